"""What the recipe trains: an adapter of PEFT's, one that starts from data, or every weight. Checked, then attached."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import nn
from transformers import TrainingArguments

from fvae_dist.adapter.flat import flatten
from fvae_dist.training.adalora import check_adalora
from fvae_dist.training.classification import check_classification
from fvae_dist.training.from_data import attach_from_data, check_initialisation, initialisation_from_data
from fvae_dist.training.full import check_full, is_full
from fvae_dist.training.implementations import has_flat_adapters
from fvae_dist.training.modeling import attach_adapter
from fvae_dist.training.recipe import Recipe

if TYPE_CHECKING:
    from fvae_dist.training.run import Prepared

logger = logging.getLogger(__name__)


def check_method(recipe: Recipe) -> None:
    """RecipeError for what the recipe's method cannot be trained with, in one line."""
    check_classification(recipe)
    check_full(recipe)
    check_adalora(recipe)
    check_initialisation(recipe)


def attach_method(base: nn.Module, prepared: Prepared, args: TrainingArguments) -> nn.Module:
    """The model to train, from the frozen base, its adapters flat where they are to be; all ranks must call it.

    Raises:
        RecipeError: the adapter does not fit the base, the data or the checkpoint.
    """
    adapter = prepared.recipe.adapter
    if is_full(adapter):
        return base.requires_grad_(True)
    if initialisation_from_data(adapter) is not None:
        return attach_from_data(base, prepared, args)
    model = attach_adapter(base, adapter)
    if has_flat_adapters(prepared.recipe, prepared.use_cpu) and (number := flatten(model)):
        logger.info("adapters: %d VAEs in two parameters each", number)
    return model
