"""What of a layer's configuration the fused kernels depend on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class Coefficients(NamedTuple):
    """The negative ELBO of a token as a linear function of its terms."""

    nll: float
    kl_z1: float
    kl_z2: float
    z1_sq: float
    z2_sq: float
    constant: float


@dataclass(frozen=True)
class Spec:
    """What the kernels need to know of a layer beside its tensors."""

    r: int
    encoder_hidden: int
    encoder_dropout: float
    decoder_hidden: int
    decoder_layers: int
    decoder_dropout: float
    concat: bool
    prior_mean: float
    prior_std: float
    coefficients: Coefficients

    @property
    def num_of_feature(self) -> int:
        """Parameters of each feature: of both trunks, of the decoder's output weight, its bias and scale."""
        return 2 * self.encoder_hidden + self.decoder_hidden + 2

    @property
    def num_small(self) -> int:
        """Number of all other parameters, see `vae_triton`."""
        r, hidden, width = self.r, self.encoder_hidden, self.decoder_hidden
        first = (2 * r if self.concat else r) * width + width
        return 2 * hidden + 4 * r * (hidden + 1) + first + (self.decoder_layers - 1) * width * (width + 1)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Numbers of weight and bias of each head and each hidden layer of the decoder."""
        sizes = [math.prod(shape) for shape in self.shapes(0)[7:]]
        return tuple(zip(sizes[::2], sizes[1::2], strict=True))

    @property
    def num_outer(self) -> int:
        """How many of them stand before the decoder's inner layers."""
        return self.num_small - (self.decoder_layers - 1) * self.decoder_hidden * (self.decoder_hidden + 1)

    def shapes(self, features: int) -> list[tuple[int, ...]]:
        """Of all parameters of one adapter, in the order of `vae_triton`'s gradients."""
        r, hidden, width = self.r, self.encoder_hidden, self.decoder_hidden
        heads: list[tuple[int, ...]] = [(r, hidden), (r,)] * 4
        inputs = [2 * r if self.concat else r] + [width] * (self.decoder_layers - 1)
        decoder = [shape for size in inputs for shape in ((width, size), (width,))]
        of_features = [(hidden, features), (hidden, features), (features, width), (features,), (features,)]
        return [*of_features, (hidden,), (hidden,), *heads, *decoder]

    @property
    def sums_fit(self) -> bool:
        """Whether a program can hold the gradients of heads and first layer, in 16 bit, beside its tokens."""
        return max(self.r, self.encoder_hidden) <= 32

    @property
    def encoder_decisions(self) -> int:
        """Dropout decisions of a token in both encoders; the decoder's come after them."""
        return 2 * self.encoder_hidden if self.encoder_dropout else 0

    @property
    def num_words(self) -> int:
        """Random words of a token for dropout: two decisions each."""
        decoder = self.decoder_layers * self.decoder_hidden if self.decoder_dropout else 0
        return (self.encoder_decisions + decoder + 1) // 2
