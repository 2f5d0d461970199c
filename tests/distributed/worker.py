"""One rank of the distributed tests: python -m tests.distributed.worker FOLDER RANK WORLD_SIZE SCENARIO...

The imports cost ten seconds a rank, so one launch runs every scenario, one after the other. Each writes
FOLDER/SCENARIO.RANK.pt, a dict for the tests to compare; one that raises writes its traceback there instead. The ranks
find each other through a file, so that no port can be taken.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import traceback
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.utils import groups, safe_get_full_fp32_param, safe_get_full_grad
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig, SFTTrainer

from fvae_dist import FVAETrainerMixin
from fvae_dist.adapter import linears
from fvae_dist.adapter.flat import flatten, split_flat
from fvae_dist.training.callbacks import StartupChecks
from fvae_dist.training.checks import StartupError
from fvae_dist.training.deepspeed_config import load_deepspeed_config
from fvae_dist.training.head import HeadMixin
from fvae_dist.training.leaving import leave
from fvae_dist.training.maskless import MasklessMixin
from fvae_dist.training.recipe import Recipe
from fvae_dist.training.resumable import ResumableTrainerMixin
from fvae_dist.training.zero3 import skip_shared_memory_operator
from tests.distributed import layouts, resident
from tests.distributed.tiny import attach, load, pad_rows, rows

ROOT = Path(__file__).parents[2]
USE_CPU = os.environ["DS_ACCELERATOR"] == "cpu"
DTYPE = os.environ.get("FVAE_TEST_DTYPE", "float32")
TIMEOUT_S = 60  # of a collective: a scenario that fails on one rank must not hold the other for longer


class Recording:
    """Keeps the first token of every row this rank saw, by step and micro-batch: it tells which row it was."""

    def get_batch_samples(self, *args: Any, **kwargs: Any):
        samples, num_items = super().get_batch_samples(*args, **kwargs)
        self.seen = [*getattr(self, "seen", []), [batch["input_ids"][:, 0].tolist() for batch in samples]]
        return samples, num_items


class SFT(Recording, ResumableTrainerMixin, FVAETrainerMixin, MasklessMixin, HeadMixin, SFTTrainer):
    pass


class Plain(Recording, FVAETrainerMixin, transformers.Trainer):
    pass


class Watch(TrainerCallback):
    """Reads gradients right before DeepSpeed's first optimizer step, and the facts that hold while training."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.gradients: dict[str, torch.Tensor] = {}
        self.facts: dict[str, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        engine, model = getattr(self.trainer, "deepspeed", None), self.trainer.model
        if engine is not None:
            step = engine.step

            def read_then_step(*step_args, **step_kwargs):
                self.read(safe_get_full_grad)
                return step(*step_args, **step_kwargs)

            engine.step = read_then_step
        self.facts["start"] = split_flat(model, whole(trainable(model)))
        self.facts["frozen"] = whole(frozen(model))
        self.facts["seed_draw"] = torch.randn(4)
        functions = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
        keywords = [function.keywords for function in functions if function is not None]
        self.facts["checkpointing"] = [{key: key == "context_fn" or entry[key] for key in entry} for entry in keywords]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if getattr(self.trainer, "deepspeed", None) is None:
            self.read(lambda parameter: parameter.grad)

    def read(self, gradient_of: Any) -> None:
        if not self.gradients:
            model = self.trainer.model
            found = {name: gradient_of(p).cpu().clone() for name, p in trainable(model).items()}
            self.gradients = split_flat(model, found)


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}


def whole(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Values of parameters that ZeRO-3 may have sharded. All ranks must call this."""
    sharded = [parameter for parameter in parameters.values() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext():
        return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}


class Run:
    """Settings of one training run of the tiny model, through the real mixin, and what came out of it."""

    def __init__(self, folder: Path, name: str, **settings: Any):
        self.folder, self.output = folder, folder / "out" / name
        self.settings = {
            "trainer": "sft",
            "stage": 3,
            "micro_batch": 2,
            "accumulation": 1,
            "checkpointing": True,
            "dtype": DTYPE,
            "num_rows": 8,
            "rows": None,
            "form": "right",
            "steps": 1,
            "learning_rate": 1e-3,
            "config": None,
            "zero": {},
            "drop": (),
            "adapter": {},
            "lora": False,
            "model": {},
            "trainer_arguments": {},
            "startup_checks": True,
            "arguments": {},
            "callbacks": (),
        } | settings

    def deepspeed_config(self) -> dict[str, Any] | None:
        """The project's own configuration; all weights of the tiny model are sharded, none is kept whole.

        None for stage None: torch's DDP.
        """
        s = self.settings
        if s["stage"] is None:
            return None
        sections = {
            "model": {"name_or_path": str(self.folder / "model"), "dtype": s["dtype"]},
            "data": {"train": [{"path": "unused"}]},
            "training": {
                "output_dir": str(self.output),
                "deepspeed": str(ROOT / "ds_configs" / (s["config"] or f"zero{s['stage']}.json")),
                "per_device_train_batch_size": s["micro_batch"],
                "gradient_accumulation_steps": s["accumulation"],
                "max_grad_norm": s["arguments"].get("max_grad_norm", 1.0),
            },
        }
        if s["stage"] == 0:
            sections["training"]["deepspeed"] = str(ROOT / "ds_configs" / "zero2.json")
        config = load_deepspeed_config(Recipe.model_validate(sections), dist.get_world_size())
        if s["stage"] == 3:
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        config["zero_optimization"].update({"stage": s["stage"], "reduce_bucket_size": 100_000} | s["zero"])
        for key in s["drop"]:
            del config[key]
        return config

    def build(self) -> Any:
        """Arguments, model and trainer, in the order of training/run.py."""
        s = self.settings
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        unset_hf_deepspeed_config()
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # the scenario before may have set it
        values = {
            "output_dir": str(self.output),
            "deepspeed": self.deepspeed_config(),
            "use_cpu": USE_CPU,
            "bf16": s["stage"] == 3 and s["dtype"] == "bfloat16",
            "fp16": s["stage"] == 3 and s["dtype"] == "float16",
            "per_device_train_batch_size": s["micro_batch"],
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": s["accumulation"],
            "gradient_checkpointing": s["checkpointing"],
            "max_steps": s["steps"],
            "learning_rate": s["learning_rate"],
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "seed": 5,
            "data_seed": 5,
            **s["arguments"],
        }
        trainer_class = {"sft": SFT, "plain": Plain}[s["trainer"]]
        if issubclass(trainer_class, SFTTrainer):
            special = {"max_length": None, "packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
            args = SFTConfig(**values, **special)
        else:
            args = TrainingArguments(**values)
        model = load(self.folder / "model", getattr(torch, s["dtype"]), **s["model"])
        transformers.set_seed(11)
        if s["lora"]:
            model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        else:
            model = attach(model, **s["adapter"])
        if "prepare_model" in s:
            s["prepare_model"](model)
        self.trainer = trainer_class(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(s["rows"] or rows(s["num_rows"])),
            eval_dataset=Dataset.from_list(rows(6, seed=3)),
            data_collator=layouts.collator(s["form"]),
            processing_class=AutoTokenizer.from_pretrained(self.folder / "model"),
            **s["trainer_arguments"],
        )
        if s["startup_checks"]:
            self.trainer.add_callback(StartupChecks(self.trainer))
        self.watch = Watch(self.trainer)
        for callback in (self.watch, *(make(self.trainer) for make in s["callbacks"])):
            self.trainer.add_callback(callback)
        return self.trainer

    def train(self, resume: str | None = None, save: bool = False) -> dict[str, Any]:
        """Build, train, on request save to out/NAME/adapter, and forget; returns `results`."""
        trainer = self.build()
        try:
            trainer.train(resume_from_checkpoint=resume)
            if save:
                trainer.save_model(str(self.output / "adapter"))
            return self.results()
        finally:
            self.close()

    def results(self) -> dict[str, Any]:
        trainer = self.trainer
        engine = getattr(trainer, "deepspeed", None)
        masters = {name: safe_get_full_fp32_param(p) for name, p in trainable(trainer.model).items() if engine}
        from deepspeed.runtime.zero import parameter_offload

        return {
            "gradients": self.watch.gradients,
            **self.watch.facts,
            "frozen_after": whole(frozen(trainer.model)),
            "final": split_flat(trainer.model, whole(trainable(trainer.model))),
            "masters": split_flat(trainer.model, masters),
            "dtypes": {name: str(p.dtype) for name, p in trainer.model.named_parameters()},
            "log": trainer.state.log_history,
            "seen": trainer.seen,
            "forward_stack": len(parameter_offload.FWD_MODULE_STACK),
            "stage": engine.zero_optimization_stage() if engine else None,
        }

    def close(self) -> None:
        """Forget the engine: its hooks and buffers must not outlive the scenario."""
        engine = getattr(self.trainer, "deepspeed", None)
        if engine is not None:
            engine.destroy()
        parallel_state_sp._release_sequence_parallel_groups()
        groups.mpu = None
        self.trainer = self.watch = None
        gc.collect()


# ------------------------------------------------------------------------------------------------------ scenarios


def loading(folder: Path) -> dict[str, Any]:
    """Private memory of this rank while a 260 MB model is loaded under ZeRO-3."""
    run = Run(folder, "loading", dtype="bfloat16")
    unset_hf_deepspeed_config()
    args = TrainingArguments(output_dir=str(run.output), deepspeed=run.deepspeed_config(), use_cpu=USE_CPU, bf16=True)
    load(folder / "model", torch.bfloat16)  # warms up what a first load allocates for good
    gc.collect()
    with PeakMemory() as memory:
        model = load(folder / "large", torch.bfloat16)
    shards = [parameter.ds_tensor for parameter in model.parameters()]
    result = {
        "shard_bytes": sum(shard.numel() * shard.element_size() for shard in shards),
        "dtypes": {str(shard.dtype) for shard in shards},
        "peak_growth_bytes": memory.peak - memory.before,
        "final_growth_bytes": private_bytes() - memory.before,
    }
    del args, model, shards
    gc.collect()
    return result


def private_bytes() -> int:
    """Anonymous resident memory: file pages of mapped weights are shared and can be dropped, so they do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


class PeakMemory:
    """Samples this process's private memory every 2 ms."""

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = private_bytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, private_bytes())

    def __exit__(self, *exc_info: Any) -> None:
        self.done.set()
        self.thread.join()


def one_step(folder: Path, layout: str, **overrides: Any) -> dict[str, Any]:
    """One step over the seven documents in one of the layouts of the invariance suite."""
    result = Run(folder, layout, **layouts.settings(layout) | overrides).train()
    return {key: result[key] for key in ("gradients", "log", "seen", "stage", "checkpointing", "start", "final")}


def tiled(folder: Path, layout: str) -> dict[str, Any]:
    """MLPs over tiles of 16 tokens, their sharded weights gathered once for a row; adapters by 5 tokens."""
    of_layout = layouts.settings(layout)["trainer_arguments"]
    elements = linears.ELEMENTS
    linears.ELEMENTS = 5 * 16  # of as many features
    try:
        return one_step(folder, layout, trainer_arguments=of_layout | {"tiled_mlp": True})
    finally:
        linears.ELEMENTS = elements


def whole_run(folder: Path) -> dict[str, Any]:
    """Two epochs over 11 documents, 4 a step: the second epoch's order, its last step of 3, noise and dropout on."""
    arguments = {
        "num_train_epochs": 2,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": 2,
    }
    return Run(folder, "whole_run", steps=-1, num_rows=11, micro_batch=2, arguments=arguments).train()


def gradient_split(folder: Path) -> dict[str, Any]:
    """A layout's step again, with the gradients of task and side loss apart."""
    return one_step(folder, "z3_sft_off", trainer_arguments={"gradient_split_every": 1})


def resident_shares(folder: Path) -> dict[str, Any]:
    """Two ranks sharing each row, with resident weights and the gradients of task and side loss apart."""
    arguments = {"sequence_parallel": 2, "resident_weights": True, "gradient_split_every": 1}
    return one_step(folder, "sp_z3_sft_full", trainer_arguments=arguments)


def five_steps(folder: Path) -> dict[str, Any]:
    """bf16 base under ZeRO-3, random noise, dropout; saved at the end."""
    run = Run(folder, "five_steps", dtype="bfloat16", steps=5, num_rows=20)
    trainer = run.build()
    try:
        trainer.train()
        trainer.save_model(str(run.output / "adapter"))
        engine = trainer.deepspeed
        evaluation = trainer.evaluate()
        result = run.results()
        result["evaluation"] = evaluation
        result["eval_logits"] = eval_logits(trainer)
        result["shards"] = {str(p.ds_tensor.dtype) for p in trainable(trainer.model).values()}
        result["frozen_shards"] = {str(p.ds_tensor.dtype) for p in frozen(trainer.model).values()}
        result["communication"] = str(engine.communication_data_type)
        result["accumulation"] = str(engine.optimizer.gradient_accumulation_dtype)
        result["buckets"] = [str(dtype) for dtype in engine.optimizer.ipg_buckets]
        return result
    finally:
        run.close()


@torch.no_grad()
def eval_logits(trainer: Any) -> torch.Tensor:
    """Logits of three rows through the running engine, in evaluation mode."""
    trainer.model.eval()
    batch = pad_rows(rows(3, seed=3))
    return trainer.deepspeed(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()


def forty_steps(folder: Path) -> dict[str, Any]:
    """AdamW steps of 1e-4: bf16 would lose each of them on a weight of size one."""
    # Small weights kept whole on every rank, as DeepSpeed does by default; elsewhere here all are sharded.
    run = Run(
        folder,
        "forty_steps",
        dtype="bfloat16",
        steps=40,
        learning_rate=1e-4,
        checkpointing=False,
        zero={"stage3_param_persistence_threshold": 100_000},
        adapter={"layers_to_transform": [1]},
        arguments={"logging_steps": 40},
    )
    return run.train(save=True)


def unsafe_precision(folder: Path) -> dict[str, Any]:
    """What StartupChecks says to three broken set-ups."""

    def narrow(model: torch.nn.Module) -> None:
        for parameter in trainable(model).values():
            parameter.data = parameter.data.bfloat16()

    settings = {
        "no_communication_dtype": {"drop": ["communication_data_type"]},
        "no_accumulation_dtype": {"drop": ["data_types"]},
        "narrow_adapter": {"prepare_model": narrow},
    }
    messages = {}
    for name, broken in settings.items():
        try:
            Run(folder, name, dtype="bfloat16", **broken).train()
            messages[name] = "no error"
        except StartupError as error:
            messages[name] = str(error)
    return messages


def resume(folder: Path) -> dict[str, Any]:
    """Four steps at a stretch, and the last two again from the checkpoint; with loader processes, noise and dropout."""
    settings = {
        "dtype": "bfloat16",
        "steps": 4,
        "num_rows": 26,  # four steps of eight; the last has two rows, and fillers
        "accumulation": 2,
        "arguments": {
            "save_strategy": "steps",
            "save_steps": 2,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 1,
            "dataloader_num_workers": 2,
        },
    }
    uninterrupted = Run(folder, "resume", **settings)
    first = uninterrupted.train()
    torch.manual_seed(12345)
    second = Run(folder, "resumed", **settings).train(resume=str(uninterrupted.output / "checkpoint-2"))
    return {"uninterrupted": first, "resumed": second}


def elastic(folder: Path) -> dict[str, Any]:
    """The last two of four steps, from the checkpoint of one process, in layouts of the same global batch; some have
    flat adapters."""
    checkpoint = str(folder / "out" / "one_rank" / "checkpoint-2")
    splits = {
        "zero3": {"stage": 3, "micro_batch": 2, "accumulation": 2},
        "zero2": {"stage": 2, "micro_batch": 1, "accumulation": 4, "prepare_model": flatten},
        "zero0": {"stage": 0, "micro_batch": 4, "accumulation": 1},
        "ddp": {"stage": None, "micro_batch": 2, "accumulation": 2},
        "resident": {"stage": 3, "micro_batch": 2, "accumulation": 2, "trainer_arguments": resident.RESIDENT},
    }
    splits["flat_ddp"], splits["flat_resident"] = ({**splits[n], "prepare_model": flatten} for n in ("ddp", "resident"))
    arguments = {"lr_scheduler_type": "linear"}
    return {
        name: Run(folder, f"elastic_{name}", steps=4, num_rows=40, arguments=arguments, **split).train(checkpoint)
        for name, split in splits.items()
    }


def lora(folder: Path) -> dict[str, Any]:
    run = Run(folder, "lora", dtype="bfloat16", steps=3, num_rows=12, lora=True)
    return run.train(save=True)


def half_precision(folder: Path) -> dict[str, Any]:
    """A float16 base. DeepSpeed refuses fp16 on CPU, though torch can compute it: the refusal is switched off here."""
    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    run = Run(folder, "half_precision", dtype="float16", steps=2)
    try:
        trainer = run.build()
        trainer.train()
        return run.results() | {"loss_scale": trainer.deepspeed.optimizer.loss_scaler.loss_scale}
    finally:
        del accelerator.is_fp16_supported
        run.close()


def non_finite(folder: Path) -> None:
    """NaN on rank 1 in step 3, through the embedding; the error is raised out of the process on both ranks."""

    class Poison(TrainerCallback):
        def __init__(self, trainer):
            self.trainer = trainer

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2 and dist.get_rank() == 1:
                embedding = self.trainer.model.get_input_embeddings()
                embedding.register_forward_hook(lambda module, args, output: output * float("nan"))

    arguments = {"save_strategy": "steps", "save_steps": 1}
    run = Run(folder, "non_finite", steps=5, num_rows=20, arguments=arguments, callbacks=(Poison,))
    trainer = run.build()
    try:
        trainer.train()
    except BaseException as error:
        seen = trainer.seen
        torch.save(
            {"error": type(error).__name__, "message": str(error), "seen": seen}, result_file(folder, "non_finite")
        )
        raise


def fused_head(folder: Path) -> dict[str, Any]:
    """Logs of two steps of two micro-batches, evaluated after each, with TRL's head and the fused one: weights gathered
    in every pass, from a head of its own or the embedding's; sequences shared."""
    cases: dict[str, dict[str, Any]] = {
        "sharded": {},
        "sharded_tied": {"model": {"tie_word_embeddings": True}, "checkpointing": False},
        "shared": layouts.settings("sp_z3_sft_off"),
    }
    arguments = {"eval_strategy": "steps", "eval_steps": 1}
    found: dict[str, Any] = {}
    for name, case in cases.items():
        common = {"steps": 2, "accumulation": 2, "num_rows": 16} | case
        for is_fused in (False, True):
            changes = {
                "arguments": arguments | common.get("arguments", {}),
                "trainer_arguments": common.get("trainer_arguments", {}) | {"fused_head": is_fused},
            }
            run = Run(folder, f"head_{name}", **common | changes)
            found[f"{name}_{'fused' if is_fused else 'trl'}"] = run.train()["log"]
    return found


SCENARIOS: dict[str, Any] = {
    "loading": loading,
    **{layout: partial(one_step, layout=layout) for layout in (*layouts.LAYOUTS, *layouts.SEQUENCE_PARALLEL)},
    "offload": partial(one_step, layout="z3_sft_full", config="zero3_cpu_offload.json"),
    "hpz": partial(one_step, layout="z3_sft_full", config="zero3_hpz.json", zero={"zero_hpz_partition_size": 2}),
    **{name: partial(scenario, Run) for name, scenario in resident.SCENARIOS.items()},
    "sp_resident": resident_shares,
    "tiled": partial(tiled, layout="z3_sft_full_wide"),
    "tiled_sp": partial(tiled, layout="sp_z3_sft_off"),
    "whole_run": whole_run,
    "gradient_split": gradient_split,
    "fused_head": fused_head,
    "five_steps": five_steps,
    "forty_steps": forty_steps,
    "unsafe_precision": unsafe_precision,
    "resume": resume,
    "elastic": elastic,
    "lora": lora,
    "half_precision": half_precision,
    "non_finite": non_finite,  # last: it ends the processes
}


def result_file(folder: Path, scenario: str) -> Path:
    return folder / f"{scenario}.{dist.get_rank()}.pt"


def main(folder: Path, rank: int, world_size: int, names: list[str]) -> None:
    timeout = timedelta(seconds=TIMEOUT_S)
    backend = "gloo" if USE_CPU else "nccl"
    if not USE_CPU:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size, timeout=timeout
    )
    skip_shared_memory_operator()
    deepspeed.init_distributed(dist_backend=backend)
    for name in names:
        started = time.monotonic()
        try:
            result = SCENARIOS[name](folder)
        except Exception:
            if name == "non_finite":
                raise
            traceback.print_exc()
            result = {"traceback": traceback.format_exc()}
        torch.save(result, result_file(folder, name))
        print(f"[{rank}] {name}: {time.monotonic() - started:.1f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    leave(0)
