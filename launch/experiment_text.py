"""What the experiment on a small base reads, made of text that is at hand: for pretraining, and with labels.

    python launch/experiment_text.py text --out data/experiment                       # Python's library, /usr/share/doc
    python launch/experiment_text.py text --out data/experiment FOLDER ...            # others
    python launch/experiment_text.py base --text data/experiment/train.jsonl --out data/experiment/base
    python launch/experiment_text.py labelled --out data/experiment/exam.jsonl \\
        --source arc=ARC-Easy.train.json --source arc=ARC-Easy.test.json --source openbook=openbookqa.train.json \\
        --source openbook=openbookqa.test.json --after "question: " --before "Answer1:"

`text` writes train.jsonl and heldout.jsonl, a file of text a record, each text once; what is held out is decided by
the text itself. `base` writes a byte-level BPE tokenizer and the config.json of a Llama for
`launch/recipes/pretrain_small.yaml`, without weights. `labelled` asks where a text comes from: {text, label} records,
as many of each label, none of them in two sources; `--after` and `--before` cut away what would tell.

Exit codes: 0 done; 2 a bad argument or file.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ENDINGS = (".py", ".rst", ".md", ".txt", ".gz")
NAMES = ("README", "NEWS", "changelog", "copyright", "NEWS.Debian")
SMALLEST, LARGEST = 200, 4_000_000  # characters of a text
HELDOUT_SHARE = 0.02
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


class TextError(Exception):
    """A folder, file or argument that cannot be used; the message is one line."""


# ---------------------------------------------------------------------------------------------------------------- text


def default_folders() -> list[Path]:
    """This Python's library, its installed packages, and the system's documentation."""
    found = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")] + [Path("/usr/share/doc")]
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]


def texts_below(folder: Path) -> Iterator[str]:
    """The texts of a folder's files, in the order of their paths; what is no UTF-8, too short or too long is left out.

    Raises:
        TextError: no such folder.
    """
    if not folder.is_dir():
        raise TextError(f"{folder}: no such folder")
    for path in sorted(folder.rglob("*")):
        if path.suffix not in ENDINGS and path.name not in NAMES:
            continue
        try:
            raw = path.read_bytes() if path.suffix != ".gz" else gzip.decompress(path.read_bytes())
            text = raw.decode("utf-8")
        except (OSError, EOFError, UnicodeDecodeError):
            continue
        if SMALLEST <= len(text) <= LARGEST and "\0" not in text:
            yield text


def write_text(folders: list[Path], out: Path) -> None:
    """OUT/train.jsonl and OUT/heldout.jsonl; a text that stands in several files is taken once."""
    out.mkdir(parents=True, exist_ok=True)
    known: set[bytes] = set()
    counts = {"train": [0, 0], "heldout": [0, 0]}
    with (
        open(out / "train.jsonl", "w", encoding="utf-8") as train,
        open(out / "heldout.jsonl", "w", encoding="utf-8") as heldout,
    ):
        for folder in folders:
            for text in texts_below(folder):
                digest = hashlib.sha256(text.encode()).digest()
                if digest in known:
                    continue
                known.add(digest)
                part = "heldout" if digest[0] < 256 * HELDOUT_SHARE else "train"
                file = heldout if part == "heldout" else train
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                counts[part][0] += 1
                counts[part][1] += len(text)
    if not counts["train"][0]:
        raise TextError(f"{', '.join(map(str, folders))}: no text was found")
    for part, (num_texts, num_chars) in counts.items():
        print(f"{out / part}.jsonl: {num_texts} texts, {num_chars / 1e6:.1f} M characters")


# ---------------------------------------------------------------------------------------------------------------- base


def write_base(text: Path, out: Path, vocab_size: int, hidden_size: int, num_layers: int) -> None:
    """Tokenizer and config.json: with the defaults 60 M parameters, of which the tied embedding is 10 M."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    if hidden_size % 64:
        raise TextError(f"--hidden-size {hidden_size}: must be a multiple of 64, the width of a head")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((row["text"] for _, row in read_records(text)), trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=1024, **SPECIAL_TOKENS).save_pretrained(out)
    config = LlamaConfig(
        vocab_size=vocab_size,  # as asked for, though a small text may hold fewer pieces
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 27 // 10 // 64 * 64,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(out)
    print(f"{out}: tokenizer of {backend.get_vocab_size()} tokens, config.json")


# ------------------------------------------------------------------------------------------------------------ labelled


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .json or .jsonl file with their places."""
    from fvae_dist.evaluation.tasks import read_objects

    return read_objects(path, None)


def cut(text: str, after: str | None, before: str | None) -> str:
    """What stands between two marks; a mark that is not there cuts nothing."""
    if after and after in text:
        text = text.split(after, 1)[1]
    if before and before in text:
        text = text.split(before, 1)[0]
    return text.strip()


def write_labelled(sources: list[str], out: Path, column: str, after: str | None, before: str | None) -> None:
    """{text, label} records in an order drawn with seed 0, as many of each label."""
    from fvae_dist.evaluation.tasks import text_column

    texts: dict[str, dict[str, None]] = {}
    for source in sources:
        label, separator, path = source.partition("=")
        if not label or not separator or not path:
            raise TextError(f"--source {source}: write LABEL=FILE")
        found = (cut(text_column(row, column, where), after, before) for where, row in read_records(Path(path)))
        texts.setdefault(label, {}).update((text, None) for text in found if text)
    if len(texts) < 2:
        raise TextError("--source: give files of at least two labels")
    owners: dict[str, int] = {}
    for own in texts.values():
        for text in own:
            owners[text] = owners.get(text, 0) + 1
    kept = {label: [text for text in own if owners[text] == 1] for label, own in texts.items()}
    num_each = min(map(len, kept.values()))
    rng = random.Random(0)
    rows = [{"text": text, "label": label} for label, own in sorted(kept.items()) for text in rng.sample(own, num_each)]
    rng.shuffle(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{out}: {num_each} texts of each label: {', '.join(sorted(kept))}")


# ------------------------------------------------------------------------------------------------------------- command


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text", help="gather plain text")
    text.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="default: Python's and the system's")
    text.add_argument("--out", type=Path, required=True, metavar="DIR")
    base = commands.add_parser("base", help="tokenizer and config.json")
    base.add_argument("--text", type=Path, required=True, metavar="FILE", help="records with text")
    base.add_argument("--out", type=Path, required=True, metavar="DIR")
    base.add_argument("--vocab-size", type=int, default=16384, metavar="N", help="[%(default)s]")
    base.add_argument("--hidden-size", type=int, default=640, metavar="N", help="[%(default)s]")
    base.add_argument("--num-layers", type=int, default=10, metavar="N", help="[%(default)s]")
    labelled = commands.add_parser("labelled", help="texts labelled by where they come from")
    labelled.add_argument("--source", action="append", required=True, metavar="LABEL=FILE", help="may be repeated")
    labelled.add_argument("--column", default="instruction", metavar="NAME", help="column of the text [%(default)s]")
    labelled.add_argument("--after", metavar="TEXT", help="take what stands after its first occurrence")
    labelled.add_argument("--before", metavar="TEXT", help="and before its first occurrence in the rest")
    labelled.add_argument("--out", type=Path, required=True, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    from fvae_dist.training.recipe import RecipeError

    options = parse_arguments(arguments)
    try:
        if options.command == "text":
            write_text(options.folders or default_folders(), options.out)
        elif options.command == "base":
            write_base(options.text, options.out, options.vocab_size, options.hidden_size, options.num_layers)
        else:
            write_labelled(options.source, options.out, options.column, options.after, options.before)
    except (TextError, RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a checkout
    sys.exit(main())
