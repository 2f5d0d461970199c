"""What `PeftModel` can do besides, once FVAE-LoRA is registered.

    model.save_pretrained(folder, inference_only=True)  # encoder 1 and B alone: all that evaluation needs
    model.rename_adapter(old_name, new_name)

`save_pretrained` without that keyword stays PEFT's own, for every method.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from peft import PeftModel, PeftType

from fvae_dist.adapter.layer import renamed
from fvae_dist.adapter.registration import PEFT_TYPE

KEYWORD = inspect.Parameter("inference_only", inspect.Parameter.KEYWORD_ONLY, default=False, annotation="bool")


def extend_peft_model() -> None:
    """Extend `PeftModel`, once; what PEFT has itself by now is left alone."""
    if KEYWORD.name not in inspect.signature(PeftModel.save_pretrained).parameters:
        PeftModel.save_pretrained = _with_inference_only(PeftModel.save_pretrained)  # type: ignore[method-assign]
    if not hasattr(PeftModel, "rename_adapter"):
        PeftModel.rename_adapter = rename_adapter  # type: ignore[attr-defined]


def rename_adapter(self: PeftModel, old_name: str, new_name: str) -> None:
    """Rename an adapter; see `FVAELoraModel.rename_adapter`.

    Raises:
        ValueError: no such adapter, the new name is taken or impossible, or adapters of this type have no renaming.
    """
    rename = getattr(type(self.base_model), "rename_adapter", None)
    if rename is None:
        raise ValueError(f"adapters of type {PeftType(self.peft_type).value} cannot be renamed")
    rename(self.base_model, old_name, new_name)
    self.active_adapter = renamed(self.active_adapter, old_name, new_name)


def _with_inference_only(save_pretrained: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(save_pretrained)
    def save(self: PeftModel, *args: Any, inference_only: bool = False, **kwargs: Any) -> None:
        if not inference_only:
            return save_pretrained(self, *args, **kwargs)
        with _as_inference_only(self):
            return save_pretrained(self, *args, **kwargs)

    signature = inspect.signature(save_pretrained)
    *others, var_keyword = signature.parameters.values()
    save.__signature__ = signature.replace(parameters=[*others, KEYWORD, var_keyword])  # type: ignore[attr-defined]
    return save


@contextmanager
def _as_inference_only(model: PeftModel) -> Iterator[None]:
    """Let the adapters' configurations say inference_only: the tuner saves what they say."""
    configs: dict[str, Any] = model.peft_config
    saved = dict(configs)
    for name, config in saved.items():
        if config.peft_type != PEFT_TYPE:
            found = PeftType(config.peft_type).value
            raise ValueError(f"inference_only=True is for {PEFT_TYPE} adapters; {name!r} is a {found} adapter")
    try:
        for name, config in saved.items():
            configs[name] = copy(config)
            configs[name].inference_only = True
        yield
    finally:
        configs.update(saved)
