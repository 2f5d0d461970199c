"""Tasks of lm-evaluation-harness (EleutherAI) on the adapted model, an optional extra.

The model is wrapped once. Every rank runs all requests: ranks that share a model by ZeRO-3 must stay in step (several
ranks are no faster here). A finished task is kept, an interrupted one starts anew.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from fvae_dist.evaluation.inference import Inference
from fvae_dist.evaluation.metrics import estimate
from fvae_dist.evaluation.ranks import Ranks
from fvae_dist.evaluation.store import write_text
from fvae_dist.evaluation.tasks import Options
from fvae_dist.training.recipe import RecipeError

INSTALL = "pip install 'fvae-dist[eval]'"


class LmEvalSuite:
    """Named tasks of the harness, found before a weight is loaded.

    Args:
        tasks: their names, or those of groups.
        folder: of task YAMLs of one's own; None: the harness's only.

    Raises:
        RecipeError: the harness is not installed, or knows no such task.
    """

    def __init__(self, tasks: list[str], folder: str | None):
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise RecipeError(f"--suite lm_eval: lm-evaluation-harness is not installed: {INSTALL}") from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if folder is not None and not Path(folder).is_dir():
            raise RecipeError(f"--lm-eval-tasks: there is no folder {folder}")
        self.tasks = tasks
        self._manager = TaskManager(include_path=folder)
        for name in tasks:
            if name not in self._manager.match_tasks([name]):
                raise RecipeError(f"--suite lm_eval:{name}: the harness knows no such task; --lm-eval-tasks adds some")

    def run(
        self, inference: Inference, options: Options, batch_size: int, settings: dict[str, Any], out: Path, ranks: Ranks
    ) -> dict[str, dict[str, Any]]:
        """Run what is not finished; all ranks must call it.

        Args:
            settings: what the numbers depend on; results that were made with others are made anew.
            out: OUT/lm_eval/TASK.json keeps a task's metrics, TASK.jsonl its samples.

        Returns:
            On rank 0, task -> metrics: value and 95 % interval of each, num_samples. A group has an entry for each of
            its tasks.
        """
        from lm_eval.models.huggingface import HFLM

        model = HFLM(
            pretrained=inference.model,  # type: ignore[arg-type]
            tokenizer=inference.tokenizer,
            batch_size=batch_size,
            max_length=options.max_length,
        )
        model._device = inference.device  # a shard's parameters may say otherwise
        results: dict[str, dict[str, Any]] = {}
        for task in self.tasks:
            path = out / "lm_eval" / f"{task}.json"
            metrics = ranks.broadcast(_finished(path, settings) if ranks.is_first else None)
            if metrics is None:
                # The harness runs everywhere and reports on the first local rank only.
                metrics = self._run_task(task, model, options, batch_size, path.parent if ranks.is_first else None)
                if ranks.is_first:
                    write_text(path, json.dumps({"settings": settings, "metrics": metrics}, indent=1) + "\n")
            results |= metrics
        return results

    def _run_task(
        self, task: str, model: Any, options: Options, batch_size: int, folder: Path | None
    ) -> dict[str, dict[str, Any]]:
        """The task's metrics, on the rank that has a folder to write to."""
        import lm_eval

        found: Any = lm_eval.simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=self._manager,
            batch_size=batch_size,
            limit=options.limit,
            bootstrap_iters=0,  # ours are the same for every suite
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            torch_random_seed=options.seed,
            fewshot_random_seed=options.seed,
        )
        if folder is None or found is None:
            return {}
        folder.mkdir(parents=True, exist_ok=True)
        metrics = {}
        for name, samples in found["samples"].items():
            metrics[name] = _metrics(found["results"][name], samples, options.seed)
            write_text(folder / f"{name}.jsonl", "".join(_line(sample) for sample in samples))
        return metrics


def _finished(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept["metrics"] if kept["settings"] == settings else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _metrics(found: dict[str, Any], samples: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The harness's metrics ("acc,none"), with our interval where its value is the mean over samples."""
    metrics: dict[str, Any] = {"num_samples": len({sample["doc_id"] for sample in samples})}
    for key, value in found.items():
        name, _, filtered_by = key.partition(",")
        if not filtered_by or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        label = name if filtered_by == "none" else f"{name},{filtered_by}"
        values = [s[name] for s in samples if s.get("filter") == filtered_by and isinstance(s.get(name), (int, float))]
        metrics[label] = {"value": float(value)}
        if values and math.isclose(sum(values) / len(values), value, rel_tol=1e-6, abs_tol=1e-9):
            metrics[label] = estimate(values, seed=seed)
    return metrics


def _line(sample: dict[str, Any]) -> str:
    kept = {key: value for key, value in sample.items() if key not in ("arguments", "resps") and "hash" not in key}
    return json.dumps({"index": sample["doc_id"], **kept}, ensure_ascii=False, default=str) + "\n"
