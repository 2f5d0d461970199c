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
    check_recompute,
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
    return make_recipe(tmp_path, tmp_path, model={"dtype": "bfloat16"}, training={"deepspeed": deepspeed, **training})


def fit(recipe, memory_gib, world_size=2):
    return fit_subject(recipe, subject("8b", LENGTH), load_deepspeed_config(recipe, world_size), world_size, memory_gib)


def needed(name, recompute, world_size=2):
    of = subject("8b", LENGTH)
    return estimate_memory(of, planned.choice(of, name, recompute), world_size).needed_gib


@pytest.mark.parametrize("config", ["zero2", "zero3", None])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_auto_is_the_least_recomputation_that_fits_with_a_margin(tmp_path, config, recompute):
    if config == "zero3" and recompute == "selective":
        pytest.skip("TRL refuses it")
    memory = needed(config, recompute) / (1 - MARGIN)
    found = fit(recipe_with(tmp_path, config), memory * 1.001)
    assert found.recompute == recompute and found.is_automatic
    assert f"{needed(config, recompute):.1f} GiB estimated, {memory * 1.001:.1f} GiB here" in str(found)
    if recompute == "full":
        assert "may not either" in str(fit(recipe_with(tmp_path, config), memory * 0.999))
    else:
        assert fit(recipe_with(tmp_path, config), memory * 0.999).recompute != recompute


def test_selective_is_no_candidate_under_zero3(tmp_path):
    between = needed("zero3", "none") - 0.01
    assert fit(recipe_with(tmp_path, "zero3"), between / (1 - MARGIN)).recompute == "full"


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_what_is_stated_is_done_without_an_estimate(tmp_path, monkeypatch, recompute):
    monkeypatch.setattr(fitting, "estimate_memory", None)
    recipe = recipe_with(tmp_path, recompute=recompute)
    assert fit(recipe, 1.0) == fit_recipe(recipe, None, None, 1, "sdpa", 1.0) == Fit(recompute, "asked for")


def test_without_known_memory_or_an_estimate_everything_is_recomputed(tmp_path, monkeypatch):
    recipe = recipe_with(tmp_path)
    found = fit_recipe(recipe, None, None, 1, "sdpa", None)
    assert (found.recompute, found.estimate) == ("full", None) and "is not known" in found.reason

    def fail(*args):
        raise PlanError("no decoder layers")

    monkeypatch.setattr(fitting, "subject_of", fail)
    found = fit_recipe(recipe, None, None, 1, "sdpa", 80.0)
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


def test_selective_under_zero3_is_refused(tmp_path):
    recipe = recipe_with(tmp_path, "zero3", recompute="selective")
    with pytest.raises(RecipeError, match=r"^training\.recompute: selective: TRL refuses it under ZeRO-3"):
        check_recompute(recipe, load_deepspeed_config(recipe, 2))
    recipe = recipe_with(tmp_path, "zero2", recompute="selective")
    check_recompute(recipe, load_deepspeed_config(recipe, 2))


def test_ranks_that_chose_differently_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    chosen = ["none", "none"]
    monkeypatch.setattr(dist, "all_gather_object", lambda found, own: found.__setitem__(slice(None), chosen))
    check_agreement(Fit("none", ""))
    chosen[1] = "full"
    with pytest.raises(RecipeError, match=r"^training\.recompute: auto chose full and none on ranks"):
        check_agreement(Fit("none", ""))


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (
            Fit("none", "auto: fits", is_automatic=True),
            "with recompute none (auto: fits): set training.recompute: full",
        ),
        (Fit("full", "auto", is_automatic=True), "set a smaller data.max_length"),
        (Fit("none", "asked for"), ""),
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
