"""Scenarios of frozen weights that are gathered once, and of the fused kernels: the worker's layouts again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from fvae_dist.adapter.flat import flatten
from tests.distributed import layouts

LAYOUTS = ("z3_sft_full", "z3_sft_off")
RESIDENT = {"resident_weights": True}
# With the fused kernels: as a unit of ZeRO-3; with resident weights, q and v computed at once; in DDP, selectively.
# Flat adapters with them, and with torch's.
FUSED = {
    "fused_z3_sft_full": {},
    "fused_resident_z3_sft_full": RESIDENT,
    "fused_ddp_sft_selective": {},
    "flat_fused_z3_sft_full": {},
    "flat_fused_resident_z3_sft_full": RESIDENT,
    "flat_fused_ddp_sft_selective": {},
    "flat_z3_sft_off": {"gradient_split_every": 1},
    "flat_z2_sft_full": {},
}
FLAT = [name for name in FUSED if name.startswith("flat_")]
GATHERS = {"all_gather": 0, "all_gather_into_tensor": 0, "allgather_fn": 0}  # position of what is filled


class GatherCounts(TrainerCallback):
    """Elements that collectives gathered, by step, while it trains; losses and metrics are a few a step."""

    def __init__(self, trainer: Any):
        from deepspeed import comm  # takes seconds, which the tests' own process has no use for

        self.trainer, self.comm = trainer, comm
        self.elements: dict[int, int] = {}
        self.originals = {name: getattr(comm, name) for name in GATHERS}

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.gathered = self.elements
        for name, original in self.originals.items():
            setattr(self.comm, name, self._counting(original))

    def _counting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def gather(output: Any, *args: Any, **kwargs: Any) -> Any:
            step = self.trainer.state.global_step
            size = output.numel() if isinstance(output, torch.Tensor) else sum(part.numel() for part in output)
            self.elements[step] = self.elements.get(step, 0) + size
            return original(output, *args, **kwargs)

        return gather

    def on_train_end(self, args, state, control, **kwargs):
        for name, original in self.originals.items():
            setattr(self.comm, name, original)


def one_step(run_class: Any, folder: Path, layout: str) -> dict[str, Any]:
    """A layout's step with resident weights, the gradients of task and side loss apart in one of them."""
    arguments = RESIDENT | ({"gradient_split_every": 1} if layout == "z3_sft_off" else {})
    return run_class(
        folder, f"resident_{layout}", **layouts.settings(layout) | {"trainer_arguments": arguments}
    ).train()


def layout_of(name: str) -> str:
    """Of which layout a scenario is the step."""
    return name.removeprefix("flat_").removeprefix("fused_").removeprefix("resident_")


def fused_step(run_class: Any, folder: Path, name: str) -> dict[str, Any]:
    """A layout's step with the fused kernels, on a CPU in Triton's interpreter, or with flat adapters, or both."""
    layout = layout_of(name)
    settings = layouts.settings(layout)
    before = settings.get("prepare_model", lambda model: None)

    def prepare(model: torch.nn.Module) -> None:
        before(model)
        if name.startswith("flat_"):
            flatten(model)

    kernel = "fused" if "fused_" in name else "auto"
    changes = {"adapter": {"kernel": kernel}, "trainer_arguments": FUSED[name], "prepare_model": prepare}
    return run_class(folder, name, **settings | changes).train()


def odd_sizes(run_class: Any, folder: Path) -> dict[str, Any]:
    """Two steps of two micro-batches with tensors that two ranks cannot share evenly, and without resident weights."""
    adapter = {"r": 3, "encoder_hidden": 5, "decoder_hidden": 7}
    found = {}
    for name, arguments in (("resident", RESIDENT), ("gathered", {})):
        settings = {"adapter": adapter, "trainer_arguments": arguments, "accumulation": 2, "steps": 2}
        run = run_class(folder, f"odd_{name}", **settings)
        trainer = run.build()
        try:
            trainer.train()
            hooks = trainer.deepspeed.optimizer._grad_acc_hooks
            found[name] = run.results() | {"num_hooks": len(hooks)}
        finally:
            run.close()
    return found


def whole_run(run_class: Any, folder: Path) -> dict[str, Any]:
    """The worker's `whole_run` with resident weights: checkpoints and evaluation between steps, its adapter saved."""
    arguments = {
        "num_train_epochs": 2,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    run = run_class(
        folder,
        "resident_run",
        steps=-1,
        num_rows=11,
        micro_batch=2,
        arguments=arguments,
        trainer_arguments=RESIDENT,
        callbacks=(GatherCounts,),
    )
    trainer = run.build()
    linear = torch.nn.functional.linear
    try:
        trainer.train()
        trainer.save_model(str(run.output / "adapter"))
        evaluation = trainer.evaluate()["eval_loss"]
        with torch.no_grad():
            batch = torch.tensor([[2, 3, 4]])
            generated = trainer.model.generate(input_ids=batch, max_new_tokens=2, do_sample=False, pad_token_id=0)
        return run.results() | {
            "gathered": trainer.gathered,
            "evaluation": evaluation,
            "generated": generated,
            "sharded": [name for name, p in trainer.model.named_parameters() if hasattr(p, "ds_id")],
            "linear_was_put_back": torch.nn.functional.linear is not linear,
            "num_hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules()),
        }
    finally:
        run.close()


class SpoilsGradient(TrainerCallback):
    """In the second of three steps rank 1's gradient of one tensor is not a number; `values` has the rank's own shards
    after each."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        trainer.values = []

    def on_step_begin(self, args, state, control, **kwargs):
        parameter = next(p for p in self.trainer.model.parameters() if p.requires_grad)
        if state.global_step == 1 and args.process_index == 1:
            self.handle = parameter.register_hook(lambda gradient: gradient * float("nan"))

    def on_step_end(self, args, state, control, **kwargs):
        if hasattr(self, "handle"):
            self.handle.remove()
        zero = self.trainer.deepspeed.optimizer
        states = [zero.optimizer.state[flat] for flat in zero.fp32_partitioned_groups_flat]
        self.trainer.values.append(
            [flat.detach().clone() for flat in zero.fp32_partitioned_groups_flat]
            + [state[key].detach().clone() for state in states for key in ("exp_avg", "exp_avg_sq", "step")]
        )


def spoiled_step(run_class: Any, folder: Path) -> dict[str, Any]:
    """Three steps with resident weights, the second of which has no number for a gradient."""
    arguments = {"optim": "adamw_torch_fused"}
    run = run_class(
        folder,
        "resident_spoiled",
        steps=3,
        num_rows=12,
        micro_batch=2,
        arguments=arguments,
        trainer_arguments=RESIDENT,
        callbacks=(SpoilsGradient,),
    )
    trainer = run.build()
    try:
        trainer.train()
        zero = trainer.deepspeed.optimizer
        counts = (int(zero.passed_over), trainer.deepspeed.skipped_steps)
        return {"values": trainer.values, "passed_over": counts, "log": trainer.state.log_history}
    finally:
        run.close()


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    **{f"resident_{layout}": lambda run, folder, of=layout: one_step(run, folder, of) for layout in LAYOUTS},
    **{name: lambda run, folder, of=name: fused_step(run, folder, of) for name in FUSED},
    "resident_run": whole_run,
    "resident_odd": odd_sizes,
    "resident_spoiled": spoiled_step,
}
