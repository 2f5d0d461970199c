"""Adapted layers that read one input (q, k and v; gate and up) computed at once, where the fused kernels compute them.

The first of them runs the base layers and the adapters of all; the others find their outputs ready, if they are then
called with the very same input, and compute alone if not. Each reports its side loss when it is called itself. A host
that launches kernels for one layer at a time would not keep up with a GPU at a few thousand tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fvae_dist.adapter import side_loss
from fvae_dist.kernels.fused_vae import MAX_ADAPTERS, Call, Side, fused_updates

# By the names of transformers: linears of a block that are called with the same tensor, in the order of their calls.
SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
)


class Ahead(NamedTuple):
    """What an earlier layer has computed for this one."""

    x: Tensor
    output: Tensor
    run: side_loss.LayerForward
    side: tuple[Tensor, ...]


def followers_of(block: nn.Module, name: str, kind: type) -> tuple[Any, ...]:
    """Of a block's child, those after it that read the same input and are of that kind."""
    for names in SHARED_INPUT:
        if name in names:
            children = (getattr(block, other, None) for other in names[names.index(name) + 1 :])
            return tuple(child for child in children if isinstance(child, kind))
    return ()


def forward(layer: Any, x: Tensor) -> Tensor | None:
    """The training forward of a layer for x (..., D), with its base; None where it is not computed in this way."""
    ahead, layer.ahead = layer.ahead, None
    if ahead is not None and ahead.x is x:
        ahead.run.report(ahead.output, *ahead.side)
        return ahead.output
    names = layer.active_adapters
    if len(names) != 1 or not _is_ready(layer, names[0]):
        return None
    (name,) = names
    dtype, device_type = layer.compute_dtype(name, x), x.device.type
    narrow = x.to(dtype)
    if not layer.fvae_vae[name].is_fused(narrow):
        return None
    members = [layer, *(other for other in layer.followers if _is_alike(layer, other, name))][:MAX_ADAPTERS]
    bases = [member.base_layer(x) for member in members]
    if any(base.dtype != dtype for base in bases):
        return layer.update(name, x, bases[0])
    runs = [side_loss.LayerForward(member, name, x.numel() // layer.in_features) for member in members]
    with torch.autocast(device_type, enabled=False):
        outputs, sides = _updates(members, name, narrow, bases, runs)
    for member, output, run, side in list(zip(members, outputs, runs, sides))[1:]:
        member.ahead = Ahead(x, output, run, side)
    runs[0].report(outputs[0], *sides[0])
    return outputs[0]


def _updates(
    members: Sequence[Any], name: str, x: Tensor, bases: Sequence[Tensor], runs: Sequence[side_loss.LayerForward]
) -> tuple[Sequence[Tensor], list[tuple[Tensor, ...]]]:
    streams = [run.noise.stream(x.numel() // x.shape[-1], x.device) for run in runs]
    keys, vaes = streams[0].keys, [member.fvae_vae[name] for member in members]
    if any(stream.keys is not keys for stream in streams):  # they belong to collectors of unlike batches
        alone = [_updates([m], name, x, [base], [run]) for m, base, run in zip(members, bases, runs)]
        return [outputs[0] for outputs, _ in alone], [sides[0] for _, sides in alone]
    call = Call(
        vaes[0].fused_spec,
        tuple(stream.salt for stream in streams),
        members[0].scaling[name],
        any(run.with_statistics for run in runs),
        any(run.with_loss for run in runs),
    )
    parameters = [parameter for vae in vaes for parameter in vae.fused_parameters()]
    ups = [member.fvae_lora_B[name].weight for member in members]
    outputs, sides = fused_updates(call, x, keys.to(x.device), bases, parameters, ups)
    reports = [_report(vae, x, run, side) for vae, run, side in zip(vaes, runs, sides)]
    return outputs, reports


def _report(vae: Any, x: Tensor, run: side_loss.LayerForward, side: Side) -> tuple[Tensor, ...]:
    return side.loss, *(vae.fused_statistics(x, side) if run.with_statistics else ())


def _is_ready(layer: Any, name: str) -> bool:
    """Whether the layer trains this adapter, and its weights are here without ZeRO-3's hooks on its modules."""
    if name not in layer.fvae_lora_B or layer.disable_adapters or layer.merged_adapters:
        return False
    vae = layer.fvae_vae[name]
    is_whole = layer.stays_whole or not hasattr(layer.fvae_lora_B[name].weight, "ds_id")
    return vae.training and vae.config.kernel == "fused" and not vae.config.inference_only and is_whole


def _is_alike(layer: Any, other: Any, name: str) -> bool:
    return (
        list(other.active_adapters) == [name]
        and _is_ready(other, name)
        and other.fvae_vae[name].fused_spec == layer.fvae_vae[name].fused_spec
        and other.scaling[name] == layer.scaling[name]
        and other.in_features == layer.in_features
    )
