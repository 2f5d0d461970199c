"""One trial: train, evaluate, write down. What is finished is not run again; what failed is written down too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fvae_dist.comparison import processes
from fvae_dist.comparison.jobs import ALONE, Slot
from fvae_dist.comparison.measured import measured_in
from fvae_dist.comparison.schema import SuiteSection
from fvae_dist.comparison.statistics import best_learning_rate
from fvae_dist.comparison.study import Study, Test, Trial
from fvae_dist.evaluation.store import write_text
from fvae_dist.training.recipe import RecipeError, one_line

RESULT, TESTED = "result.json", "test.json"
_JOBS = "jobs.json"
_ERRORS = {RESULT: "error.json", TESTED: "test_error.json"}


class TrialError(Exception):
    """A trial that could not be finished; the message is one line."""


def run_trial(study: Study, trial: Trial, slot: Slot = ALONE) -> str | None:
    """Train and validate, from where an earlier run stopped; RESULT appears in the trial's folder at the end.

    Returns:
        What went wrong, in one line, or None.

    Raises:
        RecipeError: the folder holds a trial of another comparison.
        Stopped: a signal came; started again, the trial goes on.
    """
    folder = study.folder(trial)
    if finished(study, trial) is not None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "settings.json", json.dumps(_settings(study, trial), indent=1) + "\n")
    return _recorded(folder, RESULT, lambda: _train_and_validate(study, trial, folder, slot))


def run_test(study: Study, test: Test, slot: Slot = ALONE) -> str | None:
    """Test the adapter that validation chose, with this seed; TESTED appears in its trial's folder.

    Returns:
        What went wrong, in one line, or None.

    Raises:
        RecipeError, Stopped: as `run_trial`.
    """
    trial = chosen_trial(study, test)
    if trial is None:
        return "nothing to test: no learning rate has a finished trial for every seed"
    if tested(study, trial) is not None:
        return None
    folder = study.folder(trial)

    def evaluate() -> dict[str, Any]:
        return {"settings": _test_settings(study), **_evaluate(study, study.comparison.test, folder, "test", slot)}

    return _recorded(folder, TESTED, evaluate)


def is_settled(study: Study, method: str) -> bool:
    """Whether every trial of the method is finished or has failed, so that its learning rate can be chosen."""
    own = [trial for trial in study.trials() if trial.method == method]
    return all(finished(study, trial) is not None or failure(study, trial) is not None for trial in own)


def chosen_trial(study: Study, test: Test) -> Trial | None:
    """The trial with the test's method and seed at the learning rate that is best in validation."""
    learning_rate = chosen_learning_rate(study, test.method)
    wanted = (test.method, learning_rate, test.seed)
    return next((t for t in study.trials() if (t.method, t.learning_rate, t.seed) == wanted), None)


def chosen_learning_rate(study: Study, method: str) -> float | None:
    """By the mean over all seeds of the validation metric; None before the method's trials are settled."""
    if not is_settled(study, method):
        return None
    own = {trial: finished(study, trial) for trial in study.trials() if trial.method == method}
    values = {(t.learning_rate, t.seed): result["value"] for t, result in own.items() if result is not None}
    asked = study.comparison
    return best_learning_rate(values, asked.learning_rates, asked.seeds, smaller_is_better(asked.validation.metric))


def smaller_is_better(metric: str) -> bool:
    from fvae_dist.evaluation.callback import SMALLER_IS_BETTER

    name = metric.rpartition("/")[2].partition(",")[0]  # lm_eval names a filter after a comma
    return name in SMALLER_IS_BETTER or name.endswith("perplexity") or name == "bits_per_byte"


def finished(study: Study, trial: Trial) -> dict[str, Any] | None:
    """The trial's result, or None.

    Raises:
        RecipeError: it was made with other settings.
    """
    folder = study.folder(trial)
    before = _read(folder / "settings.json")
    if before is not None:
        _check_same(folder, before, _settings(study, trial))
    return _read(folder / RESULT)


def tested(study: Study, trial: Trial) -> dict[str, Any] | None:
    """The test of the trial's adapter, or None; RecipeError as `finished`."""
    result = _read(study.folder(trial) / TESTED)
    if result is not None:
        _check_same(study.folder(trial), result["settings"], _test_settings(study))
    return result


def failure(study: Study, trial: Trial, of: str = RESULT) -> str | None:
    """Why the trial (or with TESTED its test) failed the last time that it was run."""
    record = _read(study.folder(trial) / _ERRORS[of])
    return record["error"] if record else None


def _recorded(folder: Path, name: str, run: Callable[[], dict[str, Any]]) -> str | None:
    """Write what `run` returns to folder/name, or why it failed to its error's file."""
    error_path = folder / _ERRORS[name]
    error_path.unlink(missing_ok=True)
    try:
        result = run()
    except TrialError as error:
        write_text(error_path, json.dumps({"error": str(error)}) + "\n")
        return str(error)
    write_text(folder / name, json.dumps(result, indent=1) + "\n")
    return None


def _train_and_validate(study: Study, trial: Trial, folder: Path, slot: Slot) -> dict[str, Any]:
    recipe = folder / "recipe.yaml"
    write_text(recipe, yaml.safe_dump(study.recipe_of(trial), sort_keys=False, allow_unicode=True))
    if not (folder / "train" / "metrics.json").is_file():  # the last that a training writes
        _note_jobs(folder, slot.jobs)
        _run(processes.train_command(study, recipe, slot), folder / "train.log", "training", slot)
    validated = _evaluate(study, study.comparison.validation, folder, "validation", slot)
    return {**validated, **measured_in(study.recipe_of(trial), folder / "train"), "jobs": _jobs(folder)}


def _note_jobs(folder: Path, jobs: int) -> None:
    """Before the training, which another start may complete alone: its times are then of both."""
    if jobs > _jobs(folder):
        write_text(folder / _JOBS, json.dumps({"jobs": jobs}) + "\n")


def _jobs(folder: Path) -> int:
    """The most trials at once, this one among them, beside which it was trained."""
    noted = _read(folder / _JOBS)
    return noted["jobs"] if noted else 1


def _evaluate(study: Study, suite: SuiteSection, folder: Path, name: str, slot: Slot) -> dict[str, Any]:
    """value of the metric, and worst_group where there are groups."""
    from fvae_dist.evaluation.callback import flatten

    whole = folder / "train" / "model"  # of full fine-tuning
    trained = whole if whole.is_dir() else folder / "train" / "adapter"
    command = processes.evaluate_command(study, suite, trained, folder / name, slot)
    _run(command, folder / f"{name}.log", name, slot)
    suites = json.loads((folder / name / "results.json").read_text(encoding="utf-8"))["suites"]
    tasks = [flatten(f"{own}/{task}", metrics) for own, found in suites.items() for task, metrics in found.items()]
    value = metric_value(suite.metric, tasks)
    if value is None:
        raise TrialError(f"{name}: {suite.metric} is none of {', '.join(key for task in tasks for key in task)}")
    return {"value": value, "worst_group": metric_value("groups/groups/worst_group", tasks)}


def metric_value(metric: str, tasks: list[dict[str, float]]) -> float | None:
    """SUITE/TASK/METRIC of the tasks' scalars, or with `*` for TASK the mean over tasks; None if one lacks it."""
    suite, task, name = metric.split("/")
    if task != "*":
        return next((scalars[metric] for scalars in tasks if metric in scalars), None)
    found = [value for scalars in tasks for key, value in scalars.items() if _fits(key, suite, name)]
    return sum(found) / len(found) if found and len(found) == len(tasks) else None


def _fits(key: str, suite: str, name: str) -> bool:
    return key.startswith(f"{suite}/") and key.endswith(f"/{name}")


def _run(command: list[str], log: Path, name: str, slot: Slot) -> None:
    from fvae_dist.training.control import EXIT_RESUME

    with slot.waiting():
        code = processes.run_logged(command, log, slot)
    if code == EXIT_RESUME:
        raise processes.Stopped
    if code:
        raise TrialError(f"{name}: {processes.last_error(log, code)} ({log})")


def _settings(study: Study, trial: Trial) -> dict[str, Any]:
    """What a trial's numbers depend on. The launcher too: it decides the global batch, which is part of the budget."""
    asked = study.comparison
    recipe = study.recipe_of(trial)
    del recipe["training"]["output_dir"], recipe["data"]["cache_dir"]  # so that the folder can be moved
    return _as_json({"recipe": recipe, "launcher": asked.launcher, "validation": asked.validation.model_dump()})


def _test_settings(study: Study) -> dict[str, Any]:
    return _as_json({"test": study.comparison.test.model_dump()})


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(value))


def _check_same(folder: Path, before: dict[str, Any], now: dict[str, Any], path: str = "") -> None:
    for key in dict.fromkeys([*before, *now]):
        was, is_now = before.get(key), now.get(key)
        dotted = f"{path}.{key}".lstrip(".")
        if isinstance(was, dict) and isinstance(is_now, dict):
            _check_same(folder, was, is_now, dotted)
        elif was != is_now:
            change = f"{was}, now {is_now}"[:100]
            raise RecipeError(f"{folder}: was run with another {dotted} ({change}); choose another output")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read: {one_line(error)}; remove it to run it again") from None
