"""What the host must know of a step, read once the backward pass is launched."""

import math
import signal

import pytest
import torch
from transformers import TrainerCallback

from fvae_dist.training.control import StopOnSignal, StopSignal
from fvae_dist.training.no_waiting import HostCopy, NonFiniteLossError
from tests.distributed.tiny import rows
from tests.trainers import train


def test_a_copy_is_read_on_the_host():
    value = torch.tensor([1, 2], requires_grad=False)
    copy = HostCopy(value)
    assert copy.read().tolist() == [1, 2] and copy.read().device.type == "cpu"


@pytest.mark.gpu
def test_a_copy_does_not_wait_for_what_came_after():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    value = torch.arange(3, device="cuda")
    torch.cuda.synchronize()
    copy = HostCopy(value)
    done = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # a second
    done.record()
    value.zero_()
    assert copy.read().tolist() == [0, 1, 2]
    assert not done.query()


class Records(TrainerCallback):
    """What a run's callbacks see: its steps, and the largest change of a weight by each."""

    def __init__(self):
        self.weights = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append([p.detach().clone() for p in model.parameters() if p.requires_grad])


def test_a_loss_that_is_no_number_leaves_the_weights(tmp_path, monkeypatch):
    """Its gradients exist when all hear of it; no optimizer step is taken with them."""
    records = Records()
    seen = []

    def build(self, *args, **kwargs):
        seen.append(self)
        return original(self, *args, **kwargs)

    from fvae_dist.training.recipe_trainer import RecipeTrainer

    original = RecipeTrainer.__init__
    monkeypatch.setattr(RecipeTrainer, "__init__", build)
    losses = iter([1.0, 1.0, 1.0, math.nan])  # of two micro-batches a step: the second's last one

    def spoiled(self, *args, **kwargs):
        return compute(self, *args, **kwargs) * next(losses)

    from fvae_dist.training.head import HeadMixin

    compute = HeadMixin.compute_loss
    monkeypatch.setattr(HeadMixin, "compute_loss", spoiled)
    with pytest.raises(NonFiniteLossError, match=r"^non-finite loss in step 2 on rank\(s\) 0; .* training records \["):
        train(tmp_path, callbacks=[records])
    (trainer,) = seen
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert len(records.weights) == 2
    assert all(torch.equal(a, b) for a, b in zip(records.weights[1], after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(records.weights[0], after, strict=True))
    assert any(p.grad is not None and not p.grad.isfinite().all() for p in after)


class Signals(TrainerCallback):
    """As if a signal had come, at the begin or the end of the second step."""

    def __init__(self, stop, at):
        self.stop, self.at = stop, at

    def on_step_begin(self, args, state, control, **kwargs):
        if self.at == "begin" and state.global_step == 1:
            self.stop.received = signal.SIGUSR1

    def on_step_end(self, args, state, control, **kwargs):
        if self.at == "end" and state.global_step == 2:
            self.stop.received = signal.SIGUSR1


@pytest.mark.parametrize(("at", "stopped_at"), [("begin", 2), ("end", 3), ("never", None)])
def test_a_signal_stops_after_the_step_whose_forward_pass_it_precedes(tmp_path, monkeypatch, at, stopped_at):
    from fvae_dist.training.recipe_trainer import RecipeTrainer

    stop, stoppers = StopSignal(), []
    start = RecipeTrainer.train

    def with_stopper(self):
        stoppers.append(StopOnSignal(self, stop))
        self.add_callback(stoppers[0])
        self.add_callback(Signals(stop, at))
        start(self)

    monkeypatch.setattr(RecipeTrainer, "train", with_stopper)
    trainer = train(tmp_path, data=rows(20), config={"max_steps": 4, "save_strategy": "no"})
    assert stoppers[0].stopped_at == stopped_at
    assert trainer.state.global_step == (stopped_at or 4)
