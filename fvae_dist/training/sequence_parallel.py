"""Sequence parallelism: DeepSpeed's Ulysses through accelerate, with batches and losses that fit the side loss.

The ranks of a group read the same rows, and each keeps one part of every row. In attention Ulysses exchanges tokens for
heads, so that a rank has some heads of all tokens; everything else, the adapters too, works on the rank's own tokens.
What depends on a row as a whole (its labels shifted by one, its tokens' noise keys and positions, which of them count)
is made before it is cut; sums over tokens are then those of the whole group, and a run equals one without the cut.

Not used of the libraries: DeepSpeed's data adapter and transformers' loss under it. They cut rows before their noise
keys could be known, and take the mean over a micro-batch where the trainer's is over the optimizer step.

Source: Jacobs et al., "DeepSpeed Ulysses" (arXiv 2309.14509); deepspeed 0.19, runtime/sequence_parallel/ulysses_sp.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import pad
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fvae_dist.adapter.noise import TOKEN_KEYS, token_keys
from fvae_dist.training.batches import IGNORED_LABEL, LENGTHS
from fvae_dist.training.recipe import Recipe, RecipeError

if TYPE_CHECKING:
    from transformers import Trainer as _TrainerBase  # what the mixin is mixed into
else:
    _TrainerBase = object

_GROUPS = "num_key_value_groups"
# Of the columns that are cut, what stands for a token that only fills up a batch.
_FILL = {"labels": IGNORED_LABEL, "shift_labels": IGNORED_LABEL}


def part_of(inputs: dict[str, Any], size: int, index: int, num_rows: int = 1) -> dict[str, Any]:
    """Part `index` of `size` of a batch of whole rows.

    Args:
        inputs: input_ids and labels (B, T), COUNTED where the tokens have been told, padded on the right or not at all.
        num_rows: as many rows, at least, are returned; Ulysses wants all batches of one size.

    Returns:
        The columns (max(B, num_rows), ceil(T / size)), with position_ids, TOKEN_KEYS and shift_labels (as labels too)
        beside them; what is no column of tokens as it is; no attention_mask, which causal attention can do without.

    Raises:
        ValueError: padding on the left.
    """
    input_ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    rows, length = input_ids.shape
    if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError("padding on the left cannot be cut for sequence parallelism: Ulysses' attention has no mask")
    numbers = torch.arange(length, device=input_ids.device).expand(rows, -1)
    positions = inputs.get("position_ids")
    columns = {key: value for key, value in inputs.items() if _is_column(value, rows, length)}
    columns |= {
        "position_ids": numbers if positions is None else positions.expand(rows, -1),
        TOKEN_KEYS: token_keys(input_ids, mask, positions),
        "shift_labels": pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED_LABEL),
    }
    columns.pop("attention_mask", None)
    missing = -length % size
    fill = (0, missing, 0, max(num_rows - rows, 0))
    columns = {key: pad(column, fill, value=_FILL.get(key, 0)) for key, column in columns.items()}
    # What fills a row up is a document of its own, which nobody attends to.
    columns["position_ids"][:, length:] = torch.arange(missing, device=input_ids.device)
    columns["position_ids"][rows:, :length] = numbers[:1]
    own = slice(index * (length + missing) // size, (index + 1) * (length + missing) // size)
    rest = {key: value for key, value in inputs.items() if key not in (*columns, "attention_mask", LENGTHS)}
    part = rest | _with_document(rest, missing) | {key: column[:, own].contiguous() for key, column in columns.items()}
    return part | {"labels": part["shift_labels"]}


def _is_column(value: Any, rows: int, length: int) -> bool:
    return isinstance(value, Tensor) and value.shape == (rows, length)


def _with_document(inputs: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """The borders of a padding-free row's documents, with another of `num_tokens` at its end."""
    if not num_tokens or "cu_seq_lens_q" not in inputs:
        return {}
    borders = inputs["cu_seq_lens_q"]
    borders = torch.cat([borders, borders[-1:] + num_tokens])
    longest = max(inputs["max_length_q"], num_tokens)
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}


def check_shares(recipe: Recipe, config: PretrainedConfig, world_size: int, attention: str) -> None:
    """RecipeError where the recipe's `training.sequence_parallel` cannot be, or would be wrong without a word."""
    size, training, text = recipe.training.sequence_parallel, recipe.training, config.get_text_config()
    if size == 1:
        return
    problem = ""
    heads = text.num_attention_heads
    of_kv = getattr(text, "num_key_value_heads", None) or heads
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    types = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if training.deepspeed is None:
        problem = "needs training.deepspeed (Ulysses is DeepSpeed's)"
    elif world_size % size:
        problem = f"{world_size} device(s) cannot be divided into groups of {size}"
    elif heads % size:
        problem = f"the model's {heads} attention heads cannot be shared by {size} devices"
    elif of_kv % size and size % of_kv:
        problem = f"the model's {of_kv} key-value heads can neither be shared by {size} devices nor repeated for them"
    elif attention == "eager":
        problem = "eager attention needs its T x T mask, which Ulysses does not pass on; use sdpa or flash_attention_2"
    elif attention == "sdpa" and _window(text) < recipe.data.max_length:
        problem = f"the model's window of {_window(text)} tokens would be lost with sdpa; use flash_attention_2"
    elif recipe.data.packing and training.per_device_train_batch_size > 1:
        problem = "with data.packing a micro-batch is one row: set training.per_device_train_batch_size to 1"
    elif types & {"dynamic", "longrope"}:
        problem = "RoPE scaling that follows the longest position (dynamic, longrope) would differ between the devices"
    if problem:
        raise RecipeError(f"training.sequence_parallel: {size}: {problem}")


def _window(text: PretrainedConfig) -> float:
    """Of the layers that have one, the tokens that a token sees."""
    layers = getattr(text, "layer_types", None) or ["sliding_attention"]
    return getattr(text, "sliding_window", None) or math.inf if "sliding_attention" in layers else math.inf


# ----------------------------------------------------------------------------------------------------------- attention


def _by_document(attention: Callable[..., Any]) -> Callable[..., Any]:
    """SDPA for packed rows: Ulysses gives no mask, and transformers' own was made of the rank's part alone."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any):
        positions = kwargs["position_ids"]
        document = (positions == 0).cumsum(-1)
        is_same = document[:, None, :, None] == document[:, None, None, :]
        return attention(module, query, key, value, is_same.tril(), *args, **kwargs)

    return attend


class _Attention:
    """Ulysses' attention in training, the model's own otherwise.

    In evaluation no tokens are exchanged and rows may be padded on the left, yet Ulysses would throw their masks away;
    and where it repeats key-value heads it leaves the modules with another number of groups than they have.
    """

    def __init__(self, own: Callable[..., Any], ulysses: Callable[..., Any], model: torch.nn.Module):
        self.own, self.ulysses = own, ulysses
        named = ((module, getattr(module, _GROUPS, None)) for module in model.modules())
        self.groups = {module: groups for module, groups in named if groups is not None}

    def __call__(self, module: Any, *args: Any, **kwargs: Any):
        if module.training:
            return self.ulysses(module, *args, **kwargs)
        if module in self.groups:
            setattr(module, _GROUPS, self.groups[module])
        return self.own(module, *args, **kwargs)


# ------------------------------------------------------------------------------------------------------------- trainer


class SequenceParallelMixin(_TrainerBase):
    """Mix in before the trainer class.

    Args (beside the trainer's, by keyword):
        sequence_parallel: ranks that share each row; 1: none do. Needs DeepSpeed.

    Raises:
        ValueError: no DeepSpeed, or ranks that do not divide into such groups.
    """

    accelerator: Any
    deepspeed: Any

    def __init__(self, *args: Any, sequence_parallel: int = 1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sequence_parallel = sequence_parallel
        if sequence_parallel == 1:
            return
        if not self.is_deepspeed_enabled:
            raise ValueError("sequence_parallel needs DeepSpeed")
        if self.args.world_size % sequence_parallel:
            raise ValueError(f"{self.args.world_size} ranks do not divide into groups of {sequence_parallel}")
        if self._is_packed() and self.args.per_device_train_batch_size > 1:
            raise ValueError("sequence_parallel with packing: one row a rank, so per_device_train_batch_size must be 1")

    def _is_packed(self) -> bool:
        return bool(getattr(self.data_collator, "padding_free", False))

    @property
    def num_readers(self) -> int:
        """How many ranks, or groups of ranks, read rows of their own."""
        return self.args.world_size // self.sequence_parallel

    @property
    def reader(self) -> int:
        """Which of them this rank belongs to."""
        return self.args.process_index // self.sequence_parallel

    def get_total_train_batch_size(self, args: Any) -> int:
        return super().get_total_train_batch_size(args) // self.sequence_parallel

    def get_train_dataloader(self):
        """As the trainer's; the ranks of a group read the same rows, as accelerate has it for tensor parallelism."""
        if self.sequence_parallel == 1:
            return super().get_train_dataloader()
        from torch.distributed.device_mesh import init_device_mesh

        state = self.accelerator.state
        sizes = (self.num_readers, self.sequence_parallel)
        state.ds_device_mesh = init_device_mesh(self.args.device.type, sizes, mesh_dim_names=("dp", "tp"))
        try:
            return super().get_train_dataloader()
        finally:
            del state.ds_device_mesh

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if self.sequence_parallel == 1:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        name, functions, model = self._attention_name(), ALL_ATTENTION_FUNCTIONS, self.model
        assert model is not None
        own = functions[name]
        if name == "sdpa" and self._is_packed():
            functions[name] = _by_document(own)
        with self._parallelism(name):  # in which Ulysses takes the function's place
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        functions[name] = _Attention(own, functions[name], model)
        # Losses are scaled for the mean over all ranks. DeepSpeed would sum within a group, but not in all its stages.
        for holder in (self.deepspeed, self.deepspeed.optimizer):
            holder.sequence_parallel_size = 1
        return prepared

    def train(self, *args: Any, **kwargs: Any):
        if self.sequence_parallel == 1:
            return super().train(*args, **kwargs)
        name = self._attention_name()
        own = ALL_ATTENTION_FUNCTIONS[name]
        try:
            return super().train(*args, **kwargs)
        finally:
            ALL_ATTENTION_FUNCTIONS[name] = own  # other models of this process go through it too

    def _attention_name(self) -> str:
        model: Any = self.model
        return model.config._attn_implementation

    @contextmanager
    def _parallelism(self, implementation: str) -> Iterator[None]:
        """accelerate's configuration while it prepares model and optimizer, and not its wrapper of the data."""
        from accelerate.parallelism_config import ParallelismConfig
        from accelerate.utils import DeepSpeedSequenceParallelConfig

        accelerator = self.accelerator
        before, wrap = accelerator.state.parallelism_config, accelerator.deepspeed_ulysses_dl_adapter
        accelerator.state.parallelism_config = ParallelismConfig(
            dp_replicate_size=self.num_readers,
            sp_size=self.sequence_parallel,
            sp_backend="deepspeed",
            sp_handler=DeepSpeedSequenceParallelConfig(
                sp_seq_length_is_variable=True, sp_attn_implementation=implementation
            ),
        )
        accelerator.deepspeed_ulysses_dl_adapter = lambda dataloader, model: dataloader
        try:
            yield
        finally:
            accelerator.state.parallelism_config = before
            accelerator.deepspeed_ulysses_dl_adapter = wrap

    def cut(self, batch_samples: list[dict[str, Any]]) -> None:
        """Leave of each batch this rank's part, in place."""
        if self.sequence_parallel == 1:
            return
        index = self.args.process_index % self.sequence_parallel
        num_rows = 1 if self._is_packed() else self.args.per_device_train_batch_size
        batch_samples[:] = [part_of(inputs, self.sequence_parallel, index, num_rows) for inputs in batch_samples]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.sequence_parallel > 1:  # TRL counts positions: one row's, filled up
            getattr(self, "_metrics", {}).get("train", {}).pop("num_tokens", None)
        super().log(logs, start_time)

    def whole_rows(self, part: Tensor) -> Tensor:
        """The rows that `part` (B, T) is this rank's part of, with what was filled up; all ranks must call this."""
        if self.sequence_parallel == 1:
            return part
        first = self.reader * self.sequence_parallel
        parts = gather_object([part.cpu()])[first : first + self.sequence_parallel]
        return torch.cat(parts, dim=1)
