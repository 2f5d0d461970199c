"""Arguments of `fvae-dist benchmark`."""

from __future__ import annotations

import argparse
import sys

from fvae_dist.arguments import Parser, at_least


def parse_benchmark(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="launch/benchmark.py",
        description="Measure FVAE-LoRA beside the frozen base and LoRA, and beside the least that is possible.",
        epilog="""examples:
  python launch/benchmark.py --floor --dim 4096 --tokens 8192       # the floor alone: bytes, operations, time
  python launch/benchmark.py layer --tokens 2048 8192 --output out  # one linear, forward and backward
  python launch/benchmark.py step --shape 8b --liger --recompute full none
  python launch/benchmark.py step --shape 8b --gpus 2 --compare trl # training runs under ZeRO-3
  python launch/benchmark.py attention
  python launch/benchmark.py context --shape 8b --gpus 2 --liger --output out/context   # how long a sequence may be

--floor alone stands for layer --floor. Each subcommand has --help.""",
    )
    commands = parser.add_subparsers(dest="command", metavar="{layer,step,attention,context}", required=True)
    layer = commands.add_parser("layer", help="one linear and its adapter")
    layer.add_argument("--floor", action="store_true", help="print the floor of the layer and measure no variant")
    layer.add_argument("--dim", type=at_least(1), default=4096, metavar="D", help="in-features (default: 4096)")
    layer.add_argument("--out-dim", type=at_least(1), metavar="O", help="out-features (default: as --dim)")
    _add_variants(layer)
    step = commands.add_parser("step", help="whole training steps of a Llama with random weights")
    _add_step(step)
    attention = commands.add_parser("attention", help="causal attention alone")
    for option, default in (("--heads", 32), ("--kv-heads", 8), ("--head-dim", 128)):
        attention.add_argument(option, type=at_least(1), default=default, metavar="N", help=f"default: {default}")
    backends = ["sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "sdpa-math", "flash_attention_2"]
    attention.add_argument("--backends", nargs="+", choices=backends, help="default: all")
    for command, tokens in (
        (layer, [2048, 8192, 32768]),
        (step, [2048, 4096, 8192, 16384]),
        (attention, [8192, 32768]),
    ):
        _add_common(command, tokens)
        if command is not attention:
            _add_adapter(command)
        command.set_defaults(floor=False)
    _add_context(commands.add_parser("context", help="training runs of longer and longer sequences"))
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(["layer", *argv] if "--floor" in argv and argv[0] not in commands.choices else argv)
    _check_benchmark(parser, args)
    return args


def _add_variants(parser: argparse.ArgumentParser) -> None:
    choices = ["base", "lora", "torch", "fused", "reference"]
    parser.add_argument("--reference", metavar="PATH", help="a clone of idiap/FVAE-LoRA, whose layer is measured too")
    parser.add_argument("--variants", nargs="+", choices=choices, help="what to compare (default: all that can be)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all-linear"]
    parser.add_argument("--shape", choices=["8b", "1b", "tiny"], default="8b", help="of Llama-3 (default: 8b)")
    parser.add_argument("--targets", nargs="+", choices=modules, default=["q_proj", "v_proj"], help="adapted linears")
    parser.add_argument("--attention", choices=["sdpa", "flash_attention_2"], default="sdpa", help="default: sdpa")
    parser.add_argument("--liger", action="store_true", help="Liger's fused norms, gated units and loss")


def _add_step(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--recompute", nargs="+", choices=["full", "none"], default=["full"], help="default: full")
    parser.add_argument("--telemetry", action="store_true", help="measure FVAE's variants with the ELBO's terms too")
    _add_variants(parser)
    parser.add_argument("--gpus", type=at_least(1), metavar="N", help="train on N GPUs under ZeRO-3, a run a variant")
    parser.add_argument("--steps", type=at_least(6), default=10, metavar="N", help="--gpus: steps (default: 10)")
    _add_compare(parser, "--gpus: ")
    _add_set(parser)


def _add_compare(parser: argparse.ArgumentParser, condition: str = "") -> None:
    text = f"{condition}also TRL and PEFT LoRA at their defaults; trl_liger: with Liger's kernels"
    parser.add_argument("--compare", nargs="+", choices=["trl", "trl_liger"], default=[], help=text)


def _add_context(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    tokens = parser.add_argument_group("lengths", "doubled, then by halves between the last that fits and the next")
    tokens.add_argument("--from", dest="first", type=at_least(2), default=8192, metavar="T", help="default: 8192")
    tokens.add_argument("--to", dest="last", type=at_least(2), default=2**20, metavar="T", help="default: 1048576")
    tokens.add_argument("--tokens", nargs="+", type=at_least(2), metavar="T", help="instead of --from and --to")
    tokens.add_argument("--resolution", type=at_least(1), default=8192, metavar="T", help="default: 8192")
    parser.add_argument(
        "--variants", nargs="+", choices=["lora", "torch", "fused"], help="default: lora, and fused (on a CPU torch)"
    )
    _add_compare(parser)
    parser.add_argument("--gpus", type=at_least(1), default=1, metavar="N", help="of every run (default: 1)")
    parser.add_argument(
        "--recompute", choices=["full", "selective", "none"], default="full", help="of ours (default: full)"
    )
    parser.add_argument(
        "--resident", choices=["auto", "true", "false"], default="auto", help="resident_weights of ours"
    )
    parser.add_argument(
        "--sequence-parallel", type=at_least(1), default=1, metavar="N", help="GPUs that share a sequence of ours"
    )
    parser.add_argument("--activation-offload", action="store_true", help="ours keeps activations in host memory")
    parser.add_argument("--tiled-mlp", action="store_true", help="MLPs of ours over tiles of tokens")
    _add_set(parser)
    parser.add_argument("--steps", type=at_least(1), default=5, metavar="N", help="of a run (default: 5)")
    parser.add_argument("--warm-up", type=at_least(0), default=2, metavar="N", help="of them unmeasured (default: 2)")
    parser.add_argument("--run-timeout", type=at_least(1), default=540, metavar="S", help="of a run (default: 540 s)")
    parser.add_argument(
        "--attention-tflops",
        type=float,
        metavar="X",
        help="what `attention` measured: shown is each step's share of it",
    )
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="auto: by the device")
    parser.add_argument(
        "--output", metavar="DIR", help="folder for benchmark.md, .csv, .json and .png; started again it goes on there"
    )
    _add_adapter(parser)
    parser.set_defaults(floor=False)


def _add_common(parser: argparse.ArgumentParser, tokens: list[int]) -> None:
    default = " ".join(map(str, tokens))
    parser.add_argument("--tokens", nargs="+", type=at_least(2), default=tokens, metavar="T", help=default)
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="auto: by the device")
    parser.add_argument("--rounds", type=at_least(1), default=10, metavar="N", help="measured (default: 10)")
    parser.add_argument("--warm-up", type=at_least(0), default=3, metavar="N", help="rounds before (default: 3)")
    parser.add_argument("--output", metavar="DIR", help="folder for benchmark.md, .csv, .json and .png")


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    sizes = {"--r": (1, 16), "--encoder-layers": (0, 1), "--encoder-hidden": (1, 16)}
    sizes |= {"--decoder-layers": (0, 3), "--decoder-hidden": (1, 128)}
    for option, (smallest, default) in sizes.items():
        parser.add_argument(option, type=at_least(smallest), default=default, metavar="N", help=f"default: {default}")
    parser.add_argument("--dropout", type=float, default=0.1, metavar="P", help="of every variant (default: 0.1)")


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of ours: more of the recipe, as for train.py"
    )


def _check_benchmark(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.command != "attention" and not 0 <= args.dropout < 1:
        parser.error(f"--dropout must lie in [0, 1), got {args.dropout}")
    if args.command == "attention" and args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} is no multiple of --kv-heads {args.kv_heads}")
    if args.command != "attention" and "reference" in (args.variants or ()) and not args.reference:
        parser.error("--variants reference needs --reference PATH")
    if args.command in ("context", "step") and "all-linear" in args.targets and len(args.targets) > 1:
        parser.error("--targets: all-linear stands alone")
    if args.command == "context":
        _check_context(parser, args)
    if args.command == "step":
        if args.compare and args.gpus is None:
            parser.error("--compare goes with --gpus")
        if args.gpus is not None and "base" in (args.variants or ()):
            parser.error("--variants base trains nothing, so that it does not go with --gpus")
        if args.gpus is None and args.set:
            parser.error("--set goes with --gpus")
        if args.gpus is not None and args.reference:
            parser.error("--reference does not go with --gpus: that code knows no ZeRO-3")


def _check_context(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.steps <= args.warm_up:
        parser.error(f"--steps {args.steps} must be more than --warm-up {args.warm_up}")
    if args.last < args.first:
        parser.error(f"--to {args.last} is less than --from {args.first}")
    if args.gpus % args.sequence_parallel:
        parser.error(f"--gpus {args.gpus} is no multiple of --sequence-parallel {args.sequence_parallel}")
    if args.attention_tflops is not None and not 0 < args.attention_tflops < float("inf"):
        parser.error(f"--attention-tflops must be > 0, got {args.attention_tflops}")
