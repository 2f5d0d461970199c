"""An adapter's parameters: fp32 always, and on request two flat ones instead of some twenty.

Autograd, an optimizer, clipping and DeepSpeed take microseconds to tenths of a millisecond of the host for every
parameter, however small it is. `flatten(model)` puts those of each VAE into two vectors, `WEIGHTS` (the matrices) and
`BIASES` (all others, so that whoever spares a "bias" from weight decay spares these). A submodule then finds its own as
views, and a state dict, and so every file, has each under the name and in the shape that it had: nothing that is saved
says whether they were flat.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

NARROW = (torch.float16, torch.bfloat16)
WEIGHTS, BIASES = "flat_weights", "flat_biases"


class Fp32Module(nn.Module):
    """A module whose parameters ignore casts to 16 bit, as in `model.to(torch.bfloat16)`; float64 is allowed."""

    def _apply(self, fn, recurse=True):
        def keep_wide(tensor: Tensor) -> Tensor:
            cast = fn(tensor)
            if cast.dtype in NARROW and tensor.dtype not in NARROW:
                return tensor.to(device=cast.device)
            return cast

        return super()._apply(keep_wide, recurse)


class InFlat:
    """A parameter of a submodule: the module's own until a `FlatModule` takes it over, then a view into that."""

    def __init__(self, name: str):
        self._name = name

    def __get__(self, module: Any, kind: type | None = None) -> Any:
        if module is None:
            return self
        taken = module.__dict__.get("flat_parts", {})
        if self._name in taken:
            owner, name = taken[self._name]
            return owner.part(name)
        if self._name in module._parameters:
            return module._parameters[self._name]
        raise AttributeError(self._name)

    def __set__(self, module: Any, value: Any) -> None:
        """`module.weight += ...` ends here, its work done; anything else would be a tensor that nobody saves."""
        own = self.__get__(module)
        is_own = torch.is_tensor(value) and (value.shape, value.data_ptr()) == (own.shape, own.data_ptr())
        if not is_own:
            raise AttributeError(f"{self._name} is a part of a flat parameter: change its values in place")


class Part(NamedTuple):
    """Of a flat parameter: its name in state dicts, its shape, in which of the two it is, and where it begins."""

    name: str
    shape: torch.Size
    flat: str
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def of(self, flat: Tensor) -> Tensor:
        """A view of a tensor of the flat parameter's shape; an empty one, of ZeRO-3's shards, as it is."""
        return flat.narrow(0, self.start, self.size).view(self.shape) if flat.numel() else flat


class FlatModule(Fp32Module):
    """A module that can take over all parameters of its submodules, whose classes say of each that it is `InFlat`.

    Args:
        first: names of those that stand first in a flat parameter; the others follow in their order.
    """

    def __init__(self, first: Sequence[str] = ()):
        super().__init__()
        self._first = tuple(first)
        # By name, in the order of the submodules, and of each flat parameter in its own; empty until they are flat.
        self.parts: dict[str, Part] = {}
        self.parts_of: dict[str, list[Part]] = {WEIGHTS: [], BIASES: []}
        self._views: dict[str, Tensor] | None = None

    def flatten(self) -> bool:
        """Take over the parameters of all submodules. False, and nothing is changed, where some of them train and
        others do not.

        Raises:
            RuntimeError: ZeRO-3 has partitioned them, or they have gradients, and so an optimizer, already.
        """
        found = dict(self.named_parameters())
        if self.parts or len({parameter.requires_grad for parameter in found.values()}) > 1:
            return bool(self.parts)
        if any(hasattr(parameter, "ds_id") for parameter in found.values()):
            raise RuntimeError("flatten adapters before ZeRO-3 partitions them")
        if any(parameter.grad is not None for parameter in found.values()):
            raise RuntimeError("flatten adapters before an optimizer is made: these have gradients already")
        names = dict.fromkeys([name for name in self._first if name in found] + list(found))
        for kind in (WEIGHTS, BIASES):
            tensors = {name: found[name] for name in names if (found[name].dim() > 1) == (kind == WEIGHTS)}
            start = 0
            for name, tensor in tensors.items():
                self.parts_of[kind].append(Part(name, tensor.shape, kind, start))
                start += tensor.numel()
            with torch.inference_mode(False):
                values = torch.cat([tensor.detach().flatten() for tensor in tensors.values()])
                setattr(self, kind, nn.Parameter(values, next(iter(tensors.values())).requires_grad))
        by_name = {part.name: part for of_kind in self.parts_of.values() for part in of_kind}
        self.parts = {name: by_name[name] for name in found}
        for name in found:
            path, _, own = name.rpartition(".")
            module = self.get_submodule(path)
            del module._parameters[own]
            module.__dict__.setdefault("flat_parts", {})[own] = (self, name)
        return True

    def part(self, name: str) -> Tensor:
        """The parameter of that name, a view through which gradients flow; of ZeRO-3's shards the flat one, empty."""
        if self._views is not None:
            return self._views[name]
        part = self.parts[name]
        return part.of(self._parameters[part.flat])  # type: ignore[arg-type]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Inside, every part is the same view each time: one operation for autograd, where each view would be one whose
        gradient is as large as the whole.

        Raises:
            RuntimeError: ZeRO-3 has partitioned them.
        """
        before = self._views
        try:
            if self.parts:
                views: dict[str, Tensor] = {}
                for kind, parts in self.parts_of.items():
                    flat: Any = self._parameters[kind]
                    if not flat.numel():
                        name = type(self).__name__
                        raise RuntimeError(f"{kind} of a {name} is partitioned by ZeRO-3 and has not been gathered")
                    pieces = flat.split_with_sizes([part.size for part in parts])
                    views |= {part.name: piece.view(part.shape) for part, piece in zip(parts, pieces, strict=True)}
                self._views = views
            yield
        finally:
            self._views = before

    # ------------------------------------------------------------------------------------------------- state dicts

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.parts:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        for part in self.parts.values():
            value = part.of(self._parameters[part.flat])  # type: ignore[arg-type]
            destination[prefix + part.name] = value if keep_vars else _with_own_storage(value.detach())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if not self.parts:
            super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        hooks: Any = self._load_state_dict_pre_hooks.values()
        for hook in hooks:
            hook(state_dict, prefix, *rest)
        for kind, parts in self.parts_of.items():  # DeepSpeed's own state dicts have the names of parameters
            if prefix + kind in state_dict:
                whole = state_dict.pop(prefix + kind)
                state_dict.update({prefix + part.name: part.of(whole) for part in parts})
        # Taken out, so that submodules do not find values for which they have no parameters.
        found = {name: state_dict.pop(prefix + name) for name in self.parts if prefix + name in state_dict}
        if strict:
            missing_keys += [prefix + name for name in self.parts if name not in found]
            below = [key for key in state_dict if key.startswith(prefix)]
            unexpected_keys += [key for key in below if key.removeprefix(prefix).split(".")[0] not in self._modules]
        for name, value in list(found.items()):
            flat: Any = self._parameters[self.parts[name].flat]
            own = self.parts[name].shape if flat.numel() else flat.shape
            if value.shape != own:
                error_msgs.append(
                    f"size mismatch for {prefix}{name}: copying a param with shape {value.shape} from checkpoint, the "
                    f"shape in current model is {own}."
                )
                del found[name]
        for kind in (WEIGHTS, BIASES):
            problem = self._set_parts(kind, found, local_metadata.get("assign_to_params_buffers", False))
            if problem:
                error_msgs.append(f"{prefix}{kind} {problem}")

    @torch.no_grad()
    def _set_parts(self, kind: str, found: Mapping[str, Tensor], assign: bool) -> str:
        """Set the values of parts, as many as there are; all of them make another parameter of one on the meta device.
        Returns why that cannot be, or nothing."""
        flat: Any = self._parameters[kind]
        parts = [part for part in self.parts_of[kind] if part.name in found]
        if not flat.is_meta or not parts:
            for part in parts:
                part.of(flat).copy_(found[part.name])
            return ""
        if not assign:
            text = f"{kind} is on the meta device: loading values is a no-op (did you mean to pass `assign=True`?)"
            warnings.warn(text, stacklevel=2)
            return ""
        number = len(self.parts_of[kind])
        if len(parts) < number:
            return f"is on the meta device and needs all its parts: {len(parts)} of {number} are there"
        values = torch.cat([found[part.name].flatten() for part in parts]).to(flat.dtype)
        self._parameters[kind] = nn.Parameter(values, flat.requires_grad)
        return ""


def _with_own_storage(part: Tensor) -> Tensor:
    """The same memory in a storage of its own: accelerate looks for tensors that share one, and saves one of them."""
    return part if part.is_meta or not part.numel() else torch.from_dlpack(part)


# ------------------------------------------------------------------------------------------------------ of whole models


def flatten(model: nn.Module) -> int:
    """Make two parameters of those of every adapter's VAE in the model, before an optimizer is made for them.

    Gradients are the same, and so is training with an optimizer that treats each number by itself, as Adam and SGD do,
    and groups that are made by these two names. An optimizer that looks at shapes or takes norms of whole tensors
    (Adafactor, LAMB, Muon) sees two vectors, and so does a rule for groups that looks at dimensions or at the names
    of submodules (LoRA+'s). Freeze parts before: afterwards submodules own no parameters.

    Returns:
        How many VAEs are flat; one of which only some parameters train stays as it is.

    Raises:
        RuntimeError: adapters are partitioned by ZeRO-3, or have gradients already.
    """
    return sum(module.flatten() for module in _owners(model).values())


def split_flat(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of the model's parameters (themselves, gradients, moments), with the parts in the place of
    each flat one: views, by their names in state dicts."""
    owners = _owners(model)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, _, own = name.rpartition(".")
        if path in owners and own in (WEIGHTS, BIASES):
            found |= {_join(path, part.name): part.of(tensor) for part in owners[path].parts_of[own]}
        else:
            found[name] = tensor
    return found


def join_flat(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `split_flat`; flat parameters of which no part is there are left out.

    Raises:
        ValueError: another part is missing, or has another shape.
    """
    found = dict(tensors)
    for path, owner in _owners(model).items():
        for kind, parts in owner.parts_of.items():
            if not any(_join(path, part.name) in found for part in parts):
                continue
            pieces = []
            for part in parts:
                name = _join(path, part.name)
                value = found.pop(name, None)
                if value is None or value.shape != part.shape:
                    raise ValueError(f"{name} is missing or has another shape")
                pieces.append(value.flatten())
            found[_join(path, kind)] = torch.cat(pieces)
    return found


def _owners(model: nn.Module) -> dict[str, FlatModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FlatModule)}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
