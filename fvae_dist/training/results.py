"""What a finished run leaves: the adapter with its card, and the run in numbers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fvae_dist.training.card import write_model_card
from fvae_dist.training.full import is_full
from fvae_dist.training.recipe_trainer import RecipeTrainer
from fvae_dist.training.rope_scaling import settings_of

if TYPE_CHECKING:
    from fvae_dist.training.run import Prepared

logger = logging.getLogger(__name__)


def collect_metrics(trainer: RecipeTrainer, result: Any, final_eval: dict[str, float] | None) -> dict[str, Any]:
    """The run in numbers: first and last evaluation, the log history, the totals."""
    history = trainer.state.log_history
    evaluations = [row for row in history if "eval_loss" in row]
    first = evaluations[0] if evaluations and evaluations[0]["step"] == 0 else None
    metrics: dict[str, Any] = {
        "steps": result.global_step,
        "train_runtime_s": result.metrics.get("train_runtime"),
        "history": [row for row in history if "loss/task" in row],
    }
    if first is not None:
        metrics["eval_start"] = {"loss": first["eval_loss"]}
    if final_eval is not None:
        metrics["eval_end"] = {"loss": final_eval["eval_loss"]}
    return metrics


def save_results(trainer: RecipeTrainer, prepared: Prepared, metrics: dict[str, Any]) -> None:
    """Write OUTPUT_DIR/adapter (PEFT format, fp32, with a model card), or OUTPUT_DIR/model where all of it was trained,
    and OUTPUT_DIR/metrics.json."""
    output = Path(prepared.recipe.training.output_dir)
    folder = output / ("model" if is_full(prepared.recipe.adapter) else "adapter")
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        summary = {key: metrics[key] for key in ("steps", "train_runtime_s") if metrics.get(key) is not None}
        summary |= {f"{key}_loss": metrics[key]["loss"] for key in ("eval_start", "eval_end") if key in metrics}
        if metrics["history"]:
            last = metrics["history"][-1]
            summary |= {key: last[key] for key in ("loss/task", "loss/neg_elbo") if key in last}
        scaled = settings_of(prepared.config) if prepared.recipe.model.rope_scaling is not None else None
        write_model_card(folder, prepared.recipe, prepared.data.report, summary, scaled)
        (output / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
        logger.info("%s saved and read back: %s", folder.name, folder)
