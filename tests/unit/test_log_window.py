"""Log lines between two log lines, and the warnings about latents."""

import logging

import pytest
import torch

from fvae_dist.training.log_window import LatentWarnings, LogWindow


def test_losses_are_means_over_steps():
    window = LogWindow()
    for value in (1.0, 2.0, 6.0):
        window.add_loss("loss", torch.tensor(value, requires_grad=True))
    window.num_steps = 2
    assert window.losses(lambda value, how: {"mean": value}[how]) == {"loss": 4.5}
    assert window.terms(lambda value, how: value) == {}


def terms(**changes):
    healthy = {"active_z1": 3.0, "z1_sq": 1.0, "clamped": 0.0}
    return {key: torch.tensor([healthy[key], changes.get(key, healthy[key])]) for key in healthy}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"active_z1": 0.0}, "collapse: no dimension of z1 is active"),
        ({"z1_sq": 1e4}, "runaway: mean z1^2 is above 1000"),
        ({"clamped": 0.02}, "clamped: more than 1% of the latents' log-variances"),
    ],
)
def test_warnings_come_once_and_name_the_layer(change, message, caplog):
    warnings = LatentWarnings()
    for _ in range(3):
        warnings.check(terms(**change), ["layers.0.q_proj", "layers.1.q_proj"], is_warm=True)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(message) and record.getMessage().endswith("in layers.1.q_proj")


def test_no_warning_for_healthy_latents_nor_for_cold_ones(caplog):
    warnings = LatentWarnings()
    warnings.check(terms(), ["a", "b"], is_warm=True)
    warnings.check(terms(active_z1=0.0), ["a", "b"], is_warm=False)
    assert not caplog.records
    warnings.check(terms(active_z1=0.0), ["a", "b"], is_warm=True)
    assert len(caplog.records) == 1


def test_many_layers_are_one_line(caplog):
    dead = {"active_z1": torch.zeros(64), "z1_sq": torch.ones(64), "clamped": torch.zeros(64)}
    LatentWarnings().check(dead, [f"layer{i}" for i in range(64)], is_warm=True)
    (record,) = caplog.records
    assert record.getMessage().endswith("in layer0, layer1, layer2 and 61 more layers")
