"""A large corpus is read, tokenised, packed and cached portion by portion: what that takes does not grow with it."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fvae_dist.training.portions import RECORDS, portions, rows_at_once

ROOT = Path(__file__).parents[2]
NUM_DOCUMENTS, NUM_LINES, LINE = 80, 400, 1000  # of each kind of file 32 MB in documents of 400 kB


# ------------------------------------------------------------------------------------------------------------- portions


def test_rows_at_once_follow_their_length():
    assert rows_at_once(np.full(5000, 10), most=10_000) == RECORDS
    assert rows_at_once(np.full(5000, 100), most=10_000) == 62  # 1000 halved until at most 100
    assert rows_at_once(np.array([], dtype=np.int64)) == RECORDS
    one_book = np.full(5000, 10)
    one_book[17] = 1_000_000
    assert rows_at_once(one_book, most=10_000) == RECORDS
    half_books = np.concatenate([np.full(5000, 10), np.full(5000, 9000)])
    assert rows_at_once(half_books, most=10_000) == 1  # 1000 halved until at most two


@pytest.mark.parametrize("lengths", [[3, 3, 3, 3], [20, 1, 1, 20], [5, 5, 6, 1], [10], []])
def test_portions_are_consecutive_and_bounded(lengths):
    found = list(portions(np.array(lengths, dtype=np.int64), 10))
    assert [row for rows in found for row in rows] == list(range(len(lengths)))
    assert all(len(rows) == 1 or sum(lengths[row] for row in rows) <= 10 for rows in found)
    assert all(sum(lengths[rows.start : rows.stop + 1]) > 10 for rows in found[:-1])  # no smaller than they may be


# ------------------------------------------------------------------------------------------------------ a large corpus


def own_memory_mb() -> float:
    """Of this process, without the files that are mapped (the cache's, which the system drops when it likes)."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def prepare(folder: Path) -> None:
    """Prepare folder/small.* and then folder/large.*; prints the growth in MB while the second was, and its report."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from fvae_dist.training.data import prepare_data
    from fvae_dist.training.recipe import DataSection

    core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<line>": 2}, unk_token="<line>"))
    core.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    size, starts, peaks, is_over = "none", {}, {}, threading.Event()

    def watch() -> None:
        while not is_over.wait(0.002):
            while_at = size
            peaks[while_at] = max(peaks.get(while_at, 0.0), own_memory_mb())

    threading.Thread(target=watch, daemon=True).start()
    for size in ("small", "large"):
        starts[size] = own_memory_mb()
        train = [{"path": str(folder / f"{size}.{suffix}"), "format": "text"} for suffix in ("jsonl", "txt")]
        data = {"train": train, "max_length": 64, "overlong": "split", "packing": True}
        prepared = prepare_data(
            DataSection.model_validate(data), tokenizer, seed=1, output_dir=str(folder / "runs" / "run")
        )
    is_over.set()
    print(json.dumps([peaks[size] - starts[size], prepared.report["train"]]))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_large_corpus_is_never_in_memory(tmp_path):
    document = "\n".join(["x" * (LINE - 1)] * NUM_LINES)
    texts = {"jsonl": json.dumps({"text": document}) + "\n", "txt": document + "\n\n"}
    # What the first takes stays with the process: imports, and memory for as much as is worked on at once.
    for size, number in (("small", 10), ("large", NUM_DOCUMENTS)):
        for suffix, text in texts.items():
            with open(tmp_path / f"{size}.{suffix}", "w") as file:
                file.writelines(text for _ in range(number))
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1"},
        text=True,
        capture_output=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    growth_mb, report = json.loads(result.stdout)
    size_mb = sum((tmp_path / f"large.{suffix}").stat().st_size for suffix in texts) / 1e6
    print(f"{size_mb:.0f} MB: {growth_mb:.0f} MB, {time.perf_counter() - started:.1f} s")  # for pytest -s
    assert size_mb > 63 and growth_mb < size_mb / 2
    num_documents = 2 * NUM_DOCUMENTS
    assert (report["num_records"], report["num_tokens"]) == (num_documents, num_documents * (NUM_LINES + 1))
    assert (report["num_split"], report["num_pieces"]) == (num_documents, num_documents * 7)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
