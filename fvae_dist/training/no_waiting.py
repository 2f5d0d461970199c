"""What the host must know of a step, told by the device without the host waiting for it.

A host that waits for the device has launched nothing for it to go on with: it stands still until the next launch
arrives, and between two steps for all of the trainer's Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from fvae_dist.training.batches import find_records

if TYPE_CHECKING:
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object


class NonFiniteLossError(RuntimeError):
    """The loss of a micro-step is NaN or infinite; raised on every rank before the optimizer takes a step with it."""


class HostCopy:
    """A copy of `tensor` in host memory, on its way. `read` waits for what was launched before the copy, not for what
    has been launched since."""

    def __init__(self, tensor: Tensor):
        self._copy = tensor.detach().to("cpu", non_blocking=True)  # into pinned memory
        self._arrived: torch.Event | None = None
        if tensor.device.type != "cpu":
            self._arrived = torch.Event(tensor.device)
            self._arrived.record()

    def read(self) -> Tensor:
        """The values, on CPU."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy


class NoWaitingMixin(_TrainerBase):
    """Mix in before a trainer.

    Attributes:
        wants_to_stop: whether this rank wants the run to stop; to be replaced.
        is_told_to_stop: whether any rank did, when its last forward pass was launched; the same on all ranks.
    """

    whole_rows: Callable[[Tensor], Tensor]  # SequenceParallelMixin's
    deepspeed: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Skipping non-finite losses in the logs would wait for the device, and hide what `_check` stops at.
        self.args.logging_nan_inf_filter = False
        self.wants_to_stop: Callable[[], bool] = lambda: False
        self.is_told_to_stop = False

    def _check(self, loss: Tensor, inputs: dict[str, Any]) -> None:
        """Let all ranks know whether the loss of one is not finite, and whether one wants to stop.

        They read it when the backward pass has been launched: the forward pass is long over by then, and no weight has
        changed.
        """
        mine = torch.stack([~loss.detach().isfinite(), torch.full_like(loss, self.wants_to_stop(), dtype=torch.bool)])
        of_ranks = HostCopy(self.accelerator.gather(mine.int()[None]))
        input_ids = inputs["input_ids"]

        def read() -> None:
            is_bad, wants_to_stop = of_ranks.read().bool().unbind(1)
            self.is_told_to_stop |= bool(wants_to_stop.any())
            if is_bad.any():
                self._refuse_loss(is_bad.nonzero().flatten().tolist(), input_ids)

        # DDP and FSDP have torch run theirs there too.
        loss.register_hook(lambda _: torch.autograd.Variable._execution_engine.queue_callback(read))

    def _refuse_loss(self, ranks: list[int], input_ids: Tensor) -> None:
        whole = self.whole_rows(input_ids)
        found = find_records(self.train_dataset, whole) if self.args.process_index in ranks else []
        # All ranks learn the records: the first to exit makes the launcher kill the others, message and all.
        records = dict(gather_object([(self.args.process_index, found)]))
        where = "; ".join(f"rank {rank} was at training records {records[rank]}" for rank in ranks)
        raise NonFiniteLossError(
            f"non-finite loss in step {self.state.global_step + 1} on rank(s) {', '.join(map(str, ranks))}; {where}; "
            "weights and checkpoints of the steps before are untouched"
        )

    def _clip_grad_norm(self, model):
        """As the trainer's; DeepSpeed has clipped."""
        return None if self.is_deepspeed_enabled else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        """As the trainer's; DeepSpeed's stays on the device until a log line tells it."""
        if self.is_deepspeed_enabled:
            return self.deepspeed.get_global_grad_norm()
        return super()._get_grad_norm(model, grad_norm=grad_norm)
