"""What is planned: the sizes of a model and its adapter, and what one of its layers keeps and does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from fvae_dist.planning.hardware import PlanError
from fvae_dist.planning.stand_ins import Kernels, fuse_layers
from fvae_dist.planning.trace import LayerTrace, base_of, find_layers, trace_layer

Attach = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Settings:
    """What a recipe says of the arithmetic.

    Attributes:
        dtype: of the base: bfloat16, float16 or float32.
        sequences, length: of one micro-batch on one GPU, at its longest; with sequence parallelism of its part.
        sequence_parallel: GPUs that share each sequence; in attention each has some heads of the whole.
        attention: flash_attention_2, sdpa or eager.
        liger: whether Liger's layers are used.
        fused_head: whether logits are made once (`fvae_dist.kernels.head`), not by TRL's head.
        on_cpu: whether the run has no GPU, whose kernels keep less.
        fused_adapters: whether the fused kernels compute the adapters' VAEs that they can.
        activation_offload: whether what the backward pass needs is in host memory meanwhile.
        trust_remote_code: for models that bring their own code.
    """

    dtype: str
    sequences: int
    length: int
    attention: str = "flash_attention_2"
    liger: bool = False
    fused_head: bool = False
    on_cpu: bool = False
    fused_adapters: bool = False
    sequence_parallel: int = 1
    activation_offload: bool = False
    trust_remote_code: bool = False

    @property
    def num_tokens(self) -> int:
        return self.sequences * self.length

    @property
    def bytes_per_weight(self) -> int:
        return getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class LayerTraces:
    """One decoder layer three times: without the adapter, with it, and with attention's own memory too.

    `is_eager`: attention ran with its T^2 scores, because it was asked for or because the model brings its own.
    """

    bare: LayerTrace
    adapted: LayerTrace
    whole: LayerTrace
    is_eager: bool


@dataclass
class Subject:
    """A model with its adapter, as far as it can be known without a weight. Sizes are numbers of elements.

    Attributes:
        layer_sizes: of every frozen tensor of one decoder layer, in the order of use.
        modules_per_layer: modules of one layer that DeepSpeed hooks at stage 3.
        embedding_size, head_size: of the input embedding and of the language-model head; head 0 where they are one.
    """

    settings: Settings
    num_layers: int
    hidden: int
    vocabulary: int
    base_sizes: list[int]
    layer_sizes: list[int]
    modules_per_layer: int
    embedding_size: int
    head_size: int
    trainable_sizes: list[int]
    adapted_layers: int
    _models: tuple[nn.Module, nn.Module, int] = field(repr=False)
    _traces: dict[tuple[bool, int, int], LayerTraces] = field(default_factory=dict, repr=False)

    @cached_property
    def base_parameters(self) -> int:
        return sum(self.base_sizes)

    @cached_property
    def trainable_parameters(self) -> int:
        return sum(self.trainable_sizes)

    def traces(self, zero3: bool, shape: tuple[int, int] | None = None) -> LayerTraces:
        """One layer's traces for a micro-batch of `shape` (sequences, tokens of each), by default the longest.

        Raises:
            PlanError: the meta device cannot run this model.
        """
        sequences, length = shape or (self.settings.sequences, self.settings.length)
        key = (zero3, sequences, length)
        if key not in self._traces:
            self._traces[key] = self._trace(zero3, (sequences, length))
        return self._traces[key]

    def _trace(self, zero3: bool, shape: tuple[int, int]) -> LayerTraces:
        bare, adapted, index = self._models

        def trace(model: nn.Module, **options: bool) -> LayerTrace:
            kernels = Kernels(self.settings.fused_adapters, self.settings.attention, self.settings.on_cpu)
            return _trace(model, index, shape, kernels, zero3=zero3, **options)

        if self.settings.attention != "eager":
            try:
                return LayerTraces(
                    bare=trace(bare, attention_memory=False),
                    adapted=trace(adapted, attention_memory=False),
                    whole=trace(adapted),
                    is_eager=False,
                )
            except Exception:  # an architecture with attention of its own, which needs a mask
                pass
        try:
            without = trace(bare, eager_attention=True)
            whole = trace(adapted, eager_attention=True)
        except Exception as error:
            name = type(adapted).__name__
            raise PlanError(f"cannot run a layer of {name} on the meta device: {error}") from error
        return LayerTraces(bare=without, adapted=whole, whole=whole, is_eager=True)


def describe(
    config: PretrainedConfig, settings: Settings, attach: Attach, change: Callable[[nn.Module], object] | None = None
) -> Subject:
    """Build base and adapter on the meta device and measure them.

    Args:
        attach: freezes the base it is given, injects the adapter and returns the PEFT model.
        change: changes the base in place, before.

    Raises:
        PlanError: the model has no list of decoder layers.
    """
    bare, adapted = _build(config, settings), _build(config, settings)
    if change is not None:
        change(bare)
        change(adapted)
    adapted = attach(adapted).train()
    base = base_of(adapted)
    text_config = config.get_text_config()
    num_layers = text_config.num_hidden_layers
    try:
        holder, name = find_layers(base, num_layers)
    except ValueError as error:
        raise PlanError(f"cannot be planned: {error}") from None
    layers = list(getattr(holder, name))
    adapted_layers = [i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())]
    # Of unlike layers (a mixture's first ones are dense) the largest.
    index = max(adapted_layers or range(num_layers), key=lambda i: (_numel(layers[i]), -i))
    bare_holder, _ = find_layers(bare, num_layers)
    bare_layer = getattr(bare_holder, name)[index]
    embedding = base.get_input_embeddings().weight
    head = base.get_output_embeddings()
    is_tied = head is None or getattr(text_config, "tie_word_embeddings", False)
    return Subject(
        settings=settings,
        num_layers=num_layers,
        hidden=embedding.shape[-1],
        vocabulary=embedding.shape[0],
        base_sizes=[parameter.numel() for parameter in bare.parameters()],
        layer_sizes=[parameter.numel() for parameter in bare_layer.parameters()],
        modules_per_layer=sum(1 for _ in bare_layer.modules()),
        embedding_size=embedding.numel(),
        head_size=0 if is_tied else head.weight.numel(),
        trainable_sizes=[p.numel() for p in adapted.parameters() if p.requires_grad],
        adapted_layers=len(adapted_layers),
        _models=(bare, adapted, index),
    )


def _build(config: PretrainedConfig, settings: Settings) -> nn.Module:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=settings.trust_remote_code, dtype=getattr(torch, settings.dtype)
        )
    model.requires_grad_(False)
    if settings.liger:
        fuse_layers(model)
    return model.train()


def _trace(model: nn.Module, index: int, shape: tuple[int, int], kernels: Kernels, **options: bool) -> LayerTrace:
    base = base_of(model)
    holder, name = find_layers(base, base.config.get_text_config().num_hidden_layers)
    return trace_layer(model, getattr(holder, name)[index], shape, kernels, **options)  # type: ignore[arg-type]


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
