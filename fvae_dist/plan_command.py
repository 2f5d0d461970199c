"""What `fvae-dist plan` does: a recipe and a cluster in, every way of running it and the one to take out."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from fvae_dist.planning.choice import Choice, Recompute
from fvae_dist.planning.hardware import Cluster, PlanError, detect_gpu, find_gpu
from fvae_dist.planning.planner import Load, Option, find_knee, plan_choice, recommend, scale
from fvae_dist.planning.report import LABELS, Plan, json_of, set_lines, text_of
from fvae_dist.planning.subject import Subject
from fvae_dist.planning.traffic import Traffic, estimate_traffic
from fvae_dist.training.data import prepare_data
from fvae_dist.training.deepspeed_config import load_deepspeed_config
from fvae_dist.training.fitting import Fit, fit_subject
from fvae_dist.training.implementations import planned_attention
from fvae_dist.training.modeling import check_lengths, load_config, load_tokenizer, plan_model
from fvae_dist.training.planned import (
    deepspeed_configs,
    longest_load,
    make_choice,
    overrides_of,
    own_config,
    part_length,
    subject_of,
)
from fvae_dist.training.recipe import Recipe, RecipeError
from fvae_dist.training.recipe_file import load_recipe
from fvae_dist.training.rope_scaling import describe_scaling
from fvae_dist.training.sequence_parallel import check_shares

_RECOMPUTES: tuple[Recompute, ...] = ("full", "selective", "none")


def plan(args: argparse.Namespace) -> str:
    """Plan what the arguments say; returns the report, and writes the files that were asked for.

    Raises:
        RecipeError: a mistake in recipe or arguments, or nothing fits; then it says by how much.
    """
    try:
        made = make_plan(load_recipe(args.config, args.set), args)
    except PlanError as error:
        raise RecipeError(str(error)) from None
    if args.json:
        write_file("--json", args.json, json.dumps(json_of(made), indent=1) + "\n")
    if args.write:
        write_file("--write", args.write, _overrides_text(made, args))
    return text_of(made)


def make_plan(recipe: Recipe, args: argparse.Namespace) -> Plan:
    """The plan of a recipe on the cluster that the arguments name."""
    cluster = _cluster(args)
    config = load_config(recipe.model)
    check_lengths(recipe, config)
    check_shares(recipe, config, cluster.world_size, planned_attention(recipe))
    plan_model(recipe, config)  # they refuse what training would refuse
    subject = subject_of(recipe, config)
    load, notes = _load(recipe, args.epoch_tokens)
    if recipe.model.rope_scaling is not None:
        notes.append(describe_scaling(config, recipe.model.rope_scaling))

    def make(name: str, recompute: Recompute, resident: bool, of_size: Cluster) -> Choice:
        return make_choice(recipe, subject, name, recompute, resident, of_size.world_size, of_size.gpus_per_node)

    options, refused = [], []
    fit = own_fit(recipe, subject, cluster)
    own = make(own_config(recipe), fit.recompute, fit.resident, cluster).key  # must be sound; others are only listed
    for name, recompute in product(deepspeed_configs(recipe), _RECOMPUTES):
        try:
            choice = make(name, recompute, False, cluster)
        except RecipeError as error:
            refused.append((name, recompute, str(error)))
            continue
        options.append(plan_choice(subject, choice, cluster, load))
        if choice.can_be_resident:
            options.append(plan_choice(subject, replace(choice, resident=True), cluster, load))
    best = recommend(options, own)
    if best is None:
        raise RecipeError(_nothing_fits(options, cluster))
    if subject.traces(best.choice.gathers).is_eager:
        notes.append("attention is planned as eager, with its T^2 scores")
    knee = find_knee(subject, best, make, cluster, load)
    return Plan(
        model=recipe.model.name_or_path,
        adapter=str(recipe.adapter.get("peft_type", "FVAE_LORA")),
        subject=subject,
        cluster=cluster,
        load=load,
        options=options,
        refused=refused,
        own=own,
        recommended=best,
        variants=_variants(subject, best, options, cluster, load),
        points=scale(subject, best, make, cluster, load, knee),
        knee=knee,
        overrides=overrides_of(best.choice),
        notes=notes,
    )


def own_fit(recipe: Recipe, subject: Subject, cluster: Cluster) -> Fit:
    """What the recipe's own `auto` would choose on this cluster."""
    deepspeed = load_deepspeed_config(recipe, cluster.world_size, cluster.gpus_per_node)
    return fit_subject(recipe, subject, deepspeed, cluster.world_size, cluster.gpu.memory_gib)


def _cluster(args: argparse.Namespace) -> Cluster:
    if args.detect:
        gpu, found = detect_gpu(args.network_gbit)
        return Cluster(gpu, args.nodes, args.gpus_per_node or found)
    return Cluster(find_gpu(args.gpu, args.network_gbit), args.nodes, args.gpus_per_node or 8)


def _load(recipe: Recipe, epoch_tokens: int | None) -> tuple[Load, list[str]]:
    """What a step works on, from the data where it is here; and notes on what was assumed."""
    load = replace(longest_load(recipe), epoch_tokens=epoch_tokens)
    if epoch_tokens is not None:
        return load, []
    if any(source.hub or not Path(source.path or "").is_file() for source in recipe.data.train):
        return load, ["the training data is not here: every sequence taken as data.max_length long"]
    try:
        data = prepare_data(
            recipe.data, load_tokenizer(recipe.model), seed=recipe.training.seed, output_dir=recipe.training.output_dir
        )
    except RecipeError as error:
        return load, [f"the data cannot be read, every sequence taken as data.max_length long: {error}"]
    counts = data.report["train"]
    sequences, tokens = counts["num_sequences"], counts["num_tokens"]
    if not sequences:
        return load, []
    mean_length = part_length(recipe, max(1, round(tokens / sequences)))
    return replace(load, mean_length=mean_length, epoch_sequences=sequences, epoch_tokens=tokens), []


def _variants(
    subject: Subject, best: Option, options: list[Option], cluster: Cluster, load: Load
) -> dict[str, Traffic]:
    """The recommended choice's traffic; and ZeRO-3's, as it is and with ZeRO++'s two ways of lessening it."""
    variants = {f"recommended: {best.choice.name}": best.step.traffic}
    plain = [o.choice for o in options if o.choice.gathers and o.choice.hpz == 1 and not o.choice.offload]
    alike = [choice for choice in plain if choice.recompute == best.choice.recompute] or plain
    if alike:
        changes: dict[str, dict[str, Any]] = {
            "ZeRO-3": {},
            "ZeRO-3, hpZ": {"zero_hpz_partition_size": cluster.gpus_per_node},
            "ZeRO-3, quantised weights": {"zero_quantized_weights": True},
        }
        if alike[0] is best.choice:
            del changes["ZeRO-3"]
        for name, change in changes.items():
            config = {**(alike[0].deepspeed or {}), "zero_optimization": alike[0].zero | change}
            variant = replace(alike[0], deepspeed=config)
            variants[name] = estimate_traffic(subject, variant, cluster, load.accumulation)
    return variants


def _nothing_fits(options: list[Option], cluster: Cluster) -> str:
    if not options:
        return "no DeepSpeed configuration can be used with this recipe"
    nearest = min(options, key=lambda option: max(option.over_gib, 0.0) + max(option.host_over_gib, 0.0))
    if nearest.over_gib <= 0:
        return f"{nearest.choice.name} with {nearest.choice.recompute} recomputation {nearest.lack}"
    return (
        f"does not fit: on {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name} "
        f"({cluster.gpu.memory_gib:.1f} GiB) the least is {nearest.choice.name} with {nearest.choice.recompute} "
        f"recomputation, which needs {nearest.memory.needed_gib:.1f} GiB, {nearest.over_gib:.1f} GiB too many; "
        f"largest part: {_largest(nearest)}"
    )


def _largest(option: Option) -> str:
    name, size = max(option.memory.parts.items(), key=lambda item: item[1])
    return f"{LABELS[name]} {size:.1f} GiB"


def _overrides_text(made: Plan, args: argparse.Namespace) -> str:
    """`--set` arguments, one a line; for a .yaml file the whole recipe with the overrides in it."""
    lines = set_lines(made.overrides)
    if Path(args.write).suffix not in (".yaml", ".yml"):
        return "".join(f"{line}\n" for line in lines)
    recipe = load_recipe(args.config, [*args.set, *(line.removeprefix("--set ") for line in lines)])
    return yaml.safe_dump(recipe.model_dump(exclude_unset=True), sort_keys=False, allow_unicode=True)


def write_file(option: str, path: str | Path, text: str) -> None:
    """Write what `option` asks for; RecipeError where that cannot be."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{option} {path}: {(error.strerror or str(error)).lower()}") from None
