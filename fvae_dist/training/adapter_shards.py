"""Adapters under ZeRO-3 whose weights are whole between two steps: all of them in one collective.

DeepSpeed's Python for every tensor (a hook, a place in a bucket, a copy of the gradient's part, a norm, a gather) takes
some tenths of a millisecond, and an adapter of an 8B model has 1,408 tensors (192 where it is flat): as long as the
step itself. So gradients are reduced at once after each backward here, and values gathered at once before the first
forward after a step. Optimizer, shards, gradient buffer and checkpoints remain DeepSpeed's.

Read in deepspeed 0.19.8, runtime/zero/stage3.py; the two fused copies are those that torch's FSDP2 is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

# Elements of a gradient whose norm is taken at once: it is in double precision.
_NORM_ELEMENTS = 2**24


class AdapterShards:
    """The trainable parameters of a ZeRO-3 optimizer, in the order of its groups.

    Args:
        zero: DeepSpeed's stage 3 optimizer, `problem` of which is None.
    """

    def __init__(self, zero: Any):
        self._zero = zero
        self.parameters: list[Any] = [parameter for group in zero.fp16_groups for parameter in group]
        self._sizes = [parameter.partition_numel() for parameter in self.parameters]
        self._group = self.parameters[0].ds_process_group
        self._ranks = dist.get_world_size(self._group)
        self._total = sum(self._sizes)
        self._group_sizes = [sum(parameter.partition_numel() for parameter in group) for group in zero.fp16_groups]
        self._whole: list[Tensor] = []  # the values, in one buffer; see `gather`
        self._rows: list[Tensor] = []

    @staticmethod
    def problem(zero: Any) -> str | None:
        """Why this optimizer's gradients and values must be left to DeepSpeed's hooks; None if they need not."""
        parameters = [parameter for group in zero.fp16_groups for parameter in group]
        if zero.offload_optimizer or zero.offload_param:
            return "offload"
        if getattr(zero, "zenflow", False) or getattr(zero, "use_muon", False):
            return "an optimizer that works on whole gradients"
        if zero.postscale_gradients and zero.gradient_predivide_factor != 1.0:
            return "gradient_predivide_factor"
        if zero.all2all_process_group is not None:
            return "quantised gradients"
        if len({parameter.ds_process_group for parameter in parameters}) != 1 or zero.sequence_parallel_size != 1:
            return "more than one process group"
        kinds = {parameter.dtype for parameter in parameters} | {zero.gradient_accumulation_dtype}
        if kinds | {zero.communication_data_type} != {torch.float32}:
            return "adapters, gradients or their reduction not in fp32"
        return None

    def take_over(self) -> None:
        """From now on nothing is done tensor by tensor."""
        zero = self._zero
        for handle in zero._grad_acc_hooks:
            handle.remove()
        zero._grad_acc_hooks.clear()
        unflatten = zero._unflatten_partitioned_parameters
        buffers = zero.grad_partitions_flat_buffer.split(self._group_sizes)
        sizes = [[parameter.partition_numel() for parameter in group] for group in zero.fp16_groups]

        def reduce_all() -> None:
            """DeepSpeed's, without waiting for a stream on which nothing happens any more."""
            self.reduce()
            zero.averaged_gradients = {i: list(buffer.split(sizes[i])) for i, buffer in enumerate(buffers)}
            zero._epilogue_ran_this_backward = True

        def norm_of_all(gradients: list[Tensor], params: list[Any], norm_type: float = 2) -> Tensor:
            """DeepSpeed's, not of every parameter but of pieces of its group, in which they lie one after the other;
            not finite where a gradient is not."""
            buffer = zero.grad_partitions_flat_buffer
            first = gradients[0].storage_offset() - buffer.storage_offset()
            whole = buffer.narrow(0, first, sum(gradient.numel() for gradient in gradients))
            norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in whole.split(_NORM_ELEMENTS)]
            squares = torch.stack(norms).square().sum()
            dist.all_reduce(squares, group=self._group)
            return squares.sqrt()

        def take_gradient(group: int) -> None:
            """The optimizer's gradient is the buffer, not a copy of it."""
            zero.fp32_partitioned_groups_flat[group].grad = buffers[group]
            zero.averaged_gradients[group] = None

        def unflatten_if_moved(group: int) -> None:
            """After a step every parameter's shard is pointed into the group's buffer, where it already is."""
            flat, shards = zero.fp16_partitioned_groups_flat[group], zero.fp16_partitioned_groups[group]
            last = flat.data_ptr() + (flat.numel() - shards[-1].numel()) * flat.element_size()
            if (shards[0].data_ptr(), shards[-1].data_ptr()) != (flat.data_ptr(), last):
                unflatten(group)

        zero.independent_gradient_partition_epilogue = reduce_all
        zero.get_grad_norm_direct = norm_of_all
        zero._prepare_fp32_grad_for_sub_group = take_gradient
        zero._unflatten_partitioned_parameters = unflatten_if_moved
        if _can_pass_over(zero):
            zero.step = self._without_asking(zero.step)

    def _without_asking(self, step: Callable[..., None]) -> Callable[..., None]:
        """DeepSpeed's step waits to hear whether the gradients' norm is a number, and passes over the step if it is
        not. Torch's fused optimizers can pass over a step by themselves. (The schedule goes on with it: nobody on the
        host knows of it before the next log line.)"""
        from deepspeed.runtime.zero import stage3

        zero = self._zero
        zero.passed_over = torch.zeros((), device=zero.grad_partitions_flat_buffer.device)  # steps, for the logs

        def tell_optimizer(norm: Tensor) -> bool:
            is_bad = (~norm.isfinite()).float()
            zero.optimizer.found_inf = is_bad
            zero.passed_over += is_bad
            return False

        def called(*args: Any, **kwargs: Any) -> None:
            asked, stage3.is_invalid_grad_norm = stage3.is_invalid_grad_norm, tell_optimizer
            try:
                step(*args, **kwargs)
            finally:
                stage3.is_invalid_grad_norm = asked

        return called

    @torch.no_grad()
    def reduce(self) -> None:
        """The mean of all ranks' gradients into this rank's part of each, added to that of the micro-batches before."""
        gradients = [parameter.grad for parameter in self.parameters]
        if all(gradient is None for gradient in gradients):
            return
        parts = [
            parameter.new_zeros(parameter.ds_numel) if gradient is None else gradient.reshape(-1)
            for parameter, gradient in zip(self.parameters, gradients, strict=True)
        ]
        buffer = self._zero.grad_partitions_flat_buffer
        by_rank = buffer.new_empty((self._ranks, self._total))
        torch._chunk_cat(parts, 0, self._ranks, out=by_rank)
        for parameter in self.parameters:
            parameter.grad = None
        del gradients, parts
        by_rank.div_(self._ranks)
        own = torch.empty_like(buffer)
        dist.reduce_scatter_tensor(own, by_rank.view(-1), group=self._group)
        if self._zero.micro_step_id == 0:
            buffer.copy_(own)
        else:
            buffer.add_(own)

    @torch.no_grad()
    def gather(self) -> None:
        """Make every parameter whole, from the shards as they are now."""
        from deepspeed import comm
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        shards = self._zero.fp16_partitioned_groups_flat
        shard = shards[0] if len(shards) == 1 else torch.cat(list(shards))
        if not self._whole:
            whole = shard.new_empty(self._ranks * self._total).split([self._ranks * size for size in self._sizes])
            self._rows = [values.view(self._ranks, -1) for values in whole]
            self._whole = [
                values[: parameter.ds_numel].view(parameter.ds_shape)
                for parameter, values in zip(self.parameters, whole, strict=True)
            ]
        by_rank = shard.new_empty((self._ranks, self._total))
        comm.all_gather_into_tensor(by_rank.view(-1), shard, group=self._group)
        torch.split_with_sizes_copy(by_rank, self._sizes, dim=1, out=self._rows)
        for parameter, values in zip(self.parameters, self._whole, strict=True):
            parameter.data = values
            parameter.ds_status = ZeroParamStatus.AVAILABLE

    def let_go(self) -> None:
        """Keep the shards alone, which the optimizer is about to change."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        nothing = self.parameters[0].data.new_empty(0)
        for parameter in self.parameters:
            parameter.data = nothing
            parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE


def _can_pass_over(zero: Any) -> bool:
    """Whether the optimizer takes `found_inf`, as for a GradScaler, and no loss scale depends on it."""
    is_adam = isinstance(zero.optimizer, (torch.optim.Adam, torch.optim.AdamW))
    return is_adam and not zero.dynamic_loss_scale and all(group.get("fused") for group in zero.optimizer.param_groups)
