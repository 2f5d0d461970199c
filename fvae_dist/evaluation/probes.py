"""What z1 and z2 hold: linear probes for label and cue on the latents of every adapted layer.

    python -m fvae_dist.evaluation.probes --model BASE --adapter DIR --data suite/test.jsonl --out probes.json

The data are records as `fvae_dist.evaluation.spurious` writes them, of either form: {text, label, cue} as a classifier
reads them, {instruction, input, answer, cue} as a prompt. Take its validation or test, where cue and label have nothing
to do with each other: where they go together, a probe for one finds the other. Of each text the means m1 and m2 of q1
and q2 are kept, as the mean over tokens and at the last token; a part of the texts is for the test (`linear_probe.py`).

`input` is the input x of the adapted layer, the most that a latent could hold of it. `--untrained` takes a new adapter
of the same settings ("before"): its latents' heads are zero, so that probes find in z1 and z2 what chance finds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fvae_dist.adapter.layer import FVAELinear
from fvae_dist.evaluation.linear_probe import probe, split_rows
from fvae_dist.evaluation.loading import ModelSource, find_model, load_model
from fvae_dist.evaluation.metrics import estimate
from fvae_dist.evaluation.prompts import TEMPLATES, render_prompt
from fvae_dist.evaluation.ranks import uses_cpu
from fvae_dist.evaluation.store import write_text
from fvae_dist.evaluation.tasks import prompt_row, read_objects, text_column
from fvae_dist.training.classification import TextCollator
from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.tokenization import encode_whole_texts

LATENTS = ("z1", "z2", "input")
POOLINGS = ("mean", "last")
TARGETS = ("label", "cue")
_DIFFERENCES = {"label_z1_minus_z2": ("label", "z1", "z2"), "cue_z2_minus_z1": ("cue", "z2", "z1")}


def read_texts(
    path: Path, tokenizer: Any, max_length: int, template: str = "clean", limit: int | None = None
) -> tuple[list[list[int]], dict[str, list[str]]]:
    """Token ids of each record, and its label and cue; a text is cut at its end, a prompt in front.

    Raises:
        RecipeError: `file:line` and the column that is missing, or a column of which all records have the same value.
    """
    all_ids: list[list[int]] = []
    targets: dict[str, list[str]] = {name: [] for name in TARGETS}
    for where, row in read_objects(path, limit):
        if "text" in row:
            ids = encode_whole_texts([text_column(row, "text", where)], tokenizer)[0][:max_length]
        else:
            instruction, more = text_column(row, "instruction", where), text_column(row, "input", where, default="")
            ids = prompt_row(render_prompt(template, instruction, more), tokenizer, max_length)[0].ids
        all_ids.append(ids)
        targets["label"].append(text_column(row, "label" if "text" in row else "answer", where))
        targets["cue"].append(text_column(row, "cue", where))
    for name, values in targets.items():
        if len(set(values)) < 2:
            raise RecipeError(f"{path}: every record has the {name} {values[0]!r}: nothing to probe for")
    return all_ids, targets


def adapted_layers(model: nn.Module) -> dict[str, FVAELinear]:
    """Name -> adapted layer, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FVAELinear)}


def forget_training(model: nn.Module, seed: int) -> None:
    """Replace every adapter by a new one of its settings; the head of a classifier stays, no latent depends on it."""
    torch.manual_seed(seed)
    for layer in adapted_layers(model).values():
        for name in layer.active_adapters:
            layer.update_layer(name, layer.fvae_config[name])
    model.eval().requires_grad_(False)


@contextmanager
def _watched(layers: dict[str, FVAELinear], seen: dict[str, dict[str, Tensor]]) -> Iterator[None]:
    """While open, each forward leaves layer -> latent -> (B, T, R or D) in `seen`."""

    def watch(name: str, layer: FVAELinear):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            adapter = layer.active_adapters[0]
            x = args[0].to(layer.compute_dtype(adapter, args[0]))
            vae: Any = layer.fvae_vae[adapter]
            seen[name] = {"z1": vae.encoder1.mean_only(x), "z2": vae.encoder2.mean_only(x), "input": x}

        return layer.register_forward_pre_hook(hook)

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def pooled_latents(
    model: nn.Module, all_ids: list[list[int]], pad_token_id: int, device: torch.device, batch_size: int = 16
) -> dict[tuple[str, str, str], Tensor]:
    """(layer, pooling, latent) -> (number of texts, R), of the input (.., D); fp32, on CPU. Padding counts nowhere."""
    layers = adapted_layers(model)
    parts: dict[tuple[str, str, str], list[Tensor]] = {}
    collate, seen = TextCollator(pad_token_id), {}  # type: ignore[var-annotated]
    with _watched(layers, seen):
        for start in range(0, len(all_ids), batch_size):
            rows = [{"input_ids": ids, "labels": [0]} for ids in all_ids[start : start + batch_size]]
            batch = {key: value.to(device) for key, value in collate(rows).items() if key != "labels"}
            model(**batch, use_cache=False)
            mask_BT1 = batch["attention_mask"].unsqueeze(-1).float()
            lengths_B = batch["attention_mask"].sum(1)
            row_B = torch.arange(len(rows), device=device)
            for name, latents in seen.items():
                for latent, value_BTR in latents.items():
                    wide = value_BTR.float()
                    mean = (wide * mask_BT1).sum(1) / lengths_B[:, None]
                    parts.setdefault((name, "mean", latent), []).append(mean.cpu())
                    parts.setdefault((name, "last", latent), []).append(wide[row_B, lengths_B - 1].cpu())
    return {key: torch.cat(values) for key, values in parts.items()}


def probe_latents(
    latents: dict[tuple[str, str, str], Tensor],
    targets: dict[str, list[str]],
    *,
    test_share: float = 0.3,
    l2: float = 1e-3,
    seed: int = 0,
) -> dict[str, Any]:
    """Probe every latent for every target.

    Args:
        latents: as `pooled_latents` returns them.
        targets: label and cue of each text.

    Returns:
        `layers`: layer -> pooling -> latent -> target -> {value, low, high}; `mean`: the same over the layers;
        `difference`: pooling -> label_z1_minus_z2 and cue_z2_minus_z1, means over layers; `chance`: the largest
        class's share of the test. Intervals resample the texts of the test, not the fit.

    Raises:
        ValueError: too few texts, or latents that are not finite.
    """
    classes_N: dict[str, Tensor] = {}
    for name, values in targets.items():
        numbers = {value: number for number, value in enumerate(sorted(set(values)))}
        classes_N[name] = torch.tensor([numbers[value] for value in values])
    is_test_N = split_rows(len(next(iter(classes_N.values()))), test_share, seed)
    correct: dict[tuple[str, str, str], list[Tensor]] = {}
    layers: dict[str, Any] = {}
    for (layer, pooling, latent), features in latents.items():
        for target in TARGETS:
            found = probe(features, classes_N[target], is_test_N, l2)
            correct.setdefault((pooling, latent, target), []).append(found)
            of_latent = layers.setdefault(layer, {}).setdefault(pooling, {}).setdefault(latent, {})
            of_latent[target] = estimate(found.numpy(), seed=seed)
    over_layers = {key: torch.stack(values).mean(0) for key, values in correct.items()}
    mean: dict[str, Any] = {}
    for (pooling, latent, target), found in over_layers.items():
        mean.setdefault(pooling, {}).setdefault(latent, {})[target] = estimate(found.numpy(), seed=seed)
    difference = {
        pooling: {
            name: estimate((over_layers[pooling, ours, t] - over_layers[pooling, theirs, t]).numpy(), seed=seed)
            for name, (t, ours, theirs) in _DIFFERENCES.items()
        }
        for pooling in mean
    }
    shares = {
        name: classes[is_test_N].bincount().max().item() / int(is_test_N.sum()) for name, classes in classes_N.items()
    }
    return {"chance": shares, "mean": mean, "difference": difference, "layers": layers}


def markdown_table(results: dict[str, Any]) -> str:
    """The means over layers, and the differences."""
    lines = ["| texts as | latent | label | cue |", "|---|---|---|---|"]
    for pooling, latents in results["mean"].items():
        lines += [
            f"| {pooling} | {latent} | {_percent(of['label'])} | {_percent(of['cue'])} |"
            for latent, of in latents.items()
        ]
        label, cue = (_percent(results["difference"][pooling][name]) for name in _DIFFERENCES)
        lines += [f"| {pooling} | z1 - z2, z2 - z1 | {label} | {cue} |"]
    chance = results["chance"]
    return "\n".join([*lines, f"| | chance | {100 * chance['label']:.1f} | {100 * chance['cue']:.1f} |"]) + "\n"


def _percent(of: dict[str, float]) -> str:
    return f"{100 * of['value']:.1f} ({100 * of['low']:.1f} .. {100 * of['high']:.1f})"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fvae_dist.evaluation.probes", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, metavar="BASE", help="base model, name or folder")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="FVAE-LoRA adapter")
    parser.add_argument("--data", required=True, metavar="FILE", help="records with label (or answer) and cue")
    parser.add_argument("--out", metavar="FILE", help=".json file to write")
    parser.add_argument("--untrained", action="store_true", help="a new adapter of the same settings instead")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    parser.add_argument("--template", choices=TEMPLATES, default="clean", help="of prompts (default: clean)")
    parser.add_argument(
        "--max-length", type=int, default=512, metavar="T", help="tokens of a text, as in training (default: 512)"
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="default: 16")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N records")
    parser.add_argument("--test-share", type=float, default=0.3, metavar="P", help="texts for the test (default: 0.3)")
    parser.add_argument("--l2", type=float, default=1e-3, metavar="X", help="penalty of the probes (default: 0.001)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of split, intervals, new adapter (default: 0)"
    )
    args = parser.parse_args(argv)
    for name in ("max_length", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: must be at least 1")
    if not 0 < args.test_share < 1 or not args.l2 > 0:
        parser.error("--test-share must lie between 0 and 1, --l2 above 0")
    return args


def _find_adapter(args: argparse.Namespace) -> ModelSource:
    """What is probed; RecipeError for an adapter without z1 and z2."""
    source = find_model(args.model, args.adapter, dtype=args.dtype, deepspeed="none")
    kind = source.adapter_config.get("peft_type")
    if kind != "FVAE_LORA":
        raise RecipeError(f"--adapter {args.adapter}: is of type {kind}, which has no z1 and z2; FVAE_LORA has")
    if source.adapter_config.get("inference_only"):
        raise RecipeError(f"--adapter {args.adapter}: was saved with inference_only=True, without encoder 2")
    if source.positions is not None and args.max_length > source.positions:
        args.max_length = source.positions
    return source


def main(argv: list[str] | None = None) -> int:
    """Probe one adapter. Exit codes: 0 done, 2 bad argument or file."""
    args = parse_arguments(argv)
    try:
        source = _find_adapter(args)
        texts = (Path(args.data), source.tokenizer, args.max_length, args.template, args.limit)
        all_ids, targets = read_texts(*texts)
        device = torch.device("cpu" if uses_cpu() else "cuda")
        model = load_model(source, device)
        if args.untrained:
            forget_training(model, args.seed)
        latents = pooled_latents(model, all_ids, source.tokenizer.pad_token_id, device, args.batch_size)
        settings = {"test_share": args.test_share, "l2": args.l2, "seed": args.seed}
        results = probe_latents(latents, targets, **settings)
        if args.out:
            known = {**source.settings(), "data": args.data, "untrained": args.untrained, "num_texts": len(all_ids)}
            report = {"settings": known | settings | {"max_length": args.max_length}, **results}
            write_text(Path(args.out), json.dumps(report, indent=1) + "\n")
    except (RecipeError, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(markdown_table(results), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
