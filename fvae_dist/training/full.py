"""Full fine-tuning, `adapter: {peft_type: FULL}`: every weight of the base is trained, in fp32.

model.dtype bfloat16 is then the dtype of the products alone: by autocast around fp32 weights, or under DeepSpeed by its
own bf16 copy of fp32 master weights, which ZeRO shards. What is saved is a model, not an adapter, from the fp32 values:
OUTPUT_DIR/model, and checkpoints with model.safetensors where others have an adapter.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_NAME

from fvae_dist.training.checkpoint_state import own_shard, shape_of, trainable
from fvae_dist.training.deepspeed_config import asked_stage
from fvae_dist.training.recipe import Recipe, RecipeError
from fvae_dist.training.saving import write_on_main

FULL = "FULL"
MODEL_FILE = SAFE_WEIGHTS_NAME


def is_full(adapter: dict[str, Any]) -> bool:
    return str(adapter.get("peft_type")) == FULL


def check_full(recipe: Recipe) -> None:
    """RecipeError for what full fine-tuning cannot be done with."""
    adapter, training = recipe.adapter, recipe.training
    if not is_full(adapter):
        return
    for key in adapter:
        if key != "peft_type":
            raise RecipeError(f"adapter.{key}: goes not with peft_type FULL, which trains every weight as it is")
    if training.deepspeed is not None and asked_stage(recipe) != 3:
        raise RecipeError(
            "adapter.peft_type: FULL needs zero_optimization.stage 3, or training.deepspeed: null; stages below keep "
            f"masters and moments in pieces that cannot be saved here ({training.deepspeed})"
        )
    if recipe.model.dtype == "float16":
        raise RecipeError("model.dtype: float16 underflows in full fine-tuning without loss scaling; use bfloat16")
    if training.resident_weights is True:
        raise RecipeError("training.resident_weights: true is about frozen weights; peft_type FULL has none")


def with_master_weights(recipe: Recipe) -> Recipe:
    """The recipe to load the base by: in fp32 where it is trained itself, unless DeepSpeed makes its own masters."""
    if not is_full(recipe.adapter) or recipe.training.deepspeed is not None:
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "float32"})})


def save_full(model: Any, output_dir: str | Path, is_main: bool, processing_class: Any = None) -> None:
    """Write a model with transformers' `save_pretrained`, and read it back. All ranks must call this.

    Raises:
        SaveError: on all ranks, if a weight is not finite or differs from what is on disk.
    """
    weights = whole_weights(model, keep=is_main)

    def write(output: Path) -> str:
        problem = find_bad_weight(weights)
        if problem:
            return problem
        model.save_pretrained(str(output), state_dict=weights)
        return _find_difference(weights, output)

    write_on_main("model", write, output_dir, is_main, processing_class)


def whole_weights(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Every trained weight whole, in fp32 and on CPU, tied ones once. All ranks must call this: ZeRO gathers.

    Args:
        keep: whether this rank needs the values.
    """
    weights = {}
    for name, parameter in trainable(model):
        value = parameter.detach()
        if is_sharded(parameter):
            from deepspeed.utils import safe_get_full_fp32_param

            value = safe_get_full_fp32_param(parameter)
        if keep:
            weights[name] = value.cpu().clone().view(shape_of(parameter))
    return weights


def is_sharded(parameter: Any) -> bool:
    """Whether ZeRO-3 holds this parameter's fp32 values."""
    return hasattr(parameter, "ds_id")


def find_bad_weight(weights: dict[str, Tensor]) -> str:
    return next((f"{name} is not finite" for name, value in weights.items() if not torch.isfinite(value).all()), "")


def load_weights(model: nn.Module, tensors: dict[str, Tensor]) -> str:
    """Put a checkpoint's weights into the model, before an engine has it; which of them does not fit, if any."""
    own = dict(trainable(model))
    wrong = sorted({name for name in {*own, *tensors} if name not in own or name not in tensors})
    wrong += [name for name in own if name not in wrong and shape_of(own[name]) != tensors[name].shape]
    if not wrong:
        for name, parameter in own.items():
            with _writable(parameter), torch.no_grad():
                parameter.copy_(tensors[name])
    return ", ".join(wrong[:3])


def load_master_weights(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put a checkpoint's weights into ZeRO's fp32 masters, of which `load_weights` has set the rounded copies."""
    for name, parameter in trainable(model):
        if is_sharded(parameter):
            from deepspeed.utils import safe_set_local_fp32_param

            safe_set_local_fp32_param(parameter, own_shard(parameter, tensors[name]))


def _writable(parameter: Any) -> AbstractContextManager:
    if not is_sharded(parameter):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def _find_difference(weights: dict[str, Tensor], folder: Path) -> str:
    written: dict[str, Tensor] = {}
    for path in folder.glob("model*.safetensors"):  # save_pretrained has removed those of another run
        written |= load_file(path)
    for name, value in weights.items():
        if name not in written or not torch.equal(written[name], value):
            return f"{name} differs from the model's in {folder}"
    return ""
