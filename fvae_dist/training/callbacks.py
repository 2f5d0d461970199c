"""Callbacks of the recipe's trainer: start-up checks, per-rank noise, progress line, TensorBoard. Rank 0 writes."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from fvae_dist.training.checks import (
    check_engine_precision,
    check_partitioned,
    check_resident,
    check_trainable_parameters,
)
from fvae_dist.training.log_window import LOGGED_TERMS
from fvae_dist.training.throughput import utilisation

logger = logging.getLogger(__name__)
ESTIMATE_TOLERANCE = 0.15
PROFILE_AFTER = 3  # steps that are slower: allocator, autotuning, DeepSpeed's trace
_RENAMED = {"grad_norm": "optim/grad_norm", "learning_rate": "optim/lr"}


class StartupChecks(TrainerCallback):
    """Before the first step: dtypes, sharding, and a random stream of its own for every rank.

    Args:
        trained: whether the base itself is trained.
    """

    def __init__(self, trainer: Any, trained: bool = False):
        self.trainer = trainer
        self.trained = trained

    def on_train_begin(self, args, state, control, **kwargs):
        engine = getattr(self.trainer, "deepspeed", None)
        if engine is None or not self.trained:  # else the weights are the engine's bf16 copies of fp32 masters
            check_trainable_parameters(self.trainer.model)
        if engine is not None:
            check_engine_precision(engine, of_adapters=not self.trained)
            if engine.zero_optimization_stage() == 3:
                check = check_resident if getattr(self.trainer, "resident_weights", False) else check_partitioned
                check(self.trainer.model)
        # For dropout of the base model: transformers seeds every rank alike. The adapters' noise is keyed by token.
        torch.manual_seed(args.seed + 1 + args.process_index)


class PerformanceLogs(TrainerCallback):
    """Adds perf/mfu, perf/hfu and mem/{peak,host_peak}_gib to every log line; memory is the largest of the ranks."""

    def __init__(self, trainer: Any, matmul_parameters: int, peak: float | None, trained: bool = False):
        self.trainer = trainer
        self.matmul_parameters = matmul_parameters
        self.trained = trained
        self.peak = peak

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "loss" not in logs:
            return
        engine = getattr(self.trainer, "deepspeed", None)
        if engine is not None:
            # DeepSpeed passes over a step whose gradients are not finite, without a word; see adapter_shards.py too.
            logs["optim/skipped_steps"] = engine.skipped_steps + int(getattr(engine.optimizer, "passed_over", 0))
        device = self.trainer.args.device
        local = torch.tensor([[peak_memory_gib(device), host_peak_gib()]], device=device)
        largest = self.trainer.accelerator.gather(local).amax(dim=0)
        logs["mem/peak_gib"], logs["mem/host_peak_gib"] = largest.tolist()
        if self.peak is not None and "perf/tokens_per_s_per_gpu" in logs:
            logs["perf/mfu"], logs["perf/hfu"] = utilisation(
                logs["perf/tokens_per_s_per_gpu"],
                self.matmul_parameters,
                self.peak,
                recomputes(args),
                self.trained,
            )


class EstimateCheck(TrainerCallback):
    """After this run's first optimizer step: is its peak memory what `auto` chose by?"""

    def __init__(self, estimated_gib: float):
        self.estimated_gib: float | None = estimated_gib

    def on_step_end(self, args, state, control, **kwargs):
        if self.estimated_gib is None or args.device.type != "cuda":
            return
        estimated, self.estimated_gib = self.estimated_gib, None
        measured = peak_memory_gib(args.device)
        if measured > (1 + ESTIMATE_TOLERANCE) * estimated:
            logger.warning(
                "the first step took %.1f GiB on rank %d, where %.1f were estimated; should a later one run out of "
                "memory, set training.recompute instead of auto",
                *(measured, args.process_index, estimated),
            )
        elif measured < (1 - ESTIMATE_TOLERANCE) * estimated and state.is_world_process_zero:
            logger.warning(
                "the first step took %.1f GiB, where %.1f were estimated for sequences of data.max_length: if all are "
                "as short, less recomputation than training.recompute: auto chose may fit",
                *(measured, estimated),
            )


def recomputes(args: Any) -> bool:
    """Whether the trainer checkpoints layers (the argument was renamed in transformers 5.23)."""
    return bool(getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None))


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far: the CUDA allocator's, or on CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return host_peak_gib()


def host_peak_gib() -> float:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


class ProfileTrace(TrainerCallback):
    """Traces `num_steps` steps of this run, after the first PROFILE_AFTER, on rank 0 into `folder`."""

    def __init__(self, folder: Path, num_steps: int):
        self.folder, self.num_steps = folder, num_steps
        self.begun = 0
        self.profiler: torch.profiler.profile | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun += 1
        if self.begun == PROFILE_AFTER + 1 and state.is_world_process_zero:
            on_gpu = [torch.profiler.ProfilerActivity.CUDA] if args.device.type == "cuda" else []
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *on_gpu])
            self.profiler.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self.begun == PROFILE_AFTER + self.num_steps:
            self._write(state)

    def on_train_end(self, args, state, control, **kwargs):
        if 0 < self.begun <= PROFILE_AFTER and state.is_world_process_zero:
            logger.warning("logging.profile: nothing traced, the run ended within its first %d steps", PROFILE_AFTER)
        self._write(state)

    def _write(self, state: Any) -> None:
        profiler, self.profiler = self.profiler, None
        if profiler is None:
            return
        profiler.stop()
        path = self.folder / f"step{state.global_step}.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except OSError as error:  # a full disk must not end the run
            logger.warning("logging.profile: not written to %s: %s", path, error)
        else:
            logger.info("profile written to %s", path)


class ProgressLine(TrainerCallback):
    """One bar with task loss and tokens/s; log lines go through it. On a log file, plain lines and no bar."""

    def __init__(self):
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", disable=not sys.stderr.isatty()
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n if not self.bar.disable else 0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or not logs:
            return
        if "loss/task" in logs:
            speed = logs.get("perf/tokens_per_s_per_gpu", 0.0)
            shown = {"loss": f"{logs['loss/task']:.4f}", "tok/s/device": f"{speed:,.0f}"}
            if "loss/neg_elbo" in logs:
                shown["neg_elbo"] = f"{logs['loss/neg_elbo']:.1f}"
            self.bar.set_postfix(shown)
            values = "  ".join(f"{key} {value}" for key, value in shown.items())
            tqdm.write(f"step {state.global_step}/{state.max_steps}  {values}  lr {logs.get('learning_rate', 0):.2e}")
        elif "eval_loss" in logs:
            tqdm.write(f"step {state.global_step}/{state.max_steps}  eval_loss {logs['eval_loss']:.4f}")
        sys.stdout.flush()

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


class TensorBoardLogs(TrainerCallback):
    """Writes scalars under the project's tags, and each ELBO term's spread over layers as one histogram.

    A failure (disk full, folder removed) costs the curves a point, never the run: the next log line starts a new file.
    """

    def __init__(self, trainer: Any, folder: Path, histograms: bool):
        self.trainer = trainer
        self.folder = folder
        self.histograms = histograms
        self.writer: Any = None
        self._has_failed = False

    def on_train_begin(self, args, state, control, **kwargs):
        # Steps after the resume point were lost with the interrupted run: purge them from the curves.
        self._write(state, lambda writer: None, purge_step=state.global_step + 1 if state.global_step else None)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs:
            self._write(state, lambda writer: self._add(writer, state.global_step, logs))

    def on_train_end(self, args, state, control, **kwargs):
        self._write(state, lambda writer: writer.flush())

    def _add(self, writer: Any, step: int, logs: dict[str, Any]) -> None:
        for key, value in logs.items():
            tag = _RENAMED.get(key, key)
            if key.startswith("eval_") and key.endswith("loss"):
                tag = "eval/loss"
            if "/" in tag and isinstance(value, (int, float)):
                writer.add_scalar(tag, value, step)
        if self.histograms and "elbo/nll" in logs:
            for term in LOGGED_TERMS.values():
                writer.add_histogram(f"elbo_layers/{term}", self.trainer.layer_terms[term], step)
        writer.flush()

    def _write(self, state: Any, write: Callable[[Any], None], purge_step: int | None = None) -> None:
        if not state.is_world_process_zero:
            return
        try:
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(self.folder), purge_step=purge_step)
            write(self.writer)
            self._has_failed = False
        except OSError as error:  # also what ended TensorBoard's writing thread
            self.writer = None
            if not self._has_failed:
                logger.error("%s: not written: %s; the next log line tries again", self.folder, error)
            self._has_failed = True
