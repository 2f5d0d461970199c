"""The one place that builds the DeepSpeed configuration: a JSON with static knobs, plus what the recipe states.

Batch sizes, accumulation, clipping, dtypes and the optimizer are stated once, in the recipe. A JSON that states them
too must say "auto" or the same value, otherwise the run is refused.
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any, NoReturn

from fvae_dist.training.recipe import Recipe, RecipeError

_OPTIMIZER_KEYS = ("optimizer", "scheduler")


def load_deepspeed_config(recipe: Recipe, world_size: int, ranks_per_node: int | None = None) -> dict[str, Any] | None:
    """The DeepSpeed dict of a recipe, or None for training.deepspeed: null.

    Precision (fp32 adapters around a 16-bit base): at stage 3 bf16/fp16 is enabled, because it is what the base is
    loaded and sharded in; adapters are attached outside zero.Init and stay fp32. At stages 0 to 2 it is not, because
    DeepSpeed would cast the adapters too. Gradients are reduced and accumulated in fp32 at every stage.

    Args:
        ranks_per_node: what hpZ's "auto" is; default: what the launcher says.

    Raises:
        RecipeError: unreadable JSON, or one that contradicts the recipe; names file and key.
    """
    if recipe.training.deepspeed is None:
        return None
    path = Path(recipe.training.deepspeed)
    config = _read(path)
    stage = _stage_of(config, path)
    zero = config.setdefault("zero_optimization", {})
    for key in _OPTIMIZER_KEYS:
        if config.pop(key, "auto") != "auto":
            raise RecipeError(f"{path}: {key}: is stated in the recipe (training.*); remove it here")
    stated = stated_by_recipe(recipe, stage, world_size)
    _refuse_typos(config, [*stated, *_OPTIMIZER_KEYS, "zero_optimization"], path)
    _merge(config, stated, path, ())
    if zero.get("zero_hpz_partition_size") == "auto":
        launched = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))
        zero["zero_hpz_partition_size"] = ranks_per_node or int(launched)
    # DeepSpeed's clock waits for the device twice a step; TensorBoard has the throughput.
    config.setdefault("timers", {"throughput": {"enabled": False}})
    partition = zero.get("zero_hpz_partition_size", 1)
    if not _is_int(partition) or partition < 1 or world_size % partition:
        raise RecipeError(
            f"{path}: zero_optimization.zero_hpz_partition_size: {partition!r} does not divide the {world_size} ranks"
        )
    return config


def asked_stage(recipe: Recipe) -> int:
    """ZeRO stage that the recipe asks for, however many ranks there are; RecipeError as `load_deepspeed_config`."""
    path = recipe.training.deepspeed
    return 0 if path is None else _stage_of(_read(Path(path)), Path(path))


def _stage_of(config: dict[str, Any], path: Path) -> int:
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise RecipeError(f"{path}: zero_optimization: must be an object")
    stage = zero.get("stage", 0)
    if not _is_int(stage) or stage not in (0, 1, 2, 3):
        raise RecipeError(f"{path}: zero_optimization.stage: must be 0, 1, 2 or 3, got {stage!r}")
    return stage


def zero_stage(config: dict[str, Any] | None) -> int:
    """ZeRO stage of a DeepSpeed dict; 0 without one."""
    return 0 if config is None else config["zero_optimization"].get("stage", 0)


def stated_by_recipe(recipe: Recipe, stage: int, world_size: int) -> dict[str, Any]:
    """The keys of a DeepSpeed config that the recipe decides."""
    training, dtype = recipe.training, recipe.model.dtype
    return {
        "train_micro_batch_size_per_gpu": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "train_batch_size": training.per_device_train_batch_size * training.gradient_accumulation_steps * world_size,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": stage == 3 and dtype == "bfloat16"},
        "fp16": {"enabled": stage == 3 and dtype == "float16"},
        # Without these two, gradients of fp32 adapters are still reduced and accumulated in the base's 16 bits.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def size_for_adapter(config: dict[str, Any], trainable_sizes: list[int], base_sizes: list[int]) -> None:
    """Fill the stage-3 sizes left on "auto" from the adapter, in place.

    Args:
        trainable_sizes: elements of every trainable tensor.
        base_sizes: elements of every frozen tensor.
    """
    zero = config["zero_optimization"]
    largest = max(trainable_sizes)
    if zero.get("stage3_param_persistence_threshold") == "auto":
        # Adapters stay whole on every rank, and with them whatever of the base is smaller: norms, and in a tiny model
        # some matrices. Where that would be the whole base, DeepSpeed's own default stands.
        threshold = largest + 1
        zero["stage3_param_persistence_threshold"] = threshold if max(base_sizes) >= threshold else 100_000
    if zero.get("reduce_bucket_size") == "auto":
        # The default of 5e8 elements is a 2 GB buffer for a few million adapter gradients.
        zero["reduce_bucket_size"] = max(largest, min(sum(trainable_sizes), 50_000_000))


def _read(path: Path) -> dict[str, Any]:
    def refuse_constant(name: str) -> NoReturn:
        raise RecipeError(f"{path}: not valid JSON: {name}")

    try:
        config = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=lambda pairs: _no_duplicates(pairs, path),
            parse_constant=refuse_constant,
        )
    except OSError as error:
        raise RecipeError(f"training.deepspeed: {path}: {(error.strerror or str(error)).lower()}") from None
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise RecipeError(f"{path}: a DeepSpeed config is a JSON object")
    return config


def _no_duplicates(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise RecipeError(f"{path}: duplicate key {key}")
        result[key] = value
    return result


def _refuse_typos(config: dict[str, Any], known: list[str], path: Path) -> None:
    """DeepSpeed passes over top-level keys that it does not know: a misspelt section would leave ZeRO off."""
    for key in config:
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if nearest and key not in known:
            raise RecipeError(f"{path}: {key}: unknown key; did you mean {nearest[0]}?")


def _is_same(given: Any, stated: Any) -> bool:
    return given == stated and isinstance(given, bool) == isinstance(stated, bool)  # 1 is not true


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _merge(config: dict[str, Any], stated: dict[str, Any], path: Path, parents: tuple[str, ...]) -> None:
    for key, value in stated.items():
        dotted = ".".join((*parents, key))
        if isinstance(value, dict):
            section = config.setdefault(key, {})
            if not isinstance(section, dict):
                raise RecipeError(f"{path}: {dotted}: must be an object")
            _merge(section, value, path, (*parents, key))
        elif key in config and config[key] != "auto" and not _is_same(config[key], value):
            raise RecipeError(f"{path}: {dotted}: is {config[key]!r} here and {value!r} in the recipe; remove it here")
        else:
            config[key] = value
