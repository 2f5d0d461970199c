"""The recipe: one YAML file that states a run, read strictly.

Every key is typed and documented here, beside its default. A key that is unknown, duplicated, of the wrong type or in
contradiction with another is a `RecipeError` that names the file, the line and the key; nothing heavy is imported to
find that out, so a typo costs a second and no GPU memory.

    recipe = load_recipe("launch/recipes/quickstart.yaml", overrides=["training.learning_rate=1e-4"])
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class RecipeError(Exception):
    """A recipe, data or argument that cannot be run; the message is one line for the user. Commands exit with 2."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True)


class ModelSection(_Section):
    """The frozen base model."""

    name_or_path: str = Field(description="Hugging Face id or local folder of a causal language model.")
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit).")
    tokenizer: str | None = Field(None, description="Tokenizer id or folder; default: the model's own.")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="Dtype of the frozen weights and of the large products. Adapters are always fp32."
    )
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = Field(
        "auto", description="auto = flash_attention_2 where it is installed and the device can, else sdpa, else eager."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that the model repository brings along.")
    random_weights: bool = Field(
        False,
        description="Build the model from its config.json with random weights (benchmarks; seed = training.seed).",
    )


class SourceSection(_Section):
    """One source of examples: a local file or a Hub data set."""

    path: str | None = Field(None, description="Local .json, .jsonl, .parquet or .txt file.")
    hub: str | None = Field(None, description="Hub data set id (instead of path).")
    hub_config: str | None = Field(None, description="Configuration name of the Hub data set.")
    split: str = Field("train", description="Split of the Hub data set.")
    format: Literal["alpaca", "prompt_completion", "messages", "text"] = Field(
        "alpaca",
        description="alpaca: instruction/input/output; prompt_completion: prompt/completion; messages: a list of "
        "role/content; text: one text per record (a .txt file: one document per blank-line separated block).",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Maps the format's column names to the file's, e.g. {output: answer}."
    )
    weight: float = Field(1.0, gt=0, description="Passes over this source in one epoch (0.5: a seeded half).")
    limit: int | None = Field(None, ge=1, description="Use only the first N records.")

    @model_validator(mode="after")
    def _one_origin(self):
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of path and hub")
        return self


class DataSection(_Section):
    """What is trained and evaluated on."""

    train: list[SourceSection] = Field(min_length=1, description="Training sources.")
    eval: list[SourceSection] = Field(default_factory=list, description="Evaluation sources.")
    max_length: int = Field(1024, ge=2, description="Longest sequence, tokens.")
    overlong: Literal["truncate", "drop"] = Field(
        "truncate", description="What happens to a longer record; how many is reported."
    )
    packing: bool = Field(False, description="Pack several records into one padding-free sequence of max_length.")
    completion_only_loss: bool = Field(True, description="Loss on completion / assistant / output tokens only.")
    chat_template: str | None = Field(
        None, description="Jinja template, or a file with one, for format messages; default: the tokenizer's."
    )
    cache_dir: str | None = Field(
        None, description="Where tokenised data is kept (by content hash); default: OUTPUT_DIR/../.data_cache."
    )
    num_proc: int = Field(1, ge=1, description="Processes that tokenise.")


class TrainingSection(_Section):
    """The loop; names as in transformers' TrainingArguments."""

    output_dir: str = Field(description="Checkpoints, logs and the final adapter go here.")
    overwrite_output_dir: bool = Field(False, description="Delete an earlier run's checkpoints there and start anew.")
    deepspeed: str | None = Field("ds_configs/zero3.json", description="DeepSpeed JSON (static knobs only), or null.")
    use_cpu: bool | None = Field(None, description="Train on CPU; default: only where there is no accelerator.")
    seed: int = Field(42, description="Seed of adapter weights, data order, noise and dropout.")
    max_steps: int = Field(-1, ge=-1, description="Optimizer steps; -1: num_train_epochs decides.")
    num_train_epochs: float = Field(1.0, gt=0, description="Passes over the training data.")
    per_device_train_batch_size: int = Field(1, ge=1, description="Sequences per device and micro-step.")
    per_device_eval_batch_size: int = Field(1, ge=1, description="Sequences per device in evaluation.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Micro-steps per optimizer step.")
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate of AdamW.")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="Schedule after warm-up."
    )
    warmup_steps: float = Field(0.03, ge=0, description="Warm-up in steps, or as a share of all steps if below 1.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled decay; never on biases.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW beta 1.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW beta 2.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW epsilon.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the global gradient norm; 0: no clipping.")
    gradient_checkpointing: bool = Field(True, description="Recompute each decoder layer in the backward pass.")
    gradient_checkpointing_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Passed to torch.utils.checkpoint; use_reentrant: true is refused."
    )
    use_liger_kernel: bool = Field(False, description="Liger's fused layers where the architecture has them (GPU).")
    save_strategy: Literal["steps", "epoch", "no"] = Field("steps", description="When checkpoints are written.")
    save_steps: int = Field(200, ge=1, description="Optimizer steps between checkpoints.")
    save_total_limit: int | None = Field(2, ge=1, description="Newest checkpoints kept; null: all.")
    dataloader_num_workers: int = Field(0, ge=0, description="Loader processes per rank.")

    @field_validator("gradient_checkpointing_kwargs")
    @classmethod
    def _not_reentrant(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value.get("use_reentrant"):
            raise ValueError(
                "use_reentrant: true is refused: reentrant checkpointing silently drops the side loss's gradient; "
                "remove it (non-reentrant is the default)"
            )
        return value


class EvaluationSection(_Section):
    """Loss on data.eval during the run."""

    strategy: Literal["no", "steps", "epoch"] = Field("no", description="When data.eval is evaluated.")
    steps: int = Field(200, ge=1, description="Optimizer steps between evaluations.")
    at_start: bool = Field(False, description="Evaluate the base model before the first step.")
    at_end: bool = Field(False, description="Evaluate once more after the last step.")


class LoggingSection(_Section):
    """What is written while it runs (rank 0)."""

    steps: int = Field(10, ge=1, description="Optimizer steps between log lines.")
    tensorboard: bool = Field(True, description="Write TensorBoard events to OUTPUT_DIR/tensorboard.")
    histograms: bool = Field(True, description="Per-layer ELBO terms as one histogram per term.")
    peak_tflops: float | None = Field(
        None, gt=0, description="Peak of one device in TFLOP/s for MFU; default: known from its name (H100/H200: 989)."
    )


class Recipe(_Section):
    """A run."""

    model: ModelSection
    adapter: dict[str, Any] = Field(
        default_factory=lambda: {"peft_type": "FVAE_LORA"},
        description="peft_type (default FVAE_LORA) and that PEFT method's own configuration keys.",
    )
    data: DataSection
    training: TrainingSection
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    logging: LoggingSection = Field(default_factory=LoggingSection)

    @model_validator(mode="after")
    def _consistent(self):
        if self.evaluation.strategy != "no" and not self.data.eval:
            raise ValueError("evaluation.strategy needs data.eval")
        if (self.evaluation.at_start or self.evaluation.at_end) and not self.data.eval:
            raise ValueError("evaluation.at_start and evaluation.at_end need data.eval")
        return self


# --------------------------------------------------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, as YAML 1.2 and every reader of a recipe do."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, origin: str) -> tuple[Any, dict[tuple, int]]:
    """Parse `text`; return its value and the line (1-based) of every key path.

    Raises:
        RecipeError: not YAML, or a key stands twice in one mapping; names `origin` and the line.
    """
    lines: dict[tuple, int] = {}
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _walk(node, (), lines, origin)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{origin}:{mark.line + 1}" if mark else origin
        raise RecipeError(f"{where}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def _walk(node: yaml.Node, path: tuple, lines: dict[tuple, int], origin: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in seen:
                dotted = ".".join(map(str, (*path, key)))
                raise RecipeError(f"{origin}:{line}: duplicate key {dotted} (first on line {seen[key]})")
            seen[key] = line
            lines[(*path, key)] = line
            _walk(value_node, (*path, key), lines, origin)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _walk(item, (*path, index), lines, origin)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: YAML file.
        overrides: `section.key=value` strings; the value is YAML, list items are addressed by index.

    Raises:
        RecipeError: with file, line and key, and for an unknown key the nearest known one.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else (error.strerror or str(error)).lower()
        raise RecipeError(f"{path}: cannot read the recipe: {reason}") from None
    value, lines = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with the sections {', '.join(Recipe.model_fields)}")
    overridden = {_apply_override(value, text) for text in overrides or []}
    return validate_recipe(value, str(path), lines, overridden)


def validate_recipe(
    value: dict[str, Any],
    origin: str,
    lines: dict[tuple, int] | None = None,
    overridden: set[tuple] | None = None,
) -> Recipe:
    """Check a parsed recipe; `lines` and `overridden` say where each key came from, for the message."""
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        loc = tuple(first["loc"])
        dotted = ".".join(map(str, loc)) or "recipe"
        if any(loc[: len(path)] == path for path in overridden or ()):
            where = f"--set {dotted}"
        else:
            line = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if lines and loc[:n] in lines), None)
            where = f"{origin}:{line}: {dotted}" if line else f"{origin}: {dotted}"
        raise RecipeError(f"{where}: {_explain(first, loc)}") from None


def _explain(error: Any, loc: tuple) -> str:
    if error["type"] == "extra_forbidden":
        return unknown_key(str(loc[-1]), _known_keys(loc[:-1]))
    if error["type"] == "missing":
        return "missing (required)"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    return message if isinstance(given, (dict, list)) else f"{message} (got {given!r})"


def unknown_key(key: str, known: list[str]) -> str:
    """The message for an unknown key: the nearest known one, or all of them."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"unknown key; did you mean {nearest[0]}?" if nearest else f"unknown key; known: {', '.join(known)}"


def _known_keys(loc: tuple) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        section = get_args(annotation)[0] if get_origin(annotation) is list else annotation  # type: ignore[assignment]
    return list(section.model_fields)


def _apply_override(value: dict[str, Any], text: str) -> tuple:
    key, separator, raw = text.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set {text}: write section.key=value")
    parsed, _ = parse_yaml(raw, f"--set {key}")
    path = tuple(int(part) if part.isdigit() else part for part in key.strip().split("."))
    target: Any = value
    for depth, part in enumerate(path[:-1]):
        if isinstance(part, int):
            if not isinstance(target, list) or part >= len(target):
                raise RecipeError(f"--set {key}: there is no {'.'.join(map(str, path[: depth + 1]))}")
        elif not isinstance(target, dict):
            raise RecipeError(f"--set {key}: {'.'.join(map(str, path[:depth]))} is not a section")
        elif target.get(part) is None:
            target[part] = {}
        target = target[part]
    last = path[-1]
    if isinstance(last, int):
        if not isinstance(target, list) or last >= len(target):
            raise RecipeError(f"--set {key}: there is no {key}")
    elif not isinstance(target, dict):
        raise RecipeError(f"--set {key}: {'.'.join(map(str, path[:-1]))} is not a section")
    target[last] = parsed
    return path


# ------------------------------------------------------------------------------------------------------------ help


def describe_recipe() -> str:
    """The text of `--help-recipe`: every section and key with type, default and meaning."""
    parts = []
    for name, field in Recipe.model_fields.items():
        parts.append(f"{name}:")
        if name == "adapter":
            parts.append(f"  # {field.description}")
            continue
        parts += _describe(field.annotation, "  ")  # type: ignore[arg-type]
    return "\n".join(parts)


def _describe(section: type[BaseModel], indent: str) -> list[str]:
    rows = []
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if get_origin(annotation) is list and issubclass(get_args(annotation)[0], BaseModel):
            rows.append(f"{indent}{name}: # {field.description} A list of:")
            if name != "eval":
                rows += _describe(get_args(annotation)[0], indent + "    ")
            continue
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        kind = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
        rows.append(f"{indent}{name}: {kind}, {default}\n{indent}    {field.description}")
    return rows
