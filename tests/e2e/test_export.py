"""The export command: what it writes works, and a mistake is one line that names the argument or the file."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fvae_dist.cli import export_command, main
from tests.models import tiny_model
from tests.official import LINEAR, logits, trained, write_official

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 180


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """base/ (llama), official/ (of the reference), plain/ and linear/ (ours, without and with a linear encoder)."""
    folder = tmp_path_factory.mktemp("folders")
    tiny_model("llama").save_pretrained(folder / "base")
    write_official(folder / "official", trained(), base_model_name_or_path=str(folder / "base"))
    for name, settings in {"plain": {}, "linear": LINEAR}.items():
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        trained(base, task_type="CAUSAL_LM", **settings).save_pretrained(folder / name)
    return folder


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def export(capfd):
    """export(*arguments): run the command, which must succeed; returns its one line of output."""

    def export(*arguments) -> str:
        assert export_command([str(argument) for argument in arguments]) == 0
        captured = capfd.readouterr()
        assert captured.out.count("\n") == 1
        return captured.out

    return export


@pytest.fixture
def refused(capfd, tmp_path):
    """refused(*arguments): the line that the command prints; it must write nothing."""

    def refused(*arguments) -> str:
        before = sorted(tmp_path.rglob("*"))
        capfd.readouterr()
        assert export_command([str(argument) for argument in arguments]) == 2
        captured = capfd.readouterr()
        assert captured.out == ""
        # transformers' progress bar of loading a base model is no message.
        lines = [line for line in captured.err.splitlines() if line and "Loading weights" not in line]
        assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0].removeprefix("error: ")

    return refused


def load(adapter, base) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def test_official_adapter_is_converted(folders, export, tmp_path):
    line = export(
        "--from-official", folders / "official", "--base", folders / "base", "--out", tmp_path / "new" / "out"
    )
    assert str(tmp_path / "new" / "out") in line and str(folders / "official") in line
    out = tmp_path / "new" / "out"
    assert torch.equal(logits(load(out, folders / "base")), logits(trained()))
    assert {tensor.dtype for tensor in load_file(out / "adapter_model.safetensors").values()} == {torch.float32}
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folders / "base") and config["peft_type"] == "FVAE_LORA"
    assert not list(tmp_path.rglob("*.partial")) and (out / "adapter_model.safetensors").stat().st_mode & 0o044


def test_conversion_needs_the_shapes_of_the_base_only(folders, export, tmp_path):
    (tmp_path / "shapes").mkdir()
    shutil.copy(folders / "base" / "config.json", tmp_path / "shapes")
    export("--from-official", folders / "official", "--base", tmp_path / "shapes", "--out", tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out", folders / "base")), logits(trained()))


def test_inference_form_loads_by_itself(folders, export, tmp_path):
    export("--adapter", folders / "plain", "--format", "inference", "--out", tmp_path / "out")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(loaded), logits(trained()))


def test_lora_form_loads(folders, export, tmp_path):
    export("--adapter", folders / "linear", "--format", "lora", "--base", folders / "base", "--out", tmp_path / "out")
    loaded = load(tmp_path / "out", folders / "base")
    assert loaded.peft_config["default"].peft_type.value == "LORA"
    torch.testing.assert_close(logits(loaded), logits(trained(**LINEAR)), rtol=1e-5, atol=1e-6)


def test_merged_form_loads(export, tmp_path):
    tiny_model("qwen2").save_pretrained(tmp_path / "base")
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), task_type="CAUSAL_LM", **LINEAR)
    model.save_pretrained(tmp_path / "adapter")
    export("--adapter", tmp_path / "adapter", "--format", "merged", "--out", tmp_path / "of_named_base")
    arguments = ("--adapter", tmp_path / "adapter", "--format", "merged", "--base", tmp_path / "base")
    export(*arguments, "--out", tmp_path / "of_given_base")
    for name in ("of_named_base", "of_given_base"):
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)


def test_existing_folder_keeps_what_is_not_replaced(folders, export, tmp_path):
    shutil.copytree(folders / "plain", tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    export("--adapter", folders / "linear", "--format", "lora", "--out", tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "one of the arguments --from-official --adapter is required (see --help)"),
        (["--adapter", "linear", "--format", "lora"], "the following arguments are required: --out (see --help)"),
        (["--adapter", "linear", "--out", "x"], "--format is required with --adapter (see --help)"),
        (["--from-official", "official", "--out", "x"], "--base is required with --from-official (see --help)"),
        (
            ["--from-official", "official", "--base", "base", "--format", "lora", "--out", "x"],
            "--format goes with --adapter (see --help)",
        ),
        (["--adapter", "linear", "--format", "onnx", "--out", "x"], "argument --format: invalid choice: 'onnx'"),
        (["--adapter", "nowhere", "--format", "lora", "--out", "x"], "--adapter nowhere: is no saved adapter"),
        (["--adapter", "base", "--format", "lora", "--out", "x"], "--adapter base: is no saved adapter"),
        (["--adapter", "official", "--format", "lora", "--out", "x"], "is no FVAE-LoRA adapter but FVAEPEFT"),
        (["--adapter", "plain", "--format", "lora", "--out", "x"], "needs encoder_layers = 0, this adapter has 1"),
        (["--adapter", "plain", "--format", "merged", "--out", "x"], "needs encoder_layers = 0, this adapter has 1"),
        (["--adapter", "linear", "--format", "merged", "--out", "x"], "q_proj has no bias, and merging would give"),
        (["--adapter", "linear", "--format", "lora", "--out", "linear"], "--out linear: is what --adapter reads"),
        (["--adapter", "linear", "--format", "lora", "--out", "./base/../linear"], "is what --adapter reads"),
        (
            ["--adapter", "linear", "--format", "merged", "--base", "base", "--out", "base"],
            "--out base: is what --base reads",
        ),
        (
            ["--adapter", "linear", "--format", "lora", "--out", "base/config.json"],
            "base/config.json is a file, not a folder",
        ),
        (
            ["--adapter", "linear", "--format", "lora", "--out", "base/config.json/x"],
            "--out base/config.json/x: ",
        ),
        (["--from-official", "nowhere", "--base", "base", "--out", "x"], "--from-official nowhere: does not exist"),
        (
            ["--from-official", "base", "--base", "base", "--out", "x"],
            "adapter_config.json, which says how the adapter",
        ),
        (["--from-official", "plain", "--base", "base", "--out", "x"], "peft_type is 'FVAE_LORA'"),
        (["--from-official", "official", "--base", "./no", "--out", "x"], "--base ./no: there is no such folder"),
        (["--from-official", "official", "--base", "plain", "--out", "x"], "--base plain: holds no config.json"),
        (["--from-official", "official", "--base", "gpt2_like", "--out", "x"], "target_modules: 'q_proj', 'v_proj'"),
        (["--from-official", "official", "--base", "wide", "--out", "x"], "instead of (8, 40)"),
        (
            ["--adapter", "linear", "--format", "inference", "--base", "wide", "--out", "x"],
            "--base wide: has no linear model.layers.0.self_attn.q_proj with 32 outputs, as linear needs",
        ),
        (["--adapter", "broken", "--format", "inference", "--out", "x"], "adapter_model.safetensors: "),
    ],
)
def test_mistake_is_one_line_that_names_it(arguments, message, folders, refused, tmp_path, monkeypatch):
    shutil.copytree(folders, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    tiny_model("gpt2").config.save_pretrained("gpt2_like")
    tiny_model("llama", hidden_size=40).config.save_pretrained("wide")
    shutil.copytree("linear", "broken")
    Path("broken/adapter_model.safetensors").write_bytes(b"broken")
    assert message in refused(*arguments)


def test_incomplete_adapter_is_not_merged(refused, tmp_path):
    tiny_model("qwen2").save_pretrained(tmp_path / "base")
    trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **LINEAR).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: tensor for key, tensor in tensors.items() if ".layers.1." not in key}, file)
    line = refused("--adapter", tmp_path / "adapter", "--format", "merged", "--out", tmp_path / "out")
    assert "does not fit the base model" in line


def test_full_disk_is_one_line_and_leaves_nothing(folders, refused, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fvae_dist.adapter.export.save_file", fail)
    line = refused("--adapter", folders / "linear", "--format", "lora", "--out", tmp_path / "out")
    assert line == f"--out {tmp_path / 'out'}: [Errno 28] No space left on device"


@pytest.mark.parametrize(
    "program",
    [["launch/export.py"], ["-c", "from fvae_dist.cli import run; run()", "export"]],
    ids=["launch", "fvae-dist"],
)
def test_command_runs(program, folders, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    arguments = ["--adapter", str(folders / "linear"), "--format", "inference", "--out", str(tmp_path / "out")]
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": TIMEOUT_S}
    result = subprocess.run([sys.executable, *program, *arguments], check=False, **options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1 and (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_help_says_what_there_is(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["export", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("--from-official", "--adapter", "lora", "inference", "merged", "--base"))
    assert main(["--help"]) == 0 and "export" in capsys.readouterr().out
