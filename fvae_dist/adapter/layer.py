"""The adapted linear: y = W x + scale * B z1, around any base layer that has in_features and out_features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from fvae_dist.adapter import together
from fvae_dist.adapter.config import FVAELoraConfig
from fvae_dist.adapter.flat import NARROW
from fvae_dist.adapter.layer_forward import LayerForward
from fvae_dist.adapter.up_projection import UpProjection
from fvae_dist.adapter.vae import FactorizedVAE

MERGEABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


class FVAELinear(nn.Module, BaseTunerLayer):
    """A frozen base layer and its FVAE-LoRA adapters.

    Training: z1 and z2 are sampled, the decoder's likelihood is computed, and the layer hands its negative ELBO per
    token to `side_loss`. Evaluation: z1 is the mean of q1 and nothing else of the VAE runs.

    The base layer is only called, never read but to merge, so quantised ones work. It is registered first: transformers
    takes the compute dtype of an attention block from the first linear it finds there.

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
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        # Layers after this one that read the same input, what one before it has computed for it, and whether ZeRO-3
        # leaves its adapters whole; see `together`.
        self.followers: tuple[FVAELinear, ...] = ()
        self.inbox = together.Inbox()
        self.stays_whole = False
        # The base layer's own parameters while merged ones stand in for them.
        self._unmerged: tuple[nn.Parameter, nn.Parameter | None] | None = None
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: FVAELoraConfig) -> None:
        """Add (or replace) one adapter; its parameters are fp32 whatever the dtype of the base layer."""
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = config.scaling
        self.fvae_config[adapter_name] = config
        self.fvae_vae[adapter_name] = FactorizedVAE(self.in_features, config)
        self.fvae_lora_B[adapter_name] = UpProjection(config.r, self.out_features)
        self.frozen_peft_weight_names.pop(adapter_name, None)
        if config.inference_only:
            self.frozen_peft_weight_names[adapter_name] = self.adapter_layer_names
        base = self.get_base_layer()
        of_base = next(chain(base.parameters(), base.buffers()), None)
        on_meta = self.fvae_lora_B[adapter_name].weight.is_meta
        for part in (self.fvae_vae[adapter_name], self.fvae_lora_B[adapter_name]):
            part.float().train(self.training)
            if of_base is not None and not of_base.is_meta and not on_meta:
                part.to(of_base.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def rename_adapter(self, old_name: str, new_name: str) -> None:
        """Rename one adapter, if this layer has it; nothing else about it changes."""
        for attribute in (*self.adapter_layer_names, *self.other_param_names, "frozen_peft_weight_names"):
            rename_key(getattr(self, attribute), old_name, new_name)
        self._active_adapter = renamed(self._active_adapter, old_name, new_name)
        self.merged_adapters = renamed(self.merged_adapters, old_name, new_name)

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output and the active adapters' updates.

        `adapter_names`: in evaluation, one adapter for each sample of the batch, or "__base__" for none.
        """
        if adapter_names is not None:
            self._check_mixed_batch(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.training and not args and not kwargs and adapter_names is None:
            output = together.forward(self, x)
            if output is not None:
                return output
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        if adapter_names is not None:
            return self._add_mixed_updates(result, x, adapter_names)
        for name in self.active_adapters:
            if name in self.fvae_lora_B:
                result = self.update(name, x, result)
        return result

    def _check_mixed_batch(self, x: Tensor, adapter_names: Sequence[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _add_mixed_updates(self, result: Tensor, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        for name in dict.fromkeys(adapter_names):
            if name in self.fvae_lora_B:
                samples = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
                # Not in place: the base layer's output may be a view, or be needed by its backward.
                result = result.index_add(0, samples, self.update(name, x[samples]).to(result.dtype))
        return result

    def compute_dtype(self, name: str, x: Tensor) -> torch.dtype:
        """What an adapter's wide products run in: autocast's dtype, or x's if that is narrow."""
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return x.dtype if x.dtype in NARROW else self.fvae_lora_B[name].weight.dtype  # type: ignore[return-value, union-attr]

    def update(self, name: str, x: Tensor, base: Tensor | None = None) -> Tensor:
        """scale * B z1 of one adapter, (..., D) -> (..., O), in the compute dtype; added to `base` if there is one."""
        vae: Any = self.fvae_vae[name]
        lora_B: Any = self.fvae_lora_B[name]
        dtype = self.compute_dtype(name, x)
        # Statistics stay in fp32 under an outer autocast; the casts of the large products are explicit.
        with torch.autocast(x.device.type, enabled=False):
            if vae.training:
                run = LayerForward(self, name, num_tokens=x.numel() // self.in_features)
                z1, *rest = vae(x.to(dtype), run.noise, run.with_statistics, run.with_loss)
                run.report(z1, *rest)
            else:
                (z1,) = vae(x.to(dtype))
            return lora_B(z1, self.scaling[name], dtype, base)

    # ---------------------------------------------------------------------------------------------------------- merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters (default: the active ones) to the base layer's weight and bias, which new parameters replace.

        A base layer without bias gets one, unless it would be all zeros. The old parameters are kept for `unmerge`, and
        whatever else shares them (tied embeddings) is left as it is.

        Args:
            safe_merge: refuse a result that is not finite.
            adapter_names: those of them that this layer has, and that are not merged yet.

        Raises:
            ValueError: the adapter's encoder is not linear, or the base layer has no plain weight; nothing is changed.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.fvae_lora_B]
        if problem := self.merge_problem(names, safe_merge):
            raise ValueError(problem)
        if not names:
            return
        base: Any = self.get_base_layer()
        if self._unmerged is None:
            self._unmerged = (base.weight, base.bias)
        weight, bias = self._merged_parameters(names)
        base.weight = nn.Parameter(weight, requires_grad=base.weight.requires_grad)
        if bias is not None:
            base.bias = nn.Parameter(bias, requires_grad=base.weight.requires_grad)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Give the base layer its own parameters back, bit for bit.

        Raises:
            ValueError: no adapter of this layer could ever have been merged.
        """
        if not self.merged or self._unmerged is None:
            if all(config.encoder_layers for config in self.fvae_config.values()):
                raise ValueError("FVAE-LoRA with a non-linear encoder is never merged, so there is nothing to unmerge.")
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        # For a merge PEFT brings offloaded weights in; a merge may end anywhere.
        with onload_layer(self) if self.get_base_layer().weight.is_meta else nullcontext():
            base: Any = self.get_base_layer()
            for parameter in self._unmerged:
                if parameter is not None:  # the model may have been moved or cast meanwhile
                    parameter.data = parameter.data.to(base.weight.device, base.weight.dtype)
            base.weight, base.bias = self._unmerged
        self._unmerged = None
        self.merged_adapters.clear()

    def merge_problem(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> str | None:
        """Why adapters (default: the active ones) cannot be merged here; None if they can. Changes nothing."""
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name in self.fvae_lora_B and name not in self.merged_adapters]
        if not names:
            return None
        non_linear = [name for name in names if self.fvae_config[name].encoder_layers]
        if non_linear:
            return (
                f"FVAE-LoRA adapter {non_linear[0]!r} cannot be merged into the base weights: its update depends on "
                "the input through a non-linear encoder. Keep the adapter beside the model "
                "(save_pretrained(..., inference_only=True) makes its file small), or train one with encoder_layers=0."
            )
        problem = plain_weight_problem(self.get_base_layer())
        if problem is None and any(
            hasattr(p, "ds_id") for p in (*self.fvae_vae.parameters(), *self.fvae_lora_B.parameters())
        ):
            problem = "the adapter is partitioned by ZeRO-3"
        if problem:
            return (
                f"FVAE-LoRA cannot be merged into this layer: {problem}. Merge into a model that was loaded neither "
                "quantised nor partitioned, or keep the adapter beside the model."
            )
        if safe_merge and not all(
            tensor.isfinite().all() for tensor in self._merged_parameters(names) if tensor is not None
        ):
            return f"NaN or infinite values in the merged weights: adapter(s) {', '.join(names)} seem to be broken."
        return None

    @property
    def base_has_bias(self) -> bool:
        """Whether the base layer has a bias of its own, not one that merging made."""
        bias = self._unmerged[1] if self._unmerged else getattr(self.get_base_layer(), "bias", None)
        return bias is not None

    @torch.no_grad()
    def _merged_parameters(self, names: list[str]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the base layer with these adapters in them; no bias if it has none and needs none."""
        base: Any = self.get_base_layer()
        deltas = [self._delta(name) for name in names]
        weight_delta, bias_delta = (torch.stack(parts).sum(0).to(base.weight.device) for parts in zip(*deltas))
        if isinstance(base, Conv1D):
            weight_delta = weight_delta.T
        weight = (base.weight + weight_delta).to(base.weight.dtype)
        if base.bias is None and not bias_delta.any():
            return weight, None
        bias = bias_delta if base.bias is None else base.bias + bias_delta
        return weight, bias.to(base.weight.dtype)

    def _delta(self, name: str) -> tuple[Tensor, Tensor]:
        """What an adapter with a linear encoder adds to W (O, D) and to the bias (O), fp32."""
        mean: Any = self.fvae_vae[name].encoder1.mean  # type: ignore[union-attr]
        up: Any = self.fvae_lora_B[name].weight
        with torch.autocast(up.device.type, enabled=False):
            return self.scaling[name] * up @ mean.weight, self.scaling[name] * up @ mean.bias

    def __repr__(self) -> str:
        return "fvae." + super().__repr__()


def plain_weight_problem(layer: nn.Module) -> str | None:
    """Why nothing can be added to a layer's weight and bias, None if it can: that takes y = x W + b and no more."""
    kind = type(layer)
    if kind.forward not in (nn.Linear.forward, Conv1D.forward):
        return f"its base layer, a {kind.__name__}, is neither a torch.nn.Linear nor a transformers Conv1D"
    weight = layer._parameters.get("weight")
    if hasattr(weight, "ds_id"):
        return "its base weight is partitioned by ZeRO-3"
    shape = {linear_features(layer)} if isinstance(layer, Conv1D) else {(layer.out_features, layer.in_features)}
    if type(weight) is not nn.Parameter or weight.dtype not in MERGEABLE or tuple(weight.shape) not in shape:
        found = getattr(layer, "weight", None)
        return (
            f"the weight of its base layer, a {kind.__name__}, is a {type(found).__name__} of "
            f"{getattr(found, 'dtype', 'no dtype')}, not a plain floating-point matrix"
        )
    if weight.is_meta:
        return "its base weight is on the meta device"
    return None


def renamed(names: Any, old_name: str, new_name: str) -> Any:
    """An adapter name, or a list of some, after `old_name` has become `new_name`."""
    if isinstance(names, list):
        return [new_name if name == old_name else name for name in names]
    return new_name if names == old_name else names


def rename_key(mapping: Any, old_name: str, new_name: str) -> None:
    """Rename a key of a dict or ModuleDict, in place and at its place."""
    items = {new_name if key == old_name else key: value for key, value in mapping.items()}
    mapping.clear()
    mapping.update(items)
