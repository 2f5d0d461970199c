"""Checkpoints of a run that it can be resumed from: gathered on the step's path, written off it, read back anywhere.

checkpoint-N/  adapter_config.json, adapter_model.safetensors   PEFT's format, fp32
               (full fine-tuning: config.json, model.safetensors)
               optimizer.safetensors                            Adam's moments, whole; AdaLoRA's knowledge of its ranks
               random.safetensors                               the ranks' random states
               scheduler.json, trainer_state.json               schedule; step, logs, callbacks
               manifest.json                                    sizes, checksums, versions, the base model
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

import fvae_dist
from fvae_dist.adapter.export import read_tensors
from fvae_dist.training.adalora import allocator_state, load_allocator_state, whole_ranks
from fvae_dist.training.checkpoint_files import publish, read_manifest
from fvae_dist.training.checkpoint_state import (
    load_optimizer_state,
    load_random_states,
    optimizer_state,
    random_states,
)
from fvae_dist.training.checkpoints import list_checkpoints
from fvae_dist.training.full import MODEL_FILE, find_bad_weight, load_master_weights, load_weights, whole_weights
from fvae_dist.training.loraga import own_tensors, saved_config, saved_tensors
from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.saving import ADAPTER_FILE, find_bad_tensor, full_trainable_state_dict

if TYPE_CHECKING:
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object

logger = logging.getLogger(__name__)
OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random.safetensors"
SCHEDULER_FILE = "scheduler.json"
STATE_FILE = "trainer_state.json"


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread; a failure is logged, and the run goes on to its next save."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self.last_error: Exception | None = None

    def submit(self, work: Callable[[], None], name: str) -> None:
        """Start writing once the checkpoint before is done."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work, name), name="checkpoint-writer")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, work: Callable[[], None], name: str) -> None:
        try:
            work()
            self.last_error = None
        except Exception as error:
            self.last_error = error
            logger.error("%s was not written: %s; the one before stays, the next save tries again", name, error)


class ResumableTrainerMixin(_TrainerBase):
    """Mix in before a trainer of a PeftModel, or of a whole model in fp32. Replaces its checkpoints, not `save_model`.

    Args (beside the trainer's, by keyword):
        base_fingerprint: what tells the frozen base from others; a checkpoint of another one is refused.
    """

    # Narrower than the trainer declares them.
    model: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any

    def __init__(self, *args: Any, base_fingerprint: str = "", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.base_fingerprint = base_fingerprint
        self.checkpoint_writer = CheckpointWriter()

    # ------------------------------------------------------------------------------------------------------- saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Gather the state on all ranks, hand it to rank 0's writer, and go on. Replaces the trainer's."""
        is_main = self.args.should_save
        with whole_ranks(self.model):
            adapter = self._adapter_tensors(keep=is_main)
        moments, step = optimizer_state(self.model, self.optimizer, keep=is_main)
        moments |= allocator_state(self.model)
        states = random_states(self.args.device)
        if not is_main:
            return
        output = Path(self.args.output_dir or ".")
        folder = output / f"checkpoint-{self.state.global_step}"
        write = self._writer_of(adapter, moments, states or {})
        facts = self._facts(step)
        limit = self.args.save_total_limit

        def work() -> None:
            publish(folder, write, facts)
            for old in list_checkpoints(output)[: -limit or None] if limit else []:
                shutil.rmtree(old, ignore_errors=True)

        self.checkpoint_writer.submit(work, folder.name)

    def _adapter_tensors(self, keep: bool) -> dict[str, Tensor]:
        if not isinstance(self.model, PeftModel):
            weights = whole_weights(self.model, keep)
            self._refuse_to_write(find_bad_weight(weights))
            return weights
        state_dict = full_trainable_state_dict(self.model, keep=keep)
        if not keep:
            return {}
        self._refuse_to_write(find_bad_tensor(self.model, state_dict))
        tensors = get_peft_model_state_dict(self.model, state_dict=state_dict, save_embedding_layers=False)
        return saved_tensors(self.model, tensors)

    def _refuse_to_write(self, problem: str) -> None:
        if problem:
            raise RuntimeError(f"checkpoint of step {self.state.global_step}: {problem}")

    def _writer_of(
        self, adapter: dict[str, Tensor], moments: dict[str, Tensor], states: dict[str, Tensor]
    ) -> Callable[[Path], None]:
        """A function that writes the files; everything it needs is copied now, as training goes on meanwhile."""
        if isinstance(self.model, PeftModel):
            with whole_ranks(self.model):
                config = saved_config(self.model)
            config.inference_mode = True
        else:
            config = deepcopy(self.model.config)
        weights_file = self._weights_file()
        scheduler = json.dumps(self.lr_scheduler.state_dict())
        self._export_callback_states()
        trainer_state = deepcopy(self.state)

        def write(folder: Path) -> None:
            config.save_pretrained(str(folder))
            save_file(
                {name: tensor.contiguous() for name, tensor in adapter.items()}, folder / weights_file, {"format": "pt"}
            )
            save_file(moments, folder / OPTIMIZER_FILE)
            save_file(states, folder / RANDOM_FILE)
            (folder / SCHEDULER_FILE).write_text(scheduler, encoding="utf-8")
            trainer_state.save_to_json(str(folder / STATE_FILE))

        return write

    def _weights_file(self) -> str:
        return ADAPTER_FILE if isinstance(self.model, PeftModel) else MODEL_FILE

    def _export_callback_states(self) -> None:
        from transformers.trainer_callback import ExportableState

        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()

    def _facts(self, step: int) -> dict[str, Any]:
        import deepspeed
        import peft
        import transformers

        modules = {"fvae_dist": fvae_dist, "torch": torch, "transformers": transformers, "peft": peft}
        return {
            "step": self.state.global_step,
            "optimizer_step": step,
            "world_size": self.args.world_size,
            "global_batch_size": self._global_batch_size(),
            "base_fingerprint": self.base_fingerprint,
            "versions": {name: module.__version__ for name, module in modules.items()}
            | {"deepspeed": deepspeed.__version__},
        }

    def _global_batch_size(self) -> int:
        return self.get_total_train_batch_size(self.args)

    def train(self, *args: Any, **kwargs: Any):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.checkpoint_writer.wait()

    # ------------------------------------------------------------------------------------------------------- loading

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Without DeepSpeed the trainer would load the adapter here; `_prepare_for_training` does it, always."""

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """As the trainer's; the adapter is loaded before the engine copies it, the rest after."""
        if resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, None)
        folder = Path(resume_from_checkpoint)
        manifest = read_manifest(folder)
        self._check_same_run(folder, manifest)
        self._load_adapter(folder)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        moments = _read(folder / OPTIMIZER_FILE)
        load_optimizer_state(self.model, self.optimizer, moments, manifest["optimizer_step"])
        load_allocator_state(self.model, moments)
        if not isinstance(self.model, PeftModel):
            load_master_weights(self.model, _read(folder / MODEL_FILE))
        self.lr_scheduler.load_state_dict(json.loads((folder / SCHEDULER_FILE).read_text(encoding="utf-8")))
        # The scheduler remembers the rates but sets them in its next step only.
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        return prepared

    def _check_same_run(self, folder: Path, manifest: dict[str, Any]) -> None:
        if manifest["base_fingerprint"] != self.base_fingerprint:
            raise RecipeError(f"--resume {folder}: was trained on another base model than model.name_or_path is now")
        if manifest["global_batch_size"] != self._global_batch_size():
            raise RecipeError(
                f"--resume {folder}: was trained with a global batch of {manifest['global_batch_size']} sequences, "
                f"this run has {self._global_batch_size()} (micro-batch x accumulation x ranks): the data would not go "
                "on where it stopped"
            )

    def _load_adapter(self, folder: Path) -> None:
        if not (folder / self._weights_file()).is_file():
            raise RecipeError(
                f"--resume {folder}: holds no {self._weights_file()}: of a run with another adapter.peft_type"
            )
        if not isinstance(self.model, PeftModel):
            wrong_names = load_weights(self.model, _read(folder / MODEL_FILE))
            if wrong_names:
                raise RecipeError(f"--resume {folder}: its weights are not this model's: {wrong_names}")
            return
        tensors = own_tensors(self.model, _read(folder / ADAPTER_FILE))
        result: Any = set_peft_model_state_dict(self.model, tensors)
        expected = set(get_peft_model_state_dict(self.model, save_embedding_layers=False))
        if result.unexpected_keys or set(tensors) != expected:
            wrong = sorted(set(result.unexpected_keys) | (set(tensors) ^ expected))
            raise RecipeError(f"--resume {folder}: its adapter is not this recipe's: {', '.join(wrong[:3])}")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        states = _read(Path(checkpoint) / RANDOM_FILE)
        if not load_random_states(states, self.args.process_index, self.args.device):
            logger.info("rank %d is new: its random states start afresh", self.args.process_index)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except ValueError as error:
        raise RecipeError(f"--resume {error}") from None
