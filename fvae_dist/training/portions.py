"""Portions: how much of a corpus is in memory at once. Bounded by size, because documents may be short or books."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from trl import pack_dataset

RECORDS = 1000
CHARACTERS = 2**20  # of text; while it is tokenised it takes some 30 times that, in objects of Python and the tokenizer
_PACKED_SEQUENCES = 32  # a portion fills at least so many, so that there is something to choose from
_PACKED_TOKENS = 2**20


def rows_at_once(lengths: np.ndarray, most: int = CHARACTERS) -> int:
    """How many rows `datasets.map` may take at once, at most RECORDS: no batch is longer than `most` and the longest
    row together, so that a single book makes no small batches of all the rest."""
    rows, most = RECORDS, most + int(lengths.max(initial=0))
    while rows > 1 and np.add.reduceat(lengths, np.arange(0, len(lengths), rows)).max(initial=0) > most:
        rows //= 2
    return rows


def portions(lengths: np.ndarray, most: int) -> Iterator[range]:
    """Consecutive rows of at most `most` tokens together; a row that is longer stands alone."""
    ends = np.cumsum(lengths, dtype=np.int64)
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield range(start, stop)
        start = stop


def pack(dataset: datasets.Dataset, lengths: np.ndarray, max_length: int, path: Path) -> datasets.Dataset:
    """Pack the rows of `dataset`, of so many tokens each and none of more than `max_length`, into the file `path`.

    In one process and portion by portion: packs do not cross the borders of a portion, whoever works on it.
    """
    features = datasets.Features({**dataset.features, "seq_lengths": datasets.List(datasets.Value("int32"))})
    most = max(_PACKED_TOKENS, _PACKED_SEQUENCES * max_length)
    with ArrowWriter(path=str(path), features=features) as writer:
        for number, rows in enumerate(portions(lengths, most)):
            settings = {"batch_size": len(rows), "keep_in_memory": True, "new_fingerprint": f"{path.stem}-{number}"}
            packed = pack_dataset(dataset.select(rows), max_length, strategy="bfd", map_kwargs=settings)
            writer.write_table(packed.data.table)
        writer.finalize()
    return datasets.Dataset.from_file(str(path))
