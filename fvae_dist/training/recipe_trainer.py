"""The trainers of a recipe: TRL's, or for classification transformers'; with the side loss and our checkpoints, and
with the RoPE scaling and the labels kept with each adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import Trainer
from trl import SFTTrainer

from fvae_dist.training.classification import TextCollator, row_loss
from fvae_dist.training.full import save_full
from fvae_dist.training.head import HeadMixin
from fvae_dist.training.labels import read_labels, write_labels
from fvae_dist.training.maskless import MasklessMixin
from fvae_dist.training.recipe import RecipeError, RopeScalingSection
from fvae_dist.training.resumable import ResumableTrainerMixin
from fvae_dist.training.rope_scaling import write_scaling
from fvae_dist.training.trainer import FVAETrainerMixin

# Of the recipe's training section, what is not TRL's.
OWN_KEYS = {
    "deepspeed",
    "use_cpu",
    "overwrite_output_dir",
    "recompute",
    "resident_weights",
    "use_liger_kernel",
    "side_loss_tokens",
    "stall_timeout_s",
    "sequence_parallel",
    "activation_offload",
    "tiled_mlp",
    "head",
    "flat_adapters",
}


class RecipeTrainerMixin(ResumableTrainerMixin):
    """Mix in before FVAETrainerMixin. Our checkpoints, and what an adapter is useless without in every folder that is
    one; the model card is written by the recipe, not by the library.

    Args (beside the trainer's, by keyword):
        rope_scaling: of the recipe.
        classes: a classifier's labels.
    """

    def __init__(
        self,
        *args: Any,
        rope_scaling: RopeScalingSection | None = None,
        classes: list[str] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.rope_scaling = rope_scaling
        self.classes = classes

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        return None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        if not isinstance(self.model, PeftModel):
            save_full(self.model, folder, self.args.should_save, self.processing_class)
            return
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self._write_facts(folder)

    def _writer_of(self, *args: Any, **kwargs: Any) -> Callable[[Path], None]:
        write_checkpoint = super()._writer_of(*args, **kwargs)

        def write(folder: Path) -> None:
            write_checkpoint(folder)
            self._write_facts(folder)

        return write

    def _write_facts(self, folder: Path) -> None:
        if isinstance(self.model, PeftModel):  # a whole model's own configuration has them
            base: Any = self.model.get_base_model()
            write_scaling(folder, base.config, self.rope_scaling)
            write_labels(folder, self.classes)


class RecipeTrainer(RecipeTrainerMixin, FVAETrainerMixin, MasklessMixin, HeadMixin, SFTTrainer):
    """TRL's SFTTrainer with the side loss and our checkpoints."""


class ClassificationTrainer(RecipeTrainerMixin, FVAETrainerMixin, Trainer):
    """transformers' Trainer with the same, for texts and their classes; the task loss is the mean over the rows of the
    optimizer step."""

    def __init__(self, *args: Any, processing_class: Any, **kwargs: Any):
        collator = TextCollator(processing_class.pad_token_id)
        super().__init__(
            *args,
            processing_class=processing_class,
            data_collator=collator,
            compute_loss_func=row_loss,
            **kwargs,
        )
        # The model would take num_items_in_batch, and ignore it.
        self.model_accepts_loss_kwargs = False

    def _check_same_run(self, folder: Path, manifest: dict[str, Any]) -> None:
        super()._check_same_run(folder, manifest)
        before = read_labels(folder)
        if before != self.classes:
            raise RecipeError(f"--resume {folder}: was trained on the labels {before}, the data has {self.classes}")
