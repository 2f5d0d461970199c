"""FVAELoraConfig: everything that defines an FVAE-LoRA adapter, as a PEFT configuration."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Literal

from peft import PeftConfig

from fvae_dist.adapter.registration import add_peft_type

# Log-variances are clamped to plus and minus this.
LOGVAR_LIMIT = 20.0
# Weights that do not enter an objective; setting one of them is a mistake worth a warning.
UNUSED_WEIGHTS = {
    "official": ("factorization_weight",),
    "paper": ("z1_weight", "z2_weight"),
    "vae2lat": ("reconstruction_weight", "kl_weight", "z1_weight", "z2_weight", "factorization_weight"),
    "beta_vae2lat": ("z1_weight", "z2_weight", "factorization_weight"),
}


# ruff: noqa: RUF009 - `_field` only makes a dataclass field.
def _field(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class FVAELoraConfig(PeftConfig):
    """Configuration of FVAE-LoRA (arXiv 2510.19640); defaults are those of the published runs.

    The update of an adapted linear is `y = W x + lora_alpha / (r + 1e-5) * B z1`. Weights named `*_weight` multiply
    the terms of the objective, see `fvae_dist.adapter.objective`.

    Raises:
        ValueError: a value that cannot define an adapter; the message opens with the field's name.
    """

    r: int = _field(16, "Dimension of the latents z1 and z2.")
    lora_alpha: float = _field(16.0, "The update is scaled by lora_alpha / (r + 1e-5).")
    target_modules: list[str] | set[str] | str | None = _field(
        None, "Module names, a regular expression, or 'all-linear'; default: PEFT's choice for the architecture."
    )
    exclude_modules: list[str] | set[str] | str | None = _field(
        None, "Names or a regular expression of modules left alone."
    )
    layers_to_transform: list[int] | int | None = _field(None, "Adapt only the layers with these indexes.")
    layers_pattern: list[str] | str | None = _field(None, "Name of the layer list that layers_to_transform indexes.")
    modules_to_save: list[str] | None = _field(None, "Other modules that are trained whole and saved along.")
    bias: Literal["none"] = _field("none", "Biases of the base model stay frozen.")

    encoder_layers: int = _field(1, "Hidden layers of each encoder trunk; 0: the heads read x directly.")
    encoder_hidden: int = _field(16, "Width of the encoder trunks.")
    encoder_dropout: float = _field(0.1, "Dropout after each hidden layer of the encoders.")
    encoder_shared_trunk: bool = _field(True, "Mean and log-variance share one trunk; else each has its own.")
    initial_logvar: float = _field(0.0, "Log-variance of z1 and z2 before training, in [-20, 20]; published: 0.")
    decoder_layers: int = _field(3, "Hidden layers of the decoder.")
    decoder_hidden: int = _field(128, "Width of the decoder.")
    decoder_dropout: float = _field(0.1, "Dropout after each hidden layer of the decoder.")
    latent_fusion: Literal["concat", "average"] = _field("concat", "What the decoder reads of z1 and z2.")
    z2_prior_mean: float = _field(1.5, "Mean of z2's prior, in every dimension.")
    z2_prior_std: float = _field(1.0, "Standard deviation of z2's prior.")
    objective: Literal["official", "paper", "vae2lat", "beta_vae2lat"] = _field(
        "official", "Form of the objective: the reference code's, the paper's, or one of the paper's two ablations."
    )
    task_weight: float = _field(1000.0, "Weight of the task loss; the paper's lambda is 1 / task_weight.")
    reconstruction_weight: float = _field(1.0, "Weight of the reconstruction term nll (the paper's alpha).")
    kl_weight: float = _field(1.0, "Weight of KL(q1 || N(0, I)) (the paper's beta); beta_vae2lat: of both KL terms.")
    z1_weight: float = _field(1.0, "official: weight of -mean(z1^2).")
    z2_weight: float = _field(1.0, "official: weight of mean((z2 - z2_prior_mean)^2).")
    factorization_weight: float = _field(0.1, "paper: weight delta of the factorising term Gamma.")
    side_loss_reduction: Literal["mean", "sum"] = _field(
        "mean", "How the layers' negative ELBOs are combined (the reference: mean; the paper: sum)."
    )
    detach_input: bool = _field(False, "Stop the side loss's gradient into the layer's input.")
    kernel: Literal["auto", "torch", "fused"] = _field(
        "auto", "torch, or fused (Triton, on a GPU); auto: fused for bf16 on a GPU where it can, else torch."
    )
    inference_only: bool = _field(False, "Encoder 1 and B alone, as saved for use without training.")

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = add_peft_type()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self._check_sizes()
        self._check_choices()
        self._check_numbers()
        self._check_objective()
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform needs target_modules to be a list of names: PEFT ignores it for a string"
            )

    @property
    def scaling(self) -> float:
        """Factor of B z1 in the layer's output."""
        return self.lora_alpha / (self.r + 1e-5)

    def _check_sizes(self) -> None:
        for name, least in {
            "r": 1,
            "encoder_hidden": 1,
            "decoder_hidden": 1,
            "encoder_layers": 0,
            "decoder_layers": 0,
        }.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")

    def _check_choices(self) -> None:
        choices = {
            "bias": ("none",),
            "latent_fusion": ("concat", "average"),
            "objective": ("official", "paper", "vae2lat", "beta_vae2lat"),
            "side_loss_reduction": ("mean", "sum"),
            "kernel": ("auto", "torch", "fused"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("encoder_shared_trunk", "detach_input", "inference_only"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")

    def _check_numbers(self) -> None:
        for name in ("encoder_dropout", "decoder_dropout"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value!r}")
        for name in ("lora_alpha", "z2_prior_std", "task_weight"):
            value = getattr(self, name)
            if not _is_number(value) or value <= 0:
                raise ValueError(f"{name} must be a number > 0, got {value!r}")
        for name in ("reconstruction_weight", "kl_weight", "z1_weight", "z2_weight", "factorization_weight"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise ValueError(f"{name} must be a number >= 0, got {value!r}")
        if not _is_number(self.initial_logvar) or abs(self.initial_logvar) > LOGVAR_LIMIT:
            raise ValueError(f"initial_logvar must lie within +-{LOGVAR_LIMIT:g}, got {self.initial_logvar!r}")
        if not _is_number(self.z2_prior_mean):
            raise ValueError(f"z2_prior_mean must be a number, got {self.z2_prior_mean!r}")

    def _check_objective(self) -> None:
        """Per dimension of z1 the objective holds (beta - delta) / 2 mean^2: at delta >= beta nothing bounds it."""
        reason = (
            "the KL term no longer outweighs what the factorising term gains by pushing z1 away from 0, so that the "
            "objective has no floor in z1 but for the task and the reconstruction"
        )
        if self.objective == "paper":
            delta, beta = self.factorization_weight, self.kl_weight
            if delta > beta:
                raise ValueError(f"factorization_weight {delta:g} > kl_weight {beta:g}: {reason}")
            if delta == beta and delta > 0:
                warnings.warn(f"factorization_weight {delta:g} = kl_weight {beta:g}: {reason}", stacklevel=4)
        if self.objective == "official" and 2 * self.z1_weight / self.r > self.kl_weight:
            # The reference takes such settings, so they stay possible.
            warnings.warn(f"2 z1_weight / r > kl_weight {self.kl_weight:g}: {reason}", stacklevel=4)
        defaults = {name: field.default for name, field in self.__dataclass_fields__.items()}
        ignored = [name for name in UNUSED_WEIGHTS[self.objective] if getattr(self, name) != defaults[name]]
        if ignored:
            warnings.warn(f"objective {self.objective!r} does not use {', '.join(ignored)}", stacklevel=4)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
