"""LoRA-GA: LoRA that starts from the gradient of the whole weights, which are changed so that nothing else is.

PEFT's file of such an adapter fits the changed base alone, and PEFT cannot change it again: it was made with gradients
that nobody has kept. So adapters and checkpoints are written as what training added to the base as it was, a LoRA of
twice the rank: [A; A0] and [B, -B0], with A0 and B0 what it started from. A resumed run finds both in it. In bf16 the
changed base was rounded, which such a LoRA leaves out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, preprocess_loraga
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from fvae_dist.adapter.export import ADAPTER_FILE, read_tensors
from fvae_dist.training.recipe import RecipeError, one_line

_INITIAL = "loraga_initial"


def attach_by_gradient(
    base: nn.Module, config: LoraConfig, batches: Iterable[dict[str, Tensor]], attach: Callable[[], PeftModel]
) -> PeftModel:
    """Attach an adapter that starts from the mean gradient of the batches' losses.

    Raises:
        RecipeError: PEFT refuses the model, or a layer is too small for the rank.
    """

    def backward() -> None:
        for batch in batches:
            base(**batch, use_cache=False).loss.backward()

    try:
        preprocess_loraga(base, config, backward)
    except ValueError as error:
        raise RecipeError(f"adapter.init_lora_weights: lora_ga: {one_line(error)}") from None
    for name, module in base.named_modules():
        gradient = getattr(module, "_peft_loraga_grad", None)
        patterns = config.rank_pattern or {}
        rank = patterns.get(get_pattern_key(list(patterns), name), config.r)
        if gradient is not None and min(gradient.shape) < 2 * rank:
            sizes = " x ".join(map(str, gradient.shape))
            raise RecipeError(
                f"adapter.r: {rank} is too large for lora_ga, which takes twice the rank of {name}: {sizes}"
            )
    model = attach()
    setattr(model, _INITIAL, {name: value.float().cpu().clone() for name, value in _factors(model).items()})
    return model


def attach_as_before(checkpoint: Path, attach: Callable[[], PeftModel]) -> PeftModel:
    """As the run that wrote the checkpoint began: the base changed alike. Its adapter is loaded by the trainer.

    Raises:
        RecipeError: the checkpoint is none of LoRA-GA's with this rank.
    """
    model = attach()
    try:
        tensors = read_tensors(checkpoint / ADAPTER_FILE)
    except ValueError as error:
        raise RecipeError(f"--resume {error}") from None
    shapes = {name: value.shape for name, value in _factors(model).items()}
    initial = {}
    for name, shape in shapes.items():
        value, rank_at = tensors.get(name), _rank_dimension(name)
        if value is None or value.shape[rank_at] != 2 * shape[rank_at]:
            raise RecipeError(f"--resume {checkpoint}: its adapter is not this recipe's: {name}")
        second = value.chunk(2, dim=rank_at)[1].clone()
        initial[name] = -second if rank_at else second
    for name, layer in _layers(model):
        weight = layer.get_base_layer().weight
        a, b = (initial[f"{name}.{part}.weight"].to(weight.device) for part in ("lora_A", "lora_B"))
        # The arithmetic of PEFT's lora_ga_init, so that the bits are those of the first run.
        offset = layer.scaling["default"] * (b @ a)
        is_transposed = layer.fan_in_fan_out  # type: ignore[attr-defined]
        weight.data = (weight.data.float() - (offset.T if is_transposed else offset)).to(weight.dtype)
    setattr(model, _INITIAL, initial)
    return model


# -------------------------------------------------------------------------------------------------------- what is saved


def saved_config(model: PeftModel) -> Any:
    """A copy of the adapter's configuration, for a file: of LoRA-GA that of the plain LoRA."""
    config = copy.deepcopy(model.peft_config["default"])
    if not hasattr(model, _INITIAL):
        return config
    assert isinstance(config, LoraConfig)
    grown = 2**0.5 if config.use_rslora else 2  # the scaling stays
    config.init_lora_weights, config.lora_ga_config = True, None
    config.r, config.lora_alpha = 2 * config.r, grown * config.lora_alpha  # type: ignore[assignment]
    config.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {key: grown * alpha for key, alpha in (config.alpha_pattern or {}).items()}  # type: ignore[misc]
    return config


def saved_tensors(model: PeftModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors as they go into a file."""
    initial = getattr(model, _INITIAL, {})
    result = dict(tensors)
    for name, first in initial.items():
        now = tensors[name]
        first = first.to(now.device, now.dtype)
        result[name] = torch.cat([now, -first], dim=1) if _rank_dimension(name) else torch.cat([now, first])
    return result


def own_tensors(model: PeftModel, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `saved_tensors`; those of another model as they are."""
    initial = getattr(model, _INITIAL, {})
    return {
        name: value.chunk(2, dim=_rank_dimension(name))[0].clone() if name in initial else value
        for name, value in saved.items()
    }


def is_changed_in_files(model: PeftModel) -> bool:
    return hasattr(model, _INITIAL)


def _factors(model: PeftModel) -> dict[str, Tensor]:
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: value for name, value in tensors.items() if name.endswith((".lora_A.weight", ".lora_B.weight"))}


def _layers(model: PeftModel) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _rank_dimension(name: str) -> int:
    return int(name.endswith(".lora_B.weight"))
