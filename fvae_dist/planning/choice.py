"""One way of running a recipe: a DeepSpeed configuration, what is recomputed, and whether frozen weights stay whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Recompute = Literal["full", "selective", "none"]

# DeepSpeed's own values, where a configuration leaves them out (runtime/zero/config.py).
_DEFAULTS = {
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "reduce_bucket_size": 500_000_000,
}


@dataclass(frozen=True)
class Choice:
    """A DeepSpeed configuration (its sizes filled in; None: torch's DDP) and a kind of recomputation.

    `resident`: at stage 3 the frozen weights are gathered once and stay whole (training/resident.py).
    """

    name: str
    deepspeed: dict[str, Any] | None
    recompute: Recompute
    resident: bool = False

    @property
    def key(self) -> tuple[str, Recompute, bool]:
        """What tells a recipe's choices apart."""
        return self.name, self.recompute, self.resident

    @property
    def label(self) -> str:
        return f"{self.name}, resident" if self.resident else self.name

    @property
    def zero(self) -> dict[str, Any]:
        return (self.deepspeed or {}).get("zero_optimization", {})

    @property
    def stage(self) -> int:
        return int(self.zero.get("stage", 0))

    @property
    def is_zero3(self) -> bool:
        return self.stage == 3

    @property
    def gathers(self) -> bool:
        """Whether frozen weights are sharded, and gathered in every pass."""
        return self.is_zero3 and not self.resident

    @property
    def can_be_resident(self) -> bool:
        return self.is_zero3 and self.offload is None

    @property
    def hpz(self) -> int:
        """Ranks that hold a second copy of the shards together; 1: there is none."""
        return int(self.zero.get("zero_hpz_partition_size", 1)) if self.gathers else 1

    @property
    def has_quantised_gathers(self) -> bool:
        return self.gathers and bool(self.zero.get("zero_quantized_weights"))

    @property
    def offload(self) -> str | None:
        """Where the base's shards live if not on the GPU: cpu or nvme."""
        device = (self.zero.get("offload_param") or {}).get("device", "none")
        return device if self.is_zero3 and device != "none" else None

    @property
    def passes(self) -> int:
        """How often each layer's weights are read a micro-step: forward, backward, recomputation."""
        return 2 if self.recompute == "none" else 3

    def size(self, key: str) -> int:
        """A stage-3 size in elements, DeepSpeed's default where it is not stated."""
        value = self.zero.get(key, _DEFAULTS[key])
        return int(value) if value != "auto" else _DEFAULTS[key]
