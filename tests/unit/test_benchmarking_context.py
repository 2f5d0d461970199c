"""The longest sequence that fits: which lengths are tried, how an interrupted benchmark goes on, what is refused."""

import dataclasses
import json

import pytest
import torch

from fvae_dist.benchmarking import zero3
from fvae_dist.benchmarking.context import CONTEXT, ContextRun, benchmark_context, take_up
from fvae_dist.benchmarking.floor import Ceilings
from fvae_dist.benchmarking.lengths import Bounds, doubled, walk
from fvae_dist.benchmarking.report import Axes, Report
from fvae_dist.benchmarking.step import StepRun
from fvae_dist.benchmarking.timing import OUT_OF_MEMORY, Measured
from fvae_dist.benchmarking.trial import Setting, write_inputs
from fvae_dist.benchmarking.variants import AdapterSize
from fvae_dist.benchmarking.zero3 import TrainingRun
from fvae_dist.training.recipe import RecipeError

CEILINGS = Ceilings(bytes_per_s=1e9, operations_per_s=1e9)


def tried(fits, lengths, resolution=8, bounds=None, done=()):
    """Walk with a function that says what fits (True), does not (False) or fails (text); (tried, bounds)."""
    bounds = bounds or {"a": Bounds()}

    def measure(name, tokens):
        found = fits(name, tokens)
        if found is True:
            return {"variant": name, "tokens": tokens, "ms": 1.0}
        return {"variant": name, "tokens": tokens, "note": found or OUT_OF_MEMORY}

    rows = list(walk(lengths, bounds, resolution, measure, done))
    return [(row["variant"], row["tokens"]) for row in rows], bounds


# -------------------------------------------------------------------------------------------------------------- lengths


def test_doubled():
    assert doubled(8192, 65536) == [8192, 16384, 32768, 65536]
    assert doubled(8192, 60000) == [8192, 16384, 32768]
    assert doubled(5, 5) == [5]


@pytest.mark.parametrize("limit", range(16, 257, 5))
def test_bisecting_ends_within_the_resolution(limit):
    asked, bounds = tried(lambda name, tokens: tokens <= limit, doubled(16, 256))
    found = bounds["a"]
    assert found.fits <= limit and found.fits % 8 == 0
    if limit < 256:
        assert limit < found.too_long and found.too_long - found.fits == 8
    else:
        assert found.too_long is None and str(found) == "256 (the longest tried)"
    assert len(set(asked)) == len(asked) <= 5 + 4


def test_variants_take_turns_and_end_alone():
    limits = {"a": 40, "b": 1000}
    bounds = {name: Bounds() for name in limits}
    asked, _ = tried(lambda name, tokens: tokens <= limits[name], [128, 32, 64], bounds=bounds)
    assert asked == [("a", 32), ("b", 32), ("a", 64), ("b", 64), ("b", 128), ("a", 48), ("a", 40)]
    assert (bounds["a"], bounds["b"]) == (Bounds(40, 48), Bounds(128))


def test_nothing_fits_or_less_than_the_shortest():
    asked, bounds = tried(lambda name, tokens: False, [32])
    assert asked == [("a", 32), ("a", 16), ("a", 8)] and str(bounds["a"]) == "none (8 does not)"
    asked, bounds = tried(lambda name, tokens: tokens <= 20, [32])
    assert bounds["a"] == Bounds(16, 24)


def test_another_failure_ends_a_variant():
    asked, bounds = tried(lambda name, tokens: tokens < 64 or "longer than 9 s", [32, 64, 128])
    assert asked == [("a", 32), ("a", 64)] and str(bounds["a"]) == "32 (64: longer than 9 s)"
    answers = {32: True, 64: False, 48: "exit code 1"}
    asked, bounds = tried(lambda name, tokens: answers[tokens], [32, 64])
    assert asked == [("a", 32), ("a", 64), ("a", 48)] and bounds["a"] == Bounds(32, 64, "48: exit code 1")


@pytest.mark.parametrize("num_before", range(10))
def test_interrupted_walk_goes_on(num_before):
    def fits(name, tokens):
        return tokens <= {"a": 100, "b": 72}[name]

    whole, expected = tried(fits, doubled(16, 256), bounds={"a": Bounds(), "b": Bounds()})
    bounds = {"a": Bounds(), "b": Bounds()}
    for name, tokens in whole[:num_before]:
        bounds[name].add({"tokens": tokens} | ({"ms": 1.0} if fits(name, tokens) else {"note": OUT_OF_MEMORY}))
    rest, found = tried(fits, doubled(16, 256), bounds=bounds, done=set(whole[:num_before]))
    assert (rest, found) == (whole[num_before:], expected)


# --------------------------------------------------------------------------------------------------------------- report


def context_run(names=("lora", "torch", "trl"), **changes) -> ContextRun:
    step = StepRun(
        shape="tiny",
        tokens=[],
        recompute=["full"],
        variants=list(names),
        targets=["q_proj"],
        adapter=AdapterSize(r=4, encoder_hidden=4, decoder_layers=1, decoder_hidden=8),
        attention="sdpa",
        liger=False,
        telemetry=False,
        device=torch.device("cpu"),
        dtype=torch.float32,
        rounds=1,
        warm_up=1,
    )
    training = TrainingRun(step, num_gpus=2, steps=3, compare=("trl",), sequence_parallel=2, changes=("a.b=1",))
    return ContextRun(training, list(names), [32, 64], 16, **changes)


HEAD = {
    "command": "context",
    "device": "toy",
    "dtype": "float32",
    "date": "today",
    "versions": {"torch": "1.2"},
    "config": {"r": 4, "tokens": [32, 64], "output": "here"},
    "ceilings": {"bytes_per_s": 1e9, "operations_per_s": 1e9},
}


def make_report(head=HEAD, rows=()) -> Report:
    return Report("A title", dict(head), CONTEXT, Axes("tokens_per_s", "tokens/s"), ["A note."], list(rows))


def train(training, name, tokens, recompute):
    """LoRA has room for 64 tokens, FVAE for 32, TRL's stack takes too long from 64 on."""
    assert len(training.changes) == 2 and training.changes[1].startswith("data.cache_dir=")
    if name == "trl" and tokens == 64:
        return Measured(error="longer than 9 s")
    if tokens > {"lora": 64, "torch": 32, "trl": 32}[name]:
        return Measured(error=OUT_OF_MEMORY)
    ms = {"lora": 10.0, "torch": 20.0, "trl": 40.0}[name]
    return Measured(ms=[ms, ms, ms], peak_bytes=2**30, host_peak_bytes=2**31)


def test_rows_and_summary():
    report = make_report()
    run = dataclasses.replace(context_run(attention_tflops=1e-3), lengths=[32, 64, 128])
    for row in benchmark_context(run, report, CEILINGS, train):
        report.add(row)
    rows = {(row["variant"], row["tokens"]): row for row in report.rows}
    lora, fvae, stock = (rows[name, 32] for name in ("lora", "torch", "trl"))
    assert (fvae["ratio_to_lora"], fvae["ratio_to_trl"], lora["ratio_to_trl"]) == (2.0, 0.5, 0.25)
    # Two of our GPUs share the sequence.
    assert (lora["tokens_per_s"], stock["tokens_per_s"]) == (pytest.approx(1600), pytest.approx(800))
    attention = 4.5 * 2 * 2 * 32**2 * 64
    assert lora["attention_share"] == pytest.approx(attention / 2 / 0.01 / 1e9)
    assert stock["attention_share"] == pytest.approx(attention / 0.04 / 1e9)
    assert (lora["peak_gib"], lora["host_peak_gib"]) == (1.0, 2.0)
    assert rows["trl", 64]["note"] == "longer than 9 s" and ("trl", 128) not in rows
    assert report.head["largest"]["lora"] == {"fits": 64, "too_long": 80, "failed": ""}
    assert report.head["largest"]["torch"] == {"fits": 32, "too_long": 48, "failed": ""}
    assert report.head["largest_to_lora"] == {"torch": 0.5}
    assert report.markdown().splitlines()[-1] == (
        "Longest T that fits, to 16 tokens: PEFT LoRA 64 (80 does not); FVAE torch 32 (48 does not); "
        "TRL, PEFT LoRA, ZeRO-3 32 (64: longer than 9 s); FVAE torch / PEFT LoRA 0.500."
    )


def test_interrupted_benchmark_goes_on_with_what_it_wrote(tmp_path):
    path, asked = tmp_path / "benchmark.json", []

    def counting(training, name, tokens, recompute):
        asked.append((name, tokens))
        return train(training, name, tokens, recompute)

    def start(stop_after=None, date="later"):
        head, rows = take_up(path, HEAD | {"date": date})
        report = make_report(head, rows)
        for number, row in enumerate(benchmark_context(context_run(), report, CEILINGS, counting), start=1):
            report.add(row)
            report.write(tmp_path)
            if number == stop_after:
                return report
        return report

    start(stop_after=3, date="at first")
    start(stop_after=2)
    assert [(row["variant"], row["tokens"]) for row in json.loads(path.read_text())["rows"]] == asked
    report = start()
    assert asked[:6] == [(name, tokens) for tokens in (32, 64) for name in ("lora", "torch", "trl")]
    assert asked[6:] == [("torch", 48)]
    assert report.head["date"] == "at first" and not list(tmp_path.glob("*.partial"))
    start()
    assert asked[7:] == [("trl", 64)]  # what failed, and that alone, is tried again


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"config": {"r": 8, "output": "there"}}, "rows of other settings: r 4, now 8"),
        ({"config": {"r": 4, "liger": True}}, "rows of other settings: liger None, now True"),
        ({"versions": {"torch": "1.3"}, "device": "real"}, "torch 1.2, now 1.3; device toy, now real"),
        ({"command": "step"}, "of benchmark context"),
    ],
)
def test_rows_of_other_settings_are_refused(tmp_path, changes, line):
    make_report().write(tmp_path)
    with pytest.raises(RecipeError, match=line) as caught:
        take_up(tmp_path / "benchmark.json", HEAD | changes)
    assert str(caught.value).startswith(f"{tmp_path}/benchmark.json: ")
    assert str(caught.value).endswith("; take another --output") and "\n" not in str(caught.value)


def test_other_lengths_and_folders_are_no_other_settings(tmp_path):
    make_report(rows=[{"variant": "lora", "tokens": 32, "ms": 1.0}]).write(tmp_path)
    head, rows = take_up(tmp_path / "benchmark.json", HEAD | {"config": {"r": 4, "tokens": [128], "output": "there"}})
    assert len(rows) == 1 and head["config"]["tokens"] == [128]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"command": "context", "rows": 5}'])
def test_a_file_that_is_no_report_is_refused(tmp_path, text):
    (tmp_path / "benchmark.json").write_text(text)
    with pytest.raises(RecipeError, match="no report that could be continued"):
        take_up(tmp_path / "benchmark.json", HEAD)


# ----------------------------------------------------------------------------------------------------------- the runs


def test_inputs_have_positions_and_a_sequence_for_all_that_share_it(tmp_path):
    write_inputs(Setting("tiny", 200_000, True, steps=3, sequence_parallel=4), num_gpus=8, folder=tmp_path)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["max_position_embeddings"] == 200_000
    records = [json.loads(line)["text"].split() for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert [len(words) for words in records] == 6 * [199_999]


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", OUT_OF_MEMORY),
        ("torch.AcceleratorError: CUDA error: out of memory", OUT_OF_MEMORY),
        ("ncclUnhandledCudaError: Last error: Cuda failure 2 'out of memory'", OUT_OF_MEMORY),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate", OUT_OF_MEMORY),
        ("  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 71)", OUT_OF_MEMORY),
        ("should a later one run out of memory, set training.recompute\nValueError: oops", "exit code 1"),
        ("  exitcode  : -15 (pid: 71)", "exit code 1"),
    ],
)
def test_what_counts_as_out_of_memory(monkeypatch, log, error):
    def fail(command, log_path, timeout_s):
        assert "a.b=1" in command and timeout_s == 540
        log_path.write_text(log)
        return "exit code 1"

    monkeypatch.setattr(zero3, "run_to_end", fail)
    assert zero3.measure_run(context_run().training, "lora", 32, "full").error == error
