"""The VAE that replaces LoRA's down-projection: two encoders, the sampling, the decoder.

Parameters are fp32 and stay so (see `Fp32Module`); `flat` can make two of them. The encoders' products over D take x as
it is and give fp32, the decoder's runs in the dtype of x; everything narrower, the sampling and the statistics in fp32.
Each weight is used only in the forward of the module that owns it and every forward returns plain tensors: that is what
ZeRO-3's gathering hooks need.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvae_dist.adapter.config import LOGVAR_LIMIT, FVAELoraConfig
from fvae_dist.adapter.flat import BIASES, WEIGHTS, FlatModule, InFlat
from fvae_dist.adapter.linears import CastLinear, InputLinear, Reconstruction
from fvae_dist.adapter.noise import GENERATOR, GeneratorNoise, LayerNoise
from fvae_dist.adapter.objective import coefficients, neg_elbo, token_terms, wide, wide_dtype
from fvae_dist.adapter.telemetry import r2_sample, token_statistics
from fvae_dist.kernels.fused_vae import Side, fused_vae, problem
from fvae_dist.kernels.passes import Call
from fvae_dist.kernels.spec import Spec

logger = logging.getLogger(__name__)

# Of the kernels' parameters the first; then heads and the decoder's layers in the order of the modules.
_FIRST = (
    ("encoder1.trunk.linears.0", "weight"),
    ("encoder2.trunk.linears.0", "weight"),
    ("decoder.output", "weight"),
    ("decoder.output", "bias"),
    ("decoder", "scale"),
    ("encoder1.trunk.linears.0", "bias"),
    ("encoder2.trunk.linears.0", "bias"),
)


class MLP(nn.Module):
    """num_layers x (linear -> ReLU -> dropout); the identity for num_layers = 0."""

    def __init__(self, features_in: int, hidden: int, num_layers: int, dropout: float, linear: type = CastLinear):
        super().__init__()
        widths = [features_in] + [hidden] * num_layers
        kinds = [linear] + [CastLinear] * num_layers
        self.linears = nn.ModuleList(kind(a, b) for kind, (a, b) in zip(kinds, pairwise(widths)))
        self.dropout = dropout

    @property
    def dropouts(self) -> list[tuple[int, float]]:
        """(width, rate) of each hidden layer."""
        return [(linear.out_features, self.dropout) for linear in self.linears]  # type: ignore[misc]

    def forward(self, x: Tensor, keeps: Sequence[Tensor | None] | None = None) -> Tensor:
        """(..., features_in) -> (..., hidden), fp32.

        `keeps`: for each hidden layer what its dropout keeps, (..., hidden) boolean, or None for all.
        """
        for linear, keep in zip(self.linears, keeps or [None] * len(self.linears), strict=True):
            x = F.relu(wide(linear(x)))
            if keep is not None:
                x = x * keep / (1 - self.dropout)
        return x


class Encoder(nn.Module):
    """q(z|x) = N(mean(x), diag exp(logvar(x))): fp32 from the first product on; heads zero at the start, but for
    the log-variance's bias, `initial_logvar`."""

    def __init__(self, in_features: int, config: FVAELoraConfig):
        super().__init__()
        args = (in_features, config.encoder_hidden, config.encoder_layers, config.encoder_dropout, InputLinear)
        width = config.encoder_hidden if config.encoder_layers else in_features
        self.trunk = MLP(*args)
        self.logvar_trunk = None if config.encoder_shared_trunk else MLP(*args)
        head = CastLinear if config.encoder_layers else InputLinear
        self.mean = head(width, config.r)
        self.logvar = head(width, config.r)
        for parameter in (*self.mean.parameters(), *self.logvar.parameters()):
            nn.init.zeros_(parameter)
        nn.init.constant_(self.logvar.bias, config.initial_logvar)

    @property
    def dropouts(self) -> list[tuple[int, float]]:
        return self.trunk.dropouts + (self.logvar_trunk.dropouts if self.logvar_trunk else [])

    def forward(self, x: Tensor, keeps: Sequence[Tensor | None] | None = None) -> tuple[Tensor, Tensor]:
        """(..., D) -> mean and log-variance, each (..., R), fp32; the log-variance clamped to [-20, 20]."""
        depth = len(self.trunk.linears)
        hidden = self.trunk(x, keeps and keeps[:depth])
        mean = wide(self.mean(hidden))
        if self.logvar_trunk is not None:
            hidden = self.logvar_trunk(x, keeps and keeps[depth:])
        return mean, wide(self.logvar(hidden)).clamp(-LOGVAR_LIMIT, LOGVAR_LIMIT)

    def mean_only(self, x: Tensor) -> Tensor:
        """The mean alone, (..., D) -> (..., R), fp32: all that evaluation needs."""
        return wide(self.mean(self.trunk(x)))


class Decoder(nn.Module):
    """p(x|z1, z2) = N(xhat(z), diag(|scale| + 1e-5)^2): a diagonal Gaussian with one learned scale a feature."""

    scale: Any = InFlat("scale")

    def __init__(self, in_features: int, config: FVAELoraConfig):
        super().__init__()
        latent = 2 * config.r if config.latent_fusion == "concat" else config.r
        width = config.decoder_hidden if config.decoder_layers else latent
        self.fusion = config.latent_fusion
        self.layers = MLP(latent, config.decoder_hidden, config.decoder_layers, config.decoder_dropout)
        self.output = Reconstruction(width, in_features)
        self.scale = nn.Parameter(torch.ones(in_features))

    @property
    def dropouts(self) -> list[tuple[int, float]]:
        return self.layers.dropouts

    def forward(self, z1: Tensor, z2: Tensor, x: Tensor, keeps: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Given z1, z2 (..., R): negative log-likelihood of x (..., D), nats per token, (...), fp32; the hidden units
        (..., H), of which `output` makes xhat."""
        z = torch.cat([z1, z2], dim=-1) if self.fusion == "concat" else (z1 + z2) / 2
        hidden = self.layers(z, keeps).to(x.dtype)
        # |scale| equals the reference's scale wherever that one is defined, and cannot turn negative.
        return self.output(hidden, x, self.scale.abs() + 1e-5), hidden


def sample(mean: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """A draw from N(mean, exp(logvar)), differentiable in both; eps ~ N(0, I), all (..., R)."""
    return mean + (0.5 * logvar).exp() * eps


@lru_cache
def _log_kernel(choice: str) -> None:
    logger.info("adapter kernel: %s", choice)


@lru_cache
def _one(spec: Spec) -> Spec:
    """The same object for equal ones, which are soon found to be equal."""
    return spec


def _fused_spec(config: FVAELoraConfig) -> tuple[Spec, str | None]:
    """What the fused kernels need to know, and why they cannot compute an adapter of this kind (None: they can)."""
    spec = Spec(
        r=config.r,
        encoder_hidden=config.encoder_hidden,
        encoder_dropout=config.encoder_dropout,
        decoder_hidden=config.decoder_hidden,
        decoder_layers=config.decoder_layers,
        decoder_dropout=config.decoder_dropout,
        concat=config.latent_fusion == "concat",
        prior_mean=config.z2_prior_mean,
        prior_std=config.z2_prior_std,
        coefficients=coefficients(config),
    )
    spec = _one(spec)
    if config.encoder_layers != 1:
        return spec, f"encoder_layers {config.encoder_layers} is not 1"
    if not config.encoder_shared_trunk:
        return spec, "encoder_shared_trunk is off"
    if config.detach_input:
        return spec, "detach_input is on"
    return spec, None


class FactorizedVAE(FlatModule):
    """Encoders, sampling and decoder of one adapted layer; encoder 1 alone where `config.inference_only`."""

    def __init__(self, in_features: int, config: FVAELoraConfig):
        super().__init__([".".join(names) for names in _FIRST])
        self.config = config
        self.encoder1 = Encoder(in_features, config)
        self.fused_spec, self.fused_problem = _fused_spec(config)
        # Modules and names of the kernels' parameters, in their order; filled at the first use.
        self._fused_owners: list[tuple[nn.Module, str]] = []
        if not config.inference_only:
            self.encoder2 = Encoder(in_features, config)
            self.decoder = Decoder(in_features, config)

    def forward(
        self,
        x: Tensor,
        noise: GeneratorNoise | LayerNoise = GENERATOR,
        with_statistics: bool = False,
        with_loss: bool = True,
    ) -> tuple[Tensor, ...]:
        """Training: sample both latents and decode. Evaluation: the mean of q1, and nothing else is computed.

        Everything goes through this one forward, so that ZeRO-3 may treat the module as a leaf: one gather and one
        set of hooks instead of some twenty.

        Args:
            x: input of the adapted linear, (..., D), fp32 or 16 bit.
            noise: where latents' noise and dropout come from.
            with_statistics: also return what telemetry needs.
            with_loss: False where nobody reads the loss, as in recomputation: its values may then be meaningless.

        Returns:
            z1 (..., R); in training also the negative ELBO per token (...), and on request the fields of
            `TokenStatistics`, detached; all fp32.
        """
        if not self.training:
            return (self.encoder1.mean_only(x),)
        if self.config.inference_only:
            raise ValueError(
                "this adapter was saved with inference_only=True: encoder 2 and decoder are missing, so it cannot be "
                "trained. Train from the full adapter, or call model.eval() to use this one."
            )
        if self.is_fused(x):
            return self._fused_forward(x, noise, with_statistics, with_loss)
        with self.opened():
            return self._torch_forward(x, noise, with_statistics)

    def _torch_forward(
        self, x: Tensor, noise: GeneratorNoise | LayerNoise, with_statistics: bool
    ) -> tuple[Tensor, ...]:
        draws, keeps1, keeps2, keeps_decoder = self._draw(x, noise)
        q1 = self.encoder1(x, keeps1)
        z1 = z1_side = sample(q1[0], q1[1], draws.eps1)
        if self.config.detach_input:
            # The task's gradient goes on into x, the side loss's does not: the same latents again, without x.
            x = x.detach()
            q1 = self.encoder1(x, keeps1)
            z1_side = sample(q1[0], q1[1], draws.eps1)
        q2 = self.encoder2(x, keeps2)
        z2 = sample(q2[0], q2[1], draws.eps2)
        nll, hidden = self.decoder(z1_side, z2, x, keeps_decoder)
        terms = token_terms(nll, z1_side, z2, q1, q2, self.config)
        loss = neg_elbo(terms, self.config)
        if not with_statistics:
            return z1, loss
        return z1, loss, *token_statistics(terms, loss, q1, q2, x, hidden, self.decoder.output)

    def is_fused(self, x: Tensor) -> bool:
        """Whether the kernels compute the training forward for x. Each choice is logged once.

        `auto` takes them for bf16 on a GPU: in fp32 torch's products are exact, and the kernels' are not faster.

        Raises:
            ValueError: kernel "fused" was asked for and cannot compute this adapter for x.
        """
        kernel = self.config.kernel
        if kernel == "torch" or not x.numel():
            return False
        if kernel == "auto" and not (x.is_cuda and x.dtype == torch.bfloat16):
            reason: str | None = f"{str(x.dtype).removeprefix('torch.')} on {x.device.type}"
        else:  # asked last: it imports Triton
            reason = self.fused_problem or problem(self.fused_spec, x.device, x.dtype)
        weight: Any = self._parameters.get(WEIGHTS)
        if weight is None:
            weight = self._modules["encoder1"]._modules["mean"]._parameters["weight"]  # type: ignore[union-attr]
        if reason is None and weight.device != x.device:  # kernels are told addresses, and would not notice
            reason = f"the adapter is on {weight.device}, its input on {x.device}"
        if reason is None and not weight.numel():
            reason = "ZeRO-3 gathers the adapter's weights one by one; FVAETrainerMixin makes each adapter one unit"
        if reason and kernel == "fused":
            raise ValueError(f"kernel 'fused' cannot be used: {reason}; use 'auto' or 'torch'")
        _log_kernel(f"torch (auto: {reason})" if reason else "fused (Triton)")
        return reason is None

    def _fused_forward(
        self, x: Tensor, noise: GeneratorNoise | LayerNoise, with_statistics: bool, with_loss: bool
    ) -> tuple[Tensor, ...]:
        stream = noise.stream(x.numel() // x.shape[-1], x.device)
        call = Call(self.fused_spec, (stream.salt,), 1.0, with_statistics, with_loss)
        z1, side = fused_vae(call, x, stream.keys.to(x.device), self.fused_parameters())
        return z1, side.loss, *(self.fused_statistics(x, side) if with_statistics else ())

    def fused_parameters(self) -> list[Tensor]:
        """The flat ones, or each by itself in the order of the kernels' gradients."""
        own: Any = self._parameters  # past nn.Module's __getattr__, which is slow
        if self.parts:
            return [own[WEIGHTS], own[BIASES]]
        if not self._fused_owners:
            heads = [head for encoder in (self.encoder1, self.encoder2) for head in (encoder.mean, encoder.logvar)]
            first: list[Any] = [(self.get_submodule(path), name) for path, name in _FIRST]
            inner = [(linear, name) for linear in (*heads, *self.decoder.layers.linears) for name in ("weight", "bias")]
            self._fused_owners = [*first, *inner]
        return [module._parameters[name] for module, name in self._fused_owners]  # type: ignore[misc]

    def fused_statistics(self, x: Tensor, side: Side) -> tuple[Tensor, ...]:
        """The fields of `TokenStatistics` for x (..., D)."""
        assert side.terms is not None and side.posterior is not None and side.squared_error is not None
        rows, leading = x.reshape(-1, x.shape[-1]), x.shape[:-1]
        sample = r2_sample(len(rows), x.device)
        terms = (side.terms[i].view(leading) for i in (1, 2, 3, 4, 0))
        mean1, logvar1, mean2, logvar2 = side.posterior.view(*leading, 4, self.config.r).unbind(-2)
        logvar1, logvar2 = (logvar.clamp(-LOGVAR_LIMIT, LOGVAR_LIMIT) for logvar in (logvar1, logvar2))
        of_sample = (rows.detach()[sample], rows.new_empty(0), side.squared_error[sample])
        return *terms, mean1, logvar1, mean2, logvar2, *of_sample

    def _draw(self, x: Tensor, noise: GeneratorNoise | LayerNoise):
        """All randomness at once: the noise of the latents, and what each dropout of the three networks keeps."""
        parts = (self.encoder1.dropouts, self.encoder2.dropouts, self.decoder.dropouts)
        like = torch.empty((*x.shape[:-1], self.config.r), dtype=wide_dtype(x.dtype), device=x.device)
        draws = noise.draw(like, [dropout for part in parts for dropout in part])
        keeps = iter(draws.keeps)
        return draws, *([next(keeps) for _ in part] for part in parts)
