"""Arguments of the commands; a bad one is a RecipeError, as every other bad input."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from fvae_dist.training.recipe import RecipeError


class Parser(argparse.ArgumentParser):
    """Reports a bad argument as every other bad input: one line, from one rank."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message} (see --help)")


def parse_train(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="launch/train.py",
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


def parse_evaluate(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="launch/evaluate.py",
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
    parser.add_argument("--batch-size", type=at_least(1), default=8, metavar="N", help="samples a call (default: 8)")
    parser.add_argument("--num-beams", type=at_least(1), default=1, metavar="N", help="beams (default: 1, greedy)")
    parser.add_argument("--max-new-tokens", type=at_least(1), metavar="N", help="default: 32 (gsm8k: 512, needle: 16)")
    parser.add_argument("--max-length", type=at_least(2), metavar="N", help="tokens, answer included; default: 2048")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="only the first N samples of every set")
    parser.add_argument(
        "--repeats",
        type=at_least(1),
        default=5,
        metavar="N",
        help="needle: numbers at each depth and length (default: 5)",
    )
    parser.add_argument("--seed", type=at_least(0), default=42, metavar="N", help="of the bootstrap (default: 42)")
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


def parse_export(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="launch/export.py",
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


def parse_compare(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="launch/compare.py",
        description="Compare PEFT methods: the same recipe, steps and number of trials for each.",
        epilog="""Every method is trained with every learning rate and seed of the file and evaluated on the validation
data; its best learning rate, by the mean over seeds, is tested once a seed. Started again it goes on with what is
missing.

With --jobs N up to N trials, then tests, run at once on this machine; several GPUs go round among them, one each. The
metrics stay what they are; step time, tokens/s and peak memory measured beside other trials do not compare with those
of a run alone, and the report says so. On GPUs the launcher must start one process: Python, torchrun
--nproc-per-node=1, deepspeed --num_gpus 1 (without a number it starts one a visible GPU). Trials that share a GPU have
to fit into it together.

examples:
  python launch/compare.py --config launch/recipes/compare_family.yaml
  python launch/compare.py --config launch/recipes/compare_spurious.yaml --jobs 4
  sbatch --array=0-26 --wrap 'python launch/compare.py --config FILE --trial $SLURM_ARRAY_TASK_ID'   # see --list""",
    )
    parser.add_argument("--config", metavar="FILE", required=True, help="comparison YAML")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print every trial and test with its number and state")
    what.add_argument("--trial", type=at_least(0), metavar="N", help="run one of them alone")
    what.add_argument("--report", action="store_true", help="run nothing; report what is finished")
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        default=1,
        metavar="N",
        help="trials at once on this machine (default: 1), see below",
    )
    args = parser.parse_args(argv)
    if args.jobs > 1 and (args.list or args.report or args.trial is not None):
        parser.error("--jobs goes with running everything, not with --list, --trial or --report")
    return args


def parse_checkpoint(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="launch/checkpoint.py", description="Checkpoints of a run.")
    parser.add_argument("action", choices=["inspect", "verify", "export"], help="what to do")
    parser.add_argument("path", help="a checkpoint-N folder, or a run's output_dir with several")
    parser.add_argument("--out", metavar="DIR", help="export: folder for the adapter, in PEFT's format")
    args = parser.parse_args(argv)
    if (args.action == "export") != bool(args.out):
        parser.error("--out goes with export, and export needs it")
    return args


def parse_plan(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="launch/plan.py",
        description="Memory, traffic and time of a recipe on a cluster, for every DeepSpeed configuration and kind of\n"
        "recomputation; the one to take, what bounds it, and how it scales. Needs no GPU and no weights.",
        epilog="""examples:
  python launch/plan.py --config launch/recipes/llama3_70b_multinode.yaml --nodes 4 --gpus-per-node 8 --gpu h100-80
  python launch/plan.py --config launch/recipes/llama3_8b_longcontext.yaml --detect --write chosen.txt
  deepspeed launch/train.py --config launch/recipes/llama3_8b_longcontext.yaml $(cat chosen.txt)
  python launch/plan.py --measure 1 2 --json measured.json""",
    )
    parser.add_argument("--config", metavar="RECIPE", help="recipe YAML")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override (repeatable)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs a node (default: 8; with --detect all)")
    parser.add_argument("--gpu", metavar="NAME", help="a GPU of fvae_dist/planning/gpus.json, e.g. h100-80")
    parser.add_argument("--detect", action="store_true", help="take this machine's GPUs instead")
    parser.add_argument("--network-gbit", type=float, metavar="X", help="Gbit/s between nodes for each GPU")
    parser.add_argument("--epoch-tokens", type=int, metavar="N", help="tokens of an epoch, instead of counting them")
    parser.add_argument("--json", metavar="FILE", help="write every number as JSON")
    parser.add_argument(
        "--write", metavar="FILE", help="write what to --set for the recommended choice; .yaml: the recipe with it"
    )
    parser.add_argument(
        "--measure",
        type=int,
        nargs="+",
        metavar="GPUS",
        help="instead: train four settings on so many GPUs of this machine and compare with the plan; takes of the "
        "other arguments --set, --gpu and --json, beside which the table is written as .md",
    )
    args = parser.parse_args(argv)
    if args.measure is not None:
        if args.config or args.write or min(args.measure) < 1:
            parser.error("--measure takes numbers of GPUs, and of the other arguments --set, --gpu and --json")
        return args
    if not args.config:
        parser.error("--config is required")
    if bool(args.gpu) == args.detect:
        parser.error("give --gpu NAME or --detect")
    for name in ("nodes", "gpus_per_node", "epoch_tokens", "network_gbit"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be > 0, got {value}")
    return args


def at_least(smallest: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `smallest` on."""

    def read(text: str) -> int:
        value = int(text)
        if not smallest <= value < 2**32:
            raise argparse.ArgumentTypeError(f"must be a number >= {smallest}, got {text}")
        return value

    read.__name__ = "number"  # argparse names it in "invalid number value"
    return read
