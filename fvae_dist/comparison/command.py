"""What `fvae-dist compare` does: list, run and report."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from fvae_dist.comparison import running
from fvae_dist.comparison.processes import script
from fvae_dist.comparison.report import write_report
from fvae_dist.comparison.study import Study, Test, Trial, load_study
from fvae_dist.training.recipe import RecipeError

logger = logging.getLogger(__name__)


def compare(args: argparse.Namespace) -> int:
    """Run what the arguments name, one after another, and report.

    Returns:
        0, or 1 if something failed; a line for each failure is printed.

    Raises:
        RecipeError: the comparison cannot be run as it is.
        Stopped: a signal came; started again, the comparison goes on.
    """
    study = load_study(args.config)
    if args.list:
        print(listing(study), end="")
        return 0
    if args.report:
        print(write_report(study), end="")
        return 0
    script("train.py")
    if args.trial is not None:
        return _show_failures(_run(study, [_numbered(study, args.trial)]))
    problems = _run(study, _everything(study))
    print(write_report(study), end="")
    print(f"report: {study.output / 'comparison.html'}")
    return _show_failures(problems)


def listing(study: Study) -> str:
    """A line for each trial and test: number, what it is, and how far it is."""
    lines = [f"{trial.index}\t{trial}\t{_state_of_trial(study, trial)}" for trial in study.trials()]
    lines += [f"{test.index}\t{test}\t{_state_of_test(study, test)}" for test in study.tests()]
    return "\n".join(lines) + "\n"


def _state_of_trial(study: Study, trial: Trial) -> str:
    if running.finished(study, trial) is not None:
        return "finished"
    if running.failure(study, trial) is not None:
        return "failed"
    return "begun" if study.folder(trial).exists() else "open"


def _state_of_test(study: Study, test: Test) -> str:
    trial = running.chosen_trial(study, test)
    if trial is None:
        return "open"
    if running.tested(study, trial) is not None:
        return "finished"
    return "failed" if running.failure(study, trial, running.TESTED) is not None else "open"


def _everything(study: Study) -> list[Trial | Test]:
    return [*study.trials(), *study.tests()]


def _numbered(study: Study, number: int) -> Trial | Test:
    everything = _everything(study)
    if number >= len(everything):
        raise RecipeError(f"--trial {number}: the last is {len(everything) - 1} (see --list)")
    item = everything[number]
    if isinstance(item, Test) and not running.is_settled(study, item.method):
        raise RecipeError(f"--trial {number}: tests what is chosen by {item.method}'s trials; run these first")
    return item


def _run(study: Study, items: Sequence[Trial | Test]) -> list[str]:
    """Run each; returns a line for each that failed."""
    problems = []
    for item in items:
        logger.info("%d: %s", item.index, item)
        problem = running.run_trial(study, item) if isinstance(item, Trial) else running.run_test(study, item)
        if problem is not None:
            problems.append(f"{item.index}: {item}: {problem}")
            logger.warning("%s", problems[-1])
    return problems


def _show_failures(problems: list[str]) -> int:
    for problem in problems:
        print(f"failed: {problem}", file=sys.stderr)
    return 1 if problems else 0
