"""Command lines. `fvae-dist train ...` and `launch/train.py ...` are the same command, and so on."""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from fvae_dist.training.recipe import RecipeError, describe_recipe
from fvae_dist.training.recipe_file import load_recipe

if TYPE_CHECKING:
    from fvae_dist.training.run import Prepared

EXIT_BAD_INPUT = 2
_GRACE_S = 5.0


def main(argv: list[str] | None = None) -> int:
    """Entry point of `fvae-dist`."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {
        "train": train_command,
        "evaluate": evaluate_command,
        "export": export_command,
        "checkpoint": checkpoint_command,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: fvae-dist {{{','.join(commands)}}} ...\n\nEach command has --help.")
        return 0 if argv else EXIT_BAD_INPUT
    if argv[0] not in commands:
        print(f"error: unknown command {argv[0]!r}; known: {', '.join(commands)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return commands[argv[0]](argv[1:])


def train_command(argv: list[str] | None = None) -> int:
    """Train from a recipe. Exit codes: 0 done; 2 bad recipe, data or argument; 75 stopped by SIGTERM or SIGUSR1 after a
    complete checkpoint (start it again with --resume auto); anything else is a crash."""
    _set_up_output()
    try:
        args = _parse(argv)
        if args.help_recipe:
            print(describe_recipe())
            return 0
        return _train(args)
    except RecipeError as error:
        _report(error)
        return EXIT_BAD_INPUT


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument as every other bad input: one line, from one rank."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message} (see --help)")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="launch/train.py",
        allow_abbrev=False,
        description="Fine-tune with FVAE-LoRA, or any PEFT method, from a recipe.",
        epilog="Launch: deepspeed launch/train.py --config launch/recipes/quickstart.yaml",
    )
    parser.add_argument("--config", metavar="RECIPE", help="recipe YAML")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override (repeatable)")
    parser.add_argument("--resume", metavar="auto|PATH", help="go on from the newest, or a given, checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; needs no launcher and no GPU")
    parser.add_argument("--devices", type=int, metavar="N", help="devices --dry-run computes for (default: WORLD_SIZE)")
    parser.add_argument("--help-recipe", action="store_true", help="every recipe key with type, default and meaning")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_args(argv)
    if not args.config and not args.help_recipe:
        parser.error("--config is required")
    if args.devices is not None and (args.devices < 1 or not args.dry_run):
        parser.error("--devices is a number > 0 and goes with --dry-run")
    return args


def _train(args: argparse.Namespace) -> int:
    recipe = load_recipe(args.config, args.set)
    # Imported only now: a mistake in the recipe is reported in a second.
    from fvae_dist.training import run
    from fvae_dist.training.control import EXIT_RESUME, StopSignal

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
        finished = run.train(prepared, stop)
    finally:
        run.shut_down()
        atexit.register(stop.ignore)
    return EXIT_RESUME if finished is None else 0


def _plan_suites(prepared: Prepared) -> None:
    """Read evaluation.suites and have them run in training; here, because training knows nothing of suites."""
    recipe = prepared.recipe
    if not recipe.evaluation.every:
        return
    from fvae_dist.evaluation.callback import SuiteEvaluation, plan_suites

    tasks = plan_suites(recipe, prepared.tokenizer, prepared.config)
    prepared.make_callbacks = lambda trainer: [SuiteEvaluation(trainer, recipe, tasks)]


def evaluate_command(argv: list[str] | None = None) -> int:
    """Evaluate a model with an adapter. Exit codes: 0 done, 2 bad argument or file; anything else is a crash."""
    _set_up_output()
    try:
        args = _parse_evaluate(argv)
        # Imported only now: --help and a mistake in the arguments take no seconds.
        from fvae_dist.evaluation.evaluate import evaluate
        from fvae_dist.evaluation.ranks import shut_down

        try:
            table = evaluate(args)
        finally:
            shut_down()
        if table is not None:
            print(table, end="")
        return 0
    except RecipeError as error:
        _report(error)
        return EXIT_BAD_INPUT


def _parse_evaluate(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="launch/evaluate.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Evaluate a model with an adapter (of any PEFT method), or a base model alone.",
        epilog="""suites and their data:
  perplexity      --data perplexity=RECIPE[:eval|:train]: loss on a recipe's data section
  commonsense     --data commonsense=PATH: folder of NAME.test.json or NAME/test.json (LLM-Adapters), or one file
  gsm8k           --data gsm8k=FILE: {question, answer}; exact match of the last number
  needle          [--data needle=TEXT]: a number hidden in a text of up to --max-length tokens
  groups          --data groups=FILE: any labelled set with a group column; worst-group accuracy
  lm_eval:T[,T]   tasks of lm-evaluation-harness (pip install 'fvae-dist[eval]')

examples:
  python launch/evaluate.py --model BASE --adapter runs/a/adapter --suite commonsense --data commonsense=DIR --out out
  deepspeed launch/evaluate.py ...     # several GPUs: the base sharded by ZeRO-3, the data split; the same numbers

Started again with the same --out it goes on where it was; OUT/results.json and OUT/results.md (of this
command's suites) appear at the end.""",
    )
    parser.add_argument("--model", metavar="BASE", required=True, help="base model, name or folder")
    parser.add_argument("--adapter", metavar="DIR", help="saved adapter, PEFT format, safetensors; default: none")
    parser.add_argument("--suite", metavar="NAME[,NAME]", required=True, help="what to run, see below")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for records and results")
    parser.add_argument("--data", action="append", default=[], metavar="SUITE=PATH", help="a suite's data (repeatable)")
    parser.add_argument(
        "--mode",
        choices=["generate", "loglikelihood"],
        help="questions with given answers: parse what the model writes (commonsense), or take the likeliest (groups)",
    )
    parser.add_argument("--template", choices=["clean", "published"], default="clean", help="prompt (default: clean)")
    parser.add_argument("--batch-size", type=_at_least(1), default=8, metavar="N", help="samples a call (default: 8)")
    parser.add_argument("--num-beams", type=_at_least(1), default=1, metavar="N", help="beams (default: 1, greedy)")
    parser.add_argument("--max-new-tokens", type=_at_least(1), metavar="N", help="default: 32 (gsm8k: 512, needle: 16)")
    parser.add_argument("--max-length", type=_at_least(2), metavar="N", help="tokens, answer included; default: 2048")
    parser.add_argument("--limit", type=_at_least(1), metavar="N", help="only the first N samples of every set")
    parser.add_argument("--seed", type=_at_least(0), default=42, metavar="N", help="of the bootstrap (default: 42)")
    parser.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32"],
        default="auto",
        help="of the base; auto: bfloat16 on a GPU, float32 on CPU",
    )
    parser.add_argument(
        "--attention", choices=["auto", "flash_attention_2", "sdpa", "eager"], default="auto", help="as model.attention"
    )
    parser.add_argument(
        "--deepspeed",
        metavar="auto|none|JSON",
        default="auto",
        help="auto: ZeRO-3 if there are several ranks; none: the whole model on each",
    )
    parser.add_argument("--lm-eval-tasks", metavar="DIR", help="folder with task YAMLs of your own for lm_eval")
    parser.add_argument("--overwrite", action="store_true", help="forget the finished samples in --out")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the base model's own code")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(argv)


def _at_least(smallest: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if not smallest <= value < 2**32:
            raise argparse.ArgumentTypeError(f"must be a number >= {smallest}, got {text}")
        return value

    read.__name__ = "number"  # argparse names it in "invalid number value"
    return read


def export_command(argv: list[str] | None = None) -> int:
    """Convert or export an adapter. Exit codes: 0 done, 2 bad argument or file; anything else is a crash."""
    _set_up_output()
    try:
        args = _parse_export(argv)
        # Imported only now: --help and a mistake in the arguments take no seconds.
        from fvae_dist.exporting import export

        print(export(args))
        return 0
    except RecipeError as error:
        _report(error)
        return EXIT_BAD_INPUT


def _parse_export(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="launch/export.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Bring an adapter into another form.",
        epilog="""forms:
  lora       plain LoRA, for PEFT without this project; needs encoder_layers = 0
  inference  encoder 1 and B alone, all that evaluation needs
  merged     the base model with the adapter in its weights; needs encoder_layers = 0

examples:
  python launch/export.py --from-official exp/adapter --base meta-llama/Meta-Llama-3-8B --out adapter
  python launch/export.py --adapter runs/adapter --format inference --out adapter-small""",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--from-official", metavar="DIR", help="adapter saved by the reference code (idiap/FVAE-LoRA)")
    source.add_argument("--adapter", metavar="DIR", help="saved FVAE-LoRA adapter")
    parser.add_argument("--format", choices=["lora", "inference", "merged"], help="what to make of --adapter")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="base model, name or folder: required with --from-official; merged takes by default the adapter's own",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write; files in it are replaced")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the base model's own code")
    args = parser.parse_args(argv)
    if args.from_official is not None and args.format:
        parser.error("--format goes with --adapter")
    if args.from_official is not None and not args.base:
        parser.error("--base is required with --from-official")
    if args.adapter is not None and not args.format:
        parser.error("--format is required with --adapter")
    return args


def checkpoint_command(argv: list[str] | None = None) -> int:
    """Look at, check or take the adapter out of a checkpoint. Exit codes: 0 whole, 2 damaged or bad argument."""
    _set_up_output()
    try:
        parser = _Parser(prog="launch/checkpoint.py", allow_abbrev=False, description="Checkpoints of a run.")
        parser.add_argument("action", choices=["inspect", "verify", "export"], help="what to do")
        parser.add_argument("path", help="a checkpoint-N folder, or a run's output_dir with several")
        parser.add_argument("--out", metavar="DIR", help="export: folder for the adapter, in PEFT's format")
        args = parser.parse_args(argv)
        if (args.action == "export") != bool(args.out):
            parser.error("--out goes with export, and export needs it")
        from fvae_dist.training import checkpoint_tools

        if args.action == "export":
            print(checkpoint_tools.export(args.path, args.out))
        else:
            print(getattr(checkpoint_tools, args.action)(args.path))
        return 0
    except RecipeError as error:
        _report(error)
        return EXIT_BAD_INPUT


def _report(error: RecipeError) -> None:
    """Print the error as one line, by one rank.

    Every rank meets the same error, and when one exits the launcher ends the others: a rank that left before rank 0
    had printed would leave the user with nothing. Whoever still lives after its wait has met an error of its own (a
    file that is missing on this node only) and prints it.
    """
    if not _is_main():
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
    level = logging.INFO if _is_main() else logging.ERROR
    logging.basicConfig(level=logging.WARNING if _is_main() else logging.ERROR, format="%(name)s: %(message)s")
    logging.getLogger("fvae_dist").setLevel(level)
