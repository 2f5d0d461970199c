"""Data: from the recipe's sources to token ids and labels on disk, tokenised once and memory-mapped by every process.

    prepared = prepare_data(recipe.data, tokenizer, seed=42, output_dir="runs/a", is_builder=local_rank == 0)
    SFTTrainer(train_dataset=prepared.train, args=SFTConfig(..., dataset_kwargs={"skip_prepare_dataset": True}))

Nothing leaves the data in silence: records that are cut or dropped are counted, per source, in the report.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets.arrow_writer import ArrowWriter

from fvae_dist.training.data_cache import build_or_load, wait_and_load
from fvae_dist.training.labels import count_labels
from fvae_dist.training.portions import CHARACTERS, RECORDS, pack, rows_at_once
from fvae_dist.training.recipe import DataSection, RecipeError, SourceSection
from fvae_dist.training.sources import check_source, count_groups, fingerprint_source, read_records, source_name
from fvae_dist.training.tokenization import (
    Outcome,
    describe_tokenizer,
    render_example,
    resolve_chat_template,
    tokenize_batch,
)

__all__ = ["PreparedData", "prepare_data", "render_example"]

logger = logging.getLogger(__name__)

_CACHE_FORMAT = 2  # part of the key: raise it when the same inputs give other tokens
_LARGE_NUM_RECORDS = 200_000  # from here on tokenising takes minutes and deserves a progress bar

_RECORD = datasets.Features(
    {
        "number": datasets.Value("int64"),
        "prompt": datasets.Value("string"),
        "completion": datasets.Value("string"),
        "messages": datasets.Value("string"),  # JSON: the keys of messages differ from record to record
    }
)
_TEXTS = ("prompt", "completion", "messages")
_TOKENS = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "outcome": datasets.Value("int8"),
        "num_tokens": datasets.Value("int64"),
        "num_loss_tokens": datasets.Value("int64"),
        "num_cut_tokens": datasets.Value("int64"),
    }
)


@dataclass
class PreparedData:
    """Tokenised data, memory-mapped from the cache.

    `train` and `eval` have the columns input_ids and labels (list[int], -100 where there is no loss; of format
    classification the class alone); with packing also seq_lengths, the lengths of the documents in each sequence.
    `report["train"]` and `report["eval"]` hold the counts
    num_records (read), num_truncated, num_cut_tokens (taken away by it), num_split (too long) and num_pieces (what they
    were split into), num_dropped (too long), num_dropped_no_loss (cut, only the prompt would be left), then, of one
    epoch, num_examples (after weights), num_sequences (after packing), num_tokens, num_loss_tokens; and under `sources`
    the same per source, all but num_sequences. With `data.groups` also report["train"]["groups"]: records read, by
    group; of format classification `labels`: by label.
    """

    train: datasets.Dataset
    eval: datasets.Dataset | None
    report: dict[str, Any]

    @property
    def classes(self) -> list[str] | None:
        """The labels by class number; None where no class is learned."""
        labels = self.report["train"].get("labels")
        return None if labels is None else list(labels)


def prepare_data(
    data: DataSection,
    tokenizer,
    *,
    seed: int,
    output_dir: str,
    is_builder: bool = True,
    timeout_s: float | None = None,
) -> PreparedData:
    """Tokenise the data of a recipe, or load it from the cache.

    Args:
        tokenizer: a transformers tokenizer with an EOS token.
        seed: which records a fractional weight takes.
        output_dir: of the run; the cache lies beside it unless `data.cache_dir` says otherwise.
        is_builder: True in one process per node (or in one only); the others wait for it and print nothing.
        timeout_s: how long they wait; None: as long as it takes.

    Raises:
        RecipeError: a source or record that cannot be used; in the waiting processes too.
        TimeoutError: only with `timeout_s`.
    """
    cache_dir = Path(data.cache_dir) if data.cache_dir else Path(output_dir).absolute().parent / ".data_cache"
    for source in [*data.train, *data.eval]:
        check_source(source)
    _check_split(data)
    chat_template = resolve_chat_template(data, tokenizer)
    if tokenizer.eos_token_id is None and any(s.format != "messages" for s in [*data.train, *data.eval]):
        raise RecipeError("model.tokenizer: this tokenizer has no EOS token, so no end of a text could be learned")
    # Waiting processes hash the same inputs themselves: reading a file costs little, and they need no message from the
    # builder to know what to wait for.
    folder = cache_dir / _cache_key(data, tokenizer, chat_template, seed)
    load = partial(_load, data=data)
    if not is_builder:
        return wait_and_load(folder, load, timeout_s)
    build = partial(_build, data=data, tokenizer=tokenizer, chat_template=chat_template, seed=seed)
    try:
        prepared = build_or_load(folder, build, load)
    except OSError as error:
        raise RecipeError(f"data.cache_dir: {cache_dir} cannot be used: {error}") from error
    logger.info("data: %s; in %s", "; ".join(_describe(*item) for item in prepared.report.items()), folder)
    return prepared


def _check_split(data: DataSection) -> None:
    if data.overlong != "split":
        return
    for source in [*data.train, *data.eval]:
        if source.format != "text":
            what = f"format {source.format} has prompts, and a piece would begin without its own"
            raise RecipeError(f"data.overlong: split is for format text alone: {source_name(source)}: {what}")
    if data.max_length < 3:
        raise RecipeError("data.max_length: overlong: split needs pieces of at least 3 tokens")


def _cache_key(data: DataSection, tokenizer, chat_template: str | None, seed: int) -> str:
    """Hash of everything that the tokens depend on; not of paths or of how many processes tokenise."""
    sources = [*data.train, *data.eval]
    cause = {
        "format": _CACHE_FORMAT,
        "sources": [
            [fingerprint_source(source), source.model_dump(exclude={"path", "hub", "hub_config", "split"})]
            for source in sources
        ],
        "num_train_sources": len(data.train),
        "settings": data.model_dump(include={"max_length", "overlong", "packing", "completion_only_loss"}),
        "chat_template": chat_template,
        **({"groups": data.groups} if data.groups is not None else {}),
        "tokenizer": describe_tokenizer(tokenizer),
        "seed": seed if any(source.weight % 1 for source in sources) else None,
    }
    return hashlib.sha256(json.dumps(cause, sort_keys=True, default=str).encode()).hexdigest()[:32]


# ------------------------------------------------------------------------------------------------------------- building


def _build(folder: Path, data: DataSection, tokenizer, chat_template: str | None, seed: int) -> None:
    """Fill a cache folder: train/, eval/ and report.json. All work files lie in it too, none in the user's home."""
    work = folder / "work"
    work.mkdir()
    splits = {"train": data.train, "eval": data.eval}
    report = {}
    with _progress_bars(shown=False):
        # Read everything before tokenising anything: a bad record in the last file is found in the first minute.
        for split, sources in splits.items():
            for index, source in enumerate(sources):
                _store_records(source, work / f"{split}-{index}-records.arrow")
        labels = count_labels(work, [*splits]) if data.train[0].format == "classification" else {}
        known: dict[str, Any] = {"data": data, "tokenizer": tokenizer, "chat_template": chat_template}
        for split, sources in splits.items():
            if sources:
                tokenize = partial(tokenize_batch, **known, classes=labels.get(split))
                dataset, report[split] = _build_split(split, sources, work, data, tokenize, seed)
                report[split] |= {"labels": labels[split]} if labels else {}
                dataset.save_to_disk(str(folder / split))
    if data.groups is not None:
        composition: Counter[str] = Counter()
        for source in data.train:
            composition.update(count_groups(source, data.groups))
        report["train"]["groups"] = dict(composition)
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    shutil.rmtree(work)


def _store_records(source: SourceSection, path: Path) -> None:
    """Stream a source into an Arrow file, so that a corpus never lies in Python lists."""
    with ArrowWriter(path=str(path), features=_RECORD, writer_batch_size=RECORDS) as writer:
        waiting = 0
        for record in read_records(source):
            row = {**asdict(record), "messages": json.dumps(record.messages)}
            writer.write(row)
            waiting += sum(len(row[name]) for name in _TEXTS)
            if waiting >= CHARACTERS:
                writer.write_examples_on_file()
                waiting = 0
        writer.finalize()


def _build_split(split: str, sources: list[SourceSection], work: Path, data: DataSection, tokenize, seed: int):
    """Tokenise, weigh, concatenate and pack the stored records of a split; its data set and report."""
    parts, counts, lengths = [], [], []
    for index, source in enumerate(sources):
        records = datasets.Dataset.from_file(str(work / f"{split}-{index}-records.arrow"))
        tokens = _tokenize_records(records, partial(tokenize, source=source), work / f"{split}-{index}", data.num_proc)
        rows = _choose_rows(_column(tokens, "outcome"), source.weight, seed, index)
        parts.append(tokens.select_columns(["input_ids", "labels"]).select(rows))
        counts.append(_count(tokens, rows))
        lengths.append(_column(tokens, "num_tokens")[rows])
    report = {name: sum(count[name] for count in counts) for name in counts[0]}
    if not report["num_examples"]:
        raise RecipeError(
            f"data.{split}: no record is left: {report['num_dropped']} of {report['num_records']} are longer than "
            f"max_length {data.max_length}, {report['num_dropped_no_loss']} would lose all that is to be learned"
        )
    dataset = datasets.concatenate_datasets(parts)
    if data.packing:
        # No document is longer than max_length any more, so packing cuts nothing.
        dataset = pack(dataset, np.concatenate(lengths), data.max_length, work / f"{split}-packed.arrow")
    return dataset, {**report, "num_sequences": len(dataset), "sources": counts}


def _tokenize_records(records: datasets.Dataset, tokenize, stem: Path, num_proc: int) -> datasets.Dataset:
    num_proc = min(num_proc, len(records))
    lengths = sum(pc.binary_length(records.data.column(name)).to_numpy() for name in _TEXTS)
    with _progress_bars(shown=len(records) >= _LARGE_NUM_RECORDS), _forkable_tokenizer(num_proc):
        return records.map(
            tokenize,
            batched=True,
            batch_size=rows_at_once(lengths),
            num_proc=num_proc if num_proc > 1 else None,
            remove_columns=records.column_names,
            features=_TOKENS,
            cache_file_name=f"{stem}-tokens.arrow",
            load_from_cache_file=False,
            new_fingerprint=f"{stem.name}-tokens",  # else datasets pickles and hashes the tokenizer to make one
            desc="Tokenising",
        )


def _choose_rows(outcomes: np.ndarray, weight: float, seed: int, index: int) -> np.ndarray:
    """Indices of the rows that one epoch sees: all kept ones `floor(weight)` times, and a seeded part of them."""
    kept = np.flatnonzero(outcomes < Outcome.DROPPED)
    whole, part = int(weight // 1), weight % 1
    passes = [kept] * whole
    if part and len(kept):
        generator = np.random.default_rng([seed % 2**32, index])
        num_rows = max(1, round(part * len(kept)))
        passes.append(np.sort(generator.permutation(kept)[:num_rows]))
    return np.concatenate(passes) if passes else kept[:0]


def _count(tokens: datasets.Dataset, rows: np.ndarray) -> dict[str, int]:
    outcomes = _column(tokens, "outcome")
    num_of = {outcome: int((outcomes == outcome).sum()) for outcome in Outcome}
    return {
        "num_records": len(outcomes) - num_of[Outcome.PIECE],
        "num_truncated": num_of[Outcome.TRUNCATED],
        "num_cut_tokens": int(_column(tokens, "num_cut_tokens").sum()),
        "num_split": num_of[Outcome.SPLIT],
        "num_pieces": num_of[Outcome.SPLIT] + num_of[Outcome.PIECE],
        "num_dropped": num_of[Outcome.DROPPED],
        "num_dropped_no_loss": num_of[Outcome.DROPPED_NO_LOSS],
        "num_examples": len(rows),
        "num_tokens": int(_column(tokens, "num_tokens")[rows].sum()),
        "num_loss_tokens": int(_column(tokens, "num_loss_tokens")[rows].sum()),
    }


def _column(tokens: datasets.Dataset, name: str) -> np.ndarray:
    return tokens.data.column(name).to_numpy()


# -------------------------------------------------------------------------------------------------------------- loading


def _load(folder: Path, data: DataSection) -> PreparedData:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    loaded: dict[str, datasets.Dataset] = {}
    for split, sources in {"train": data.train, "eval": data.eval}.items():
        if not sources:
            continue
        counts, dataset = report[split], datasets.load_from_disk(str(folder / split))
        if len(dataset) != counts["num_sequences"]:
            raise ValueError(f"{split} holds {len(dataset)} sequences instead of {counts['num_sequences']}")
        # Names are not in the cache: the same contents may have had another path when it was made.
        for source, of_source in zip(sources, counts["sources"], strict=True):
            of_source["name"] = source_name(source)
        loaded[split] = dataset
    return PreparedData(loaded["train"], loaded.get("eval"), report)


def _describe(split: str, counts: dict[str, Any]) -> str:
    text = (  # names are added after the numbers: they may hold braces
        "{num_records} records, {num_sequences} sequences, {num_tokens} tokens ({num_loss_tokens} with loss), "
        "{num_truncated} truncated ({num_cut_tokens} tokens cut), {num_split} split into {num_pieces} pieces, "
        "{num_dropped} dropped as too long, "
        "{num_dropped_no_loss} dropped as nothing to learn was left"
    ).format(**counts)
    for kind in ("group", "label"):
        text += "".join(f", {kind} {name}: {number}" for name, number in counts.get(f"{kind}s", {}).items())
    return f"{split}: {text}"


@contextlib.contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Progress bars garble the log of a job; show them only where one has to wait."""
    were_shown = not datasets.utils.are_progress_bars_disabled()
    switch = {True: datasets.enable_progress_bars, False: datasets.disable_progress_bars}
    switch[shown]()
    try:
        yield
    finally:
        switch[were_shown]()


@contextlib.contextmanager
def _forkable_tokenizer(num_proc: int) -> Iterator[None]:
    """Keep a tokenizer's own threads off in forked processes; left to itself it does so with a warning for each."""
    undecided = num_proc > 1 and "TOKENIZERS_PARALLELISM" not in os.environ
    if undecided:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if undecided:
            del os.environ["TOKENIZERS_PARALLELISM"]
