"""What is compared: adapters of one size, made as PEFT makes them, around one frozen base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig

from fvae_dist.adapter import FVAELoraConfig
from fvae_dist.benchmarking.floor import Floor, LayerSize, base_floor, fvae_floor, lora_floor

BASE, LORA, TORCH, FUSED, REFERENCE = "base", "lora", "torch", "fused", "reference"
STOCK, STOCK_LIGER = "trl", "trl_liger"
# Of the stock stack, what is not at its default (trl.SFTConfig's names).
STOCKS: dict[str, dict[str, Any]] = {STOCK: {}, STOCK_LIGER: {"use_liger_kernel": True}}
LABELS = {
    BASE: "frozen base",
    LORA: "PEFT LoRA",
    TORCH: "FVAE torch",
    FUSED: "FVAE fused",
    REFERENCE: "reference layer",
    STOCK: "TRL, PEFT LoRA, ZeRO-3",
    STOCK_LIGER: "TRL, PEFT LoRA, ZeRO-3, Liger",
}


@dataclass(frozen=True)
class AdapterSize:
    """Widths and dropout of every variant that has them; `r` and lora_alpha = r are LoRA's too."""

    r: int = 16
    encoder_layers: int = 1
    encoder_hidden: int = 16
    decoder_layers: int = 3
    decoder_hidden: int = 128
    dropout: float = 0.1

    def settings(self, variant: str, targets: list[str]) -> dict[str, Any]:
        """The adapter as a recipe states it.

        Raises:
            ValueError: the variant is no PEFT method of this installation.
        """
        modules: list[str] | str = "all-linear" if targets == ["all-linear"] else targets
        common = {"r": self.r, "lora_alpha": self.r, "target_modules": modules}
        if variant == LORA:
            return {"peft_type": "LORA", **common, "lora_dropout": self.dropout}
        if variant not in (TORCH, FUSED):
            raise ValueError(f"{variant} is no adapter that PEFT attaches")
        return {
            "peft_type": "FVAE_LORA",
            **common,
            "encoder_layers": self.encoder_layers,
            "encoder_hidden": self.encoder_hidden,
            "encoder_dropout": self.dropout,
            "decoder_layers": self.decoder_layers,
            "decoder_hidden": self.decoder_hidden,
            "decoder_dropout": self.dropout,
            "kernel": variant,
        }

    def config(self, variant: str, targets: list[str]) -> PeftConfig:
        """The PEFT configuration.

        Raises:
            ValueError: the variant is not available; the message says why.
        """
        values = self.settings(variant, targets)
        kind = LoraConfig if values.pop("peft_type") == "LORA" else FVAELoraConfig
        return kind(**values)

    def floor(self, variant: str, size: LayerSize) -> Floor | None:
        """The floor of the variant's adapter, without the base layer; None for the base."""
        if variant == BASE:
            return None
        if variant in (LORA, *STOCKS):
            return lora_floor(size, self.r)
        return fvae_floor(size, self.fvae())

    def fvae(self) -> FVAELoraConfig:
        values = self.settings(TORCH, [])
        del values["peft_type"]
        return FVAELoraConfig(**values)

    def layer_seconds(self, variant: str, size: LayerSize, ceilings: Any, recompute: bool = False) -> float:
        """Floor of base and adapter together."""
        adapter = self.floor(variant, size)
        own = adapter.seconds(ceilings, recompute) if adapter else 0.0
        return base_floor(size).seconds(ceilings, recompute) + own


def default_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype asked for; auto: bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """As a recipe has it."""
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """As a trainer with bf16=True runs the forward; off in fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
