"""FVAE-LoRA (arXiv 2510.19640) as a PEFT method, and its distributed training recipe.

Importing the package registers the method with PEFT under the name "FVAE_LORA"; nothing else happens: neither
DeepSpeed nor CUDA is touched.

    import fvae_dist
    from peft import get_peft_model
    model = get_peft_model(model, fvae_dist.FVAELoraConfig(target_modules=["q_proj", "v_proj"]))
"""

import importlib
from typing import TYPE_CHECKING

from fvae_dist.peft_hook import register_with_peft

if TYPE_CHECKING:
    from fvae_dist.adapter import FVAELoraConfig, FVAELoraModel, side_loss
    from fvae_dist.training.trainer import FVAETrainerMixin

__version__ = "0.1.0"
__all__ = ["FVAELoraConfig", "FVAELoraModel", "FVAETrainerMixin", "side_loss"]

# Public name -> the module that defines it, imported when it is asked for.
_HOMES = {
    "FVAELoraConfig": "fvae_dist.adapter",
    "FVAELoraModel": "fvae_dist.adapter",
    "side_loss": "fvae_dist.adapter",
    "FVAETrainerMixin": "fvae_dist.training.trainer",
}

register_with_peft()


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
