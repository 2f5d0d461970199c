"""The recipe's schema: every key typed and documented beside its default. `recipe_file.py` reads the YAML.

A value of the wrong type or in contradiction with another is refused; nothing is converted in silence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator


class RecipeError(Exception):
    """A recipe, data or argument that cannot be run; the message is one line for the user. Commands exit with 2."""


def one_line(error: BaseException, longest: int | None = 500) -> str:
    """An error's message in one line of at most `longest` characters; its type where it has none."""
    return " ".join(str(error).split())[:longest] or type(error).__name__


class Section(BaseModel):
    """A part of a file in which every key is known and every value is of its type."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _not_too_large(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("too large")
        parts = value.split("/") if isinstance(value, str) and info.field_name != "chat_template" else []
        if any(len(part.encode(errors="replace")) > 255 for part in parts) or len(parts) > 256:
            raise ValueError("longer than a name can be")
        return value


# YAML reads an unquoted no as false.
_NO_IS_TEXT = BeforeValidator(lambda value: "no" if value is False else value)


_ONLY_WITH = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}


class RopeScalingSection(Section):
    """More positions than the model was trained with; types and keys as transformers has them."""

    type: Literal["linear", "dynamic", "yarn", "llama3"] = Field(
        description="linear: positions divided by factor; dynamic: base raised with the longest row seen (NTK); yarn: "
        "by wavelength, attention sharpened; llama3: by wavelength, as Llama 3.1."
    )
    factor: float = Field(ge=1, le=1e6, description="The model's positions become factor times as many.")
    original_max_position_embeddings: int | None = Field(
        None, ge=1, description="Positions before any scaling; default: the model's, if it has no scaling of its own."
    )
    low_freq_factor: float | None = Field(None, gt=0, description="llama3 (required): bound of what is scaled whole.")
    high_freq_factor: float | None = Field(None, gt=0, description="llama3 (required): bound of what is not scaled.")
    attention_factor: float | None = Field(None, gt=0, description="yarn: factor of cosine and sine; default: paper's.")
    beta_fast: float | None = Field(None, gt=0, description="yarn: rotations from which nothing is scaled; default 32.")
    beta_slow: float | None = Field(None, gt=0, description="yarn: rotations up to which all is scaled; default 1.")
    mscale: float | None = Field(None, gt=0, description="yarn: as DeepSeek's configurations have it.")
    mscale_all_dim: float | None = Field(None, gt=0, description="yarn: as DeepSeek's configurations have it.")
    truncate: bool | None = Field(None, description="yarn: whether the bounds are rounded to whole dimensions.")

    @model_validator(mode="after")
    def _keys_of_its_type(self):
        for type_, keys in _ONLY_WITH.items():
            stated = [key for key in keys if getattr(self, key) is not None]
            if stated and self.type != type_:
                raise ValueError(f"{stated[0]}: goes with type {type_}, not {self.type}")
        if self.type == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            if low is None or high is None:
                raise ValueError("low_freq_factor, high_freq_factor: missing (type llama3 requires them)")
            if high <= low:
                raise ValueError("high_freq_factor: must be greater than low_freq_factor")
        if self.type == "yarn" and (self.beta_fast or 32) <= (self.beta_slow or 1):
            raise ValueError("beta_fast: must be greater than beta_slow (they default to 32 and 1)")
        return self


class ModelSection(Section):
    """The frozen base model."""

    name_or_path: str = Field(min_length=1, description="Hugging Face id or local folder of a causal language model.")
    task: Literal["causal_lm", "classification"] = Field(
        "causal_lm",
        description="classification: a new head, trained in fp32, tells each text's label (data of format "
        "classification).",
    )
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit).")
    tokenizer: str | None = Field(None, description="Tokenizer id or folder; default: the model's own.")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="Dtype of the frozen weights and of the large products. Adapters are always fp32."
    )
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = Field(
        "auto",
        description="auto = sdpa for rows without padding where it takes cuDNN's kernel (Hopper), else "
        "flash_attention_2 where it is installed and the device can, else sdpa, else eager.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that the model repository brings along.")
    use_safetensors: bool = Field(
        True, description="Read weights from safetensors alone; false: also from pickles (pytorch_model.bin)."
    )
    random_weights: bool = Field(
        False,
        description="Build the model from its config.json with random weights (benchmarks; seed = training.seed).",
    )
    rope_scaling: RopeScalingSection | None = Field(None, description="Scaling of the rotary position embeddings.")


class SourceSection(Section):
    """One source of examples: a local file or a Hub data set."""

    path: str | None = Field(None, description="Local .json, .jsonl, .parquet or .txt file.")
    hub: str | None = Field(None, description="Hub data set id (instead of path).")
    hub_config: str | None = Field(None, description="Configuration name of the Hub data set.")
    split: str = Field("train", description="Split of the Hub data set.")
    format: Literal["alpaca", "prompt_completion", "messages", "text", "classification"] = Field(
        "alpaca",
        description="alpaca: instruction/input/output; prompt_completion: prompt/completion; messages: a list of "
        "role/content; text: one text per record (a .txt file: one document per blank-line separated block); "
        "classification: text/label (text or integer), for model.task classification.",
    )
    template: Literal["clean", "published"] = Field(
        "clean", description="Prompt of format alpaca; published: as LLM-Adapters trains, white space and all."
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Maps the format's column names to the file's, e.g. {output: answer}."
    )
    weight: float = Field(1.0, gt=0, le=1000, description="Passes over this source in one epoch (0.5: a seeded half).")
    limit: int | None = Field(None, ge=1, description="Use only the first N records.")

    @model_validator(mode="after")
    def _one_origin(self):
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of path and hub")
        if self.template != "clean" and self.format != "alpaca":
            raise ValueError(f"template: {self.template} is a prompt of format alpaca, not of {self.format}")
        return self


class DataSection(Section):
    """What is trained and evaluated on."""

    train: list[SourceSection] = Field(min_length=1, description="Training sources.")
    eval: list[SourceSection] = Field(default_factory=list, description="Evaluation sources.")
    max_length: int = Field(1024, ge=2, description="Longest sequence, tokens.")
    overlong: Literal["truncate", "drop", "split"] = Field(
        "truncate", description="What happens to a longer record, and is counted; split: into pieces (format text)."
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
    groups: str | None = Field(
        None, min_length=1, description="Column with each training record's group: how many each has is reported."
    )


class TrainingSection(Section):
    """The loop; names as in transformers' TrainingArguments."""

    output_dir: str = Field(min_length=1, description="Checkpoints, logs and the final adapter go here.")
    overwrite_output_dir: bool = Field(False, description="Delete an earlier run's checkpoints there and start anew.")
    deepspeed: str | None = Field("ds_configs/zero3.json", description="DeepSpeed JSON (static knobs only), or null.")
    use_cpu: bool | None = Field(None, description="Train on CPU; default: only where there is no accelerator.")
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of adapter weights, data order, noise and dropout.")
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
    recompute: Literal["auto", "none", "selective", "full"] = Field(
        "auto",
        description="What of each decoder layer the backward pass computes again: nothing, all but attention, "
        "or all. auto: the least that fits by the planner's estimate; full where the device's memory is "
        "not known (CPU).",
    )
    resident_weights: Literal["auto"] | bool = Field(
        "auto",
        description="Under ZeRO-3 gather the frozen weights once and keep them whole on every GPU, instead of in every "
        "pass. auto: where they fit by the planner's estimate; false where the device's memory is not known (CPU).",
    )
    side_loss_tokens: Literal["all", "labelled"] = Field(
        "all", description="Tokens that count in the side loss: all real ones, or only those with a task-loss label."
    )
    use_liger_kernel: Literal["auto"] | bool = Field(
        "auto", description="Liger's fused layers. auto: on a GPU, where it is installed and knows the architecture."
    )
    head: Literal["auto", "trl", "fused"] = Field(
        "auto",
        description="How the language-model head and its loss are computed. fused: logits once and of labelled tokens "
        "alone, on a GPU, for a frozen plain head. trl: twice, and it waits for the GPU. auto: fused where it can be.",
    )
    flat_adapters: Literal["auto"] | bool = Field(
        "auto",
        description="Keep each FVAE-LoRA adapter's VAE in two parameters, not some twenty: less of the host's time for "
        "autograd, optimizer and DeepSpeed; files and gradients are the same. auto: for a bf16 base on a GPU.",
    )
    save_strategy: Annotated[Literal["steps", "epoch", "no"], _NO_IS_TEXT] = Field(
        "steps", description="When checkpoints are written."
    )
    save_steps: int = Field(200, ge=1, description="Optimizer steps between checkpoints.")
    save_total_limit: int | None = Field(2, ge=1, description="Newest checkpoints kept; null: all.")
    stall_timeout_s: float = Field(
        1800.0, ge=0, description="End the run when no step, evaluation batch or save ends for so long; 0: never."
    )
    sequence_parallel: int = Field(
        1,
        ge=1,
        description="Devices that share each row, by DeepSpeed's Ulysses: every one keeps a part of its tokens, and "
        "some heads of all of them in attention. The global batch is that of devices / sequence_parallel.",
    )
    activation_offload: bool = Field(
        False,
        description="Keep what the backward pass needs in pinned host memory, copied beside the computation (on a "
        "GPU). With recompute full: each layer's input.",
    )
    tiled_mlp: bool = Field(
        False,
        description="Run MLPs, and norms that are not Liger's, over tiles of as many tokens as the model is wide: "
        "memory that does not grow with the row, for one more forward pass. For long rows; not with adapters in MLPs.",
    )
    dataloader_num_workers: int = Field(0, ge=0, description="Loader processes per rank.")

    @field_validator("max_steps")
    @classmethod
    def _not_zero_steps(cls, value: int) -> int:
        if value == 0:
            raise ValueError("must be > 0, or -1 to let num_train_epochs decide")
        return value


class EvaluationSection(Section):
    """Loss on data.eval during the run, and the suites of launch/evaluate.py."""

    strategy: Annotated[Literal["no", "steps", "epoch"], _NO_IS_TEXT] = Field(
        "no", description="When data.eval is evaluated."
    )
    steps: int = Field(200, ge=1, description="Optimizer steps between evaluations.")
    at_start: bool = Field(False, description="Evaluate the base model before the first step.")
    at_end: bool = Field(False, description="Evaluate once more after the last step.")
    every: int = Field(0, ge=0, description="Optimizer steps between runs of `suites`; 0: never.")
    suites: dict[Literal["perplexity", "commonsense", "gsm8k", "needle", "groups"], str] = Field(
        default_factory=dict,
        description="Suite and its data, as --data of launch/evaluate.py: {groups: val.jsonl}.",
    )
    mode: Literal["generate", "loglikelihood"] | None = Field(
        None, description="How suites ask: parse what is written, or take the likeliest answer; default: the suite's."
    )
    template: Literal["clean", "published"] = Field("clean", description="Prompt of the suites.")
    suite_batch_size: int = Field(8, ge=1, description="Samples per device and call of the suites.")
    max_new_tokens: int | None = Field(None, ge=1, description="Longest answer, tokens; default: the suite's.")
    limit: int | None = Field(None, ge=1, description="Use only the first N samples of every set of the suites.")
    best_metric: str | None = Field(
        None,
        description="SUITE/TASK/METRIC, e.g. groups/groups/worst_group: the adapter that was best by it is kept in "
        "OUTPUT_DIR/best.",
    )


class LoggingSection(Section):
    """What is written while it runs (rank 0)."""

    steps: int = Field(10, ge=1, description="Optimizer steps between log lines.")
    tensorboard: bool = Field(True, description="Write TensorBoard events to OUTPUT_DIR/tensorboard.")
    telemetry: bool = Field(
        True, description="ELBO terms, active units, R^2 of the logged steps, and warnings of collapsed latents."
    )
    histograms: bool = Field(True, description="Per-layer ELBO terms as one histogram per term (needs telemetry).")
    gradient_split_every: int = Field(
        0,
        ge=0,
        description="Every N steps log gradient norms of task and side loss apart (such a step costs 3).",
    )
    profile: int = Field(
        0,
        ge=0,
        description="Trace so many steps with torch's profiler, after this run's first three, to "
        "OUTPUT_DIR/profile/stepN.json.gz (for chrome://tracing or Perfetto); they are slower.",
    )
    peak_tflops: float | None = Field(
        None, gt=0, description="Peak of one device in TFLOP/s for MFU; default: known from its name (H100/H200: 989)."
    )


class Recipe(Section):
    """A run."""

    model: ModelSection
    adapter: dict[str, Any] = Field(
        default_factory=lambda: {"peft_type": "FVAE_LORA"},
        description="peft_type (default FVAE_LORA; FULL: no adapter) and that PEFT method's own configuration keys.",
    )
    data: DataSection
    training: TrainingSection
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    logging: LoggingSection = Field(default_factory=LoggingSection)

    @model_validator(mode="after")
    def _consistent(self):
        for source in [*self.data.train, *self.data.eval]:
            if (source.format == "classification") != (self.model.task == "classification"):
                raise ValueError(
                    f"data: format {source.format} of {source.path or source.hub} goes not with model.task "
                    f"{self.model.task}"
                )
        if self.evaluation.strategy != "no" and not self.data.eval:
            raise ValueError("evaluation.strategy: needs data.eval")
        if bool(self.evaluation.every) != bool(self.evaluation.suites):
            raise ValueError("evaluation.every: goes with evaluation.suites, and they with it")
        if self.evaluation.best_metric and not self.evaluation.every:
            raise ValueError("evaluation.best_metric: needs evaluation.every")
        for key in ("at_start", "at_end"):
            if getattr(self.evaluation, key) and not self.data.eval:
                raise ValueError(f"evaluation.{key}: needs data.eval")
        return self
