"""Full fine-tuning, `adapter: {peft_type: FULL}`: every weight of the base is trained, in fp32.

model.dtype bfloat16 is then the dtype of the large products alone (autocast). What is saved is a model, not an adapter:
OUTPUT_DIR/model, and checkpoints with model.safetensors where others have an adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_NAME

from fvae_dist.training.checkpoint_state import trainable
from fvae_dist.training.recipe import Recipe, RecipeError
from fvae_dist.training.saving import SaveError, tell_all_ranks

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
    if training.deepspeed is not None:
        raise RecipeError(
            "adapter.peft_type: FULL is not supported under DeepSpeed, whose weights are gathered and saved here for "
            "adapters only; use training.deepspeed: null"
        )
    if recipe.model.dtype == "float16":
        raise RecipeError("model.dtype: float16 underflows in full fine-tuning without loss scaling; use bfloat16")
    if training.resident_weights is True:
        raise RecipeError("training.resident_weights: true is about frozen weights; peft_type FULL has none")


def with_master_weights(recipe: Recipe) -> Recipe:
    """The recipe to load the base by: in fp32 where it is trained itself, whatever the products are in."""
    if not is_full(recipe.adapter):
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "float32"})})


def save_full(model: Any, output_dir: str | Path, is_main: bool, processing_class: Any = None) -> None:
    """Write a model with transformers' `save_pretrained`, and read it back. All ranks must call this.

    Raises:
        SaveError: on all ranks, if a weight is not finite or differs from what is on disk.
    """
    problem = ""
    if is_main:
        try:
            problem = find_bad_weight(trained_weights(model))
            if not problem:
                model.save_pretrained(str(output_dir))
                problem = _find_difference(model, Path(output_dir))
            if processing_class is not None:
                processing_class.save_pretrained(str(output_dir))
        except (OSError, SafetensorError) as error:
            problem = f"{type(error).__name__}: {error}"
    problem = tell_all_ranks(problem)
    if problem:
        raise SaveError(f"{output_dir}: model not saved: {problem}")


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Tied weights once."""
    return {name: parameter.detach() for name, parameter in trainable(model)}


def find_bad_weight(weights: dict[str, Tensor]) -> str:
    return next((f"{name} is not finite" for name, value in weights.items() if not torch.isfinite(value).all()), "")


def load_weights(model: nn.Module, tensors: dict[str, Tensor]) -> str:
    """Put a checkpoint's weights into the model; which of them does not fit, if any."""
    own = trained_weights(model)
    wrong = sorted({name for name in {*own, *tensors} if name not in own or name not in tensors})
    wrong += [name for name in own if name not in wrong and own[name].shape != tensors[name].shape]
    if not wrong:
        for name, value in own.items():
            value.copy_(tensors[name])
    return ", ".join(wrong[:3])


def _find_difference(model: nn.Module, folder: Path) -> str:
    written: dict[str, Tensor] = {}
    for path in folder.glob("model*.safetensors"):  # save_pretrained has removed those of another run
        written |= load_file(path)
    for name, value in trained_weights(model).items():
        if name not in written or not torch.equal(written[name], value.cpu()):
            return f"{name} differs from the model's in {folder}"
    return ""
