"""The plan as text for a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from fvae_dist.planning.choice import Choice, Recompute
from fvae_dist.planning.hardware import Cluster, constants
from fvae_dist.planning.memory import PARTS, MemoryEstimate, estimate_moments
from fvae_dist.planning.planner import Epoch, Key, Knee, Load, Option, Point, epoch_of
from fvae_dist.planning.subject import Subject
from fvae_dist.planning.traffic import Traffic

LABELS = {
    "base_weights": "base weights",
    "hpz_copy": "hpZ's second shards",
    "gathered_weights": "gathered weights",
    "adapter_states": "adapter and states",
    "checkpoints": "checkpoints",
    "layer_activations": "layer activations",
    "adapter_activations": "adapter activations",
    "attention": "attention",
    "loss": "loss",
    "communication": "communication",
}


@dataclass(frozen=True)
class Plan:
    """A recipe on a cluster.

    Attributes:
        refused: (configuration, recomputation, why) of what cannot be run at all.
        variants: traffic of a sharded choice under other settings of its gathers, by their name.
        notes: what the reader should know of the input.
    """

    model: str
    adapter: str
    subject: Subject
    cluster: Cluster
    load: Load
    options: list[Option]
    refused: list[tuple[str, Recompute, str]]
    own: Key
    recommended: Option
    variants: dict[str, Traffic]
    points: list[Point]
    knee: Knee | None
    overrides: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def memory_table(memory: MemoryEstimate) -> str:
    """GiB by part; parts that do not exist are left out, but for the well-known ones."""
    always = ("base_weights", "gathered_weights", "adapter_states")
    rows = [(LABELS[key], value) for key, value in memory.parts.items() if value >= 0.0005 or key in always]
    lines = [f"{label:<20}{value:9.3f} GiB" for label, value in rows]
    lines.append(f"{'total':<20}{memory.total_gib:9.3f} GiB at the peak, in {memory.moment}")
    lines.append(f"{'needed':<20}{memory.needed_gib:9.3f} GiB with CUDA context, NCCL and fragmentation")
    return "\n".join(lines)


def text_of(plan: Plan) -> str:
    """The whole report."""
    best = plan.recommended
    sections = {
        "Planned": _planned(plan),
        "Choices": _choices(plan),
        f"Recommended: {_name(best.choice)}": _recommended(plan),
        "Memory of one GPU": _memory(plan),
        "Traffic of one optimizer step, per GPU": _traffic(plan),
        "Nodes": _curve(plan),
        "Constants": _constants(plan.cluster),
    }
    return "\n\n".join(f"== {title} ==\n{text}" for title, text in sections.items())


def json_of(plan: Plan) -> dict[str, Any]:
    """Every number of the report."""
    cluster, best = plan.cluster, plan.recommended
    epoch = epoch_of(best, cluster, plan.load)
    return {
        "model": plan.model,
        "adapter": plan.adapter,
        "parameters": {"base": plan.subject.base_parameters, "trainable": plan.subject.trainable_parameters},
        "cluster": {
            "gpu": cluster.gpu.name,
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.gpus_per_node,
            "memory_gib": cluster.gpu.memory_gib,
        },
        "load": asdict(plan.load) | {"max_length": plan.subject.settings.length},
        "choices": [option_json(option) for option in plan.options],
        "refused": [dict(zip(("deepspeed", "recompute", "reason"), row)) for row in plan.refused],
        "recommended": option_json(best)
        | {
            "moments_gib": {memory.moment: memory.parts for memory in _moments(plan)},
            "epoch": asdict(epoch) if epoch else None,
            "overrides": plan.overrides,
        },
        "traffic_variants": {name: _traffic_json(traffic) for name, traffic in plan.variants.items()},
        "curve": [asdict(point) for point in plan.points],
        "knee": asdict(plan.knee) if plan.knee else None,
        "constants": {name: asdict(entry) for name, entry in constants().items()},
        "notes": plan.notes,
    }


# ------------------------------------------------------------------------------------------------------------- sections


def _planned(plan: Plan) -> str:
    subject, cluster, load = plan.subject, plan.cluster, plan.load
    share = 100 * subject.trainable_parameters / subject.base_parameters
    gpu = cluster.gpu
    lines = [
        f"model      {plan.model}: {subject.base_parameters:,} parameters, {subject.num_layers} layers, "
        f"{subject.settings.dtype}",
        f"adapter    {plan.adapter}: {subject.trainable_parameters:,} parameters ({share:.3f} %) in "
        f"{len(subject.trainable_sizes):,} tensors, fp32",
        f"cluster    {cluster.nodes} node(s) x {cluster.gpus_per_node} {gpu.name} = {cluster.world_size} GPUs, "
        f"{gpu.memory_gib:.1f} GiB each",
        f"step       {load.sequences} x {subject.settings.length:,} tokens a GPU, {load.accumulation} micro-step(s); "
        f"{subject.settings.attention}" + (", Liger" if subject.settings.liger else ""),
    ]
    if load.sequence_parallel > 1:
        lines.append(f"           each sequence shared by {load.sequence_parallel} GPUs")
    if load.mean_length != subject.settings.length:
        lines.append(
            f"           time for sequences of {load.mean_length:,} tokens, the data's mean; memory for the longest"
        )
    return "\n".join(lines + [f"note       {note}" for note in plan.notes])


def _memory(plan: Plan) -> str:
    """Of the recommended choice at each moment that can be the peak."""
    moments = _moments(plan)
    rows = [(LABELS[name], *(f"{m.parts[name]:.3f}" for m in moments)) for name in PARTS]
    rows.append(("total", *(f"{m.total_gib:.3f}" for m in moments)))
    rows.append(("needed", *(f"{m.needed_gib:.3f}" for m in moments)))
    table = _table(("GiB in", *(m.moment for m in moments)), rows)
    return f"{table}\n(needed: with CUDA context, NCCL's buffers and fragmentation)"


def _moments(plan: Plan) -> list[MemoryEstimate]:
    return estimate_moments(plan.subject, plan.recommended.choice, plan.cluster.world_size)


def _choices(plan: Plan) -> str:
    header = ("ds_config", "recompute", "GiB", "room", "in node", "between", "step", "tok/s/GPU", "bound by")
    rows = []
    for option in plan.options:
        choice, traffic = option.choice, option.step.traffic
        mark = "*" if option is plan.recommended else "=" if choice.key == plan.own else " "
        rows.append(
            (
                f"{mark} {choice.label}",
                choice.recompute,
                f"{option.memory.needed_gib:.1f}",
                f"{-option.over_gib:+.1f}",
                _bytes(traffic.in_node_bytes),
                _bytes(traffic.between_nodes_bytes),
                _seconds(option.step.seconds),
                f"{option.step.tokens_per_s_per_gpu:,.0f}",
                option.step.bound if option.fits else option.lack,
            )
        )
    names: dict[tuple[str, str], list[str]] = {}
    for name, recompute, why in plan.refused:
        names.setdefault((recompute, why), []).append(name)
    refused = [f"not recompute {how} with {', '.join(configs)}: {why}" for (how, why), configs in names.items()]
    legend = "(* recommended, = as the recipe has it; resident: gathered once; GiB and bytes are one GPU's)"
    return "\n".join([_table(header, rows), legend, *refused])


def _recommended(plan: Plan) -> str:
    best, cluster = plan.recommended, plan.cluster
    step = best.step
    whole = step.tokens_per_s_per_gpu * cluster.world_size
    lines = [
        f"fits       {best.memory.needed_gib:.1f} of {cluster.gpu.memory_gib:.1f} GiB",
        f"step       {_seconds(step.seconds)}: arithmetic {_seconds(step.compute_s)} (products "
        f"{_seconds(step.products_s)}, attention {_seconds(step.attention_s)}, memory {_seconds(step.elementwise_s)}), "
        f"host {_seconds(step.host_s)}, traffic {_seconds(step.traffic.seconds)}",
        f"speed      {step.tokens_per_s_per_gpu:,.0f} tokens/s/GPU, {whole:,.0f} in all",
        f"bound by   {step.bound}",
        f"epoch      {_epoch(epoch_of(best, cluster, plan.load))}",
    ]
    if best.host_gib:
        lines.append(f"host       {best.host_gib:.1f} GiB of memory a node for what is offloaded")
    if best.choice.key == plan.own:
        lines.append("change     nothing: the recipe has it so")
    else:
        lines += [f"set        {line}" for line in set_lines(plan.overrides)]
    return "\n".join(lines)


def set_lines(overrides: dict[str, Any]) -> list[str]:
    """Overrides as arguments of launch/train.py, without a blank in a value so that a shell may split them."""
    return [f"--set {key}={_yaml(value)}" for key, value in overrides.items()]


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f'"{key}":{_yaml(item)}' for key, item in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return str(value).lower() if value is not None else "null"
    return str(value)


def _epoch(epoch: Epoch | None) -> str:
    if epoch is None:
        return "unknown: the data is not here; give --epoch-tokens"
    return f"{epoch.steps:,} steps, {epoch.tokens:,} tokens: {epoch.hours:.2f} h, {epoch.gpu_hours:.1f} GPU-hours"


def _traffic(plan: Plan) -> str:
    width = plan.subject.settings.bytes_per_weight
    rows = [
        (
            name,
            *(_bytes(size * width) for size in traffic.gathered.values()),
            _bytes(traffic.in_node_bytes),
            _bytes(traffic.between_nodes_bytes),
            _bytes(traffic.host_bytes),
            _seconds(traffic.seconds),
        )
        for name, traffic in plan.variants.items()
    ]
    header = ("", "forward", "recompute", "backward", "in node", "between nodes", "from host", "time")
    table = _table(header, rows)
    return f"{table}\n(forward, recompute, backward: weights gathered, unquantised; the rest with gradients)"


def _curve(plan: Plan) -> str:
    rows = [
        (
            str(point.nodes),
            str(point.world_size),
            f"{point.needed_gib:.1f}" + ("" if point.fits else " too many"),
            f"{point.tokens_per_s_per_gpu:,.0f}",
            f"{100 * point.efficiency:.0f} %",
            f"{100 * point.traffic_share:.0f} %",
            point.bound,
        )
        for point in plan.points
    ]
    header = ("nodes", "GPUs", "GiB", "tok/s/GPU", "efficiency", "traffic/hidden by", "bound by")
    knee = plan.knee
    if knee is None:
        text = "no knee: traffic does not catch up with the arithmetic on any number of nodes"
    elif knee.nodes == 0:
        text = f"past the knee from one node on: {knee.bound}"
    else:
        text = f"knee: {knee.nodes:,} nodes ({knee.world_size:,} GPUs); beyond it {knee.bound} is the slower"
    return _table(header, rows) + f"\n{text}\n(each GPU keeps its micro-batch: weak scaling)"


def _constants(cluster: Cluster) -> str:
    """Which of them were measured."""
    by_kind: dict[str, list[str]] = {}
    for name, entry in constants().items():
        by_kind.setdefault(entry.kind, []).append(f"{name} {entry.value:g}")
    of_gpu = "rates measured" if cluster.gpu.is_measured else "rates from its data sheet, by the shares below"
    lines = [f"{cluster.gpu.name}: {of_gpu}; links from data sheets (fvae_dist/planning/gpus.json)"]
    words = {"measured": "measured", "fitted": "fitted to measured steps", "source": "read in a source"}
    return "\n".join(lines + [f"{words.get(kind, kind)}: {', '.join(names)}" for kind, names in by_kind.items()])


# ---------------------------------------------------------------------------------------------------------------- forms


def option_json(option: Option) -> dict[str, Any]:
    """Every number of one choice."""
    step = option.step
    return {
        "deepspeed": option.choice.name,
        "recompute": option.choice.recompute,
        "resident": option.choice.resident,
        "fits": option.fits,
        "over_gib": option.over_gib,
        "needed_gib": option.memory.needed_gib,
        "total_gib": option.memory.total_gib,
        "memory_gib": option.memory.parts,
        "moment": option.memory.moment,
        "host_gib": option.host_gib,
        "step_s": step.seconds,
        "compute_s": step.compute_s,
        "products_s": step.products_s,
        "attention_s": step.attention_s,
        "elementwise_s": step.elementwise_s,
        "host_s": step.host_s,
        "traffic": _traffic_json(step.traffic),
        "tokens_per_s_per_gpu": step.tokens_per_s_per_gpu,
        "bound": step.bound,
    }


def _traffic_json(traffic: Traffic) -> dict[str, Any]:
    return asdict(traffic) | {"seconds": traffic.seconds}


def _name(choice: Choice) -> str:
    return f"{choice.label}, recompute {choice.recompute}"


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return "0" if number < 1 else f"{number / 1e3:.1f} kB"


def _seconds(number: float) -> str:
    return f"{1e3 * number:,.0f} ms" if number < 10 else f"{number:,.1f} s"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Columns aligned: the first and last to the left, numbers to the right."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    last = len(header) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )
