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
import io
import json
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

# Its neighbours in launch/.
from quickstart_report import QuickstartError, report
from quickstart_text import digest, group_documents, load_topics, make_pairs, sentences, split_topics

SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
ARTIFACTS = ("model", "train.jsonl", "heldout.jsonl")


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
    fingerprint = digest(json.dumps([asdict(settings), sorted(topics.items())]))
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
