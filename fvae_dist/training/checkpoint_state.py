"""The state of a training run as plain tensors and JSON, independent of ranks, accumulation and ZeRO stage.

Adapters, their two Adam moments, scheduler and random states: small, so that they are kept whole and not in shards. A
run goes on from them on another number of ranks or at another stage. Nothing is pickled.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fvae_dist.adapter.flat import join_flat, split_flat

MOMENTS = ("exp_avg", "exp_avg_sq")


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


# ----------------------------------------------------------------------------------------------------------- optimizer


def optimizer_state(model: nn.Module, optimizer: Any, keep: bool) -> tuple[dict[str, Tensor], int]:
    """Adam's moments of every trained parameter, whole, on CPU, "MOMENT/NAME" -> fp32, and its step count. Names are
    those of state dicts: of an adapter's flat parameters the parts.

    Args:
        optimizer: DeepSpeed's or torch's, as the trainer holds it. All ranks must call this (ZeRO gathers).
        keep: whether this rank needs the values.

    Raises:
        ValueError: no step has been taken yet, or the optimizer is not Adam's kind.
    """
    zero, base = _unwrap(optimizer)
    _link_fragments(zero)
    moments: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
    for name, parameter in trainable(model):
        for moment in MOMENTS:
            if zero is None:
                value = base.state.get(parameter, {}).get(moment)
            else:
                from deepspeed.utils import safe_get_full_optimizer_state

                value = safe_get_full_optimizer_state(parameter, moment)
            if value is None:
                raise ValueError(f"{type(base).__name__} has no {moment} of {name}")
            if keep:
                moments[moment][name] = value.detach().float().cpu().view(shape_of(parameter))
    parts = {moment: split_flat(model, of_one) for moment, of_one in moments.items()}
    named = {f"{moment}/{name}": value.clone() for moment, of_one in parts.items() for name, value in of_one.items()}
    return named, _step_of(base)


def load_optimizer_state(model: nn.Module, optimizer: Any, moments: dict[str, Tensor], step: int) -> None:
    """Put moments and step count back, whatever the sharding now is.

    Raises:
        ValueError: a moment is missing, or has another shape.
    """
    zero, base = _unwrap(optimizer)
    whole: dict[str, dict[str, Tensor]] = {}
    for moment in MOMENTS:
        named = {key.partition("/")[2]: value for key, value in moments.items() if key.startswith(f"{moment}/")}
        try:
            whole[moment] = join_flat(model, named)
        except ValueError as error:
            raise ValueError(f"optimizer state: {moment} of {error}") from None
        for name, parameter in trainable(model):
            value = whole[moment].get(name)
            if value is None or value.shape != shape_of(parameter):
                raise ValueError(f"optimizer state: {moment} of {name} is missing or has another shape")
    _make_states(zero, base, step)
    _link_fragments(zero)
    for name, parameter in trainable(model):
        for moment in MOMENTS:
            _set(parameter, zero, base, moment, whole[moment][name])


def _link_fragments(zero: Any) -> None:
    """Link each parameter to its part of the states, again.

    DeepSpeed's stages 1 and 2 do it once, when the first of their groups has stepped and the others have no state yet.
    """
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _set(parameter: Any, zero: Any, base: Any, moment: str, value: Tensor) -> None:
    if zero is None:
        base.state[parameter][moment].copy_(value)
    elif hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_set_local_optimizer_state

        # Not the "full" function: it takes no parameter whose size the ranks do not divide.
        safe_set_local_optimizer_state(parameter, own_shard(parameter, value), moment)
    else:
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)


def own_shard(parameter: Any, value: Tensor) -> Tensor:
    """This rank's part of a whole value of a ZeRO-3 parameter, padded as DeepSpeed's."""
    size = parameter.ds_tensor.numel()
    rank = parameter._z3_optimizer._get_param_partition_rank(parameter)
    flat = value.flatten()
    padded = torch.cat([flat, flat.new_zeros(max(size * (rank + 1) - len(flat), 0))])
    return padded[size * rank : size * (rank + 1)].to(parameter.ds_tensor.device)


def _make_states(zero: Any, base: Any, step: int) -> None:
    """Adam makes its states in its first step, which has not come yet."""
    for group in base.param_groups:
        if "step" in group:
            group["step"] = step
    # ZeRO-3 lends these to Adam in a step only; Adam's own groups are empty between them.
    flat = getattr(zero, "fp32_partitioned_groups_flat", None) or getattr(zero, "single_partition_of_fp32_groups", None)
    is_fused = any(group.get("fused") for group in base.param_groups)
    for parameter in flat or [parameter for group in base.param_groups for parameter in group["params"]]:
        state = base.state[parameter]
        state["step"] = torch.tensor(float(step), device=parameter.device if is_fused else "cpu")
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(parameter)


def _unwrap(optimizer: Any) -> tuple[Any, Any]:
    """(ZeRO's optimizer or None, the one that does the arithmetic)."""
    while type(optimizer).__module__.startswith("accelerate."):
        optimizer = optimizer.optimizer
    is_zero = type(optimizer).__module__.startswith("deepspeed.runtime")
    return (optimizer, optimizer.optimizer) if is_zero else (None, optimizer)


def _step_of(base: Any) -> int:
    steps = {int(state["step"]) for state in base.state.values() if "step" in state}
    steps |= {int(group["step"]) for group in base.param_groups if "step" in group}
    if len(steps) != 1:
        raise ValueError(f"the optimizer's step counts are {sorted(steps)}, not one")
    return steps.pop()


def shape_of(parameter: Any) -> torch.Size:
    """Of the whole parameter, also where this rank has a part of it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


# ------------------------------------------------------------------------------------------------------- random states


def random_states(device: torch.device) -> dict[str, Tensor] | None:
    """The random states of all ranks, "RANK/GENERATOR" -> integers; None but on rank 0. All ranks must call this."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # type: ignore[misc]
    mine = {
        "python": torch.tensor([version, *internal], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), int(position), int(has_gauss)], dtype=torch.int64),
        "numpy_gauss": torch.tensor([float(cached)], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(device)
    everyones: list[Any] = [mine]
    if dist.is_available() and dist.is_initialized():
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, mine)
        if dist.get_rank() != 0:
            return None
    return {f"{rank}/{name}": value for rank, states in enumerate(everyones) for name, value in states.items()}


def load_random_states(states: dict[str, Tensor], rank: int, device: torch.device) -> bool:
    """Restore this rank's generators; False if the states are those of a run with fewer ranks."""
    mine = {key.partition("/")[2]: value for key, value in states.items() if key.startswith(f"{rank}/")}
    if not mine:
        return False
    version, *internal = mine["python"].tolist()
    gauss = mine["python_gauss"].tolist()
    random.setstate((version, tuple(internal), gauss[0] if gauss else None))
    *keys, position, has_gauss = mine["numpy"].tolist()
    np.random.set_state(
        ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, float(mine["numpy_gauss"][0]))
    )
    torch.set_rng_state(mine["torch"])
    if device.type == "cuda" and "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"], device)
    return True
