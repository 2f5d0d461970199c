"""The adapted linear: y = W x + scale * B z1, around any base layer that has in_features and out_features."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from fvae_dist.adapter import side_loss
from fvae_dist.adapter.config import FVAELoraConfig
from fvae_dist.adapter.objective import TokenTerms, neg_elbo
from fvae_dist.adapter.vae import NARROW, CastLinear, FactorizedVAE, Fp32Module


def linear_features(layer: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a layer that can be adapted, else None. Right for ZeRO-3 shards too."""
    if isinstance(layer, Conv1D):
        # Conv1D stores its weight as (in, out); a ZeRO-3 shard has an empty .shape and the real one in .ds_shape.
        rows, columns = getattr(layer.weight, "ds_shape", layer.weight.shape)
        return int(rows), int(columns)
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return None  # nn.MultiheadAttention reads its weight and never calls it: an adapter there would do nothing
    in_features, out_features = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if isinstance(in_features, int) and isinstance(out_features, int):
        return in_features, out_features
    return None


class UpProjection(Fp32Module, CastLinear):
    """lora_B: (out_features, r), no bias, N(0, 0.02^2) at the start."""

    def __init__(self, r: int, out_features: int):
        super().__init__(r, out_features, bias=False)
        nn.init.normal_(self.weight, std=0.02)


class FVAELinear(nn.Module, BaseTunerLayer):
    """A frozen base layer and its FVAE-LoRA adapters.

    Training: z1 and z2 are sampled, the decoder's likelihood is computed, and the layer hands its negative ELBO per
    token to `side_loss`. Evaluation: z1 is the mean of q1 and nothing else of the VAE runs.

    The base layer is only called, never read, so quantised ones work. It is registered first: transformers takes the
    compute dtype of an attention block from the first linear it finds there.

    Source: arXiv 2510.19640.
    """

    adapter_layer_names = ("fvae_vae", "fvae_lora_B")
    other_param_names = ("r", "scaling", "fvae_config")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: FVAELoraConfig):
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        features = linear_features(self.get_base_layer())
        if features is None:
            raise ValueError(f"{type(base_layer).__name__} has no in_features and out_features: it cannot be adapted")
        self.in_features, self.out_features = features
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.fvae_config: dict[str, FVAELoraConfig] = {}
        self.fvae_vae = nn.ModuleDict()
        self.fvae_lora_B = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: FVAELoraConfig) -> None:
        """Add (or replace) one adapter; its parameters are fp32 whatever the dtype of the base layer."""
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = config.scaling
        self.fvae_config[adapter_name] = config
        self.fvae_vae[adapter_name] = FactorizedVAE(self.in_features, config)
        self.fvae_lora_B[adapter_name] = UpProjection(config.r, self.out_features)
        base = self.get_base_layer()
        of_base = next(chain(base.parameters(), base.buffers()), None)
        on_meta = self.fvae_lora_B[adapter_name].weight.is_meta
        for part in (self.fvae_vae[adapter_name], self.fvae_lora_B[adapter_name]):
            part.float().train(self.training)
            if of_base is not None and not of_base.is_meta and not on_meta:
                part.to(of_base.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.fvae_lora_B:
                result = result + self._update(name, x).to(result.dtype)
        return result

    def _update(self, name: str, x: Tensor) -> Tensor:
        """scale * B z1 of one adapter, (..., D) -> (..., O), in the compute dtype."""
        vae: Any = self.fvae_vae[name]
        lora_B: Any = self.fvae_lora_B[name]
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        else:
            dtype = x.dtype if x.dtype in NARROW else lora_B.weight.dtype
        # Statistics stay in fp32 under an outer autocast; the casts of the large products are explicit.
        with torch.autocast(device_type, enabled=False):
            z1, *rest = vae(x.to(dtype))
            if rest:
                mean1, terms = rest[0], TokenTerms(*rest[1:])
                side_loss.report(self, name, neg_elbo(terms, self.fvae_config[name]), terms, mean1)
            return lora_B(z1.to(dtype)) * self.scaling[name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "FVAE-LoRA cannot be merged into the base weights: its update depends on the input through a non-linear "
            "encoder. Keep the adapter beside the model."
        )

    def unmerge(self) -> None:
        raise ValueError("FVAE-LoRA is never merged, so there is nothing to unmerge.")

    def __repr__(self) -> str:
        return "fvae." + super().__repr__()
