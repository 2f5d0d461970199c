"""Gradient checkpointing as the side loss needs it: never reentrant, and selective where that was asked for."""

from __future__ import annotations

from typing import Any

import torch

# transformers 5.23 renamed the argument and keeps the old name as an alias.
_KWARGS = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")


def refuse_reentrant(trainer_args: Any) -> None:
    """ValueError if the user asked for reentrant checkpointing."""
    for name in _KWARGS:
        if (getattr(trainer_args, name, None) or {}).get("use_reentrant"):
            raise ValueError(
                f"{name}={{'use_reentrant': True}} is refused: reentrant checkpointing silently drops the side "
                "loss's gradient; non-reentrant is the default"
            )


def use_non_reentrant(trainer_args: Any) -> None:
    """TRL asks for reentrant checkpointing under PEFT + ZeRO-3, for an old DeepSpeed; undo that."""
    settings: dict[str, Any] = {}
    for name in _KWARGS:
        settings.update(getattr(trainer_args, name, None) or {})
    settings["use_reentrant"] = False
    for name in _KWARGS:
        if hasattr(trainer_args, name):
            setattr(trainer_args, name, dict(settings))


def keep_selective(model: torch.nn.Module) -> None:
    """TRL 1.16 patches the old name of the method that transformers 5.23 calls: what it asks for would be lost."""
    enable: Any = getattr(model, "gradient_checkpointing_enable", None)
    if getattr(enable, "_is_sac_wrapped", False) and hasattr(model, "activation_checkpointing_enable"):

        def activation_checkpointing_enable(activation_checkpointing_kwargs=None, **kwargs):
            return enable(gradient_checkpointing_kwargs=activation_checkpointing_kwargs, **kwargs)

        model.activation_checkpointing_enable = activation_checkpointing_enable  # type: ignore[assignment]
