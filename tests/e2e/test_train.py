"""The real commands as subprocesses: quickstart under the launcher, baseline, README's script."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fvae_dist.training.process_group import free_port

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 420
pytestmark = pytest.mark.distributed

TAGS = {
    *("loss/total", "loss/task", "loss/neg_elbo", "elbo/nll", "elbo/kl_z1", "elbo/z1_sq", "elbo/z2_sq"),
    *("elbo/active_units", "optim/grad_norm", "optim/lr", "perf/tokens_per_s_per_gpu", "mem/peak_gib", "eval/loss"),
}


def run(command: list[str], folder: Path) -> str:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "FVAE_NO_INSTALL": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        command, cwd=folder, env=environment, text=True, capture_output=True, timeout=TIMEOUT_S, check=False
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-6000:]
    return output


def deepspeed(folder: Path, recipe: str, *arguments: str) -> str:
    port = str(free_port())
    launch = ["deepspeed", "--master_port", port, "--num_accelerators", "2", "launch/train.py", "--config", recipe]
    return run([*launch, *arguments], folder)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what the commands need; the quickstart has run in it, in its short form."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("launch", "ds_configs"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "pyproject.toml", folder)
    steps = ["--set", "training.max_steps=36", "--set", "training.save_steps=36"]
    output = run(["bash", "launch/quickstart.sh", "--fast", *steps], folder)
    (folder / "quickstart.log").write_text(output)
    return folder


def metrics(folder: Path, name: str) -> dict:
    return json.loads((folder / "runs" / name / "metrics.json").read_text())


def test_quickstart_adapts_saves_and_plots(checkout):
    numbers = metrics(checkout, "quickstart")
    assert numbers["eval_end"]["loss"] < 0.8 * numbers["eval_start"]["loss"]
    output = checkout / "runs" / "quickstart"
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "adapter" / "README.md").is_file()
    tensors = load_file(output / "adapter" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 and tensor.numel() for tensor in tensors.values())
    assert not list(output.rglob("training_args.bin"))
    assert "tensorboard --logdir" in (checkout / "quickstart.log").read_text()


def test_quickstart_writes_the_documented_tags(checkout):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(checkout / "runs" / "quickstart" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= TAGS
    assert "elbo_layers/nll" in events.Tags()["histograms"]


def test_adapter_loads_in_plain_peft_and_generates(checkout):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    folder = str(checkout / "runs" / "quickstart" / "adapter")
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(checkout / ".quickstart" / "model")
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
    model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("Text: The", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > prompt["input_ids"].shape[1]


def test_lora_baseline_is_one_key_away(checkout):
    settings = ["training.output_dir=runs/lora", "training.max_steps=16", "adapter.peft_type=LORA"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    run([sys.executable, "launch/train.py", "--config", "launch/recipes/quickstart.yaml", *arguments], checkout)
    numbers = metrics(checkout, "lora")
    assert numbers["eval_end"]["loss"] < numbers["eval_start"]["loss"]
    tensors = load_file(checkout / "runs" / "lora" / "adapter" / "adapter_model.safetensors")
    assert all(".lora_" in name and tensor.dtype == torch.float32 for name, tensor in tensors.items())


def test_readme_script_runs_as_it_stands(checkout):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    script = next(block for block in blocks if "SFTTrainer" in block)
    assert len(script.strip().splitlines()) < 30
    (checkout / "own.py").write_text(script)
    run([sys.executable, "own.py"], checkout)
    assert load_file(checkout / "runs" / "own" / "adapter" / "adapter_model.safetensors")


@pytest.mark.skipif("FVAE_SHARED" not in os.environ, reason="FVAE_SHARED does not name the folder with real data")
def test_real_model_on_real_data(checkout):
    shared = Path(os.environ["FVAE_SHARED"])
    settings = [
        f"model.name_or_path={shared}/models/stories260k",
        f"data.train.0.path={shared}/data/commonsense/boolq.train.json",
        "data.train.0.format=alpaca",
        f"data.eval.0.path={shared}/data/commonsense/boolq.test.json",
        "data.eval.0.format=alpaca",
        "data.eval.0.limit=100",
        "data.max_length=384",
        "training.max_steps=20",
        "training.output_dir=runs/boolq",
    ]
    deepspeed(checkout, "launch/recipes/quickstart.yaml", *[p for s in settings for p in ("--set", s)])
    numbers = metrics(checkout, "boolq")
    assert numbers["eval_end"]["loss"] < 0.8 * numbers["eval_start"]["loss"]
