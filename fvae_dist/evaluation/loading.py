"""The model to evaluate: base and adapter, whole on each rank or sharded by ZeRO-3."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

import fvae_dist.adapter  # noqa: F401  (registers FVAE_LORA with PEFT)
from fvae_dist.adapter.export import ADAPTER_FILE, CONFIG_FILE, read_json, read_tensors
from fvae_dist.evaluation.ranks import environment_ranks, uses_cpu
from fvae_dist.training.adalora import adalora_of
from fvae_dist.training.checkpoint_files import sha256
from fvae_dist.training.checks import StartupError, check_partitioned
from fvae_dist.training.classification import HEAD, SEQ_CLS, load_classifier
from fvae_dist.training.deepspeed_config import load_deepspeed_config, size_for_adapter, zero_stage
from fvae_dist.training.fingerprint import base_fingerprint
from fvae_dist.training.implementations import choose_attention
from fvae_dist.training.labels import read_labels, set_labels
from fvae_dist.training.modeling import check_weights, load_base_model, load_config, load_tokenizer
from fvae_dist.training.recipe import (
    ModelSection,
    Recipe,
    RecipeError,
    RopeScalingSection,
    TrainingSection,
    one_line,
)
from fvae_dist.training.rope_scaling import apply_saved_scaling, check_scaled, positions_of
from fvae_dist.training.zero3 import treat_vaes_as_leaves

SHARDED = Path(__file__).parents[2] / "ds_configs" / "zero3.json"


@dataclass
class ModelSource:
    """What is known of the model before a weight is loaded.

    num_labels: of a classifier, None for a language model. classes: its labels, None where the adapter does not name
    them. deepspeed: the ZeRO-3 configuration, None where every rank
    holds the whole model. rope_scaling: what the adapter was trained with. positions: the longest sequence, None where
    the architecture has no limit.
    """

    recipe: Recipe
    config: PretrainedConfig
    tokenizer: Any
    adapter: Path | None
    deepspeed: dict[str, Any] | None
    attention: str
    num_labels: int | None = None
    classes: list[str] | None = None
    adapter_config: dict[str, Any] = field(default_factory=dict)
    rope_scaling: RopeScalingSection | None = None

    @property
    def positions(self) -> int | None:
        return positions_of(self.config)

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on; whether the model is sharded is not among it."""
        section = self.recipe.model
        return {
            "model": section.name_or_path,
            "model_fingerprint": base_fingerprint(section, self.config, 0),
            "adapter": str(self.adapter) if self.adapter else None,
            "adapter_sha256": sha256(self.adapter / ADAPTER_FILE) if self.adapter else None,
            "adapter_config": {
                key: value for key, value in self.adapter_config.items() if key != "base_model_name_or_path"
            },
            "dtype": section.dtype,
            "attention": self.attention,
            **({"classes": self.classes} if self.classes else {}),
        } | ({"rope_scaling": self.rope_scaling.model_dump(exclude_none=True)} if self.rope_scaling else {})


def find_model(
    model: str,
    adapter: str | None,
    *,
    dtype: str = "auto",
    attention: str = "auto",
    deepspeed: str = "auto",
    trust_remote_code: bool = False,
) -> ModelSource:
    """Check everything about base and adapter that needs no weights.

    Args:
        model: Hub id or folder of the base.
        adapter: folder of a saved adapter, in PEFT's format; None: the base alone.
        dtype: of the base; auto: bfloat16 on a GPU, float32 on CPU.
        deepspeed: auto shards by ZeRO-3 where there is more than one rank; none never does; or a DeepSpeed JSON.

    Raises:
        RecipeError: names the argument.
    """
    if dtype == "auto":
        dtype = "float32" if uses_cpu() else "bfloat16"
    try:
        section = ModelSection.model_validate(
            {"name_or_path": model, "dtype": dtype, "attention": attention, "trust_remote_code": trust_remote_code}
        )
    except ValidationError as error:  # the other values are choices of the command line
        raise RecipeError(f"--model {model[:60]!r}: {error.errors()[0]['msg']}") from None
    world_size = environment_ranks().world_size
    if deepspeed == "auto":
        deepspeed = str(SHARDED) if world_size > 1 else "none"
    training = TrainingSection(output_dir="unused", deepspeed=None if deepspeed == "none" else deepspeed)
    # The sections that loading reads; there is no data to train on, which a whole recipe would ask for.
    recipe = Recipe.model_construct(model=section, training=training, adapter={})  # type: ignore[call-arg]
    try:
        ds_config = load_deepspeed_config(recipe, world_size)
        if ds_config is not None and zero_stage(ds_config) != 3:
            raise RecipeError("--deepspeed: sharding needs zero_optimization.stage 3; stages below shard no weights")
        config = load_config(section)
        check_weights(section)
        tokenizer = load_tokenizer(section)
        attention, _ = choose_attention(section, uses_cpu())
    except RecipeError as error:
        raise as_argument(error) from None
    source = ModelSource(recipe, config, tokenizer, None, ds_config, attention)
    if adapter is not None:
        source.adapter = Path(adapter)
        source.adapter_config, tensors = _read_adapter(source.adapter)
        try:
            source.rope_scaling = apply_saved_scaling(config, source.adapter, model)
        except RecipeError as error:
            raise RecipeError(f"--adapter {error}") from None
        if source.adapter_config.get("task_type") == SEQ_CLS:
            _set_classes(source, tensors)
        # A classifier's head is made beside the sharded base, as adapters are.
        heads = {"classifier", HEAD} if source.num_labels else set()
        whole = set(source.adapter_config.get("modules_to_save") or ()) - heads
        if ds_config is not None and whole:
            raise RecipeError(
                f"--adapter {adapter}: brings whole modules (modules_to_save), which cannot be loaded into a sharded "
                "model; use --deepspeed none"
            )
    return source


def as_argument(error: RecipeError) -> RecipeError:
    """An error about a recipe's key, as one about the argument that stands for it here."""
    message = str(error)
    for key, argument in {
        ", or set model.use_safetensors: false if you trust them": "",
        "model.name_or_path": "--model",
        "model.attention": "--attention",
        "model.tokenizer": "--model",
        "training.deepspeed": "--deepspeed",
        "training.output_dir": "--out",
    }.items():
        message = message.replace(key, argument)
    return RecipeError(message)


def _read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Its configuration and tensors, none of them broken or not finite."""
    if not (folder / CONFIG_FILE).is_file():
        raise RecipeError(f"--adapter {folder}: holds no {CONFIG_FILE}: not a saved adapter")
    if not (folder / ADAPTER_FILE).is_file():
        raise RecipeError(f"--adapter {folder}: holds no {ADAPTER_FILE} (pickled files are not loaded)")
    try:
        return read_json(folder / CONFIG_FILE), read_tensors(folder / ADAPTER_FILE)
    except ValueError as error:
        raise RecipeError(f"--adapter {one_line(error)}") from None


def _saved_labels(tensors: dict[str, Tensor]) -> int | None:
    """Rows of the classification head that was saved with the adapter."""
    heads = [key for key in tensors if key.endswith(("score.weight", "classifier.weight"))]
    return tensors[heads[0]].shape[0] if heads else None


def _set_classes(source: ModelSource, tensors: dict[str, Tensor]) -> None:
    """How many classes the classifier has, and which, if its folder says so."""
    assert source.adapter is not None
    config = source.config
    config.num_labels = _saved_labels(tensors) or config.num_labels or 0
    source.num_labels = config.num_labels
    try:
        source.classes = read_labels(source.adapter)
    except RecipeError as error:
        raise RecipeError(f"--adapter {error}") from None
    if source.classes is not None:
        if len(source.classes) != source.num_labels:
            raise RecipeError(
                f"--adapter {source.adapter}: labels.json names {len(source.classes)} classes, the head has "
                f"{source.num_labels}"
            )
        set_labels(config, source.classes)


def load_model(source: ModelSource, device: torch.device) -> nn.Module:
    """Base and adapter in evaluation mode, on `device` or sharded over the ranks (all must call it).

    Returns the base model with the adapter's layers in it, not PEFT's wrapper: ZeRO-3 needs the very module whose
    forward is called, and `generate` passes the wrapper by. (A prompt-learning method stays in its wrapper.)

    Raises:
        RecipeError: weights that cannot be loaded, or that do not fit.
    """
    live = None
    if source.deepspeed is not None:
        from transformers.integrations import HfDeepSpeedConfig

        live = HfDeepSpeedConfig(source.deepspeed)  # from_pretrained shards for as long as this object lives
    base = _load_base(source)
    check_scaled(base, source.rope_scaling, source.recipe.model.name_or_path)
    model = base if source.adapter is None else _attach(base, source.adapter)
    model.eval().requires_grad_(False)
    if source.deepspeed is not None:
        model = _shard(model, source.deepspeed)
    else:
        model = model.to(device)
    del live
    tokenizer = source.tokenizer
    base.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if source.num_labels is None:
        base.generation_config = greedy_generation(base, tokenizer)
    return model


def _load_base(source: ModelSource) -> Any:
    section = source.recipe.model
    try:
        if source.num_labels is None:
            return load_base_model(source.recipe, source.config, source.attention)
        return load_classifier(
            section.name_or_path,
            config=source.config,
            dtype=getattr(torch, section.dtype),
            attn_implementation=source.attention,
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,
        )
    except RecipeError as error:
        raise as_argument(error) from None
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(f"--model {section.name_or_path}: cannot load it: {one_line(error)}") from None


def _attach(base: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        # PEFT only warns, and goes on with random values.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        try:
            model = PeftModel.from_pretrained(base, str(folder))  # type: ignore[arg-type]
        except (UserWarning, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise RecipeError(f"--adapter {folder}: does not fit the base model: {one_line(error)}") from None
    if adalora_of(model) is not None:
        _fill_again(model, folder)
    return model if model.active_peft_config.is_prompt_learning else model.get_base_model()


@torch.no_grad()
def _fill_again(model: PeftModel, folder: Path) -> None:
    """PEFT makes AdaLoRA's layers anew for the ranks that remain, in the base's dtype: bf16 has rounded the values."""
    for name, value in read_tensors(folder / ADAPTER_FILE).items():
        if ".lora_" in name:  # others (modules_to_save) PEFT has loaded as they are
            model.get_parameter(f"{name}.default").copy_(value)


def _shard(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """Hand the model to DeepSpeed: gathers each layer's weights for as long as its forward runs."""
    import deepspeed

    trainable = [p.numel() for p in model.parameters() if not hasattr(p, "ds_id")]
    frozen: list[int] = [p.ds_numel for p in model.parameters() if hasattr(p, "ds_id")]  # type: ignore[attr-defined]
    size_for_adapter(config, trainable or [1], frozen)
    treat_vaes_as_leaves(model)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    try:
        check_partitioned(engine.module)
    except StartupError as error:
        raise RuntimeError(str(error)) from None
    return engine.module.eval()


def greedy_generation(model: Any, tokenizer: Any) -> GenerationConfig:
    """Nothing of the model's own sampling settings, but its ends of text."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return GenerationConfig(
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
