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
from torch.nn.modules.module import _has_any_global_hook

from fvae_dist.adapter.layer_forward import LayerForward
from fvae_dist.adapter.noise import draw_ticket
from fvae_dist.kernels.fused_vae import Side, fused_updates
from fvae_dist.kernels.passes import MAX_ADAPTERS, Call

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
    circumstances: tuple
    output: Tensor
    run: LayerForward
    side: tuple[Tensor, ...]


class Inbox:
    """Where a layer finds what is ahead. An object of its own: nn.Module is slow to set an attribute."""

    def __init__(self) -> None:
        self.ahead: Ahead | None = None

    def __reduce__(self) -> tuple:
        return Inbox, ()  # a copy of the model begins without

    def take(self) -> Ahead | None:
        ahead, self.ahead = self.ahead, None
        return ahead


class Member(NamedTuple):
    """A layer, the one adapter that trains there, and its parts."""

    layer: Any
    name: str
    vae: Any
    up: Tensor
    scaling: float


def followers_of(block: nn.Module, name: str, kind: type) -> tuple[Any, ...]:
    """Of a block's child, those after it that read the same input and are of that kind."""
    for names in SHARED_INPUT:
        if name in names:
            children = (getattr(block, other, None) for other in names[names.index(name) + 1 :])
            return tuple(child for child in children if isinstance(child, kind))
    return ()


def forward(layer: Any, x: Tensor) -> Tensor | None:
    """The training forward of a layer for x (..., D), with its base; None where it is not computed in this way."""
    ahead = layer.inbox.take()
    leader = _member(layer)
    if leader is None:
        return None
    version = 0 if x.is_inference() else x._version
    circumstances = (leader.name, version, torch.is_grad_enabled())
    if ahead is not None and ahead.x is x and ahead.circumstances == circumstances:
        ahead.run.report(ahead.output, *ahead.side)
        return ahead.output
    dtype = layer.compute_dtype(leader.name, x)
    narrow = x.to(dtype)
    if not leader.vae.is_fused(narrow):
        return None
    others = (_member(other) for other in layer.followers)
    members = [leader, *(other for other in others if other and _is_alike(leader, other))][:MAX_ADAPTERS]
    bases = [_plain_weight(member.layer.base_layer, dtype) for member in members]
    is_weight = all(base is not None for base in bases)
    if not is_weight:
        bases = [member.layer.base_layer(x) for member in members]
    if any(base.dtype != dtype for base in bases):
        return layer.update(leader.name, x, bases[0])
    ticket, num_tokens = draw_ticket(), x.numel() // x.shape[-1]
    runs = [LayerForward(m.layer, m.name, num_tokens, ticket + i) for i, m in enumerate(members)]
    outputs, sides = _updates(members, narrow, bases, runs, is_weight)
    for member, output, run, side in list(zip(members, outputs, runs, sides))[1:]:
        member.layer.inbox.ahead = Ahead(x, circumstances, output, run, side)
    runs[0].report(outputs[0], *sides[0])
    return outputs[0]


def _updates(
    members: Sequence[Member],
    x: Tensor,
    bases: Sequence[Tensor],
    runs: Sequence[LayerForward],
    is_weight: bool,
) -> tuple[Sequence[Tensor], list[tuple[Tensor, ...]]]:
    """Of each layer the output, and what it reports of its side loss."""
    streams = [run.noise.stream(x.numel() // x.shape[-1], x.device) for run in runs]
    keys = streams[0].keys
    if any(stream.keys is not keys for stream in streams):  # they belong to collectors of unlike batches
        alone = [_updates([member], x, [base], [run], is_weight) for member, base, run in zip(members, bases, runs)]
        return [outputs[0] for outputs, _ in alone], [sides[0] for _, sides in alone]
    call = Call(
        members[0].vae.fused_spec,
        tuple(stream.salt for stream in streams),
        members[0].scaling,
        any(run.with_statistics for run in runs),
        any(run.with_loss for run in runs),
        runs[0].recomputes,
    )
    parameters = [parameter for member in members for parameter in member.vae.fused_parameters()]
    ups = [member.up for member in members]
    outputs, sides = fused_updates(call, x, keys.to(x.device), bases, parameters, ups, is_weight)
    return outputs, [_report(member.vae, x, run, side) for member, run, side in zip(members, runs, sides)]


def _report(vae: Any, x: Tensor, run: LayerForward, side: Side) -> tuple[Tensor, ...]:
    return side.loss, *(vae.fused_statistics(x, side) if run.with_statistics else ())


def _member(layer: Any) -> Member | None:
    """None if the layer does not train exactly one adapter with the kernels, or its weights are not whole here without
    ZeRO-3's hooks on its modules."""
    names = layer.active_adapters
    if len(names) != 1 or layer.disable_adapters or layer.merged_adapters:
        return None
    # Past nn.Module's __getattr__, which is slow.
    (name,), parts = names, layer._modules
    vae = parts["fvae_vae"]._modules.get(name)
    if vae is None or not vae.training or vae.config.kernel == "torch" or vae.config.inference_only:
        return None
    up = parts["fvae_lora_B"]._modules[name]._parameters["weight"]
    if hasattr(up, "ds_id") and not layer.stays_whole:
        return None
    return Member(layer, name, vae, up, layer.scaling[name])


def _plain_weight(base: nn.Module, dtype: torch.dtype) -> Any:
    """The frozen weight (O, D) of a base layer that does nothing but multiply by it, whole and in that dtype; None if
    it does more, or anyone has hooked it."""
    if type(base) is not nn.Linear or "forward" in vars(base) or base._parameters.get("bias") is not None:
        return None
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return None
    weight: Any = base._parameters["weight"]
    is_plain = type(weight) is nn.Parameter and not weight.requires_grad and not hasattr(weight, "ds_id")
    return weight if is_plain and weight.dtype == dtype and not _has_any_global_hook() else None


def _is_alike(a: Member, b: Member) -> bool:
    is_same_size = a.layer.in_features == b.layer.in_features and a.vae.fused_spec == b.vae.fused_spec
    is_same_kind = bool(a.vae.parts) == bool(b.vae.parts)
    return a.name == b.name and a.scaling == b.scaling and is_same_size and is_same_kind
