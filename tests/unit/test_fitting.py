"""What `auto` chooses, from the planner's estimate and the device's memory."""

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerControl, TrainerState

from fvae_dist.planning.hardware import PlanError
from fvae_dist.planning.memory import estimate_memory
from fvae_dist.training import callbacks, fitting
from fvae_dist.training.callbacks import EstimateCheck
from fvae_dist.training.deepspeed_config import load_deepspeed_config
from fvae_dist.training.fitting import (
    MARGIN,
    Fit,
    check_agreement,
    check_asked,
    device_memory_gib,
    fit_recipe,
    fit_subject,
    name_the_key_when_out_of_memory,
)
from fvae_dist.training.recipe import RecipeError
from tests import planned
from tests.planned import subject
from tests.recipes import make_recipe

LENGTH = 8192


def recipe_with(tmp_path, config="zero2", **training):
    deepspeed = config and str(planned.ROOT / "ds_configs" / f"{config}.json")
    training = {"deepspeed": deepspeed, "recompute": "auto", "resident_weights": "auto", **training}
    return make_recipe(tmp_path, tmp_path, model={"dtype": "bfloat16"}, training=training)


def fit(recipe, memory_gib, world_size=2):
    return fit_subject(recipe, subject("8b", LENGTH), load_deepspeed_config(recipe, world_size), world_size, memory_gib)


def needed(name, recompute, resident=False):
    of = subject("8b", LENGTH)
    return estimate_memory(of, planned.choice(of, name, recompute, resident=resident), 2).needed_gib


def in_order(config):
    """What auto tries, with what each needs."""
    residencies = [True, False] if config == "zero3" else [False]
    return [(how, stays, needed(config, how, stays)) for how in ("none", "selective", "full") for stays in residencies]


@pytest.mark.parametrize("config", ["zero2", "zero3", "zero3_hpz", None])
def test_auto_is_the_first_that_fits_with_a_margin(tmp_path, config):
    """The least recomputation; of equal recomputation weights that stay, where there is anything to gather."""
    config, order = config, in_order("zero3" if config == "zero3_hpz" else config)
    for memory in [gib / (1 - MARGIN) * change for _, _, gib in order for change in (0.999, 1.001)]:
        allowed = (1 - MARGIN) * memory
        expected = next((row for row in order if row[2] <= allowed), min(order, key=lambda row: row[2]))
        if config == "zero3_hpz" and not expected[1]:
            continue  # it holds second shards beside
        found = fit(recipe_with(tmp_path, config), memory)
        assert (found.recompute, found.resident) == expected[:2] and found.is_automatic
        assert f"{expected[2]:.1f} GiB estimated, {memory:.1f} GiB here" in str(found)
        assert ("nothing fits" in str(found)) == (expected[2] > allowed)
        assert ("resident weights" in str(found)) == expected[1]


def test_everything_fits_a_large_gpu_and_nothing_a_small_one(tmp_path):
    large, small = (fit(recipe_with(tmp_path, "zero3"), memory) for memory in (500.0, 1.0))
    assert (large.recompute, large.resident) == ("none", True)
    assert (small.recompute, small.resident) == ("full", False)


def test_where_nothing_fits_it_is_what_takes_the_least(tmp_path):
    """Without recomputation sharded weights take more than resident ones."""
    assert needed("zero3", "none", False) > needed("zero3", "none", True)
    found = fit(recipe_with(tmp_path, "zero3", recompute="none"), 1.0)
    assert (found.recompute, found.resident) == ("none", True) and "nothing fits" in str(found)


@pytest.mark.parametrize("stated", [{"recompute": "full"}, {"resident_weights": False}, {"resident_weights": True}])
def test_what_is_stated_stays_and_the_rest_is_chosen(tmp_path, stated):
    found = fit(recipe_with(tmp_path, "zero3", **stated), 500.0)
    assert found.recompute == stated.get("recompute", "none")
    assert found.resident == stated.get("resident_weights", True)


def test_offloaded_weights_do_not_stay(tmp_path):
    assert not fit(recipe_with(tmp_path, "zero3_cpu_offload"), 500.0).resident
    recipe = recipe_with(tmp_path, "zero3_cpu_offload", resident_weights=True)
    with pytest.raises(RecipeError, match=r"^training\.resident_weights: true contradicts offload_param in .*offload"):
        check_asked(recipe, load_deepspeed_config(recipe, 2))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_what_is_stated_is_done_without_an_estimate(tmp_path, monkeypatch, recompute):
    monkeypatch.setattr(fitting, "estimate_memory", None)
    recipe = recipe_with(tmp_path, recompute=recompute)
    assert (
        fit(recipe, 1.0) == fit_recipe(recipe, None, None, 1, "sdpa", False, 1.0) == Fit(recompute, False, "asked for")
    )
    recipe = recipe_with(tmp_path, "zero3", recompute=recompute, resident_weights=True)
    assert fit(recipe, 1.0) == Fit(recompute, True, "asked for")


def test_without_known_memory_or_an_estimate_everything_is_recomputed(tmp_path, monkeypatch):
    recipe = recipe_with(tmp_path)
    found = fit_recipe(recipe, None, None, 1, "sdpa", False, None)
    assert (found.recompute, found.resident, found.estimate) == ("full", False, None) and "is not known" in found.reason

    def fail(*args):
        raise PlanError("no decoder layers")

    monkeypatch.setattr(fitting, "subject_of", fail)
    found = fit_recipe(recipe, None, None, 1, "sdpa", False, 80.0)
    assert (found.recompute, found.reason) == ("full", "auto: no estimate: no decoder layers")


def test_memory_of_a_device(monkeypatch):
    assert device_memory_gib(use_cpu=True) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=(index + 1) * 2**30)
    )
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_memory_gib(use_cpu=False) == 2.0


def test_auto_does_not_fill_the_hosts_memory(tmp_path):
    found = fit(recipe_with(tmp_path, "zero3", activation_offload=True), memory_gib=1000)
    assert found.recompute == "selective" and found.resident
    assert fit(recipe_with(tmp_path, "zero3", activation_offload=True), memory_gib=0.001).recompute == "full"


def test_selective_under_zero3_when_asked_for(tmp_path):
    found = fit(recipe_with(tmp_path, "zero3", recompute="selective"), memory_gib=1000)
    assert found.recompute == "selective" and found.resident


def test_ranks_that_chose_differently_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    chosen = [("none", True), ("none", True)]
    monkeypatch.setattr(dist, "all_gather_object", lambda found, own: found.__setitem__(slice(None), chosen))
    check_agreement(Fit("none", False, ""))
    chosen[1] = ("none", False)
    with pytest.raises(RecipeError, match=r"auto chose unlike .*\('none', False\) and \('none', True\); state them"):
        check_agreement(Fit("none", False, ""))


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (
            Fit("none", False, "auto: fits", is_automatic=True),
            "with recompute none (auto: fits): set training.recompute: full",
        ),
        (Fit("full", False, "auto", is_automatic=True), "set a smaller data.max_length"),
        (Fit("none", False, "asked for"), ""),
    ],
)
def test_out_of_memory_under_auto_names_the_key_and_stays_a_crash(caplog, fit, message):
    with pytest.raises(torch.OutOfMemoryError), name_the_key_when_out_of_memory(fit):
        raise torch.OutOfMemoryError("no memory")
    assert message in caplog.text and bool(caplog.text) == fit.is_automatic


@pytest.mark.parametrize(
    ("measured", "message"),
    [(11.4, ""), (8.6, ""), (11.6, "set training.recompute instead of auto"), (8.4, "less recomputation")],
)
def test_the_first_steps_memory_is_compared_with_the_estimate(monkeypatch, caplog, measured, message):
    monkeypatch.setattr(callbacks, "peak_memory_gib", lambda device: measured)
    args, state = SimpleNamespace(device=torch.device("cuda"), process_index=0), TrainerState()
    state.is_world_process_zero = True
    check = EstimateCheck(10.0)
    with caplog.at_level(logging.WARNING):
        check.on_step_end(args, state, TrainerControl())
        first = caplog.text
        check.on_step_end(args, state, TrainerControl())
    assert caplog.text == first  # once
    assert message in first and bool(first) == bool(message)


def test_estimates_are_not_compared_on_cpu(monkeypatch, caplog):
    args = SimpleNamespace(device=torch.device("cpu"), process_index=0)
    EstimateCheck(1e9).on_step_end(args, TrainerState(), TrainerControl())
    assert not caplog.text
