"""FVAETrainerMixin: the side loss inside transformers.Trainer and trl.SFTTrainer.

    class Trainer(FVAETrainerMixin, SFTTrainer): ...

    loss = task_weight * task_loss + side_loss

The side loss is the token-weighted mean over every real (non-padding) token of the optimizer step: all micro-batches,
all ranks. With an adapter of another PEFT type the mixin adds nothing to the loss and still counts, checks and saves.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor

from fvae_dist.adapter import FVAELinear, side_loss
from fvae_dist.adapter.vae import FactorizedVAE
from fvae_dist.training.saving import save_adapter

if TYPE_CHECKING:
    from transformers import Trainer as _TrainerBase  # what the mixin is mixed into
else:
    _TrainerBase = object


class NonFiniteLossError(RuntimeError):
    """The loss of a micro-step is NaN or infinite; raised on every rank before any gradient of it exists."""


class FVAETrainerMixin(_TrainerBase):
    """Mix in before the trainer class. Adds the side loss, the checks around it, fp32 adapter saving, and its logs.

    Logged beside the trainer's own keys, every `logging_steps`: loss/total, loss/task, loss/neg_elbo, elbo/nll,
    elbo/kl_z1, elbo/z1_sq, elbo/z2_sq, elbo/active_units, perf/tokens_per_s_per_gpu.

    Raises:
        ValueError: reentrant gradient checkpointing was asked for: it would silently drop the side loss's gradient; or
            ddp_find_unused_parameters: DDP would take the decoder for unused.
        NonFiniteLossError: during training, on all ranks, with step, ranks and records.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        trainer_args = kwargs.get("args", args[1] if len(args) > 1 else None)
        for name in _CHECKPOINTING_KWARGS:
            if (getattr(trainer_args, name, None) or {}).get("use_reentrant"):
                raise ValueError(
                    f"{name}={{'use_reentrant': True}} is refused: reentrant checkpointing silently drops the side "
                    "loss's gradient; non-reentrant is the default"
                )
        _keep_ddp_from_guessing(trainer_args)
        super().__init__(*args, **kwargs)
        self.model: torch.nn.Module
        self._use_non_reentrant_checkpointing()
        self._fvae_layers = [module for module in self.model.modules() if isinstance(module, FVAELinear)]
        self._refuse_padded_packing()
        if self._zero3():
            _treat_vaes_as_leaves(self.model)
        # Skipping non-finite losses in the logs would hide what _stop_if_not_finite stops at.
        self.args.logging_nan_inf_filter = False
        self._step_tokens: Tensor | None = None
        self._window = _LogWindow()
        self.layer_terms: dict[str, Tensor] = {}

    # ------------------------------------------------------------------------------------------------- set-up

    def _use_non_reentrant_checkpointing(self) -> None:
        """TRL asks for reentrant checkpointing under PEFT + ZeRO-3, for an old DeepSpeed; undo that."""
        settings: dict[str, Any] = {}
        for name in _CHECKPOINTING_KWARGS:
            settings.update(getattr(self.args, name, None) or {})
        settings["use_reentrant"] = False
        for name in _CHECKPOINTING_KWARGS:
            if hasattr(self.args, name):
                setattr(self.args, name, dict(settings))

    def _zero3(self) -> bool:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return plugin is not None and plugin.zero_stage == 3

    def _refuse_padded_packing(self) -> None:
        collator = self.data_collator
        if getattr(collator, "padding_free", False) and getattr(collator, "pad_to_multiple_of", None):
            raise ValueError("pad_to_multiple_of with packing: its padding cannot be told from tokens; leave it out")

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """As the trainer's (no biases, no norms), and not the decoder's scale either: decay would sharpen it to 0."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(".decoder.scale")]

    # ------------------------------------------------------------------------------------------------- the loss

    def training_step(self, *args: Any, **kwargs: Any):
        loss = super().training_step(*args, **kwargs)
        if self._zero3():
            _drop_stale_forward_stack()
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any):
        """As the trainer's; also counts the real tokens of the whole optimizer step, on all ranks together."""
        samples, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        device = self.args.device
        counts = [token_mask_of(inputs).sum().to(device) for inputs in samples]
        local = torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.long, device=device)
        self._step_tokens = self.accelerator.reduce(local.float(), reduction="sum")
        self._window.num_tokens = self._window.num_tokens + self._step_tokens
        self._window.num_steps += 1
        return samples, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """task_weight * task loss + side loss in training; the task loss alone in evaluation."""
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        result: Any
        if not self._fvae_layers:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            task = total = result[0] if return_outputs else result
        else:
            mask = token_mask_of(inputs)
            with side_loss.collect(self.model, token_mask=mask) as collected:
                result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            task = result[0] if return_outputs else result
            total, side = self._add_side_loss(task, collected, num_items_in_batch)
            self._window.add_side(side, collected.sums(), self._share(num_items_in_batch))
        self._stop_if_not_finite(total, inputs)
        self._window.add_task(task, total, self._share(num_items_in_batch))
        return (total, result[1]) if return_outputs else total

    def _add_side_loss(self, task: Tensor, collected: side_loss.Collector, num_items_in_batch) -> tuple[Tensor, Tensor]:
        """Scale this micro-batch's side loss so that the step's gradient is that of the global token mean.

        Data parallelism averages the ranks' gradients, hence the factor of their number; where the trainer is going
        to divide the loss by the accumulation steps, that is undone.
        """
        num_tokens = self._step_tokens if self._step_tokens is not None else collected.num_tokens
        factor = self.accelerator.num_processes / self._share(num_items_in_batch)
        side = collected.neg_elbo_sum * factor / num_tokens.clamp(min=1)
        return self._task_weight() * task + side.to(task.device), side

    def _task_weight(self) -> float:
        """Of the active adapter; not every adapter has every layer."""
        active = (
            layer.fvae_config[name]
            for layer in self._fvae_layers
            for name in layer.active_adapters
            if name in layer.fvae_config
        )
        return next(active).task_weight

    def _share(self, num_items_in_batch) -> float:
        """What the trainer will multiply a micro-batch's loss by: 1 if it is normalised over the step already."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or bool(self.compute_loss_func)
        return 1.0 if scaled else 1.0 / getattr(self, "current_gradient_accumulation_steps", 1)

    # ------------------------------------------------------------------------------------------------- the checks

    def _stop_if_not_finite(self, loss: Tensor, inputs: dict[str, Any]) -> None:
        flags = self.accelerator.gather((~torch.isfinite(loss.detach())).int().reshape(1))
        if not bool(flags.any()):
            return
        ranks = flags.nonzero().flatten().tolist()
        found = find_records(self.train_dataset, inputs["input_ids"]) if self.args.process_index in ranks else []
        # All ranks learn the records: the first to exit makes the launcher kill the others, message and all.
        records = dict(gather_object([(self.args.process_index, found)]))
        where = "; ".join(f"rank {rank} was at training records {records[rank]}" for rank in ranks)
        raise NonFiniteLossError(
            f"non-finite loss in step {self.state.global_step + 1} on rank(s) {', '.join(map(str, ranks))}; {where}; "
            "weights and checkpoints of the steps before are untouched"
        )

    # ------------------------------------------------------------------------------------------------- saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter alone, in fp32, and read it back; all ranks must call this (ZeRO-3 gathers)."""
        if not isinstance(self.model, PeftModel):
            return super().save_model(output_dir, _internal_call)
        folder = output_dir or self.args.output_dir or "."
        save_adapter(self.model, folder, is_main=self.args.should_save, processing_class=self.processing_class)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")
        return None

    # ------------------------------------------------------------------------------------------------- the logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._window.num_steps:
            logs.update(self._drain_window())
        super().log(logs, start_time)

    def _drain_window(self) -> dict[str, float]:
        """Means since the last log line over steps, micro-batches and ranks. All ranks enter these reductions."""
        window, self._window = self._window, _LogWindow()
        reduce = self.accelerator.reduce
        scalars = {key: float(reduce(value, "mean")) / window.num_steps for key, value in window.losses.items()}
        if window.sums:
            sums = {key: reduce(value, "sum") for key, value in window.sums.items()}
            self.layer_terms = {key: value.cpu() for key, value in side_loss.terms_from_sums(sums).items()}
            for term in ("nll", "kl_z1", "z1_sq", "z2_sq"):
                scalars[f"elbo/{term}"] = float(self.layer_terms[term].mean())
            scalars["elbo/active_units"] = float(self.layer_terms["active_z1"].mean())
        elapsed = max(time.perf_counter() - window.started, 1e-9)
        scalars["perf/tokens_per_s_per_gpu"] = float(window.num_tokens) / elapsed / self.accelerator.num_processes
        return scalars


class _LogWindow:
    """What has happened since the last log line; tensors stay on the device until then."""

    def __init__(self):
        self.started = time.perf_counter()
        self.num_steps = 0
        self.num_tokens: Tensor | float = 0.0
        self.losses: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}

    def add_task(self, task: Tensor, total: Tensor, share: float) -> None:
        self._add("loss/task", task.detach() * share)
        self._add("loss/total", total.detach() * share)

    def add_side(self, side: Tensor, sums: dict[str, Tensor], share: float) -> None:
        self._add("loss/neg_elbo", side.detach() * share)
        self.sums = {key: self.sums[key] + value if self.sums else value for key, value in sums.items()}

    def _add(self, key: str, value: Tensor) -> None:
        value = value.float()
        self.losses[key] = self.losses[key] + value if key in self.losses else value


# transformers 5.23 renamed the argument and keeps the old name as an alias.
_CHECKPOINTING_KWARGS = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")


def _keep_ddp_from_guessing(trainer_args: Any) -> None:
    """torch's DDP must wait for every adapter gradient.

    Looking for unused parameters, it walks back from the model's output, does not meet decoder and encoder 2, whose
    gradients come by the side loss alone, and fails when they arrive.
    """
    if getattr(trainer_args, "ddp_find_unused_parameters", None):
        raise ValueError("ddp_find_unused_parameters=True is refused: DDP would take the VAE's decoder for unused")
    if trainer_args is not None:
        trainer_args.ddp_find_unused_parameters = False


def _treat_vaes_as_leaves(model: torch.nn.Module) -> None:
    """One gather and one set of ZeRO-3 hooks for a whole VAE; must precede deepspeed.initialize."""
    vaes = [module for module in model.modules() if isinstance(module, FactorizedVAE)]
    if vaes:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, [FactorizedVAE])
        for vae in vaes:
            vae.register_forward_pre_hook(_require_input_gradient)


def _require_input_gradient(module: torch.nn.Module, args: tuple) -> tuple | None:
    """DeepSpeed reduces a leaf's gradients in a full backward hook. For an input without gradient (the first adapted
    layer, without checkpointing) torch fires that hook before any of them exists: DeepSpeed would take zeros."""
    x = args[0]
    if not torch.is_grad_enabled() or x.requires_grad:
        return None
    return (x.detach().requires_grad_(), *args[1:])


def _drop_stale_forward_stack() -> None:
    """Undo a leak of DeepSpeed 0.19 with non-reentrant checkpointing.

    Recomputation stops early by an exception that passes over ZeRO-3's post-forward hooks, so its stack of running
    modules grows with every step. Switching early stop off is no way out: the last module of a layer would then be
    released before its recomputed weight is used ("different metadata ... shape [0]").
    """
    from deepspeed.runtime.zero import parameter_offload

    del parameter_offload.FWD_MODULE_STACK[1:]


def token_mask_of(inputs: dict[str, Any]) -> Tensor:
    """1 for the real tokens of a batch, the shape of input_ids: its attention mask, or all where nothing is padded."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones_like(inputs["input_ids"])
    if mask.dim() != 2:
        raise ValueError(f"attention_mask of shape {tuple(mask.shape)}: the side loss needs the 2-D padding mask")
    return mask


def find_records(dataset: Any, input_ids: Tensor) -> list[int]:
    """Indexes of the dataset's records whose tokens stand in the batch. Scans the data: only for an error message."""
    import numpy as np

    batch = input_ids.detach().cpu().numpy().astype(np.int32).tobytes()
    found = []
    for index in range(len(dataset)):
        record = np.asarray(dataset[index]["input_ids"], dtype=np.int32).tobytes()
        position = batch.find(record)
        while position >= 0 and position % 4:
            position = batch.find(record, position + 1)
        if record and position >= 0:
            found.append(index)
    return found
