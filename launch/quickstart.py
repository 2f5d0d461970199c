"""Everything the quickstart needs and no download: a text, a tokenizer, a small base model, a task, and the report.

    python launch/quickstart.py prepare --dir .quickstart
    python launch/quickstart.py report --dir .quickstart --output-dir runs/quickstart

`prepare` takes the English text that every Python installation carries (`pydoc_data.topics`, the language reference
behind `help("while")`) and cuts it, by topic, into three parts that share no paragraph:

    base      tokenizer and base model are trained on it (next token, plain torch, fp32)
    train     sentences for the fine-tuning task
    heldout   sentences for measuring it; neither the tokenizer nor any model is trained on them

The task is new to the base model: three function words of a sentence are blanked, name them in order.

    Text: The "while" statement _ used for repeated execution _ long as _ expression is true.
    Missing words: is, as, an

What a small model learns of it in two minutes is the form of the answer and how often each word is one, hardly yet
which word stands where: the held-out loss falls by about three quarters, of which the form is the larger share.

`report` draws the losses of a finished run and says whether the adapter beat the base model on held-out sentences.
Exit codes: 0 done; 1 the held-out loss did not fall; 2 something is missing (one line says what).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import random
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
PART_SHARES = {"base": 0.60, "train": 0.30, "heldout": 0.10}
FUNCTION_WORDS = {
    *("a", "an", "and", "are", "as", "at", "be", "by", "can", "for", "from", "has", "if", "in", "is", "it", "its"),
    *("not", "of", "on", "or", "that", "the", "this", "to", "was", "when", "which", "with"),
}
NUM_GAPS = 3
ARTIFACTS = ("model", "train.jsonl", "heldout.jsonl")


class QuickstartError(Exception):
    """Something is missing or unreadable; the message is one line for the user. Exits with 2."""


@dataclass(frozen=True)
class Settings:
    """What `prepare` makes. Any change, or another text, makes a new fingerprint and so a new preparation."""

    version: int = 1  # raise it when the code below changes what is made
    seed: int = 42
    vocab_size: int = 1536
    hidden_size: int = 128
    num_layers: int = 4
    num_steps: int = 320
    batch_size: int = 16
    sequence_length: int = 128
    learning_rate: float = 3e-3
    num_train_pairs: int = 2400
    num_heldout_pairs: int = 160


FAST = Settings(
    vocab_size=512,
    hidden_size=96,
    num_layers=2,
    num_steps=100,
    batch_size=8,
    sequence_length=96,
    num_train_pairs=400,
    num_heldout_pairs=40,
)


# ------------------------------------------------------------------------------------------------------------ text


def load_topics() -> dict[str, str]:
    """The language reference of this Python, topic name -> text. Its wording differs a little between versions."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        message = "this Python has no pydoc_data.topics, the quickstart's text; use a full installation"
        raise QuickstartError(f"{sys.executable}: {message}") from None
    return dict(topics)


def split_topics(topics: dict[str, str]) -> dict[str, list[str]]:
    """Cut the text by topic into the parts of PART_SHARES; return each part's paragraphs.

    Long topics quote short ones whole ("compound" contains "while"), so a paragraph belongs to the smallest topic it
    stands in and is dropped from the others: parts share no paragraph. Topics are dealt in an order that depends on
    their names only, each to the part that is then least full.
    """
    owner: dict[str, tuple[str, str]] = {}  # paragraph without its line breaks -> (topic, paragraph as printed)
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            key = " ".join(paragraph.split())
            if key:
                owner.setdefault(key, (name, paragraph.strip("\n")))
    paragraphs: dict[str, list[str]] = {name: [] for name in topics}
    for name, paragraph in owner.values():
        paragraphs[name].append(paragraph)

    parts: dict[str, list[str]] = {part: [] for part in PART_SHARES}
    num_chars = dict.fromkeys(PART_SHARES, 0)
    for name in sorted(topics, key=_digest):
        size = sum(map(len, paragraphs[name]))
        part = min(PART_SHARES, key=lambda part: (num_chars[part] + size) / PART_SHARES[part])
        parts[part] += paragraphs[name]
        num_chars[part] += size
    return parts


def sentences(paragraphs: list[str]) -> list[str]:
    """The prose sentences of `paragraphs`, each once: tables, grammar, code and headings are left out."""
    found: dict[str, None] = {}
    for paragraph in paragraphs:
        if re.search(r"::=|>>>|^\s*[+|]|^\s*[*=\-~]{4,}|^ {6,}", paragraph, re.MULTILINE):
            continue
        for sentence in re.split(r'(?<=[.!?]) +(?=[A-Z"(*])', " ".join(paragraph.split())):
            if re.match(r'["A-Z]', sentence) and sentence.endswith(".") and 60 <= len(sentence) <= 170:
                found[sentence] = None
    return list(found)


def make_pairs(texts: list[str], num_pairs: int, seed: int) -> list[dict[str, str]]:
    """Blank NUM_GAPS function words per sentence; return prompt/completion records.

    Sentences are gone through again, with other gaps, until there are `num_pairs` records or eight rounds are over.
    """
    records: dict[str, str] = {}
    for round_number in range(8):
        for text in texts:
            words = text.split(" ")
            candidates = [index for index, word in enumerate(words) if word in FUNCTION_WORDS]
            if len(candidates) < NUM_GAPS or len(records) == num_pairs:
                continue
            # Seeded by the sentence: a record does not depend on the records before it.
            gaps = sorted(random.Random(f"{seed} {round_number} {text}").sample(candidates, NUM_GAPS))
            blanked = " ".join("_" if index in gaps else word for index, word in enumerate(words))
            records[f"Text: {blanked}\nMissing words:"] = " " + ", ".join(words[index] for index in gaps)
    return [{"prompt": prompt, "completion": completion} for prompt, completion in records.items()]


def group_documents(paragraphs: list[str], num_chars: int = 500) -> list[str]:
    """Join neighbouring paragraphs to documents of at least `num_chars` (but for the last one)."""
    documents = [""]
    for paragraph in paragraphs:
        if len(documents[-1]) >= num_chars:
            documents.append("")
        documents[-1] += ("\n\n" if documents[-1] else "") + paragraph
    return documents


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------------------------------- tokenizer, base model


def train_tokenizer(text: str, settings: Settings):
    """Train a SentencePiece unigram vocabulary on `text`; return it as a Hugging Face fast tokenizer.

    No normalisation, no dummy prefix, whitespace pieces and byte fallback: decode(encode(text)) == text.
    """
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=buffer,
        model_type="unigram",
        vocab_size=settings.vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        user_defined_symbols=["\n"],  # training lines hold none, so it would otherwise be the byte <0x0A>
        pad_id=3,
        num_threads=1,  # sums in one order: the same text gives the same vocabulary
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
    vocab = [(pieces.id_to_piece(index), pieces.get_score(index)) for index in range(pieces.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=pieces.unk_id(), byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", pieces.bos_id())]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS
    )


def build_base(tokenizer, settings: Settings):
    """A Llama of about a million parameters with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.hidden_size * 3,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # No pad id: with one, loading zeroes that row of an embedding that ZeRO-3 has already sharded away.
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def pretrain(model, ids: list[int], settings: Settings) -> tuple[float, float]:
    """Train `model` on random windows of `ids`; return the loss (nats per token) of the first and the last steps."""
    import torch

    torch.set_num_threads(min(4, torch.get_num_threads()))  # more only wait for each other at this size
    ids_N = torch.tensor(ids)
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.learning_rate, total_steps=settings.num_steps, pct_start=0.1
    )
    window = torch.arange(settings.sequence_length)
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    for step in range(1, settings.num_steps + 1):
        starts = torch.randint(len(ids) - settings.sequence_length, (settings.batch_size, 1), generator=generator)
        batch = ids_N[starts + window]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % max(1, settings.num_steps // 6) == 0:
            print(f"  step {step}/{settings.num_steps}: loss {losses[-1]:.2f}, {time.monotonic() - started:.0f} s")
    tail = losses[-20:]
    return losses[0], sum(tail) / len(tail)


# --------------------------------------------------------------------------------------------------------- prepare


def prepare(directory: Path, settings: Settings) -> None:
    """Fill `directory` with model/, train.jsonl, heldout.jsonl and, last, manifest.json; reuse a finished one.

    The work is done in `directory`/.partial and renamed into place, the manifest last: a preparation that was
    stopped at any point has no manifest and is done again.
    """
    topics = load_topics()
    fingerprint = _digest(json.dumps([asdict(settings), sorted(topics.items())]))
    if _is_prepared(directory, fingerprint):
        print(f"reusing {directory} (text and settings unchanged)")
        return
    started = time.monotonic()
    partial = directory / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    parts = split_topics(topics)
    counts = write_pairs(partial, parts, settings)
    losses = write_model(partial / "model", group_documents(parts["base"]), settings)
    manifest = {"fingerprint": fingerprint, "settings": asdict(settings), **counts, **losses}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    (directory / "manifest.json").unlink(missing_ok=True)
    for name in ARTIFACTS:
        target = directory / name
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        (partial / name).rename(target)
    (partial / "manifest.json").rename(directory / "manifest.json")
    partial.rmdir()
    print(f"prepared {directory} in {time.monotonic() - started:.0f} s")


def write_pairs(directory: Path, parts: dict[str, list[str]], settings: Settings) -> dict[str, int]:
    """Write train.jsonl and heldout.jsonl; return how many records each has."""
    counts = {}
    texts = {part: sentences(parts[part]) for part in ("train", "heldout")}
    # A sentence may stand in two paragraphs; one that any training part knows is no held-out sentence.
    known = " ".join(" ".join(paragraph.split()) for part in ("base", "train") for paragraph in parts[part])
    texts["heldout"] = [text for text in texts["heldout"] if text not in known]
    for part, num_pairs in (("train", settings.num_train_pairs), ("heldout", settings.num_heldout_pairs)):
        records = make_pairs(texts[part], num_pairs, settings.seed)
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (directory / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts[f"num_{part}_pairs"] = len(records)
    print(f"task: {counts['num_train_pairs']} training and {counts['num_heldout_pairs']} held-out fill-the-gap pairs")
    return counts


def write_model(directory: Path, documents: list[str], settings: Settings) -> dict[str, float]:
    """Train tokenizer and base model on `documents` and save both in `directory`; return the first and last loss."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of saving one small file
    tokenizer = train_tokenizer("\n\n".join(documents), settings)
    # Many short documents, so that the base knows where a text starts and, for the task, that it can end.
    ids = [
        token
        for document_ids in tokenizer(documents, verbose=False)["input_ids"]  # opens with <s>
        for token in (*document_ids, tokenizer.eos_token_id)
    ]
    model = build_base(tokenizer, settings)
    size = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters"
    print(f"base model: {size}, {len(ids)} tokens of Python's language reference, {settings.num_steps} steps")
    first, last = pretrain(model, ids, settings)
    print(f"base model: loss {first:.2f} -> {last:.2f} nats per token (uniform guess: {math.log(len(tokenizer)):.2f})")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return {"base_loss_first": first, "base_loss_last": last}


def _is_prepared(directory: Path, fingerprint: str) -> bool:
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return manifest.get("fingerprint") == fingerprint and all((directory / name).exists() for name in ARTIFACTS)


# ---------------------------------------------------------------------------------------------------------- report


def report(directory: Path, output_dir: Path) -> bool:
    """Draw and print how the run in `output_dir` went; return whether the held-out loss fell."""
    if not (directory / "manifest.json").is_file():
        raise QuickstartError(f"{directory}/manifest.json: not there; run: python launch/quickstart.py prepare")
    metrics = read_metrics(output_dir / "metrics.json")
    adapter = output_dir / "adapter"
    if not adapter.is_dir():
        raise QuickstartError(f"{adapter}: no adapter there; the training run did not finish")
    plot = draw_losses(metrics, output_dir / "loss.png")
    base, adapted = metrics["eval_start"]["loss"], metrics["eval_end"]["loss"]
    print(f"held-out loss   base {base:.3f} -> adapted {adapted:.3f} nats per token ({adapted / base - 1:+.1%})")
    if not adapted < base:  # also true for NaN
        print(f"the held-out loss did not fall: look at {plot}", file=sys.stderr)
        return False
    print(f"adapter         {adapter}")
    print(f"plot            {plot}")
    print(f"curves          tensorboard --logdir {output_dir / 'tensorboard'}")
    print("next, with a real model: edit launch/recipes/llama3_8b_commonsense.yaml (model, data), then check it with")
    print("                deepspeed launch/train.py --config launch/recipes/llama3_8b_commonsense.yaml --dry-run")
    return True


def read_metrics(path: Path) -> dict:
    """Read the training run's metrics.json.

    Raises:
        QuickstartError: no such file, not JSON, or without the two held-out losses and a history.
    """
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        float(metrics["eval_start"]["loss"]), float(metrics["eval_end"]["loss"])
        complete = bool(metrics["history"])
    except OSError:
        raise QuickstartError(f"{path}: not there; the training run did not finish") from None
    except (KeyError, TypeError, ValueError) as error:
        raise QuickstartError(f"{path}: not a finished run's metrics ({type(error).__name__}: {error})") from None
    if not complete:
        raise QuickstartError(f"{path}: history is empty; the training run logged nothing")
    return metrics


def draw_losses(metrics: dict, path: Path) -> Path:
    """Draw task loss and held-out levels (left), negative ELBO and its terms (right) over steps; return `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (task_axis, elbo_axis) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    history = metrics["history"]
    _draw_series(task_axis, history, "loss/task", "training batches", color="tab:blue")
    for key, label, color in (("eval_start", "base", "tab:red"), ("eval_end", "adapted", "tab:green")):
        level = metrics[key]["loss"]
        task_axis.axhline(level, linestyle="--", color=color, label=f"held-out, {label}: {level:.2f}")
    task_axis.set(title="Task loss", xlabel="optimizer step", ylabel="cross-entropy, nats per completion token")
    task_axis.set_ylim(bottom=0)

    _draw_series(elbo_axis, history, "loss/neg_elbo", "negative ELBO", color="black", linewidth=2)
    for key, label in (
        ("elbo/nll", "reconstruction NLL (nats)"),
        ("elbo/kl_z1", "KL of z1 (nats)"),
        ("elbo/z1_sq", "mean z1²"),
        ("elbo/z2_sq", "mean (z2 − prior mean)²"),
    ):
        _draw_series(elbo_axis, history, key, label)
    # Linear around zero, logarithmic beyond: the reconstruction is hundreds of nats and may be negative.
    elbo_axis.set_yscale("symlog", linthresh=1.0)
    elbo_axis.set(title="Side loss and its terms", xlabel="optimizer step", ylabel="per token, mean over layers")
    for axis in (task_axis, elbo_axis):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)  # below the panel
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _draw_series(axis, history: list[dict], key: str, label: str, **style) -> None:
    """Plot the entries of `history` that have `key`; a key that no entry has (another adapter type) is left out."""
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, **style)


# --------------------------------------------------------------------------------------------------------- command


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare_parser = commands.add_parser("prepare", help="make base model, tokenizer and task (about a minute)")
    prepare_parser.add_argument("--fast", action="store_true", help="far smaller and shorter: for tests")
    report_parser = commands.add_parser("report", help="draw and print a finished run")
    report_parser.add_argument("--output-dir", type=Path, required=True, help="the run's training.output_dir")
    for subparser in (prepare_parser, report_parser):
        subparser.add_argument("--dir", type=Path, default=Path(".quickstart"), help="prepared folder [%(default)s]")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    options = parse_arguments(arguments)
    try:
        if options.command == "prepare":
            prepare(options.dir, FAST if options.fast else Settings())
            return 0
        return 0 if report(options.dir, options.output_dir) else 1
    except QuickstartError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
