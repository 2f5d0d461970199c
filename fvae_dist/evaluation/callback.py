"""Suites during training: run every so many steps, logged under eval/, the best adapter kept."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, TrainerCallback

from fvae_dist.evaluation.inference import Inference
from fvae_dist.evaluation.loading import greedy_generation
from fvae_dist.evaluation.ranks import Ranks
from fvae_dist.evaluation.running import run_task
from fvae_dist.evaluation.suites import make_tasks
from fvae_dist.evaluation.tasks import Options, Task
from fvae_dist.planning.trace import base_of
from fvae_dist.training.recipe import Recipe, RecipeError
from fvae_dist.training.rope_scaling import positions_of

logger = logging.getLogger(__name__)

GROUP_METRICS = ("average", "balanced", "worst_group", "gap")
CALIBRATION_METRICS = ("ece", "mce", "ace", "nll")
SMALLER_IS_BETTER = ("loss", "perplexity", "gap", *CALIBRATION_METRICS)
BEST_FILE = "best.json"


def plan_suites(
    recipe: Recipe, tokenizer: Any, config: PretrainedConfig, classes: list[str] | None = None
) -> list[Task]:
    """The tasks of evaluation.suites, read and tokenised before training.

    Args:
        classes: the labels of the classifier that is trained.

    Raises:
        RecipeError: their data cannot be used, or evaluation.best_metric names none of them.
    """
    section = recipe.evaluation
    positions = positions_of(config)
    max_length = max(2048, recipe.data.max_length)
    options = Options(
        data={str(name): path for name, path in section.suites.items()},
        mode=section.mode,
        template=section.template,
        max_new_tokens=section.max_new_tokens,
        max_length=min(max_length, positions or max_length),
        limit=section.limit,
        seed=recipe.training.seed,
    )
    folder = Path(recipe.training.output_dir).absolute().parent
    try:
        num_labels = None if classes is None else len(classes)
        tasks = make_tasks(list(options.data), tokenizer, options, folder, num_labels, positions, classes)
    except RecipeError as error:
        raise RecipeError(f"evaluation.suites: {error}") from None
    if section.best_metric is not None:
        known = [f"{task.suite}/{task.name}" for task in tasks]
        prefix, _, metric = section.best_metric.rpartition("/")
        if prefix not in known or metric not in ("accuracy", *GROUP_METRICS, *SMALLER_IS_BETTER):
            raise RecipeError(
                f"evaluation.best_metric: {section.best_metric} is no metric of the suites; write one of "
                f"{', '.join(known)}, a slash and accuracy, worst_group or the like"
            )
    return tasks


class SuiteEvaluation(TrainerCallback):
    """Runs the tasks on all ranks. Nothing random is drawn, so that training goes on as if it had not happened."""

    def __init__(self, trainer: Any, recipe: Recipe, tasks: list[Task]):
        self.trainer = trainer
        self.section = recipe.evaluation
        self.seed = recipe.training.seed
        self.folder = Path(recipe.training.output_dir) / "best"
        self.tasks = tasks
        self.ranks = Ranks(trainer.args.process_index, trainer.args.world_size)
        self.best: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        # A resumed run goes on comparing; one that starts anew forgets what an earlier run left.
        if state.global_step:
            try:
                kept = json.loads((self.folder / BEST_FILE).read_text(encoding="utf-8"))
                self.best = float(kept["value"]) if kept["metric"] == self.section.best_metric else None
            except (OSError, ValueError, KeyError, TypeError):
                self.best = None
        self.best = self.ranks.broadcast(self.best)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.section.every:
            return
        scalars = self.ranks.broadcast(self._run())
        should_log = control.should_log
        self.trainer.log({f"eval/{name}": value for name, value in scalars.items()})
        control.should_log = should_log  # writing a log line clears it, and the step's own is still to come
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        logger.info("step %d: %s", state.global_step, shown)
        metric = self.section.best_metric
        if metric is None:
            return
        if metric not in scalars:
            raise RecipeError(f"evaluation.best_metric: {metric} is none of {', '.join(scalars)}")
        value = scalars[metric]
        sign = -1 if metric.rpartition("/")[2] in SMALLER_IS_BETTER else 1
        if self.best is None or sign * value > sign * self.best:
            self.best = value
            self._keep({"step": state.global_step, "metric": metric, "value": value})

    def _run(self) -> dict[str, float]:
        """All tasks; their metrics as scalars on rank 0."""
        trainer = self.trainer
        model = trainer.model
        was_training = model.training
        base = base_of(model)
        own_generation = getattr(base, "generation_config", None)  # a classifier has none
        if own_generation is not None:
            base.generation_config = greedy_generation(base, trainer.processing_class)
        inference = Inference(model, trainer.processing_class, trainer.args.device, sharded=trainer._zero3())
        scalars: dict[str, float] = {}
        model.eval()
        try:
            for task in self.tasks:
                records = run_task(
                    task, inference, self.section.suite_batch_size, self.ranks, after_batch=self._show_life
                )
                if self.ranks.is_first:
                    scalars |= flatten(f"{task.suite}/{task.name}", task.summarise(records))
        finally:
            model.train(was_training)
            if own_generation is not None:
                base.generation_config = own_generation
        return scalars

    def _show_life(self) -> None:
        """To the watchdog, a batch here is as good as one of the trainer's own evaluation."""
        trainer = self.trainer
        trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control)

    def _keep(self, facts: dict[str, Any]) -> None:
        """Replace OUTPUT_DIR/best by the adapter as it is; all ranks must call it."""
        aside = self.folder.with_name(f".{self.folder.name}.partial")
        self.trainer.save_model(str(aside), _internal_call=True)
        if self.ranks.is_first:
            (aside / BEST_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(aside, self.folder)


def flatten(prefix: str, metrics: dict[str, Any]) -> dict[str, float]:
    """A task's metrics as scalars: estimates, and those of groups and calibration."""
    estimates = {name: entry for name, entry in metrics.items() if isinstance(entry, dict) and "value" in entry}
    scalars = {name: entry["value"] for name, entry in estimates.items()}
    if "groups" in metrics:
        scalars |= {name: metrics["groups"][name]["value"] for name in GROUP_METRICS}
    scalars |= metrics.get("calibration", {})
    if "num_parse_failures" in metrics:
        scalars["num_parse_failures"] = metrics["num_parse_failures"]
    return {f"{prefix}/{name}": float(value) for name, value in scalars.items()}
