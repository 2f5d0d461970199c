"""FVAE-LoRA (arXiv 2510.19640) as a PEFT method, and its distributed training recipe.

Importing the package registers the method with PEFT under the name "FVAE_LORA"; nothing else happens: neither
DeepSpeed nor CUDA is touched.

    import fvae_dist
    from peft import get_peft_model
    model = get_peft_model(model, fvae_dist.FVAELoraConfig(target_modules=["q_proj", "v_proj"]))
"""

from typing import TYPE_CHECKING

from fvae_dist.adapter import FVAELoraConfig, FVAELoraModel, side_loss

if TYPE_CHECKING:
    from fvae_dist.training.trainer import FVAETrainerMixin

__version__ = "0.1.0"
__all__ = ["FVAELoraConfig", "FVAELoraModel", "FVAETrainerMixin", "side_loss"]


def __getattr__(name: str):
    # The mixin needs transformers' Trainer, which costs seconds to import: only who asks for it pays.
    if name == "FVAETrainerMixin":
        from fvae_dist.training.trainer import FVAETrainerMixin

        return FVAETrainerMixin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
