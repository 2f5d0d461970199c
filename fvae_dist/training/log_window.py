"""What a run has shown since its last log line, and what of it deserves a warning."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from torch import Tensor

from fvae_dist.adapter.config import FVAELoraConfig
from fvae_dist.adapter.telemetry import terms_from_sums
from fvae_dist.training.gradient_split import GradientSplit

logger = logging.getLogger(__name__)

# Logged name -> term; means over layers.
LOGGED_TERMS = {
    "elbo/nll": "nll",
    "elbo/kl_z1": "kl_z1",
    "elbo/z1_sq": "z1_sq",
    "elbo/z2_sq": "z2_sq",
    "elbo/gamma": "gamma",
    "elbo/active_units": "active_z1",
    "elbo/active_units_z2": "active_z2",
    "elbo/wasserstein": "wasserstein",
    "elbo/r2": "r2",
    "elbo/clamped": "clamped",
}
# z1's prior has z1_sq = 1.
RUNAWAY_Z1_SQ = 1000.0
CLAMPED_SHARE = 0.01


class LogWindow:
    """Sums over micro-steps and tokens; tensors stay on the device until a log line is written."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.num_steps = 0
        self.num_tokens: Tensor | float = 0.0
        self._losses: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._configs: list[FVAELoraConfig] = []
        self.gradient_split: GradientSplit | None = None

    def add_loss(self, key: str, value: Tensor) -> None:
        """Add a micro-step's share of a step's loss."""
        value = value.detach().float()
        self._losses[key] = self._losses[key] + value if key in self._losses else value

    def add_sums(self, sums: dict[str, Tensor], configs: list[FVAELoraConfig]) -> None:
        """Add what a micro-step's collector saw of each layer."""
        self._sums = {key: self._sums[key] + value if self._sums else value for key, value in sums.items()}
        self._configs = configs

    def losses(self, reduce: Callable[[Tensor, str], Tensor]) -> dict[str, float]:
        """Means over steps and ranks. All ranks must call this."""
        return {key: float(reduce(value, "mean")) / self.num_steps for key, value in self._losses.items()}

    def terms(self, reduce: Callable[[Tensor, str], Tensor]) -> dict[str, Tensor]:
        """Per-layer terms on CPU over the tokens of all ranks; empty without telemetry. All ranks must call this."""
        if not self._sums:
            return {}
        sums = {key: reduce(value, "sum") for key, value in self._sums.items()}
        return {key: value.cpu() for key, value in terms_from_sums(sums, self._configs).items()}

    def tokens_per_second(self) -> float:
        return float(self.num_tokens) / max(time.perf_counter() - self.started, 1e-9)


class LatentWarnings:
    """Warns of latents that have gone wrong, once for each problem and layer."""

    def __init__(self) -> None:
        self._warned: set[tuple[str, str]] = set()

    def check(self, terms: dict[str, Tensor], layer_names: list[str], is_warm: bool) -> None:
        """`terms` as of `terms_from_sums`; `is_warm`: latents have had the time to become active."""
        if is_warm:
            self._warn("collapse: no dimension of z1 is active", layer_names, terms["active_z1"] == 0)
        self._warn(
            f"runaway: mean z1^2 is above {RUNAWAY_Z1_SQ:g} (its prior has 1); lower z1_weight or factorization_weight",
            layer_names,
            terms["z1_sq"] > RUNAWAY_Z1_SQ,
        )
        self._warn(
            f"clamped: more than {CLAMPED_SHARE:.0%} of the latents' log-variances stand at +-20, without gradient",
            layer_names,
            terms["clamped"] > CLAMPED_SHARE,
        )

    def _warn(self, problem: str, layer_names: list[str], found: Tensor) -> None:
        layers = [name for name, bad in zip(layer_names, found.tolist(), strict=True) if bad]
        new = [name for name in layers if (problem, name) not in self._warned]
        self._warned.update((problem, name) for name in new)
        if new:
            more = f" and {len(new) - 3} more layers" if len(new) > 3 else ""
            logger.warning("%s in %s%s", problem, ", ".join(new[:3]), more)
