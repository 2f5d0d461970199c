"""Frozen weights gathered once. They never change: where all of them fit a GPU, no pass needs to gather them again.

The model is still loaded in shards, one reader for all ranks. After `deepspeed.initialize` every frozen weight is made
whole and leaves ZeRO-3 for good, the shard with it. Adapters remain ZeRO-3's, with sharded states; they are gathered in
one collective before the first forward after each step, and their gradients reduced in one after each backward (see
`adapter_shards`), so that nothing is left for DeepSpeed's hooks to do, and these are removed.

Read in deepspeed 0.19.8, runtime/zero: parameter_offload.py, stage3.py, partition_parameters.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fvae_dist.adapter import FVAELinear
from fvae_dist.training.adapter_shards import AdapterShards

logger = logging.getLogger(__name__)


def make_resident(engine: Any) -> None:
    """Take an engine's frozen weights out of ZeRO-3; its VAEs must not be leaf modules. All ranks must call this.

    The engine can no longer write DeepSpeed's own checkpoints, which would look for shards.
    """
    zero = engine.optimizer
    zero.parameter_offload._remove_module_hooks()
    with torch.no_grad():
        for parameter in engine.module.parameters():  # the same order on every rank: each is a collective
            if not parameter.requires_grad:
                _release_from_zero3(parameter)
    _keep_adapters_whole(zero, engine.module)
    _spare_walks(engine)
    for layer in engine.module.modules():
        if isinstance(layer, FVAELinear):
            layer.stays_whole = True
    _use_stock_linear()


def _release_from_zero3(parameter: Any) -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parameter.all_gather()
    # Whoever still holds the shard (DeepSpeed's tables do) must not keep its memory.
    parameter.ds_tensor.data = parameter.ds_tensor.data.new_empty(0)
    for name, value in list(vars(parameter).items()):
        if name.startswith("ds_") or callable(value):
            delattr(parameter, name)
    parameter.ds_status = ZeroParamStatus.AVAILABLE  # TRL asks for it before it gathers a head


def _keep_adapters_whole(zero: Any, model: nn.Module) -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    adapters: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    reason = AdapterShards.problem(zero)
    shards = None if reason else AdapterShards(zero)
    if shards is None:
        logger.info("adapters are reduced and gathered by DeepSpeed, tensor by tensor: %s", reason)
    else:
        shards.take_over()

    def partition_adapters() -> None:
        """Before the optimizer's step, which writes to the shards. DeepSpeed's goes over the frozen weights too."""
        if shards is None:
            adapters[0].partition(adapters)
        else:
            shards.let_go()

    @torch.no_grad()
    def gather_adapters(*_: Any) -> None:
        """After a step, and after whatever gathered and let go of them, such as writing a checkpoint."""
        missing = [parameter for parameter in adapters if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        if missing and shards is not None:
            shards.gather()
        elif missing:
            missing[0].all_gather_coalesced(missing).wait()

    zero.parameter_offload.partition_all_parameters = partition_adapters
    # DeepSpeed would gather these after each step, one collective a tensor, and the norms of the base with them.
    zero.persistent_parameters = zero.parameter_offload.persistent_parameters = []
    model.register_forward_pre_hook(gather_adapters)
    # `generate` goes past the PEFT model's forward; every forward begins with the embedding.
    model.get_input_embeddings().register_forward_pre_hook(gather_adapters)  # type: ignore[operator]


def _spare_walks(engine: Any) -> None:
    """DeepSpeed walks through all modules around each forward and, in Python, through each access to a weight, to find
    those that are used outside of their modules and to gather them; here all are whole. The GPU waits meanwhile, as
    it does while every weight of the base forgets a gradient."""
    from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict

    for module in engine.module.modules():
        if isinstance(module._parameters, ZeROOrderedDict):
            module._parameters = dict(module._parameters.items())
    prologue, epilogue = engine._forward_prologue, engine._forward_epilogue
    adapters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]

    def without_looking(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            engine.zero_optimization_partition_weights = lambda: False
            try:
                return call(*args)
            finally:
                del engine.zero_optimization_partition_weights

        return called

    def zero_grad() -> None:
        for parameter in adapters:
            parameter.grad = None

    engine._forward_prologue, engine._forward_epilogue = without_looking(prologue), without_looking(epilogue)
    engine.zero_grad = zero_grad


def _use_stock_linear() -> None:
    """zero.Init has replaced torch's linear by a Python one that keeps every input, a frozen weight's too."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    if torch.nn.functional.linear is zero3_linear_wrap:
        torch.nn.functional.linear = InsertPostInitMethodToModuleSubClasses.linear_bk  # type: ignore[assignment]
