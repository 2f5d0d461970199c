"""Statistics, paired measuring, adapters on one base, the reference's import, and the reports."""

import builtins
import csv
import dataclasses
import json
import sys

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fvae_dist.benchmarking import zero3
from fvae_dist.benchmarking.attached import Attached, attach, put_in_place
from fvae_dist.benchmarking.floor import Ceilings
from fvae_dist.benchmarking.reference import build_reference_layer, source_folder
from fvae_dist.benchmarking.report import Axes, Column, Report
from fvae_dist.benchmarking.samples import Spread, paired_difference, paired_ratio, spread_of
from fvae_dist.benchmarking.step import StepRun, _Bench, build_model, use_checkpointing
from fvae_dist.benchmarking.timing import Measured, measure_ceilings, measure_in_turn
from fvae_dist.benchmarking.trial import config_of
from fvae_dist.benchmarking.variants import AdapterSize

CPU = torch.device("cpu")
SMALL = AdapterSize(r=4, encoder_hidden=4, decoder_layers=1, decoder_hidden=8)
CEILINGS = Ceilings(bytes_per_s=1e9, operations_per_s=1e9)

# ----------------------------------------------------------------------------------------------------------- statistics


def test_spread():
    assert spread_of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert spread_of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    with pytest.raises(ValueError, match="no measurements"):
        spread_of([])


def test_paired_statistics_cancel_a_drift():
    base = [1.0, 2.0, 4.0]
    assert paired_ratio([3 * value for value in base], base) == 3.0
    assert paired_difference([value + 0.5 for value in base], base) == 0.5


# ------------------------------------------------------------------------------------------------------------ measuring


def test_variants_take_turns_and_warm_up_does_not_count():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    measured = measure_in_turn(calls, CPU, rounds=3, warm_up=2, repeats=2, prepare=lambda name: order.append("."))
    assert "".join(order) == 5 * ".aa.bb"
    assert [len(result.ms) for result in measured.values()] == [3, 3]
    assert all(ms >= 0 for result in measured.values() for ms in result.ms)


def test_a_variant_that_fails_leaves_the_others():
    def fail(error):
        raise error

    calls = {
        "memory": lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")),
        "other": lambda: fail(RuntimeError("no kernel\nimage")),
        "good": lambda: None,
    }
    measured = measure_in_turn(calls, CPU, rounds=2, warm_up=0)
    assert measured["memory"] == Measured(error="out of memory")
    assert measured["other"] == Measured(error="RuntimeError: no kernel")
    assert len(measured["good"].ms) == 2 and measured["good"].error == ""


def test_ceilings_are_positive():
    ceilings = measure_ceilings(CPU, torch.float32)
    assert ceilings.bytes_per_s > 1e6 and ceilings.operations_per_s > 1e6


# --------------------------------------------------------------------------------------------------------- the variants


def test_adapters_share_one_base_model():
    model = AutoModelForCausalLM.from_config(config_of("tiny")).requires_grad_(False).train()
    names, ids = [name for name, _ in model.named_parameters()], torch.arange(8)[None]
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    expected = model(ids).logits
    variants = {name: attach(model, SMALL.config(name, ["q_proj", "v_proj"])) for name in ("lora", "torch")}
    assert [name for name, _ in model.named_parameters()] == names
    assert {name: len(one.layers) for name, one in variants.items()} == {"lora": 4, "torch": 4}
    assert variants["lora"].sizes() == 2 * [(64, 64), (64, 32)]
    present = Attached()
    for one in (*variants.values(), *variants.values()):
        put_in_place(model, one, present)
        present = one
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in one.parameters}
    put_in_place(model, Attached(), present)
    assert torch.equal(model(ids).logits, expected)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_bytes_of_an_adapter_count_its_optimizer():
    model = AutoModelForCausalLM.from_config(config_of("tiny")).requires_grad_(False).train()
    one = attach(model, SMALL.config("lora", ["q_proj"]))
    parameters = 4 * sum(parameter.numel() for parameter in one.parameters)
    assert one.num_bytes() == parameters
    for parameter in one.parameters:
        parameter.grad = torch.ones_like(parameter)
    one.optimizer.step()
    steps = 4 * len(one.parameters)
    assert one.num_bytes() == 4 * parameters + steps


def test_unknown_adapter():
    with pytest.raises(ValueError, match="base is no adapter that PEFT attaches"):
        AdapterSize().config("base", ["q_proj"])


STUB_LAYER = """
import torch
from peft.other import NUMBER

class FVAEPEFTLoraLayerWrapped(torch.nn.Module):
    def __init__(self, base, name, config, r, lora_alpha):
        super().__init__()
        self.base_layer, self.config, self.number = base, config, NUMBER
        self.lora_B = torch.nn.Parameter(torch.ones(base.out_features, dtype=base.weight.dtype))
        self.fvae_peft_current_elbo = 0

    def get_base_layer(self):
        return self.base_layer

    def forward(self, x):
        assert not torch.is_tensor(self.fvae_peft_current_elbo) or torch._C._current_graph_task_id() != -1
        self.fvae_peft_current_elbo = self.lora_B.square().sum()
        return self.base_layer(x) + self.lora_B.to(x.dtype)
"""


def write_clone(folder, layer: str = STUB_LAYER) -> str:
    source = folder / "peft" / "src" / "peft"
    inner = source / "tuners" / "fvae_peft"
    inner.mkdir(parents=True)
    (source / "__init__.py").write_text("class FVAEPEFTConfig(dict): pass\n")
    (source / "other.py").write_text("NUMBER = 41\n")
    for package in (source / "tuners", inner):
        (package / "__init__.py").write_text("")
    (inner / "fvae_peft_mlp_layer.py").write_text(layer)
    return str(folder)


def test_reference_is_imported_beside_the_installed_peft(tmp_path):
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "peft"}
    path = list(sys.path)
    linear = nn.Linear(3, 2, bias=False, dtype=torch.bfloat16)
    layer = build_reference_layer(write_clone(tmp_path), linear, SMALL)
    assert (layer.number, layer.config["latent_dim"], layer.config["dec_hidden_layer"]) == (41, 4, 8)
    assert layer.lora_B.dtype == torch.float32 and layer.base_layer.weight.dtype == torch.bfloat16
    after = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "peft"}
    assert after == before and sys.path == path and sys.modules["peft"] is peft


def test_reference_that_cannot_be_imported(tmp_path):
    with pytest.raises(ValueError, match="is no clone of idiap/FVAE-LoRA"):
        source_folder(str(tmp_path))
    clone = write_clone(tmp_path, "import a_package_that_is_not_there\n")
    with pytest.raises(ValueError, match="cannot be imported: No module named 'a_package_that_is_not_there'"):
        build_reference_layer(clone, nn.Linear(3, 2), SMALL)
    assert sys.modules["peft"] is peft


@pytest.mark.parametrize("recompute", ["full", "none"])
def test_steps_with_the_reference_take_its_loss_once_a_step(tmp_path, recompute):
    changes = {"variants": ["lora", "reference"], "recompute": [recompute], "telemetry": False, "rounds": 2}
    run = dataclasses.replace(training_run().step, **changes, reference=write_clone(tmp_path))
    bench = _Bench(run, build_model(run))
    use_checkpointing(bench.model, recompute == "full")
    before = [parameter.detach().clone() for parameter in bench.attached["reference"].parameters]
    measured = bench.measure(8)
    assert [len(measured[name].ms) for name in ("lora", "reference")] == [2, 2], measured
    after = bench.attached["reference"].parameters
    assert len(after) == 4 and not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))


# -------------------------------------------------------------------------------------------------------- training runs


def training_run(**changes) -> zero3.TrainingRun:
    step = StepRun(
        shape="tiny",
        tokens=[32],
        recompute=["full", "none"],
        variants=["lora", "torch", "fused"],
        targets=["q_proj", "v_proj"],
        adapter=SMALL,
        attention="sdpa",
        liger=False,
        telemetry=True,
        device=CPU,
        dtype=torch.float32,
        rounds=1,
        warm_up=0,
    )
    return zero3.TrainingRun(step, **{"num_gpus": 2, "steps": 6, "compare": ("trl", "trl_liger"), **changes})


def test_rows_of_training_runs(monkeypatch):
    def fake(run, name, tokens, recompute):
        ms = {"lora": [10.0, 20.0, 30.0], "torch": [40.0], "torch +terms": [50.0], "trl_liger": [80.0], "trl": [90.0]}
        return Measured(ms=ms[name], peak_bytes=2**30) if name in ms else Measured(error="not there")

    monkeypatch.setattr(zero3, "measure_run", fake)
    rows = [dict(row) for row in zero3.benchmark_training(training_run(), CEILINGS)]  # as they are when they come
    names = [(row["recompute"], row["variant"]) for row in rows]
    own = ["lora", "torch", "torch +terms", "fused", "fused +terms"]
    assert names == [*(("full", name) for name in ("trl", "trl_liger", *own)), *(("none", name) for name in own)]
    of = {row["variant"]: row for row in rows[:7]}
    assert (of["torch"]["ratio_to_lora"], of["torch"]["ratio_to_trl"]) == (2.0, 0.5)
    assert rows[7]["recompute"] == "none" and rows[7]["ratio_to_trl"] == 0.25
    assert of["torch +terms"]["ratio_to_silent"] == 1.25 and "ratio_to_silent" not in of["torch"]
    assert of["lora"]["tokens_per_s"] == pytest.approx(32 / 0.02) and of["lora"]["peak_gib"] == 1.0
    # N = 151,552, attention 2 layers x 2 T^2 x 64: model operations over time and ceiling.
    assert of["lora"]["mfu"] == pytest.approx((4 * 151552 * 32 + 3 * 2 * 2 * 32**2 * 64) / 0.02 / 1e9)
    assert of["fused"]["note"] == "not there" and "ms" not in of["fused"]


def test_training_rows_come_as_they_are_measured(monkeypatch):
    measured: list[str] = []
    monkeypatch.setattr(zero3, "measure_run", lambda run, name, *_: measured.append(name) or Measured(ms=[10.0]))
    for number, row in enumerate(zero3.benchmark_training(training_run(), CEILINGS), 1):
        assert len(measured) == number and measured[-1] == row["variant"]


def test_a_training_run_that_fails_says_how(monkeypatch, capfd):
    def fail(command, log_path, timeout_s):
        assert ("-m" in command[5:]) == (command[-2] == "fvae_dist.benchmarking.stock")
        log_path.write_text("torch.OutOfMemoryError: CUDA out of memory" if "stock" in command[-2] else "oops")
        return "exit code 1"

    monkeypatch.setattr(zero3, "run_to_end", fail)
    assert zero3.measure_run(training_run(), "lora", 32, "full").error == "exit code 1"
    assert zero3.measure_run(training_run(), "trl", 32, "full").error == "out of memory"
    assert "oops" in capfd.readouterr().err


@pytest.mark.distributed
def test_stock_stack_trains(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    measured = zero3.measure_run(training_run(num_gpus=1), "trl", 32, "full")
    assert measured.error == "" and len(measured.ms) == 2
    assert all(ms > 0 for ms in measured.ms) and measured.peak_bytes > 2**20


# --------------------------------------------------------------------------------------------------------------- report


def make_report() -> Report:
    head = {
        "device": "toy",
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "1.2"},
        "ceilings": {"bytes_per_s": 2e9, "operations_per_s": 3e12},
    }
    columns = [Column("tokens", "T"), Column("label", "variant"), Column("ms", "ms", ",.1f"), Column("gone", "gone")]
    report = Report("A title", head, [*columns, Column("note", "note")], Axes("ms", "ms"), ["A note."])
    report.rows.append({"tokens": 8, "label": "a", "ms": 1234.56, "ms_low": 1.0, "ms_high": 2000.0})
    report.rows.append({"tokens": 8, "label": "b", "note": "x | y"})
    return report


def test_markdown():
    lines = make_report().markdown().splitlines()
    assert lines[0] == "## A title" and lines[2].startswith("toy, 2026-01-02T03:04:05+00:00; torch 1.2.")
    assert lines[3] == "Measured here: copy 2.0 GB/s, product 3.00 TFLOP/s."
    table = ["| T | variant | ms | note |", "|---|---|---|---|", "| 8 | a | 1,234.6 |  |", "| 8 | b |  | x \\| y |"]
    assert lines[5:] == [*table, "", "A note."]


def test_files(tmp_path):
    report = make_report()
    report.write(tmp_path / "out")
    report.plot(tmp_path / "out" / "benchmark.png")
    assert json.loads((tmp_path / "out" / "benchmark.json").read_text()) == {**report.head, "rows": report.rows}
    with open(tmp_path / "out" / "benchmark.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["ms"] == "1234.56" and rows[1]["note"] == "x | y" and rows[1]["ms"] == ""
    assert rows[0]["device"] == "toy" and rows[0]["torch"] == "1.2"
    assert (tmp_path / "out" / "benchmark.md").read_text() == report.markdown() + "\n"
    assert (tmp_path / "out" / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_no_plot_without_matplotlib(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    make_report().plot(tmp_path / "a.png")
    assert capsys.readouterr().err == "no plot: matplotlib is not installed (`pip install matplotlib`)\n"
    assert not (tmp_path / "a.png").exists()
