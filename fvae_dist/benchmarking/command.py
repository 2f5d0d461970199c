"""What `fvae-dist benchmark` does: measures the ceilings, then what the arguments say, and reports it."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fvae_dist.benchmarking.attention import BACKENDS, AttentionRun, benchmark_attention
from fvae_dist.benchmarking.context import CONTEXT, ContextRun, benchmark_context, take_up
from fvae_dist.benchmarking.floor import Ceilings, LayerSize, base_floor
from fvae_dist.benchmarking.layer import LayerRun, benchmark_layer
from fvae_dist.benchmarking.lengths import doubled
from fvae_dist.benchmarking.reference import source_folder
from fvae_dist.benchmarking.report import Axes, Column, Report
from fvae_dist.benchmarking.step import StepRun, benchmark_step
from fvae_dist.benchmarking.timing import free_memory, measure_ceilings
from fvae_dist.benchmarking.trial import WARM_UP
from fvae_dist.benchmarking.variants import (
    BASE,
    FUSED,
    LABELS,
    LORA,
    REFERENCE,
    TORCH,
    AdapterSize,
    default_dtype,
    dtype_name,
)
from fvae_dist.benchmarking.zero3 import TrainingRun, benchmark_training
from fvae_dist.training.card import package_versions
from fvae_dist.training.implementations import choose_attention
from fvae_dist.training.recipe import ModelSection, RecipeError

Measuring = tuple[Report, Iterator[dict[str, Any]]]  # without rows yet, and the rows as they are measured
_PACKAGES = ("fvae-dist", "torch", "triton", "transformers", "peft", "trl", "deepspeed", "liger-kernel", "flash-attn")
_TIMES = [
    Column("ms", "ms", ",.3f"),
    Column("ms_low", "25 %", ",.3f"),
    Column("ms_high", "75 %", ",.3f"),
    Column("floor_ms", "floor ms", ",.3f"),
    Column("x_floor", "x floor", ",.2f"),
]
_LAYER = [
    Column("tokens", "T"),
    Column("label", "variant"),
    *_TIMES,
    Column("above_base_ms", "above base ms", ",.3f"),
    Column("device_ms", "GPU ms", ",.3f"),
    Column("device_above_base_ms", "GPU above base ms", ",.3f"),
    Column("adapter_floor_ms", "adapter's floor ms", ",.3f"),
    Column("adapter_x_floor", "x adapter's floor", ",.2f"),
    Column("ratio_to_lora", "/ LoRA", ".3f"),
    Column("tokens_per_s", "tokens/s", ",.0f"),
    Column("tflops", "TFLOP/s", ",.4g"),
    Column("extra_mib", "peak MiB", ",.0f"),
    Column("note", "note"),
]
_STEP = [
    Column("recompute", "recompute"),
    Column("tokens", "T"),
    Column("label", "variant"),
    *_TIMES,
    Column("ratio_to_lora", "/ LoRA", ".3f"),
    Column("ratio_to_trl", "/ TRL", ".3f"),
    Column("ratio_to_silent", "/ without telemetry", ".3f"),
    Column("tokens_per_s", "tokens/s/GPU", ",.0f"),
    Column("mfu", "MFU", ".1%"),
    Column("tflops", "hardware TFLOP/s", ",.4g"),
    Column("peak_gib", "peak GiB", ",.2f"),
    Column("host_peak_gib", "host peak GiB", ",.2f"),
    Column("note", "note"),
]
_ATTENTION = [
    Column("tokens", "T"),
    Column("label", "backend"),
    *_TIMES,
    Column("tflops", "TFLOP/s", ",.4g"),
    Column("extra_mib", "peak MiB", ",.0f"),
    Column("note", "note"),
]
_FLOOR = [
    Column("tokens", "T"),
    Column("label", "of"),
    Column("phase", "phase"),
    Column("mib", "MiB", ",.2f"),
    Column("gflop", "GFLOP", ",.3f"),
    Column("floor_us", "us", ",.1f"),
    Column("bound", "bound by"),
]


def benchmark(args: argparse.Namespace) -> str:
    """Measure what the arguments say; returns the table, and writes the files that were asked for.

    Raises:
        RecipeError: something asked for cannot be measured here.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    _check(args, device)
    if args.output:
        _make_folder(Path(args.output))
    dtype = default_dtype(args.dtype, device)
    ceilings = measure_ceilings(device, dtype)
    free_memory(device)
    layer = _floor if args.floor else _layer
    measure = {"attention": _attention, "context": _context, "step": _step, "layer": layer}[args.command]
    report, rows = measure(args, device, dtype, ceilings)
    for row in rows:
        report.add(row)
        print(report.line(row), file=sys.stderr, flush=True)
        if args.output:  # after every row: a run that is cut short leaves what it had
            report.write(Path(args.output))
    if args.output:
        report.write(Path(args.output))
        report.plot(Path(args.output) / "benchmark.png")
    return report.markdown()


# ------------------------------------------------------------------------------------------------------- the five kinds


def _layer(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, ceilings: Ceilings) -> Measuring:
    out_dim = args.out_dim or args.dim
    variants = args.variants or [BASE, LORA, TORCH, FUSED, *([REFERENCE] if args.reference else [])]
    run = LayerRun(
        args.dim,
        out_dim,
        args.tokens,
        variants,
        _adapter(args),
        device,
        dtype,
        args.rounds,
        args.warm_up,
        args.reference,
    )
    notes = [
        f"Medians and quartiles of {args.rounds} rounds in which the variants take turns; differences and ratios are "
        "medians over rounds. Floor: base and adapter together; GPU: what it works in a call, by torch's profiler (a "
        "layer by itself may wait for the host); peak: above what lay there before.",
    ]
    title = f"One layer, {args.dim} x {out_dim}, r = {args.r}, {dtype_name(dtype)}, forward and backward"
    report = Report(title, _head(args, device, dtype, ceilings), _LAYER, Axes("ms", "ms"), notes)
    return report, benchmark_layer(run, ceilings)


def _floor(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, ceilings: Ceilings) -> Measuring:
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        size = LayerSize(args.dim, args.out_dim or args.dim, tokens, dtype.itemsize)
        adapter = _adapter(args)
        floors = {BASE: base_floor(size), LORA: adapter.floor(LORA, size), TORCH: adapter.floor(TORCH, size)}
        for name, floor in floors.items():
            assert floor is not None
            common = {"tokens": tokens, "label": {TORCH: "FVAE adapter", LORA: "LoRA adapter"}.get(name, LABELS[name])}
            for phase in ("forward", "backward", "recompute"):
                part = getattr(floor, phase)
                rows.append(common | {"phase": phase, **_amounts(part.num_bytes, part.operations)})
                rows[-1] |= {"floor_us": 1e6 * part.seconds(ceilings), "bound": part.bound(ceilings)}
            for again, phase in ((False, "sum without recompute"), (True, "sum with recompute")):
                moved = floor.forward.num_bytes * (2 if again else 1) + floor.backward.num_bytes
                rows.append(common | {"phase": phase, **_amounts(moved, floor.operations(again))})
                rows[-1]["floor_us"] = 1e6 * floor.seconds(ceilings, again)
    notes = ["The least that must move and run; fvae_dist/benchmarking/floor.py says what is assumed."]
    title = f"Floor of one layer, {args.dim} x {args.out_dim or args.dim}, r = {args.r}, {dtype_name(dtype)}"
    axes = Axes("floor_us", "us", ("label", "phase"))
    return Report(title, _head(args, device, dtype, ceilings), _FLOOR, axes, notes), iter(rows)


def _amounts(num_bytes: float, operations: float) -> dict[str, float]:
    return {"mib": num_bytes / 2**20, "gflop": operations / 1e9}


def _step(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, ceilings: Ceilings) -> Measuring:
    several = args.gpus is not None
    alone = [LORA, TORCH, FUSED] if several else [BASE, LORA, TORCH, FUSED]
    variants = args.variants or [*alone, *([REFERENCE] if args.reference else [])]
    run = _step_run(args, variants, device, dtype)
    if several:
        training = TrainingRun(run, args.gpus, args.steps, tuple(args.compare), changes=tuple(args.set))
        rows = benchmark_training(training, ceilings)
        how = ", ".join([f"ZeRO-3, {args.gpus} rank(s)", *args.set])
        notes = [f"Medians and quartiles of steps {WARM_UP + 1} to {args.steps} of one training run each."]
    else:
        rows = benchmark_step(run, ceilings)
        how = "one device"
        notes = [f"Medians and quartiles of {args.rounds} rounds in which the variants take turns."]
    notes[0] += (
        " MFU: 4 N tokens and causal attention, no recomputation, as a share of the product measured here; hardware "
        "TFLOP/s: with recomputation, flash attention's fifth backward product and the adapters."
    )
    liger = ", Liger" if args.liger else ""
    title = (
        f"Training step, {args.shape}, {how}, {dtype_name(dtype)}, {args.attention}{liger}, {' '.join(args.targets)}"
    )
    axes = Axes("tokens_per_s", "tokens/s/GPU", ("label", "recompute"))
    return Report(title, _head(args, device, dtype, ceilings), _STEP, axes, notes), rows


def _step_run(
    args: argparse.Namespace, variants: list[str], device: torch.device, dtype: torch.dtype, **changes: Any
) -> StepRun:
    given = vars(args) | {"variants": variants, "adapter": _adapter(args), "device": device, "dtype": dtype} | changes
    return StepRun(**{field.name: given[field.name] for field in dataclasses.fields(StepRun)})


def _context(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, ceilings: Ceilings) -> Measuring:
    names = args.variants or [LORA, FUSED if device.type == "cuda" else TORCH]
    step = _step_run(args, names, device, dtype, recompute=[args.recompute], telemetry=False, rounds=1, reference=None)
    changes = {
        "training.sequence_parallel": args.sequence_parallel if args.sequence_parallel > 1 else None,
        "training.activation_offload": "true" if args.activation_offload else None,
        "training.tiled_mlp": "true" if args.tiled_mlp else None,
        "training.resident_weights": args.resident if args.resident != "auto" else None,
    }
    stated = {key: value for key, value in changes.items() if value is not None}
    training = TrainingRun(
        step,
        args.gpus,
        args.steps,
        tuple(args.compare),
        args.warm_up,
        args.sequence_parallel,
        (*(f"{key}={value}" for key, value in stated.items()), *args.set),
        args.run_timeout,
    )
    names = [*names, *training.compare]
    lengths = args.tokens or doubled(args.first, args.last)
    run = ContextRun(training, names, lengths, args.resolution, args.attention_tflops)
    head, rows = _head(args, device, dtype, ceilings), list[dict[str, Any]]()
    if args.output:
        head, rows = take_up(Path(args.output) / "benchmark.json", head)
    how = [
        f"recompute {args.recompute}",
        *(f"{key.partition('.')[2]} {value}" for key, value in stated.items()),
        *args.set,
    ]
    title = f"Long sequences, {args.shape}, ZeRO-3, {args.gpus} rank(s), {dtype_name(dtype)}, {args.attention}"
    title += f"{', Liger' if args.liger else ''}, {', '.join([*how, *args.set])}, {' '.join(args.targets)}"
    notes = [
        f"Medians and quartiles of steps {args.warm_up + 1} to {args.steps} of one training run each; peaks are the "
        "largest of the ranks. MFU: 4 N tokens and causal attention, no recomputation, as a share of the product "
        "measured here. Of attention's ceiling: its operations alone, those that are recomputed among them, over the "
        "whole step."
    ]
    order = [*names, *(row["variant"] for row in rows)].index
    axes = Axes("tokens_per_s", "tokens/s/GPU")
    report = Report(title, head, CONTEXT, axes, notes, rows, lambda row: (row["tokens"], order(row["variant"])))
    return report, benchmark_context(run, report, Ceilings(**head["ceilings"]))


def _attention(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, ceilings: Ceilings) -> Measuring:
    run = AttentionRun(
        args.tokens,
        args.backends or BACKENDS,
        args.heads,
        args.kv_heads,
        args.head_dim,
        device,
        dtype,
        args.rounds,
        args.warm_up,
    )
    notes = ["Forward and backward; operations of two and five products, the masked half not counted."]
    title = f"Causal attention, {args.heads}/{args.kv_heads} heads of {args.head_dim}, {dtype_name(dtype)}"
    report = Report(title, _head(args, device, dtype, ceilings), _ATTENTION, Axes("tflops", "TFLOP/s"), notes)
    return report, benchmark_attention(run, ceilings)


# ------------------------------------------------------------------------------------------------- arguments and place


def _adapter(args: argparse.Namespace) -> AdapterSize:
    return AdapterSize(
        args.r, args.encoder_layers, args.encoder_hidden, args.decoder_layers, args.decoder_hidden, args.dropout
    )


def _check(args: argparse.Namespace, device: torch.device) -> None:
    """Refuse what cannot be measured here before anything is."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("start it without a launcher: --gpus N starts the processes itself")
    if args.command in ("layer", "step") and args.reference:
        try:
            source_folder(args.reference)
        except ValueError as error:
            raise RecipeError(f"--reference: {error}") from None
    if args.command not in ("context", "step"):
        return
    if args.liger and device.type == "cpu":
        raise RecipeError("--liger: Liger's kernels need a GPU")
    if args.liger and package_versions(["liger-kernel"])["liger-kernel"] == "not installed":
        raise RecipeError("--liger: Liger is not installed: `pip install liger-kernel`")
    section = ModelSection(name_or_path="random", attention=args.attention)
    try:
        choose_attention(section, device.type == "cpu")
    except RecipeError as error:
        raise RecipeError(str(error).replace("model.attention", "--attention", 1)) from None
    if args.gpus is not None and device.type == "cuda" and args.gpus > torch.cuda.device_count():
        raise RecipeError(f"--gpus: {args.gpus} GPUs asked for, {torch.cuda.device_count()} here")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"--output {folder}: {(error.strerror or str(error)).lower()}") from None


def _head(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, ceilings: Ceilings) -> dict[str, Any]:
    """Where, when, with what, and how it was started."""
    on_gpu = device.type == "cuda"
    cpu = f"CPU {platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"
    return {
        "command": "floor" if args.floor else args.command,
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": package_versions(_PACKAGES) | ({"cuda": torch.version.cuda} if on_gpu else {}),
        "dtype": dtype_name(dtype),
        "config": {key: value for key, value in vars(args).items() if key not in ("command", "floor")},
        "ceilings": {"bytes_per_s": ceilings.bytes_per_s, "operations_per_s": ceilings.operations_per_s},
    }
