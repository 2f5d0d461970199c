"""Command lines. `fvae-dist train ...` and `launch/train.py ...` are the same command, and so on."""

from __future__ import annotations

import argparse
import atexit
import functools
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from fvae_dist import arguments
from fvae_dist.benchmark_arguments import parse_benchmark
from fvae_dist.training.leaving import leave
from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.recipe_file import load_recipe

if TYPE_CHECKING:
    from fvae_dist.training.run import Prepared

EXIT_BAD_INPUT = 2
_GRACE_S = 5.0


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first argument names; its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {
        "train": train_command,
        "evaluate": evaluate_command,
        "export": export_command,
        "compare": compare_command,
        "plan": plan_command,
        "benchmark": benchmark_command,
        "checkpoint": checkpoint_command,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: fvae-dist {{{','.join(commands)}}} ...\n\nEach command has --help.")
        return 0 if argv else EXIT_BAD_INPUT
    if argv[0] not in commands:
        print(f"error: unknown command {argv[0]!r}; known: {', '.join(commands)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return commands[argv[0]](argv[1:])


def run() -> NoReturn:
    """The installed command `fvae-dist`."""
    leave(main())


def _command(run: Callable[[list[str] | None], int]) -> Callable[..., int]:
    """A bad recipe, argument or file is one line and exit code 2, whatever the command."""

    @functools.wraps(run)
    def command(argv: list[str] | None = None) -> int:
        _set_up_output()
        try:
            return run(argv)
        except RecipeError as error:
            _report(error)
            return EXIT_BAD_INPUT

    return command


@_command
def train_command(argv: list[str] | None) -> int:
    """Train from a recipe. Exit codes: 0 done; 2 bad recipe, data or argument; 75 stopped by SIGTERM or SIGUSR1 after a
    complete checkpoint (start it again with --resume auto); anything else is a crash."""
    args = arguments.parse_train(argv)
    if args.help_recipe:
        from fvae_dist.training.recipe_help import describe_recipe

        print(describe_recipe())
        return 0
    return _train(args)


def _train(args: argparse.Namespace) -> int:
    recipe = load_recipe(args.config, args.set)
    # Imported only now: a mistake in the recipe is reported in a second.
    from fvae_dist.training import run
    from fvae_dist.training.control import EXIT_RESUME, StopSignal
    from fvae_dist.training.no_waiting import NonFiniteLossError
    from fvae_dist.training.process_group import ended_with

    devices = args.devices or int(os.environ.get("WORLD_SIZE", "1"))
    stop = StopSignal().listen()
    prepared = run.prepare(recipe, resume=args.resume, dry_run=args.dry_run, devices=devices)
    _plan_suites(prepared)
    if args.dry_run:
        from fvae_dist.training.dry_run import describe

        if _is_main():
            print(describe(prepared, devices))
        return 0
    try:
        with ended_with(RecipeError, NonFiniteLossError):
            finished = run.train(prepared, stop)
    finally:
        atexit.register(stop.ignore)
    return EXIT_RESUME if finished is None else 0


def _plan_suites(prepared: Prepared) -> None:
    """Read evaluation.suites and have them run in training; here, because training knows nothing of suites."""
    recipe = prepared.recipe
    if not recipe.evaluation.every:
        return
    from fvae_dist.evaluation.callback import SuiteEvaluation, plan_suites

    tasks = plan_suites(recipe, prepared.tokenizer, prepared.config, prepared.data.classes)
    prepared.make_callbacks = lambda trainer: [SuiteEvaluation(trainer, recipe, tasks)]


@_command
def evaluate_command(argv: list[str] | None) -> int:
    """Evaluate a model with an adapter. Exit codes: 0 done, 2 bad argument or file; anything else is a crash."""
    args = arguments.parse_evaluate(argv)
    # Imported only now: --help and a mistake in the arguments take no seconds.
    from fvae_dist.evaluation.evaluate import evaluate
    from fvae_dist.training.process_group import ended_with

    with ended_with(RecipeError):
        table = evaluate(args)
    if table is not None:
        print(table, end="")
    return 0


@_command
def export_command(argv: list[str] | None) -> int:
    """Convert or export an adapter. Exit codes: 0 done, 2 bad argument or file; anything else is a crash."""
    args = arguments.parse_export(argv)
    # Imported only now: --help and a mistake in the arguments take no seconds.
    from fvae_dist.exporting import export

    print(export(args))
    return 0


@_command
def compare_command(argv: list[str] | None) -> int:
    """Compare PEFT methods. Exit codes: 0 done; 1 a trial failed, the others went on; 2 bad file or argument; 75
    stopped by SIGTERM or SIGUSR1 (start it again: it goes on); anything else is a crash."""
    args = arguments.parse_compare(argv)
    # Imported only now: --help and a mistake in the arguments take no seconds.
    from fvae_dist.comparison.command import compare
    from fvae_dist.comparison.processes import Stopped
    from fvae_dist.training.control import EXIT_RESUME

    try:
        return compare(args)
    except Stopped:
        return EXIT_RESUME


@_command
def checkpoint_command(argv: list[str] | None) -> int:
    """Look at, check or take the adapter out of a checkpoint. Exit codes: 0 whole, 2 damaged or bad argument."""
    args = arguments.parse_checkpoint(argv)
    from fvae_dist.training import checkpoint_tools

    if args.action == "export":
        print(checkpoint_tools.export(args.path, args.out))
    else:
        print(getattr(checkpoint_tools, args.action)(args.path))
    return 0


@_command
def plan_command(argv: list[str] | None) -> int:
    """Plan a recipe on a cluster. Exit codes: 0 done; 2 bad recipe or argument, or nothing fits; else a crash."""
    args = arguments.parse_plan(argv)
    if args.measure:
        from fvae_dist.plan_measure import measure

        print(measure(args))
        return 0
    # Imported only now: --help and a mistake in the arguments take no seconds.
    from fvae_dist.plan_command import plan

    print(plan(args))
    return 0


@_command
def benchmark_command(argv: list[str] | None) -> int:
    """Measure layers, steps or attention. Exit codes: 0 done; 2 bad argument; else a crash."""
    args = parse_benchmark(argv)
    # Imported only now: --help and a mistake in the arguments take no seconds.
    from fvae_dist.benchmarking.command import benchmark

    print(benchmark(args))
    return 0


def _report(error: RecipeError) -> None:
    """Print the error as one line, by one rank.

    Every rank meets the same error, and when one exits the launcher ends the others: a rank that left before rank 0
    had printed would leave the user with nothing. Whoever still lives after its wait has met an error of its own (a
    file that is missing on this node only) and prints it.
    """
    if not _is_main():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the batch script's ranks inherit it ignored
        time.sleep(_GRACE_S if os.environ.get("LOCAL_RANK", "0") == "0" else 2 * _GRACE_S)
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _set_up_output() -> None:
    """Log to stderr, from rank 0; leave out what a user can do nothing about."""
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
    # Without a network it announces every retry twice; what failed is in the error that follows.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    # Misses an optional kernel as soon as it is imported, on CPUs with bf16 units.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    level = logging.INFO if _is_main() else logging.ERROR
    logging.basicConfig(level=logging.WARNING if _is_main() else logging.ERROR, format="%(name)s: %(message)s")
    logging.getLogger("fvae_dist").setLevel(level)
