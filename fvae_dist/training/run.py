"""One training run, from recipe to adapter folder. `train` reads like a table of contents."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from trl import SFTConfig
from trl.models import enable_selective_activation_checkpointing

from fvae_dist.training.adalora import RankAllocation, adalora_of, with_total_step
from fvae_dist.training.callbacks import (
    EstimateCheck,
    PerformanceLogs,
    ProfileTrace,
    ProgressLine,
    StartupChecks,
    TensorBoardLogs,
)
from fvae_dist.training.checkpoint_files import remove_leftovers
from fvae_dist.training.checkpoints import check_output_dir, clear_output_dir, find_checkpoint
from fvae_dist.training.control import StallWatchdog, StopOnSignal, StopSignal, lock_output_dir
from fvae_dist.training.data import PreparedData, prepare_data
from fvae_dist.training.deepspeed_config import load_deepspeed_config, size_for_adapter, zero_stage
from fvae_dist.training.fingerprint import base_fingerprint
from fvae_dist.training.fitting import (
    Fit,
    check_agreement,
    check_asked,
    device_memory_gib,
    fit_recipe,
    name_the_key_when_out_of_memory,
)
from fvae_dist.training.full import is_full, with_master_weights
from fvae_dist.training.implementations import (
    choose_attention,
    choose_head,
    choose_liger,
    lone_documents_through_sdpa,
    row_multiple,
    rows_of,
)
from fvae_dist.training.labels import set_labels
from fvae_dist.training.methods import attach_method, check_method
from fvae_dist.training.modeling import (
    ModelPlan,
    check_lengths,
    check_weights,
    load_base_model,
    load_config,
    load_tokenizer,
    plan_model,
)
from fvae_dist.training.process_group import be_the_only_rank
from fvae_dist.training.recipe import Recipe, RecipeError
from fvae_dist.training.recipe_trainer import OWN_KEYS, ClassificationTrainer, RecipeTrainer
from fvae_dist.training.results import collect_metrics, save_results
from fvae_dist.training.rope_scaling import describe_scaling
from fvae_dist.training.sequence_parallel import check_shares
from fvae_dist.training.steps import optimizer_steps
from fvae_dist.training.throughput import peak_tflops
from fvae_dist.training.tiled_mlp import find_mlps
from fvae_dist.training.zero3 import skip_shared_memory_operator

logger = logging.getLogger(__name__)


@dataclass
class Prepared:
    """A checked run: everything that can be known before a process group or device memory exists.

    make_callbacks: further callbacks for the trainer, such as the suites of fvae_dist.evaluation.
    """

    recipe: Recipe
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    plan: ModelPlan
    data: PreparedData
    deepspeed: dict[str, Any] | None
    attention: str
    attention_reason: str
    liger: bool
    liger_reason: str
    use_cpu: bool
    fit: Fit
    checkpoint: str | None
    base_fingerprint: str
    lock: IO[str] | None
    make_callbacks: Callable[[RecipeTrainer], list[transformers.TrainerCallback]] = lambda trainer: []


def prepare(recipe: Recipe, resume: str | None = None, dry_run: bool = False, devices: int | None = None) -> Prepared:
    """Check everything that needs no device, in the order in which mistakes are cheapest to find.

    Data is tokenised here by the first process of a node, before any process group exists: the others wait for a
    file, and no collective can time out.

    Args:
        devices: how many take part; default WORLD_SIZE.

    Raises:
        RecipeError: the recipe, its files or its data cannot be run.
    """
    training = recipe.training
    use_cpu = _use_cpu(recipe)
    world_size = devices or _env_int("WORLD_SIZE", 1)
    deepspeed = load_deepspeed_config(recipe, world_size)
    check_asked(recipe, deepspeed)
    check_method(recipe)
    attention, reason = choose_attention(recipe.model, use_cpu, rows_of(recipe))
    checkpoint = None if dry_run else find_checkpoint(resume, training.output_dir)
    if not dry_run:
        check_output_dir(training.output_dir, checkpoint, training.overwrite_output_dir, resume is not None)
    is_first = _env_int("RANK", 0) == 0
    lock = lock_output_dir(training.output_dir) if is_first and not dry_run else None
    if lock is not None:
        remove_leftovers(Path(training.output_dir))
    config = load_config(recipe.model)
    liger, liger_reason = choose_liger(recipe, config, use_cpu)
    if not dry_run:
        check_weights(recipe.model)
    tokenizer = load_tokenizer(recipe.model)
    check_lengths(recipe, config, tokenizer)
    check_shares(recipe, config, world_size, attention)
    plan = plan_model(recipe, config, use_cpu)
    fingerprint = base_fingerprint(recipe.model, config, training.seed)
    is_builder = _env_int("LOCAL_RANK", 0) == 0
    data = prepare_data(
        recipe.data, tokenizer, seed=training.seed, output_dir=training.output_dir, is_builder=is_builder
    )
    if data.classes is not None:  # how wide the head is, is known only now
        set_labels(config, data.classes)
        plan = plan_model(recipe, config, use_cpu)
    recipe = with_total_step(recipe, optimizer_steps(training, len(data.train), world_size))
    fit = fit_recipe(recipe, config, deepspeed, world_size, attention, liger, device_memory_gib(use_cpu))
    if training.overwrite_output_dir and checkpoint is None and not dry_run and is_first:
        clear_output_dir(training.output_dir)
    return Prepared(
        recipe,
        config,
        tokenizer,
        plan,
        data,
        deepspeed,
        attention,
        reason,
        liger,
        liger_reason,
        use_cpu,
        fit,
        checkpoint,
        fingerprint,
        lock,
    )


def train(prepared: Prepared, stop: StopSignal | None = None) -> dict[str, Any] | None:
    """Train, evaluate, save. Returns the metrics that are written to OUTPUT_DIR/metrics.json; None if `stop` came."""
    recipe = prepared.recipe
    _set_up_process(prepared)
    args = build_arguments(prepared)
    start_process_group(args)
    check_agreement(prepared.fit)
    logger.info("%s", prepared.fit)
    logger.info("attention: %s (%s)", prepared.attention, prepared.attention_reason)
    logger.info("Liger's layers: %s (%s)", "yes" if prepared.liger else "no", prepared.liger_reason)
    if recipe.model.rope_scaling is not None:
        logger.info("%s", describe_scaling(prepared.config, recipe.model.rope_scaling))
    if recipe.model.dtype == "float16":
        logger.warning("model.dtype float16: gradients of fp32 adapters get no loss scaling; bfloat16 is safer")
    model = build_model(prepared, args)
    trainer = build_trainer(prepared, args, model)
    stopper = StopOnSignal(trainer, stop or StopSignal())
    trainer.add_callback(stopper)
    for callback in prepared.make_callbacks(trainer):
        trainer.add_callback(callback)
    with (
        name_the_key_when_out_of_memory(prepared.fit),
        lone_documents_through_sdpa(prepared.attention, recipe.model, prepared.use_cpu, rows_of(recipe)),
    ):
        result = trainer.train(resume_from_checkpoint=prepared.checkpoint)
    if stopper.stopped_at is not None:
        if trainer.checkpoint_writer.last_error is not None:
            raise trainer.checkpoint_writer.last_error
        return None
    final_eval = trainer.evaluate() if recipe.evaluation.at_end else None

    metrics = collect_metrics(trainer, result, final_eval)
    save_results(trainer, prepared, metrics)
    return metrics


def build_arguments(prepared: Prepared) -> SFTConfig:
    """TRL's arguments. While they live, `from_pretrained` loads the base sharded under ZeRO-3."""
    recipe = prepared.recipe
    training, evaluation = recipe.training, recipe.evaluation
    stage = zero_stage(prepared.deepspeed)
    passed_on = training.model_dump(exclude=OWN_KEYS)
    return SFTConfig(
        **passed_on,
        gradient_checkpointing=prepared.fit.recompute != "none",
        use_liger_kernel=prepared.liger,
        activation_offloading=recipe.training.activation_offload and not prepared.use_cpu,
        deepspeed=prepared.deepspeed,
        use_cpu=prepared.use_cpu,
        accelerator_config={"non_blocking": not prepared.use_cpu},
        data_seed=training.seed,
        # At stage 3 this must agree with the DeepSpeed config; elsewhere adapters cast for themselves, a base does not.
        bf16=(stage == 3 or is_full(recipe.adapter)) and recipe.model.dtype == "bfloat16",
        fp16=stage == 3 and recipe.model.dtype == "float16",
        # Truncated and packed in data preparation already; packed data needs the padding-free collator.
        max_length=None,
        packing=False,
        padding_free=recipe.data.packing,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        eval_strategy=evaluation.strategy,
        eval_steps=evaluation.steps if evaluation.strategy == "steps" else None,
        eval_on_start=evaluation.at_start,
        prediction_loss_only=True,
        logging_steps=recipe.logging.steps,
        logging_first_step=True,
        report_to="none",
        disable_tqdm=True,
        trust_remote_code=recipe.model.trust_remote_code,
    )


def start_process_group(args: SFTConfig) -> None:
    """Start it before the model is built: zero.Init would otherwise shard over a world of one."""
    if args.deepspeed is not None and args.use_cpu:
        skip_shared_memory_operator()
    device = args.device  # transformers sets up devices, and with them the process group, on first use
    if args.deepspeed is not None:
        import deepspeed

        # A running group is taken over; without this call DeepSpeed's own layer still counts one rank.
        deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl")


def build_model(prepared: Prepared, args: SFTConfig) -> nn.Module:
    """Load the base (sharded under ZeRO-3), then attach the adapter outside zero.Init so that it stays fp32."""
    base = load_base_model(with_master_weights(prepared.recipe), prepared.config, prepared.attention)
    transformers.set_seed(args.seed)
    if prepared.data.classes is not None:  # it finds a text's last token by it
        model_config: Any = base.config
        model_config.get_text_config().pad_token_id = prepared.tokenizer.pad_token_id
    model = attach_method(base, prepared, args)
    if prepared.fit.recompute == "selective":
        # Not through SFTConfig: under ZeRO-3 TRL asks for reentrant checkpointing, which we undo, and refuses this.
        enable_selective_activation_checkpointing(model)
    if prepared.recipe.training.tiled_mlp:
        find_mlps(model)  # refused here; the trainer tiles them once Liger has changed them
    if prepared.deepspeed is not None:
        # The same dict that accelerate will hand to deepspeed.initialize. EVA's sizes are not those of the plan.
        sizes = [getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad]
        size_for_adapter(args.hf_deepspeed_config.config, sizes, prepared.plan.base_sizes)
    return model


def build_trainer(prepared: Prepared, args: SFTConfig, model: nn.Module) -> RecipeTrainer:
    """The trainer with its callbacks; transformers' own progress printing is replaced."""
    recipe, plan = prepared.recipe, prepared.plan
    make: Any = ClassificationTrainer
    of_task: dict[str, Any] = {"classes": prepared.data.classes}
    if prepared.data.classes is None:
        make, of_task = RecipeTrainer, {"fused_head": choose_head(recipe, model, prepared.use_cpu)}
        args.pad_to_multiple_of = row_multiple(recipe, model, prepared.attention, prepared.use_cpu)
    trainer = make(
        model=model,
        args=args,
        train_dataset=prepared.data.train,
        eval_dataset=prepared.data.eval,
        processing_class=prepared.tokenizer,
        side_loss_tokens=recipe.training.side_loss_tokens,
        telemetry=recipe.logging.telemetry,
        gradient_split_every=recipe.logging.gradient_split_every,
        resident_weights=prepared.fit.resident,
        sequence_parallel=recipe.training.sequence_parallel,
        base_fingerprint=prepared.base_fingerprint,
        rope_scaling=recipe.model.rope_scaling,
        tiled_mlp=recipe.training.tiled_mlp,
        **of_task,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(StartupChecks(trainer, trained=is_full(recipe.adapter)))
    if (adalora := adalora_of(model)) is not None:
        trainer.add_callback(RankAllocation(adalora))
    matmul_parameters = plan.base_parameters - plan.embedding_parameters
    peak = peak_tflops(recipe.logging.peak_tflops)
    trainer.add_callback(PerformanceLogs(trainer, matmul_parameters, peak, trained=is_full(recipe.adapter)))
    if prepared.fit.estimate is not None:
        trainer.add_callback(EstimateCheck(prepared.fit.estimate.total_gib))
    trainer.add_callback(ProgressLine())
    if recipe.training.stall_timeout_s:
        trainer.add_callback(StallWatchdog(recipe.training.stall_timeout_s))
    output_dir = Path(recipe.training.output_dir)
    if recipe.logging.profile:
        trainer.add_callback(ProfileTrace(output_dir / "profile", recipe.logging.profile))
    if recipe.logging.tensorboard:
        trainer.add_callback(TensorBoardLogs(trainer, output_dir / "tensorboard", recipe.logging.histograms))
    return trainer


def _use_cpu(recipe: Recipe) -> bool:
    stated = recipe.training.use_cpu
    if stated is False and not torch.cuda.is_available():
        raise RecipeError("training.use_cpu: false, but there is no CUDA device here")
    if stated is None:
        # DeepSpeed was told so: its half of the run would not touch a GPU.
        return os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    return stated


def _set_up_process(prepared: Prepared) -> None:
    """Environment of a process that no launcher set up, and a fair share of the cores on CPU."""
    if prepared.use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        local_ranks = _env_int("LOCAL_WORLD_SIZE", _env_int("LOCAL_SIZE", _env_int("WORLD_SIZE", 1)))
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // local_ranks))
        os.environ["OMP_NUM_THREADS"] = threads  # accelerate would give every rank all the cores
        torch.set_num_threads(int(threads))
    be_the_only_rank()


def _env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))
