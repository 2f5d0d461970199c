"""Writing an adapter: gathered from ZeRO-3 shards, fp32, safetensors, read back before anyone relies on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fvae_dist.adapter.flat import split_flat
from fvae_dist.training.adalora import adalora_of
from fvae_dist.training.loraga import is_changed_in_files, saved_config, saved_tensors

ADAPTER_FILE = "adapter_model.safetensors"
_GATHER_CHUNK = 64


class SaveError(RuntimeError):
    """An adapter could not be written completely; raised on every rank."""


def save_adapter(model: PeftModel, output_dir: str | Path, is_main: bool, processing_class: Any = None) -> None:
    """Write every adapter of `model` in PEFT's format. All ranks must call this: ZeRO-3 gathers parameters.

    Floating point values are written as fp32. After writing, the file is read again and compared.

    Args:
        model: a PeftModel, partitioned or not.
        output_dir: folder, created if needed (other adapters than "default" go to sub-folders, as in PEFT).
        is_main: whether this rank writes.
        processing_class: tokenizer, saved along.

    Raises:
        SaveError: on all ranks, if a tensor is empty, not finite, or differs from what is on disk.
    """
    state_dict = full_trainable_state_dict(model, keep=is_main)

    def write(output: Path) -> str:
        output.mkdir(parents=True, exist_ok=True)
        problem = find_bad_tensor(model, state_dict)
        if problem:
            return problem
        model.save_pretrained(str(output), state_dict=state_dict)
        if is_changed_in_files(model):
            saved_config(model).save_pretrained(str(output))
            save_file(_as_saved(model, state_dict, "default"), output / ADAPTER_FILE, {"format": "pt"})
        _make_readable(model, output)
        return _find_difference(model, state_dict, output)

    write_on_main("adapter", write, output_dir, is_main, processing_class)


def write_on_main(
    what: str, write: Callable[[Path], str], output_dir: str | Path, is_main: bool, processing_class: Any = None
) -> None:
    """Have the main rank write a folder, with the tokenizer beside it. All ranks must call this.

    Args:
        what: is written, for the message.
        write: writes it; returns what is wrong with it, or nothing.

    Raises:
        SaveError: on all ranks, what `write` returned, or that it could not write.
    """
    problem = ""
    if is_main:
        try:
            problem = write(Path(output_dir))
            if processing_class is not None:
                processing_class.save_pretrained(str(output_dir))
        except (OSError, SafetensorError) as error:
            problem = f"{type(error).__name__}: {error}"
    problem = tell_all_ranks(problem)
    if problem:
        raise SaveError(f"{output_dir}: {what} not saved: {problem}")


def full_trainable_state_dict(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The model's state dict with every trained parameter whole, fp32 and on CPU; frozen ZeRO-3 shards as they are.

    Args:
        keep: whether this rank needs the values (gathering still involves every rank).
    """
    state_dict = dict(model.state_dict()) if keep else {}
    wanted = {name: parameter for name, parameter in model.named_parameters() if _belongs_to_adapter(name, parameter)}
    items = iter(wanted.items())
    # Bounded gathers, in the same order on every rank: all of them at once would not fit beside a large model.
    while chunk := list(islice(items, _GATHER_CHUNK)):
        with _gathered([parameter for _, parameter in chunk]):
            if keep:
                whole = split_flat(model, dict(chunk))
                state_dict |= {name: value.detach().float().cpu().clone() for name, value in whole.items()}
    return state_dict


def _belongs_to_adapter(name: str, parameter: nn.Parameter) -> bool:
    return parameter.requires_grad or ".fvae_" in name or ".lora_" in name


def _gathered(parameters: list[nn.Parameter]):
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=None)
    return torch.no_grad()


def _adapters_on_disk(model: PeftModel, output: Path) -> dict[str, Path]:
    return {name: (output if name == "default" else output / name) / ADAPTER_FILE for name in model.peft_config}


def _make_readable(model: PeftModel, output: Path) -> None:
    """safetensors writes files only their owner can read; give them the modes of any other new file."""
    mask = os.umask(0)
    os.umask(mask)
    for path in _adapters_on_disk(model, output).values():
        path.chmod(0o666 & ~mask)


def find_bad_tensor(model: PeftModel, state_dict: dict[str, Tensor]) -> str:
    for adapter in model.peft_config:
        tensors = _as_saved(model, state_dict, adapter)
        if not tensors:
            return f"adapter {adapter!r} has no tensors"
        for name, tensor in tensors.items():
            if tensor.numel() == 0 and adalora_of(model) is None:  # which may leave a layer no rank at all
                return f"{name} is empty (a ZeRO-3 shard that was not gathered)"
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return f"{name} is not finite"
    return ""


def _as_saved(model: PeftModel, state_dict: dict[str, Tensor], adapter: str) -> dict[str, Tensor]:
    tensors = get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=adapter)
    return saved_tensors(model, tensors) if adapter == "default" else tensors


def _find_difference(model: PeftModel, state_dict: dict[str, Tensor], output: Path) -> str:
    for adapter, path in _adapters_on_disk(model, output).items():
        written = load_file(path)
        expected = _as_saved(model, state_dict, adapter)
        if set(written) != set(expected):
            return f"{path} has other tensors than the model"
        for name, tensor in expected.items():
            if written[name].dtype != tensor.dtype or not torch.equal(written[name], tensor.cpu()):
                return f"{path}: {name} differs from the model's"
    return ""


def tell_all_ranks(problem: str) -> str:
    """Rank 0's problem, on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return problem
    box = [problem]
    dist.broadcast_object_list(box, src=0)
    return box[0] or ""
