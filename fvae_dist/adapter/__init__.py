"""The method: configuration, objective, VAE, adapted layer, tuner, side loss. Knows torch and PEFT, nothing else."""

from fvae_dist.adapter import side_loss
from fvae_dist.adapter.config import FVAELoraConfig
from fvae_dist.adapter.layer import FVAELinear
from fvae_dist.adapter.model import FVAELoraModel
from fvae_dist.adapter.peft_extensions import extend_peft_model
from fvae_dist.adapter.registration import register

register(FVAELoraConfig, FVAELoraModel)
extend_peft_model()

__all__ = ["FVAELinear", "FVAELoraConfig", "FVAELoraModel", "side_loss"]
