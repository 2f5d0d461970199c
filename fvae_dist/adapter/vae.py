"""The VAE that replaces LoRA's down-projection: two encoders, the sampling, the decoder.

Parameters are fp32 and stay so (see `Fp32Module`). The products over D run in the dtype of x; everything narrower, the
sampling and the statistics in fp32. Each weight is used only in the forward of the module that owns it and every
forward returns plain tensors: that is what ZeRO-3's gathering hooks need.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvae_dist.adapter.config import FVAELoraConfig
from fvae_dist.adapter.objective import LOGVAR_LIMIT, diag_gaussian_nll, token_terms, wide

NARROW = (torch.float16, torch.bfloat16)


class Fp32Module(nn.Module):
    """A module whose parameters ignore casts to 16 bit, as in `model.to(torch.bfloat16)`; float64 is allowed."""

    def _apply(self, fn, recurse=True):
        def keep_wide(tensor: Tensor) -> Tensor:
            cast = fn(tensor)
            if cast.dtype in NARROW and tensor.dtype not in NARROW:
                return tensor.to(device=cast.device)
            return cast

        return super()._apply(keep_wide, recurse)


class CastLinear(nn.Linear):
    """A linear that computes in the dtype of its input, whatever the dtype of its weights.

    Not through F.linear: ZeRO-3 replaces that function by a Python one, which keeps gathered base weights from staying
    alive and costs 1 ms a call; on adapter weights, which stay whole, it saves nothing.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.to(input.dtype).t()
        rows = input.reshape(-1, self.in_features)
        if self.bias is None:
            output = rows.mm(weight)
        else:
            output = torch.addmm(self.bias.to(input.dtype), rows, weight)
        return output.view(*input.shape[:-1], self.out_features)


class MLP(nn.Module):
    """num_layers x (linear -> ReLU -> dropout); the identity for num_layers = 0."""

    def __init__(self, features_in: int, hidden: int, num_layers: int, dropout: float):
        super().__init__()
        widths = [features_in] + [hidden] * num_layers
        self.linears = nn.ModuleList(CastLinear(a, b) for a, b in pairwise(widths))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., features_in) -> (..., hidden), fp32; only the first product runs in the dtype of x."""
        for linear in self.linears:
            x = self.dropout(F.relu(wide(linear(x))))
        return x


class Encoder(nn.Module):
    """q(z|x) = N(mean(x), diag exp(logvar(x))): trunk(s) in the dtype of x, heads in fp32, zero at the start."""

    def __init__(self, in_features: int, config: FVAELoraConfig):
        super().__init__()
        args = (in_features, config.encoder_hidden, config.encoder_layers, config.encoder_dropout)
        width = config.encoder_hidden if config.encoder_layers else in_features
        self.trunk = MLP(*args)
        self.logvar_trunk = None if config.encoder_shared_trunk else MLP(*args)
        self.mean = CastLinear(width, config.r)
        self.logvar = CastLinear(width, config.r)
        for head in (self.mean, self.logvar):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D) -> mean and log-variance, each (..., R), fp32; the log-variance clamped to [-20, 20]."""
        hidden = self.trunk(x)
        mean = wide(self.mean(hidden))
        if self.logvar_trunk is not None:
            hidden = self.logvar_trunk(x)
        return mean, wide(self.logvar(hidden)).clamp(-LOGVAR_LIMIT, LOGVAR_LIMIT)

    def mean_only(self, x: Tensor) -> Tensor:
        """The mean alone, (..., D) -> (..., R), fp32: all that evaluation needs."""
        return wide(self.mean(self.trunk(x)))


class Decoder(nn.Module):
    """p(x|z1, z2) = N(xhat(z), diag(|scale| + 1e-5)^2): a diagonal Gaussian with one learned scale a feature."""

    def __init__(self, in_features: int, config: FVAELoraConfig):
        super().__init__()
        latent = 2 * config.r if config.latent_fusion == "concat" else config.r
        width = config.decoder_hidden if config.decoder_layers else latent
        self.fusion = config.latent_fusion
        self.layers = MLP(latent, config.decoder_hidden, config.decoder_layers, config.decoder_dropout)
        self.output = CastLinear(width, in_features)
        self.scale = nn.Parameter(torch.ones(in_features))

    def forward(self, z1: Tensor, z2: Tensor, x: Tensor) -> Tensor:
        """Negative log-likelihood of x (..., D) given z1, z2 (..., R), nats per token: (...), fp32."""
        z = torch.cat([z1, z2], dim=-1) if self.fusion == "concat" else (z1 + z2) / 2
        xhat = self.output(self.layers(z).to(x.dtype))
        # |scale| equals the reference's scale wherever that one is defined, and cannot turn negative.
        return diag_gaussian_nll(x, xhat, self.scale.abs() + 1e-5)


def sample(mean: Tensor, logvar: Tensor) -> Tensor:
    """A draw from N(mean, exp(logvar)), differentiable in both.

    The noise comes from torch's default generator, which checkpointing restores for recomputation; a private
    generator would give different noise there, and silently wrong gradients.
    """
    return mean + (0.5 * logvar).exp() * torch.randn_like(mean)


class FactorizedVAE(Fp32Module):
    """Encoders, sampling and decoder of one adapted layer."""

    def __init__(self, in_features: int, config: FVAELoraConfig):
        super().__init__()
        self.z2_prior_mean = config.z2_prior_mean
        self.encoder1 = Encoder(in_features, config)
        self.encoder2 = Encoder(in_features, config)
        self.decoder = Decoder(in_features, config)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Training: sample both latents and decode. Evaluation: the mean of q1, and nothing else is computed.

        Everything goes through this one forward, so that ZeRO-3 may treat the module as a leaf: one gather and one
        set of hooks instead of some twenty.

        Args:
            x: input of the adapted linear, (..., D), fp32 or 16 bit.

        Returns:
            z1 (..., R); in training also the mean of q1 (..., R) and the fields of `TokenTerms`, each (...); all fp32.
        """
        if not self.training:
            return (self.encoder1.mean_only(x),)
        mean1, logvar1 = self.encoder1(x)
        mean2, logvar2 = self.encoder2(x)
        z1, z2 = sample(mean1, logvar1), sample(mean2, logvar2)
        terms = token_terms(self.decoder(z1, z2, x), z1, z2, mean1, logvar1, self.z2_prior_mean)
        return z1, mean1, *terms
