"""The trainer of a recipe: TRL's, with the side loss, our checkpoints, and the RoPE scaling kept with each adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from trl import SFTTrainer

from fvae_dist.training.full import save_full
from fvae_dist.training.liger_head import LigerHeadMixin
from fvae_dist.training.recipe import RopeScalingSection
from fvae_dist.training.resumable import ResumableTrainerMixin
from fvae_dist.training.rope_scaling import write_scaling
from fvae_dist.training.trainer import FVAETrainerMixin


class RecipeTrainer(ResumableTrainerMixin, FVAETrainerMixin, LigerHeadMixin, SFTTrainer):
    """TRL's SFTTrainer with the side loss and our checkpoints; the model card is written by the recipe, not by TRL.

    Args (beside the trainer's, by keyword):
        rope_scaling: of the recipe; written into every folder that an adapter is.
    """

    def __init__(self, *args: Any, rope_scaling: RopeScalingSection | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rope_scaling = rope_scaling

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        return None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        if not isinstance(self.model, PeftModel):
            save_full(self.model, folder, self.args.should_save, self.processing_class)
            return
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self._write_scaling(folder)

    def _writer_of(self, *args: Any, **kwargs: Any) -> Callable[[Path], None]:
        write_checkpoint = super()._writer_of(*args, **kwargs)

        def write(folder: Path) -> None:
            write_checkpoint(folder)
            self._write_scaling(folder)

        return write

    def _write_scaling(self, folder: Path) -> None:
        if isinstance(self.model, PeftModel):  # a whole model's own configuration has it
            base: Any = self.model.get_base_model()
            write_scaling(folder, base.config, self.rope_scaling)
