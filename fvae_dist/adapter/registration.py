"""Makes "FVAE_LORA" a PEFT method of the installed, unmodified PEFT."""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

PEFT_TYPE = "FVAE_LORA"
PREFIX = "fvae_"


def add_peft_type() -> PeftType:
    """Add the member FVAE_LORA to PEFT's closed enum of methods, once, and return it.

    `register_peft_method` takes outside methods but looks their name up in `PeftType`, which cannot be subclassed.
    """
    if PEFT_TYPE in PeftType.__members__:
        return PeftType(PEFT_TYPE)
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_ = PEFT_TYPE
    member._value_ = PEFT_TYPE
    setattr(PeftType, PEFT_TYPE, member)
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._value2member_map_[PEFT_TYPE] = member
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Register the method with PEFT; a second call does nothing."""
    if add_peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=PEFT_TYPE.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
