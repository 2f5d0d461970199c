"""What must hold before the first step. Each check names what is wrong and fails loudly, on every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class StartupError(RuntimeError):
    """The prepared run would not train what the recipe says."""


def check_trainable_parameters(model: nn.Module) -> None:
    """Only adapter parameters train, and each is fp32 (its ZeRO-3 shard too). Not for a base that is trained.

    Raises:
        StartupError: nothing trains, or something trains in fewer bits.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise StartupError("no parameter is trainable")
    for name, parameter in trainable.items():
        if ".base_layer." in name:
            raise StartupError(f"{name} belongs to the frozen base and is trainable")
        shard = getattr(parameter, "ds_tensor", parameter)
        for tensor in (parameter, shard):
            if tensor.dtype != torch.float32:
                raise StartupError(f"{name} is {tensor.dtype}, not float32: small updates would be lost")


def check_engine_precision(engine: Any, of_adapters: bool = True) -> None:
    """DeepSpeed reduces and accumulates gradients in fp32 and keeps fp32 master weights.

    Args:
        of_adapters: their gradients are fp32 from the start; a base's are those of its bf16 copy.

    Raises:
        StartupError: otherwise; names the setting.
    """
    fp32 = torch.float32
    if engine.communication_data_type != fp32:
        raise StartupError(f"gradients are reduced in {engine.communication_data_type}, not float32")
    optimizer = engine.optimizer
    accumulation = getattr(optimizer, "gradient_accumulation_dtype", fp32)
    if accumulation != fp32:
        raise StartupError(f"gradients are accumulated in {accumulation}, not float32")
    for dtype in getattr(optimizer, "ipg_buckets", {}) if of_adapters else ():
        if dtype != fp32:
            raise StartupError(f"a gradient bucket is {dtype}, not float32")
    groups = getattr(optimizer, "optimizer", optimizer).param_groups
    for parameter in (parameter for group in groups for parameter in group["params"]):
        if parameter.dtype != fp32:
            raise StartupError(f"an optimizer master weight is {parameter.dtype}, not float32")


def check_resident(model: nn.Module) -> None:
    """With resident weights every frozen parameter is whole.

    Raises:
        StartupError: one is a shard: no hook would gather it.
    """
    shards = [name for name, p in model.named_parameters() if not p.requires_grad and hasattr(p, "ds_id")]
    if shards:
        raise StartupError(f"{len(shards)} frozen parameters are still ZeRO-3's, {shards[0]} first")


def check_partitioned(model: nn.Module) -> None:
    """Under ZeRO-3 every frozen parameter is a shard.

    Raises:
        StartupError: one is whole: each rank would hold the whole model.
    """
    whole = [name for name, p in model.named_parameters() if not p.requires_grad and not hasattr(p, "ds_id")]
    if whole:
        raise StartupError(f"ZeRO-3 did not partition {len(whole)} frozen parameters, {whole[0]} first")


def keep_ddp_from_guessing(trainer_args: Any) -> None:
    """torch's DDP must wait for every adapter gradient.

    Looking for unused parameters, it walks back from the model's output, does not meet decoder and encoder 2, whose
    gradients come by the side loss alone, and fails when they arrive.
    """
    if getattr(trainer_args, "ddp_find_unused_parameters", None):
        raise ValueError("ddp_find_unused_parameters=True is refused: DDP would take the VAE's decoder for unused")
    if trainer_args is not None:
        trainer_args.ddp_find_unused_parameters = False
