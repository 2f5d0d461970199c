"""Short training runs on models with random weights and data made up here: nothing is downloaded.

A run is a `launch/train.py` (or another module) under torchrun; its memory and speed are read from TensorBoard files.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import LlamaConfig

ROOT = Path(__file__).parents[2]
STEPS = 10
WARM_UP = 4  # steps that are slower: allocator, autotuning, DeepSpeed's trace
TIMEOUT_S = 540
_ADAPTER = {"peft_type": "FVAE_LORA", "r": 16, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
_LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
# Llama-3.2-1B, Llama-3-8B, and one for tests.
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False},
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "tie_word_embeddings": False,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
}


@dataclass(frozen=True)
class Setting:
    """One run: a shape, tokens of a sequence, whether layers are recomputed; and what the recipe has beside these."""

    shape: str
    length: int
    recompute: bool
    adapter: dict[str, Any] = field(default_factory=lambda: dict(_ADAPTER))
    attention: str = "flash_attention_2"
    liger: bool = False
    telemetry: bool = False
    steps: int = STEPS
    sequence_parallel: int = 1  # GPUs that share a sequence

    def __str__(self) -> str:
        return f"{self.shape} T={self.length} recompute={'full' if self.recompute else 'none'}"


class RunLogs(NamedTuple):
    """What a run has logged, step by step: tokens/s of a GPU, peak GiB of the device and of a rank on the host."""

    speeds: list[float]
    peaks: list[float]
    host_peaks: list[float]


def config_of(shape: str, length: int = 0) -> LlamaConfig:
    """The model's configuration, with positions for sequences of `length` tokens."""
    sizes: dict[str, Any] = _LLAMA | SHAPES[shape]
    sizes["max_position_embeddings"] = max(length, sizes["max_position_embeddings"])
    return LlamaConfig(**sizes)


def write_inputs(setting: Setting, num_gpus: int, folder: Path) -> Path:
    """Model folder without weights, data (each record `length` tokens), and the recipe; returns the recipe's path."""
    model = folder / "model"
    config_of(setting.shape, setting.length).save_pretrained(model)
    _write_tokenizer(model)
    with open(folder / "data.jsonl", "w") as data:
        for record in range(setting.steps * num_gpus // setting.sequence_parallel):
            words = (f"w{(7 * record + word * word) % 1000}" for word in range(setting.length - 1))
            data.write(json.dumps({"text": " ".join(words)}) + "\n")
    config = "zero3.json" if num_gpus > 1 else "zero2.json"
    recipe = {
        "model": {"name_or_path": str(model), "random_weights": True, "attention": setting.attention},
        "adapter": setting.adapter,
        "data": {"train": [{"path": str(folder / "data.jsonl"), "format": "text"}], "max_length": setting.length},
        "training": {
            "output_dir": str(folder / "run"),
            "deepspeed": str(ROOT / "ds_configs" / config),
            "max_steps": setting.steps,
            "recompute": "full" if setting.recompute else "none",
            "use_liger_kernel": setting.liger,
            "save_strategy": "no",
        },
        "logging": {"steps": 1, "telemetry": setting.telemetry},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def _write_tokenizer(folder: Path) -> None:
    """One token a word; an EOS, which completes a record's `length`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i + 2 for i in range(1000)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def train_command(recipe: Path, num_gpus: int, changes: list[str]) -> list[str]:
    """Train the recipe with so many processes."""
    overrides = [part for text in changes for part in ("--set", text)]
    return [*torchrun(num_gpus), "launch/train.py", "--config", str(recipe), *overrides]


def torchrun(num_gpus: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_gpus}"]


def run_to_end(command: list[str], log_path: Path, timeout_s: float = TIMEOUT_S) -> str:
    """Run to the end; returns what went wrong, or nothing. In a session of its own, of which no rank outlives it, and
    none this process when it is terminated."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with open(log_path, "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return f"longer than {timeout_s:g} s"
        finally:
            signal.signal(signal.SIGTERM, before)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return f"exit code {code}" if code else ""


def read_logs(folder: Path) -> RunLogs:
    """What a run's TensorBoard folder holds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = ("perf/tokens_per_s_per_gpu", "mem/peak_gib", "mem/host_peak_gib")
    return RunLogs(*([event.value for event in events.Scalars(tag)] for tag in tags))
