"""One forward of an adapted layer in training mode: its noise, and whom it reports to."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from fvae_dist.adapter.noise import GENERATOR, Noise, draw_ticket, in_backward, recall, remember
from fvae_dist.adapter.side_loss import Collector, collector_for
from fvae_dist.adapter.telemetry import TokenStatistics

_warned_uncollected = False


class LayerForward:
    """What a layer in training mode needs to know of its forward, first or recomputed, and whom to report to.

    `ticket`: from `noise.draw_ticket`; without one it is drawn here. `noise`: where its randomness comes from.
    `with_statistics`, `with_loss`: whether somebody will read their values. `recomputes`: it is a recomputation.
    """

    def __init__(self, layer: nn.Module, adapter: str, num_tokens: int, ticket: int | None = None):
        self._layer, self._adapter = layer, adapter
        self._ticket = draw_ticket() if ticket is None else ticket
        self._collector: Collector | None = None
        self.recomputes = in_backward()
        self.with_loss = not self.recomputes
        self.noise: Noise = GENERATOR
        if self.recomputes:
            self.noise = recall(self._ticket)
        else:
            self._collector = collector_for(layer)
            if self._collector is not None and self._collector.noise is not None:
                self.noise = self._collector.noise.of_layer(self._collector.stream_of(layer, adapter), num_tokens)
        self.with_statistics = self._collector is not None and self._collector.with_terms

    def report(self, z1: Tensor, neg_elbo: Tensor, *statistics: Tensor) -> None:
        """Hand over what the VAE returned. Recomputation reports to nobody."""
        if self.recomputes:
            return
        remember(self._ticket, self.noise, (z1, neg_elbo))
        if self._collector is None:
            _warn_uncollected(neg_elbo)
        else:
            of_tokens = TokenStatistics(*statistics) if statistics else None
            self._collector.add(self._layer, self._adapter, neg_elbo, of_tokens)


def _warn_uncollected(neg_elbo: Tensor) -> None:
    global _warned_uncollected
    if neg_elbo.requires_grad and not _warned_uncollected:
        _warned_uncollected = True
        warnings.warn(
            "FVAE-LoRA layers ran in training mode and nothing collects their side loss: without it this is LoRA with "
            "noise. Use fvae_dist.FVAETrainerMixin, or side_loss.collect(model) around the forward.",
            stacklevel=2,
        )
