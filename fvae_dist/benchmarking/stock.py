"""The stock stack, for comparison: TRL's SFTTrainer, PEFT's LoRA, ZeRO-3 with "auto" sizes, and TRL's defaults.

Started by torchrun with a folder that `trial.write_inputs` filled; nothing of this project takes part in the training.
Its stock.json says length, steps, dtype, use_cpu, the adapter and what of SFTConfig is not at its default;
stock_result.json is written.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from fvae_dist.benchmarking.timing import synchronise
from fvae_dist.training.callbacks import host_peak_gib, peak_memory_gib
from fvae_dist.training.leaving import leave
from fvae_dist.training.process_group import ended_with
from fvae_dist.training.run import start_process_group

ZERO3: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 1_000_000_000,
}


class StepClock(transformers.TrainerCallback):
    """Milliseconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronise(args.device)
        self.ends.append(time.perf_counter())

    @property
    def ms(self) -> list[float]:
        """The first step counts as long as the second, so that there is one number a step."""
        gaps = [1e3 * (after - before) for before, after in zip(self.ends, self.ends[1:])]
        return gaps[:1] + gaps


def main(folder: Path) -> None:
    """Train as stock.json says."""
    from datasets import load_dataset

    asked = json.loads((folder / "stock.json").read_text())
    args = _arguments(folder, asked)
    start_process_group(args)
    transformers.set_seed(0)
    config = AutoConfig.from_pretrained(folder / "model")
    config.pad_token_id = None  # zero.Init partitions the embedding before its padding row is zeroed
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, asked["dtype"]))
    clock = StepClock()
    lora = {key: value for key, value in asked["lora"].items() if key != "peft_type"}
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=load_dataset("json", data_files=str(folder / "data.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
        callbacks=[clock],
    )
    trainer.train()
    peaks = torch.tensor([[peak_memory_gib(args.device), host_peak_gib()]], device=args.device)
    peak_gib, host_gib = trainer.accelerator.gather(peaks).amax(dim=0).tolist()
    if trainer.is_world_process_zero():
        found = {"ms": clock.ms, "peak_gib": peak_gib, "host_peak_gib": host_gib}
        (folder / "stock_result.json").write_text(json.dumps(found))


def _arguments(folder: Path, asked: dict[str, Any]) -> SFTConfig:
    deepspeed = dict(ZERO3)
    if asked["use_cpu"]:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        deepspeed |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    return SFTConfig(
        output_dir=str(folder / "stock"),
        max_steps=asked["steps"],
        max_length=asked["length"],
        per_device_train_batch_size=1,
        bf16=asked["dtype"] == "bfloat16",
        use_cpu=asked["use_cpu"],
        deepspeed=deepspeed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **asked["changes"],
    )


if __name__ == "__main__":
    with ended_with():
        main(Path(sys.argv[1]))
    leave(0)
