"""What `fvae-dist compare` does: list, run and report."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from queue import SimpleQueue

from fvae_dist.comparison import running
from fvae_dist.comparison.jobs import ALONE, Running, Slot, slots_of
from fvae_dist.comparison.launchers import check_several_at_once
from fvae_dist.comparison.processes import Stopped, script
from fvae_dist.comparison.report import write_report
from fvae_dist.comparison.study import Study, Test, Trial, load_study
from fvae_dist.training.recipe import RecipeError

logger = logging.getLogger(__name__)


def compare(args: argparse.Namespace) -> int:
    """Run what the arguments name, one after another or --jobs at once, and report.

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
    problems = _run(study, _everything(study)) if args.jobs == 1 else _run_all_at_once(study, args.jobs)
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
    return [problem for item in items if (problem := _run_one(study, item, ALONE)) is not None]


def _run_one(study: Study, item: Trial | Test, slot: Slot) -> str | None:
    name = f"{item.index}: {item}"
    beside_others = slot.jobs > 1
    logger.info("%s%s", name, ": started" if beside_others else "")
    run = running.run_trial if isinstance(item, Trial) else running.run_test
    problem = run(study, item, slot)  # type: ignore[arg-type]
    if problem is not None:
        logger.warning("%s: %s", name, problem)
        return f"{name}: {problem}"
    if beside_others:
        logger.info("%s: finished", name)
    return None


def _run_all_at_once(study: Study, jobs: int) -> list[str]:
    """`_run` for everything, with up to so many at once: the tests after the trials, by which they are chosen."""
    check_several_at_once(study.comparison.launcher, jobs)
    with Running() as shared:
        slots = slots_of(shared, jobs)
        return [
            *_run_at_once(study, study.trials(), slots, shared),
            *_run_at_once(study, study.tests(), slots, shared),
        ]


def _run_at_once(study: Study, items: Sequence[Trial | Test], slots: list[Slot], shared: Running) -> list[str]:
    """`_run`, one thread a slot. An error that ends the comparison, or a signal, stops all."""
    free: SimpleQueue[Slot] = SimpleQueue()
    for slot in slots:
        free.put(slot)

    def run(item: Trial | Test) -> str | None:
        slot = free.get()
        try:
            with shared.working:
                if shared.received:
                    raise Stopped
                return _run_one(study, item, slot)
        finally:
            free.put(slot)

    with ThreadPoolExecutor(len(slots)) as pool:
        futures = [pool.submit(run, item) for item in items]
        try:
            if any(future.exception() for future in wait(futures, return_when=FIRST_EXCEPTION).done):
                shared.stop()
            wait(futures)
        except BaseException:  # Ctrl-C: as without jobs nothing outlives this process
            shared.kill()
            raise
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, Stopped)), errors[0])
    return [problem for future in futures if (problem := future.result()) is not None]


def _show_failures(problems: list[str]) -> int:
    for problem in problems:
        print(f"failed: {problem}", file=sys.stderr)
    return 1 if problems else 0
