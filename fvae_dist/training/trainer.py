"""FVAETrainerMixin: the side loss inside transformers.Trainer and trl.SFTTrainer.

    class Trainer(FVAETrainerMixin, SFTTrainer): ...

    loss = task_weight * task_loss + side_loss

The side loss is the token-weighted mean over every token of the optimizer step that counts: all micro-batches, all
ranks. Noise and dropout of the adapters are a function of seed, step, layer and token, so that a run does not depend on
how it is laid out. With an adapter of another PEFT type the mixin adds nothing to the loss and still counts, checks and
saves.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers.trainer_utils import has_length

from fvae_dist.adapter import FVAELinear, side_loss
from fvae_dist.adapter.noise import TOKEN_KEYS, TokenNoise
from fvae_dist.training.adalora import adalora_of, orthogonality_loss
from fvae_dist.training.batches import (
    COUNTED,
    LENGTHS,
    SideLossTokens,
    WithLengths,
    drop_fillers,
    token_mask_of,
    unlabel_after_padding,
)
from fvae_dist.training.checks import keep_ddp_from_guessing
from fvae_dist.training.gradient_checkpointing import keep_selective, refuse_reentrant, use_non_reentrant
from fvae_dist.training.gradient_split import GradientSplit
from fvae_dist.training.log_window import LOGGED_TERMS, LatentWarnings, LogWindow
from fvae_dist.training.no_waiting import NoWaitingMixin
from fvae_dist.training.resident import make_resident
from fvae_dist.training.saving import save_adapter
from fvae_dist.training.sequence_parallel import SequenceParallelMixin
from fvae_dist.training.tiled_mlp import tile_mlps
from fvae_dist.training.walks import WalkOnceMixin
from fvae_dist.training.zero3 import drop_stale_forward_stack, treat_vaes_as_leaves


class FVAETrainerMixin(SequenceParallelMixin, WalkOnceMixin, NoWaitingMixin):
    """Mix in before the trainer class. Adds the side loss, the checks around it, fp32 adapter saving, and its logs.

    Logged beside the trainer's own keys, every `logging_steps`: loss/total, loss/task, loss/neg_elbo,
    perf/tokens_per_s_per_gpu; with telemetry, of the step that is logged, `log_window.LOGGED_TERMS`.

    Args (beside the trainer's, by keyword):
        side_loss_tokens: "all" real tokens count in the side loss, or only those that are "labelled".
        telemetry: log the ELBO's terms and warn of collapsed, runaway or clamped latents.
        gradient_split_every: every so many steps also log gradient/{task,side}/{encoder1,encoder2,decoder,lora_B}, the
            norms of the two losses' gradients; such a step costs three. 0: never.
        tiled_mlp: MLPs over tiles of tokens (`tiled_mlp.py`).
        resident_weights: under ZeRO-3 gather the frozen weights once, for good (`resident.py`). Needs checkpoints that
            hold no frozen weights: ResumableTrainerMixin's.

    Raises:
        ValueError: reentrant gradient checkpointing was asked for: it would silently drop the side loss's gradient; or
            ddp_find_unused_parameters: DDP would take the decoder for unused; or an adapter that cannot be trained.
        NonFiniteLossError: during training, on all ranks, with step, ranks and records.
    """

    def __init__(
        self,
        *args: Any,
        side_loss_tokens: SideLossTokens = "all",
        telemetry: bool = True,
        gradient_split_every: int = 0,
        resident_weights: bool = False,
        tiled_mlp: bool = False,
        **kwargs: Any,
    ):
        trainer_args = kwargs.get("args", args[1] if len(args) > 1 else None)
        refuse_reentrant(trainer_args)
        keep_ddp_from_guessing(trainer_args)
        super().__init__(*args, **kwargs)
        self.model: torch.nn.Module
        use_non_reentrant(self.args)
        keep_selective(self.model)
        self._fvae_layers = [module for module in self.model.modules() if isinstance(module, FVAELinear)]
        self._refuse_inference_only()
        self._prepare_collator()
        self.tiled_mlp = tiled_mlp
        self.resident_weights = resident_weights and self._zero3()
        if self._zero3() and not self.resident_weights:  # without hooks on modules there is nothing to save on them
            treat_vaes_as_leaves(self.model)
        self.side_loss_tokens: SideLossTokens = side_loss_tokens
        self.telemetry = telemetry
        self.gradient_split_every = gradient_split_every
        self._is_collecting_step = False
        self._step_tokens: Tensor | None = None
        self._window = LogWindow()
        self._latent_warnings = LatentWarnings()
        self.layer_terms: dict[str, Tensor] = {}
        self.layer_names: list[str] = []

    # ------------------------------------------------------------------------------------------------- set-up

    def _zero3(self) -> bool:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return plugin is not None and plugin.zero_stage == 3

    def _prepare_collator(self) -> None:
        collator = self.data_collator
        if not getattr(collator, "padding_free", False):
            return
        if getattr(collator, "pad_to_multiple_of", None):
            raise ValueError("pad_to_multiple_of with packing: its padding cannot be told from tokens; leave it out")
        self.data_collator = WithLengths(collator)

    def _prepare_for_training(self, *args: Any, **kwargs: Any):
        if self.tiled_mlp:
            tile_mlps(self.model, zero3=self._zero3() and not self.resident_weights)
            self.tiled_mlp = False
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.resident_weights:
            make_resident(self.deepspeed)
        offload: Any = getattr(self, "maybe_activation_offload_context", None)
        if hasattr(offload, "update_model_params"):
            offload.update_model_params(self.model)  # DeepSpeed has moved them: they would be offloaded as activations
        return prepared

    def _refuse_inference_only(self) -> None:
        for layer in self._fvae_layers:
            for name in layer.active_adapters:
                if name in layer.fvae_config and layer.fvae_config[name].inference_only:
                    raise ValueError(
                        f"adapter {name!r} was saved with inference_only=True: encoder 2 and decoder are missing, so "
                        "it cannot be trained; train from the full adapter"
                    )

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """As the trainer's (no biases, no norms), and not the decoder's scale either: decay would sharpen it to 0."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(".decoder.scale")]

    # ------------------------------------------------------------------------------------------------- the loss

    def training_step(self, model, inputs, *args: Any, **kwargs: Any):
        num_items_in_batch = kwargs.get("num_items_in_batch", args[0] if args else None)
        if self._fvae_layers and self.gradient_split_every:
            self._split_gradient(model, inputs, num_items_in_batch)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self._zero3():
            drop_stale_forward_stack()
        return loss

    def _get_num_items_in_batch(self, batch_samples, device):
        """As the trainer's, but in training the rows that only fill up an epoch's last batch count for nothing."""
        if not self._is_collecting_step:  # evaluation counts too
            return super()._get_num_items_in_batch(batch_samples, device)
        for inputs in batch_samples:
            if getattr(self, "_loss_shifts_labels", True):
                unlabel_after_padding(inputs)
            inputs[COUNTED] = token_mask_of(inputs, self.side_loss_tokens)
        # A loss that is a mean over each batch would have none over a batch of fillers.
        loss_is_normalised = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if batch_samples and loss_is_normalised and self.accelerator.gradient_state.end_of_dataloader:
            size = self.args.per_device_train_batch_size
            # Not accelerate's remainder: it does not know it after a resume in mid-epoch.
            remainder = len(self.train_dataset) % (size * self.num_readers) if has_length(self.train_dataset) else 0
            if remainder:
                drop_fillers(batch_samples[-1], min(max(remainder - self.reader * size, 0), size))
        self.cut(batch_samples)
        return super()._get_num_items_in_batch(batch_samples, device)

    def get_batch_samples(self, *args: Any, **kwargs: Any):
        """As the trainer's; also counts the tokens of the whole optimizer step, on all ranks together."""
        self._is_collecting_step = True
        try:
            samples, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        finally:
            self._is_collecting_step = False
        device = self.args.device
        counts = [inputs[COUNTED].sum().to(device) for inputs in samples]
        local = torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.long, device=device)
        self._step_tokens = self.accelerator.reduce(local.float(), reduction="sum")
        self._window.num_tokens = self._window.num_tokens + self._step_tokens
        self._window.num_steps += 1
        return samples, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """task_weight * task loss + side loss in training; the task loss alone in evaluation."""
        if not self.model.training:
            return super().compute_loss(model, _for_model(inputs), return_outputs, num_items_in_batch)
        share = self._share(num_items_in_batch)
        task, side, outputs = self._losses(model, inputs, num_items_in_batch, return_outputs, window=self._window)
        total = task
        if side is not None:
            total = self._task_weight() * task + side
            self._window.add_loss("loss/neg_elbo", side * share)
        if (adalora := adalora_of(self.model)) is not None:
            # Once a step, however many micro-batches it has: the trainer has added up or averages their losses.
            total = total + orthogonality_loss(adalora) / (self.current_gradient_accumulation_steps * share)
        self._check(total, inputs)
        self._window.add_loss("loss/task", task * share)
        self._window.add_loss("loss/total", total * share)
        return (total, outputs) if return_outputs else total

    def _losses(
        self, model, inputs, num_items_in_batch, return_outputs: bool = False, window: LogWindow | None = None
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Task loss, side loss (None without FVAE-LoRA layers), outputs (if asked for) of a micro-batch, as scaled by
        the trainer.

        `window` receives the layers' terms where telemetry is due.
        """
        clean = _for_model(inputs)
        result: Any
        if not self._fvae_layers:
            result = super().compute_loss(model, clean, return_outputs, num_items_in_batch)
            return (result[0], None, result[1]) if return_outputs else (result, None, None)
        mask = inputs[COUNTED] if COUNTED in inputs else token_mask_of(inputs, self.side_loss_tokens)
        with_terms = window is not None and self.telemetry and self._will_log()
        noise = TokenNoise(inputs, seed=self.args.seed, step=self.state.global_step)
        with side_loss.collect(self.model, token_mask=mask, terms=with_terms, noise=noise) as collected:
            result = super().compute_loss(model, clean, return_outputs, num_items_in_batch)
        task, outputs = result if return_outputs else (result, None)
        if window is not None and with_terms:
            self.layer_names = collected.layer_names
            window.add_sums(collected.sums(), collected.layer_configs)
        return task, self._side_loss(collected, num_items_in_batch).to(task.device), outputs

    def _side_loss(self, collected: side_loss.Collector, num_items_in_batch) -> Tensor:
        """This micro-batch's side loss, scaled so that the step's gradient is that of the global token mean.

        Data parallelism averages the ranks' gradients, hence the factor of their number; where the trainer is going
        to divide the loss by the accumulation steps, that is undone.
        """
        num_tokens = self._step_tokens if self._step_tokens is not None else collected.num_tokens
        factor = self.accelerator.num_processes / self._share(num_items_in_batch)
        return collected.neg_elbo_sum * factor / num_tokens.clamp(min=1)

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

    def _will_log(self) -> bool:
        """Whether the running step ends with a log line, as far as can be known."""
        step = self.state.global_step + 1
        if self.args.logging_strategy == "steps":
            return step % self.state.logging_steps == 0 or (step == 1 and self.args.logging_first_step)
        return self.args.logging_strategy == "epoch"

    def _split_gradient(self, model, inputs: dict[str, Any], num_items_in_batch) -> None:
        """One micro-batch's part of the gradient split, in steps that are due."""
        if (self.state.global_step + 1) % self.gradient_split_every:
            return
        model.train()
        inputs = self._prepare_inputs(inputs)
        share = self._share(num_items_in_batch)

        def losses() -> dict[str, Tensor]:
            # Not through DDP, which would wait for a backward pass of its own.
            with self.compute_loss_context_manager():
                task, side, _ = self._losses(self.model, inputs, num_items_in_batch, window=None)
            assert side is not None
            return {"task": self._task_weight() * task * share, "side": side * share}

        split = self._window.gradient_split = self._window.gradient_split or GradientSplit(self.model)
        # Of TRL's trainer and of HeadMixin, which count this batch twice more.
        counted: dict[str, Any] = {
            name: vars(self)[name] for name in ("_total_train_tokens", "_head_sums") if name in vars(self)
        }
        split.add(losses, self.args.device)
        vars(self).update(counted)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._window.num_steps:
            logs.update(self._drain_window())
        super().log(logs, start_time)

    def _drain_window(self) -> dict[str, float]:
        """Means since the last log line over steps, micro-batches and ranks. All ranks enter these reductions."""
        window, self._window = self._window, LogWindow()
        reduce = self.accelerator.reduce
        scalars = window.losses(reduce)
        self.layer_terms = window.terms(reduce)
        if self.layer_terms:
            scalars |= {key: float(self.layer_terms[term].mean()) for key, term in LOGGED_TERMS.items()}
            if self.is_world_process_zero():
                self._latent_warnings.check(self.layer_terms, self.layer_names, self._latents_are_warm())
        if window.gradient_split is not None:
            scalars |= window.gradient_split.norms(reduce, self.args.device)
        scalars["perf/tokens_per_s_per_gpu"] = window.tokens_per_second() / self.accelerator.num_processes
        return scalars

    def _latents_are_warm(self) -> bool:
        warmup = max(self.args.get_warmup_steps(self.state.max_steps), self.state.max_steps // 10)
        return self.state.global_step > warmup


def _for_model(inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key not in (COUNTED, LENGTHS, TOKEN_KEYS)}
