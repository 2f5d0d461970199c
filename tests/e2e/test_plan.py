"""launch/plan.py through the command: the report, the files it writes, what it refuses; --dry-run says the same."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fvae_dist import plan_command, plan_measure
from fvae_dist.benchmarking.trial import SHAPES
from fvae_dist.cli import main, train_command
from fvae_dist.planning.report import LABELS
from fvae_dist.training.recipe_file import load_recipe
from tests.planned import SIZES
from tests.recipes import make_model_folder, recipe_values, write_recipe, write_records

ROOT = Path(__file__).parents[2]
CONFIGS = ["zero3", "zero2", "zero3_hpz", "zero3_cpu_offload", "zero3_nvme_offload"]
H100 = ("--gpu", "h100-80")
LENGTH = 64  # of every record: the data's mean is its longest, and a layer is traced for one length
LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}
SECTIONS = [
    "Planned",
    "Choices",
    "Recommended",
    "Memory of one GPU",
    "Traffic of one optimizer step, per GPU",
    "Nodes",
    "Constants",
]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """recipe(configs, sizes, **sections): a recipe of one of the shipped configurations, with 20 records."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def recipe(configs: list[str], sizes: dict | None = None, **sections) -> str:
        Path("ds_configs").mkdir()
        for name in configs:
            shutil.copy(ROOT / "ds_configs" / f"{name}.json", "ds_configs")
        write_records(tmp_path / "data.jsonl", 20 * [{"text": (LENGTH - 2) * "a"}])
        model = make_model_folder(tmp_path / "model", **(sizes or {}))
        training = {"deepspeed": f"ds_configs/{configs[0]}.json", **sections.pop("training", {})}
        base = {"dtype": "bfloat16", **sections.pop("model", {})}
        source = {"path": str(tmp_path / "data.jsonl"), "format": "text"}
        data = {"train": [source], "max_length": LENGTH, **sections.pop("data", {})}
        values = recipe_values(tmp_path, model, model=base, training=training, data=data, **sections)
        values["adapter"] = LORA  # traced in a tenth of the time
        return str(write_recipe(tmp_path, values))

    return recipe


def plan(capsys, *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments: str) -> str:
    """The one line that the command prints."""
    capsys.readouterr()
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("error: ")
    return captured.err.removeprefix("error: ").rstrip("\n")


# ----------------------------------------------------------------------------------------------------------- the report


def test_report_and_its_numbers(recipe, capsys):
    text = plan(capsys, "--config", recipe(CONFIGS), "--nodes", "2", *H100, "--json", "plan.json")
    found = re.findall(r"^== (.*?)(?:: .*)? ==$", text, re.MULTILINE)
    assert found == SECTIONS
    numbers = json.loads(Path("plan.json").read_text())
    assert numbers["cluster"] == {"gpu": "h100-80", "nodes": 2, "gpus_per_node": 8, "memory_gib": 79.1}
    # Five configurations, three kinds of recomputation; two may keep weights.
    assert len(numbers["choices"]) == 5 * 3 + 2 * 3 and not numbers["refused"]
    for row in numbers["choices"]:
        assert set(row["memory_gib"]) == set(LABELS)
        assert row["fits"] and row["total_gib"] == pytest.approx(sum(row["memory_gib"].values()))
        assert row["step_s"] >= max(row["compute_s"], row["host_s"], row["traffic"]["seconds"])
        assert row["tokens_per_s_per_gpu"] > 0 and row["bound"]
        assert f"{row['needed_gib']:.1f}" in text
    best = numbers["recommended"]
    resident = ", resident" if best["resident"] else ""
    assert f"== Recommended: {best['deepspeed']}{resident}, recompute {best['recompute']} ==" in text
    assert max(sum(parts.values()) for parts in best["moments_gib"].values()) == pytest.approx(best["total_gib"])
    assert all(
        re.search(rf"^{re.escape(label)} +[\d.]+ +[\d.]+ +[\d.]+$", text, re.MULTILINE) for label in LABELS.values()
    )
    assert best["step_s"] <= 1.03 * min(row["step_s"] for row in numbers["choices"])
    assert list(numbers["traffic_variants"])[1:] == ["ZeRO-3", "ZeRO-3, hpZ", "ZeRO-3, quantised weights"]
    assert [point["nodes"] for point in numbers["curve"]][:3] == [1, 2, 4]
    # 20 records of one sequence each, 16 GPUs: two steps.
    assert best["epoch"]["steps"] == 2
    assert re.search(r"epoch +2 steps, [\d,]+ tokens: [\d.]+ h, [\d.]+ GPU-hours", text)


def test_epoch_without_data(recipe, capsys):
    path = recipe(["zero3"], data={"train": [{"path": "nowhere.jsonl"}]})
    text = plan(capsys, "--config", path, *H100)
    assert "note       the training data is not here" in text
    assert "epoch      unknown: the data is not here; give --epoch-tokens" in text
    text = plan(capsys, "--config", path, *H100, "--epoch-tokens", "5120")
    assert "epoch      10 steps, 5,120 tokens" in text  # 8 GPUs x 64 tokens
    assert "note" not in text


def test_405b_on_1024_gpus(recipe, capsys, monkeypatch):
    recipe(["zero3"], SIZES["405b"] | {"max_position_embeddings": 8192})
    model = Path("model").absolute()
    monkeypatch.chdir(ROOT)
    path = "launch/recipes/llama3_70b_multinode.yaml"
    changes = ["--set", f"model.name_or_path={model}", "--set", f"adapter={json.dumps(LORA)}"]
    text = plan(capsys, "--config", path, *changes, "--nodes", "128", *H100)
    assert re.search(r"405,\d{3},\d{3},\d{3} parameters, 126 layers", text)
    assert "= 1024 GPUs" in text
    curve = text.partition("== Nodes ==\n")[2]
    assert re.search(r"^1 +8 +[\d.]+ too many ", curve, re.MULTILINE)
    assert re.search(r"^128 +1024 +[\d.]+ +[\d,]+ +\d+ %", curve, re.MULTILINE)
    assert re.search(r"^(knee: [\d,]+ nodes|no knee|past the knee)", curve, re.MULTILINE)


# ---------------------------------------------------------------------------------------------------------------- files


def test_written_overrides_are_taken_by_the_recipe_loader(recipe, capsys):
    path = recipe(["zero3", "zero3_hpz"], training={"recompute": "full"})
    arguments = ["--config", path, *H100, "--set", "training.seed=7"]
    plan(capsys, *arguments, "--write", "chosen.txt", "--json", "plan.json")
    best = json.loads(Path("plan.json").read_text())["recommended"]
    written = Path("chosen.txt").read_text().split()
    assert written[::2] == ["--set"] * (len(written) // 2)
    before, changed = load_recipe(path), load_recipe(path, written[1::2])
    assert changed.training.deepspeed == best["deepspeed"]
    assert changed.training.recompute == best["recompute"]
    assert changed.training.resident_weights is best["resident"]
    assert changed != before  # it recommends something else here, or nothing is tested


def test_written_recipe_is_the_recommended_one(recipe, capsys):
    path = recipe(["zero3"])
    plan(capsys, "--config", path, *H100, "--set", "training.seed=7", "--write", "chosen.yaml", "--json", "plan.json")
    best = json.loads(Path("plan.json").read_text())["recommended"]
    before, changed = load_recipe(path), load_recipe("chosen.yaml")
    assert changed.training.recompute == best["recompute"]
    assert changed.training.seed == 7
    assert (changed.data, changed.adapter, changed.model) == (before.data, before.adapter, before.model)
    assert yaml.safe_load(Path("chosen.yaml").read_text()).keys() == yaml.safe_load(Path(path).read_text()).keys()


def test_nothing_to_change_is_said(recipe, capsys):
    path = recipe(["zero3"], training={"recompute": "none", "resident_weights": True})
    assert "change     nothing: the recipe has it so" in plan(capsys, "--config", path, *H100)


def test_selective_recomputation_can_be_written(recipe, capsys, monkeypatch):
    monkeypatch.setattr(plan_command, "_RECOMPUTES", ("selective",))
    path = recipe(["zero2"])
    plan(capsys, "--config", path, *H100, "--write", "chosen.txt")
    changed = load_recipe(path, Path("chosen.txt").read_text().split()[1::2])
    assert changed.training.recompute == "selective"


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_fit_is_refused_with_the_lack(recipe, capsys):
    path = recipe(["zero2"], SIZES["8b"] | {"max_position_embeddings": 8192}, data={"max_length": 8192})
    no_liger = ["--set", "training.use_liger_kernel=false"]  # with it, it would fit
    line = refused(capsys, "--config", path, "--gpu", "l4", "--gpus-per-node", "2", *no_liger)
    lack = re.fullmatch(
        r"does not fit: on 1 x 2 l4-24 \(22\.0 GiB\) the least is ds_configs/zero2\.json with full recomputation, "
        r"which needs ([\d.]+) GiB, ([\d.]+) GiB too many; largest part: base weights 15\.0 GiB",
        line,
    )
    assert lack, line
    assert float(lack[1]) == pytest.approx(22.0 + float(lack[2]), abs=0.11)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--gpu", "h100-8O"], "--gpu: unknown GPU 'h100-8O'; did you mean h100-80?"),
        (["--gpu", "h100"], "--gpu: 'h100' is one of h100-80, "),
        ([], "give --gpu NAME or --detect"),
        ([*H100, "--detect"], "give --gpu NAME or --detect"),
        ([*H100, "--nodes", "0"], "--nodes must be > 0, got 0"),
        ([*H100, "--nodes", "-3"], "--nodes must be > 0, got -3"),
        ([*H100, "--nodes", "two"], "argument --nodes: invalid int value: 'two'"),
        ([*H100, "--gpus-per-node", "0"], "--gpus-per-node must be > 0, got 0"),
        ([*H100, "--network-gbit", "nan"], "--network-gbit must be > 0, got nan"),
        ([*H100, "--epoch-tokens", "0"], "--epoch-tokens must be > 0, got 0"),
        ([*H100, "--fast"], "unrecognized arguments: --fast"),
        ([*H100, "--set", "training.sed=1"], "--set training.sed: unknown key; did you mean seed?"),
        ([*H100, "--set", "training.deepspeed=no.json"], "training.deepspeed: no.json: no such file or directory"),
        ([*H100, "--set", "data.max_length=513"], "data.max_length: 513 is longer than the 512 positions"),
        (
            [*H100, "--set", "adapter.target_modules=[nope]"],
            "adapter.target_modules: Target modules {'nope'} not found",
        ),
        ([*H100, "--set", "model.name_or_path=./nowhere"], "model.name_or_path: there is no folder nowhere"),
        ([*H100, "--write", "nowhere/chosen.txt"], "--write nowhere/chosen.txt: no such file or directory"),
        ([*H100, "--json", "."], "--json .: is a directory"),
        (["--measure", "1"], "--measure takes numbers of GPUs"),
    ],
)
def test_bad_arguments_are_one_line(recipe, capsys, arguments, line):
    assert refused(capsys, "--config", recipe(["zero3"]), *arguments).startswith(line)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (list(H100), "--config is required"),
        (["--config", "nowhere.yaml", *H100], "nowhere.yaml: cannot read the recipe: no such file or directory"),
        (["--measure", "0"], "--measure takes numbers of GPUs"),
        (["--measure", "1", "--gpu", "h1000"], "--gpu: unknown GPU 'h1000'"),
        (["--measure", "1", "--gpu", "l4", "--json", "nowhere/a.json"], "--json nowhere/a.json: no such file"),
    ],
)
def test_bad_arguments_without_a_recipe(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, *arguments).startswith(line)


def test_detection_needs_a_device(recipe, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in (["--config", recipe(["zero3"]), "--detect"], ["--measure", "1"]):
        assert refused(capsys, *arguments) == "--detect: there is no CUDA device here; name one with --gpu"


# ------------------------------------------------------------------------------------------ dry run, script, measuring


@pytest.mark.parametrize("config", ["zero2", "zero3_hpz"])
def test_dry_run_plans_the_same(recipe, capsys, config):
    path = recipe([config])
    plan(capsys, "--config", path, *H100, "--nodes", "2", "--json", "plan.json")
    assert train_command(["--config", path, "--dry-run", "--devices", "16"]) == 0
    shown = capsys.readouterr().out.partition("== Memory per device, 16 device(s), estimated ==\n")[2]
    own = next(
        row
        for row in json.loads(Path("plan.json").read_text())["choices"]
        if (row["deepspeed"], row["recompute"]) == (f"ds_configs/{config}.json", "full")
    )
    assert f"{own['total_gib']:9.3f} GiB at the peak, in {own['moment']}" in shown
    for name, size in own["memory_gib"].items():
        if size >= 0.001:
            assert re.search(rf"^{re.escape(LABELS[name])} +{size:.3f} GiB$", shown, re.MULTILINE), name


def test_script_runs():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        str(ROOT / "launch" / "plan.py"),
        "--config",
        "recipe.yaml",
        "--gpu",
        "h200",
        "--nodes",
        "0",
    ]
    result = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=180, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --nodes must be > 0, got 0 (see --help)\n"


@pytest.fixture
def toy(monkeypatch):
    """The shape that is measured in these tests, and nothing else."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 1024}
    monkeypatch.setitem(SHAPES, "toy", sizes | {"num_attention_heads": 4, "num_key_value_heads": 2})
    monkeypatch.setattr(plan_measure, "SETTINGS", (plan_measure.Setting("toy", 64, True),))


@pytest.mark.distributed
@pytest.mark.usefixtures("toy")
def test_measure_sets_a_run_beside_its_plan(tmp_path, monkeypatch, capsys):
    """A toy on the CPU, where planned and measured have little in common; the way there is the same."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    changes = {"model.dtype": "float32", "model.attention": "sdpa", "training.use_cpu": "true"}
    changes["training.deepspeed"] = "null"  # DeepSpeed would compile an operator, once on a machine
    changes["adapter"] = json.dumps(LORA)
    overrides = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    out = tmp_path / "measured.json"
    text = plan(capsys, "--measure", "1", "--gpu", "l4", "--json", str(out), *overrides)
    (row,) = json.loads(out.read_text())
    assert row["error"] == ""
    assert (row["gpu"], row["gpus"], row["setting"]) == ("l4-24", 1, "toy T=64 recompute=full")
    assert row["measured_gib"] > 0 and row["measured_s"] > 0
    assert 0 < row["planned"]["total_gib"] < 0.1 and row["planned"]["step_s"] > 0
    assert out.with_suffix(".md").read_text() == text
    head, rule, line, _, goals = text.splitlines()
    assert len({part.count("|") for part in (head, rule, line)}) == 1
    assert line.startswith("| 1 x l4-24, toy T=64 recompute=full | ") and f"{row['measured_s']:.3f} s" in line
    assert goals.startswith("Memory within 10%: ")


@pytest.mark.usefixtures("toy")
def test_measuring_goes_on_after_a_run_that_fails(tmp_path, monkeypatch, capsys):
    def fail(command: list[str], log_path: Path) -> str:
        log_path.write_text("CUDA out of memory")
        return "exit code 1"

    monkeypatch.setattr(plan_measure, "run_to_end", fail)
    out = tmp_path / "measured.json"
    text = plan(
        capsys, "--measure", "1", "2", "--gpu", "l4", "--json", str(out), "--set", f"adapter={json.dumps(LORA)}"
    )
    rows = json.loads(out.read_text())
    seen = [
        (row["gpus"], row["planned"]["deepspeed"].rpartition("/")[2], row["error"], row["measured_s"]) for row in rows
    ]
    assert seen == [(1, "zero2.json", "exit code 1", None), (2, "zero3.json", "exit code 1", None)]
    assert text.count("| failed |") == 4 and "Memory within 10%: 0 of 2; step within 20%: 0." in text
