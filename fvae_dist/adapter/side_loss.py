"""How the layers' negative ELBOs reach the loss.

    with side_loss.collect(model) as c:
        out = model(**batch)
    loss = task_weight * out.loss + c.neg_elbo

Each adapted layer, in training mode, hands its negative ELBO per token to the open collector. The mask of tokens that
count and the mean over them are applied here, outside the layer, so that nothing inside a checkpointed region depends
on the collector: recomputation in the backward pass repeats the layer's work exactly, reports to nobody, and keeps
nothing alive. Gradients are exact without checkpointing and with non-reentrant checkpointing; a reentrant first
forward runs without gradients, which is an error here and not a silently missing gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvae_dist.adapter.config import FVAELoraConfig
from fvae_dist.adapter.noise import TokenNoise
from fvae_dist.adapter.telemetry import TokenStatistics, sums_over_tokens, terms_from_sums

_open_collectors: list[Collector] = []


# Of statistics that wait to be added up together, at most: more of them would hold memory for nothing.
PENDING_BYTES = 128 * 2**20


class _Report(NamedTuple):
    """One forward of one (layer, adapter), as the layer gave it: a layer reports from inside a checkpointed region,
    where multiplying the two would save tensors that recomputation does not save again."""

    entry: int
    neg_elbo: Tensor  # (...)
    mask: Tensor


@dataclass
class _Entry:
    """One (layer, adapter) that reported."""

    index: int
    name: str
    adapter: str
    config: FVAELoraConfig
    num_reports: int = 0


class Collector:
    """What the adapted layers of one model reported during one `collect` block.

    Attributes after the block (all sums and means run over the tokens that count, fp32):
        neg_elbo: scalar, differentiable; per adapter the mean (or sum, `side_loss_reduction`) over its layers of the
            token mean of the negative ELBO.
        terms: name -> detached (L,) tensor, L reporting layers in model order, see `telemetry.terms_from_sums`:
            nll, kl_z1, z1_sq, z2_sq, neg_elbo, gamma, wasserstein, active_z1, active_z2, r2, clamped.
        layer_names, layer_configs: the L module names, and their adapters' configurations.
        num_tokens: scalar tensor, tokens that counted.
    """

    def __init__(self, model: nn.Module, token_mask: Tensor | None, with_terms: bool, noise: TokenNoise | None):
        self.noise = noise
        self._mask = token_mask
        self._explicit_mask = token_mask is not None
        self.with_terms = with_terms
        self._grad_enabled = torch.is_grad_enabled()
        self._names: dict[nn.Module, str] = {}
        _name_layers(model, "", self._names)
        self._entries: dict[tuple[nn.Module, str], _Entry] = {}
        self._reports: list[_Report] = []
        # Masks in the shape and dtype of the reports: reports of one forward of the model share one.
        self._masks: dict[Any, tuple[Tensor | None, Tensor]] = {}
        # Statistics of reports that can be added up together, and such sums with the entries they are of.
        self._pending: dict[Any, list[tuple[_Report, TokenStatistics]]] = {}
        self._sums: list[tuple[list[int], dict[str, Tensor]]] = []

    # ------------------------------------------------------------------------------------------------- results

    @property
    def neg_elbo(self) -> Tensor:
        """Scalar side loss of the block's tokens; raises ValueError if no layer reported or no token counts."""
        self._require_tokens()
        return self._combine(self._neg_elbo_sums() / self._token_counts())

    @property
    def neg_elbo_sum(self) -> Tensor:
        """As `neg_elbo`, but summed over the tokens: to be divided by the tokens of a larger batch. 0 if none."""
        self._require_reports()
        return self._combine(self._neg_elbo_sums())

    @property
    def num_tokens(self) -> Tensor:
        """Tokens that counted, a scalar tensor."""
        self._require_reports()
        return self._token_counts().max()

    @property
    def layer_names(self) -> list[str]:
        return [entry.name for entry in self._entries.values()]

    @property
    def layer_configs(self) -> list[FVAELoraConfig]:
        return [entry.config for entry in self._entries.values()]

    @property
    def terms(self) -> dict[str, Tensor]:
        """Detached per-layer token means; see the class."""
        self._require_tokens()
        if not self.with_terms:
            raise ValueError("terms were not kept: side_loss.collect was called with terms=False")
        return terms_from_sums(self.sums(), self.layer_configs)

    def sums(self) -> dict[str, Tensor]:
        """Detached per-layer sums over tokens (L, ...), additive over micro-batches and ranks; `num_tokens` (L,)."""
        self._require_reports()
        self._add_up_pending()
        order = [index for of, _ in self._sums for index in of]
        totals: dict[str, Tensor] = {}
        for key in self._sums[0][1] if self._sums else ():
            parts = [sums[key] for _, sums in self._sums]
            if parts[0].dim() > 1:
                # Active adapters may differ in R: padded with zeros, dimensions that never count as active.
                width = max(part.shape[1] for part in parts)
                parts = [F.pad(part, (0, width - part.shape[1])) for part in parts]
            totals[key] = self._by_entry(torch.cat(parts), order)
        totals["num_tokens"] = self._token_counts()
        return totals

    def _neg_elbo_sums(self) -> Tensor:
        """(L,), over the counted tokens, differentiable."""

        def sums(same: list[_Report]) -> Tensor:
            rows = [report.neg_elbo.flatten() for report in same]
            return ((rows[0][None] if len(rows) == 1 else torch.stack(rows)) * same[0].mask).sum(-1)

        return self._over_reports(sums)

    def _token_counts(self) -> Tensor:
        """(L,)"""
        return self._over_reports(lambda same: same[0].mask.sum().expand(len(same)))

    def _over_reports(self, of_same_mask: Callable[[list[_Report]], Tensor]) -> Tensor:
        """(L,) from a function that gives the values of reports with one mask, all of them at once."""
        groups: dict[int, list[_Report]] = {}
        for report in self._reports:
            groups.setdefault(id(report.mask), []).append(report)
        parts = [of_same_mask(same) for same in groups.values()]
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._by_entry(values, [report.entry for same in groups.values() for report in same])

    def _by_entry(self, values: Tensor, order: list[int]) -> Tensor:
        """(L, ...): row i added to that of entry order[i]."""
        if order == list(range(len(self._entries))):
            return values
        total = values.new_zeros(len(self._entries), *values.shape[1:])
        return total.index_add(0, torch.tensor(order, device=values.device), values)

    def _combine(self, per_layer: Tensor) -> Tensor:
        groups: dict[str, list[_Entry]] = {}
        for entry in self._entries.values():
            groups.setdefault(entry.adapter, []).append(entry)
        totals = []
        for entries in groups.values():
            of_adapter = per_layer if len(groups) == 1 else per_layer[[entry.index for entry in entries]]
            totals.append(of_adapter.sum() if entries[0].config.side_loss_reduction == "sum" else of_adapter.mean())
        return totals[0] if len(totals) == 1 else torch.stack(totals).sum()

    def _require_reports(self) -> None:
        if not self._entries:
            raise ValueError(
                "no FVAE-LoRA layer reported a side loss: the model must be in training mode (model.train()), have an "
                "active FVAE-LoRA adapter, and run its forward inside the collect block"
            )

    def _require_tokens(self) -> None:
        self._require_reports()
        if not bool(self.num_tokens > 0):
            raise ValueError("no token counts: the token mask is empty")

    # ------------------------------------------------------------------------------------------------- reporting

    def _see_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before each forward of the model: which tokens of it count, where the caller did not say."""
        if self._explicit_mask:
            return
        mask = _argument(module, "attention_mask", args, kwargs)
        if mask is None or (torch.is_tensor(mask) and mask.dim() == 2):
            self._mask = mask
        else:
            raise ValueError(
                "side_loss.collect cannot tell from this attention_mask which tokens count; pass token_mask="
            )

    def accepts(self, layer: nn.Module) -> bool:
        return layer in self._names

    def stream_of(self, layer: nn.Module, adapter: str) -> str:
        """A name for the noise of the layer's next report; one that runs again draws anew."""
        entry = self._entries.get((layer, adapter))
        again = f"/{entry.num_reports}" if entry else ""
        return f"{self._names[layer]}/{adapter}{again}"

    def add(self, layer: Any, adapter: str, neg_elbo: Tensor, statistics: TokenStatistics | None) -> None:
        """Take one layer's report: neg_elbo (...), one value a token."""
        name = self._names[layer]
        if self._grad_enabled and not neg_elbo.requires_grad and _is_trainable(layer.fvae_vae[adapter]):
            raise RuntimeError(
                f"{name}: the side loss has no gradient, so it would silently not train. This is what reentrant "
                "gradient checkpointing does; use gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        mask = self._mask_for(name, neg_elbo)
        entry = self._entries.get((layer, adapter))
        if entry is None:
            config = layer.fvae_config[adapter]
            entry = self._entries[(layer, adapter)] = _Entry(len(self._entries), name, adapter, config)
        entry.num_reports += 1
        report = _Report(entry.index, neg_elbo, mask)
        self._reports.append(report)
        if statistics is not None:
            alike = (id(mask), *((tensor.shape, tensor.dtype) for tensor in statistics))
            pending = self._pending.setdefault(alike, [])
            pending.append((report, statistics))
            if len(pending) * statistics.num_bytes > PENDING_BYTES:  # they are alike
                self._add_up_pending()

    def _add_up_pending(self) -> None:
        for pending in self._pending.values():
            reports, statistics = zip(*pending)
            self._sums.append(([report.entry for report in reports], sums_over_tokens(statistics, reports[0].mask)))
        self._pending.clear()

    def _mask_for(self, name: str, values: Tensor) -> Tensor:
        """The mask flattened, as floating-point numbers beside `values`; the same tensor for the same mask."""
        alike = (id(self._mask), values.numel(), values.dtype, values.device)
        if alike not in self._masks:
            self._masks[alike] = (self._mask, self._as_weights(name, values))  # the mask too, to keep its id its own
        return self._masks[alike][1]

    def _as_weights(self, name: str, values: Tensor) -> Tensor:
        if self._mask is None:
            return torch.ones_like(values, requires_grad=False).flatten()
        mask = self._mask.to(device=values.device, dtype=values.dtype)
        if mask.numel() != values.numel():
            raise ValueError(
                f"{name} saw {values.numel()} tokens where the token mask has {mask.numel()}: layers that see only "
                "some tokens (experts of a mixture, cross-attention) cannot be adapted with a token mask"
            )
        return mask.flatten()


def _name_layers(module: nn.Module, name: str, names: dict[nn.Module, str]) -> None:
    """The adapted layers in `module`, named as by named_modules, which takes 15 ms a step of an 8B model: it goes on
    into the adapters."""
    if "fvae_vae" in module._modules:
        names.setdefault(module, name)
        return
    for key, child in module._modules.items():
        if child is not None:
            _name_layers(child, f"{name}.{key}" if name else key, names)


def _is_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _argument(module: nn.Module, name: str, args: tuple, kwargs: dict) -> Any:
    """The argument of module's forward of that name, passed by position or keyword; None without one."""
    if name in kwargs or len(args) < 2:
        return kwargs.get(name)
    return inspect.signature(module.forward).bind(*args, **kwargs).arguments.get(name)


@contextmanager
def collect(
    model: nn.Module, token_mask: Tensor | None = None, terms: bool = True, noise: TokenNoise | None = None
) -> Iterator[Collector]:
    """Collect the side loss of every forward of `model` inside the block.

    Args:
        model: a model with FVAE-LoRA layers (a PeftModel, or one that contains it), in training mode.
        token_mask: 1 for tokens that count, the shape of input_ids; default: the 2-D `attention_mask` that the forward
            of `model` receives, all tokens without one.
        terms: also keep the detached terms; False saves their small cost.
        noise: layout-independent noise of the one batch that runs inside; default: torch's generator.

    Yields:
        A `Collector`, to be read after the forward.

    Raises:
        RuntimeError: a layer's side loss has no gradient though it should (reentrant checkpointing).
        ValueError: mask and layer disagree on the number of tokens.
    """
    collector = Collector(model, token_mask, terms, noise)
    # The forward of the model inside a PeftModel names its arguments, which PEFT's *args do not.
    entrance: Any = model
    if hasattr(model, "get_base_model"):
        entrance = entrance.get_base_model()
    hook = entrance.register_forward_pre_hook(collector._see_forward, with_kwargs=True)
    _open_collectors.append(collector)
    try:
        yield collector
    finally:
        _open_collectors.remove(collector)
        hook.remove()


def collector_for(layer: nn.Module) -> Collector | None:
    """The open collector that the layer reports to, the innermost of those of a model that has it."""
    return next((collector for collector in reversed(_open_collectors) if collector.accepts(layer)), None)
