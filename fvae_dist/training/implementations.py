"""Which attention and which layers are run, and why: chosen once, before anything is loaded, and logged."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available
from transformers.utils.import_utils import is_triton_available

from fvae_dist.planning.trace import base_of
from fvae_dist.training.head import head_problem
from fvae_dist.training.maskless import is_causal
from fvae_dist.training.recipe import ModelSection, Recipe, RecipeError
from fvae_dist.training.rope_scaling import positions_of

logger = logging.getLogger(__name__)

FLASH_INSTALL = "pip install flash-attn --no-build-isolation"
# Several documents in one row; rows of unlike length side by side; one row, as long as it is.
Rows = Literal["packed", "padded", "single"]
# Where torch prefers cuDNN's attention to its own flash kernel (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
_CUDNN_CAPABILITIES, _CUDNN_VERSION, _CUDNN_HEAD_DIM = ((9, 0), (10, 0)), 90900, 128
_ROW_MULTIPLE = 32


def has_flat_adapters(recipe: Recipe, use_cpu: bool) -> bool:
    """Whether adapters are flattened (`fvae_dist.adapter.flat`): on a CPU the host's time for a parameter is nothing
    beside its arithmetic."""
    asked = recipe.training.flat_adapters
    return asked if asked != "auto" else not use_cpu and recipe.model.dtype == "bfloat16"


def rows_of(recipe: Recipe) -> Rows:
    """What attention must know of a micro-batch of the recipe's training data."""
    if recipe.data.packing:
        return "packed"
    if recipe.training.sequence_parallel > 1:
        return "single"  # padded on the right alone, and Ulysses passes no mask
    return "single" if recipe.training.per_device_train_batch_size == 1 else "padded"


def choose_attention(section: ModelSection, use_cpu: bool, rows: Rows = "padded") -> tuple[str, str]:
    """The attention implementation and the reason for it.

    Measured on an H200, forward and backward, TFLOP/s at 8k and 32k tokens: cuDNN's kernel 513 and 540, flash-attn 2.8
    302 and 342. SDPA takes cuDNN's where it needs no mask: transformers then passes is_causal alone. Packed and padded
    rows need a mask there, which only slower kernels take; flash-attn leaves the padding out and is told where each
    document begins. A packed row that is one document needs neither: see `lone_documents_through_sdpa`.

    Raises:
        RecipeError: flash_attention_2 was asked for and cannot run here; with the install line where it is missing.
    """
    obstacle = _flash_obstacle(section, use_cpu)
    if section.attention == "flash_attention_2":
        if obstacle:
            raise RecipeError(f"model.attention: flash_attention_2 cannot run here: {obstacle}")
        return "flash_attention_2", "asked for"
    if section.attention != "auto":
        return section.attention, "asked for"
    if not hasattr(torch.nn.functional, "scaled_dot_product_attention"):
        return ("flash_attention_2", "auto: no sdpa") if obstacle is None else ("eager", f"auto: no sdpa; {obstacle}")
    if rows == "single" and _sdpa_takes_cudnn(section, use_cpu):
        return "sdpa", "auto: rows without padding, for which it takes cuDNN's kernel, the fastest on this GPU"
    if obstacle is None:
        return "flash_attention_2", f"auto: {rows} rows; flash-attn is installed and the device can"
    slower = "" if rows == "single" or use_cpu else f"; slower kernels, because {rows} rows need a mask"
    return "sdpa", f"auto: no flash_attention_2 ({obstacle}){slower}"


def row_multiple(recipe: Recipe, model: Any, attention: str, use_cpu: bool) -> int | None:
    """What rows' lengths are filled up to a multiple of, behind their tokens; None: nothing.

    cuDNN's attention makes a plan for every new length, forward and backward: some 150 ms of an H200's host, so that
    runs of rows of unlike lengths were slower than with flash-attn.
    """
    base = base_of(model)
    if attention != "sdpa" or rows_of(recipe) == "packed" or not _sdpa_takes_cudnn(recipe.model, use_cpu):
        return None
    longest = -(-recipe.data.max_length // _ROW_MULTIPLE) * _ROW_MULTIPLE
    positions = positions_of(base.config)
    fits = recipe.training.sequence_parallel == 1 and (positions is None or longest <= positions)
    return _ROW_MULTIPLE if fits and is_causal(base) else None  # others would need a mask for it


@contextmanager
def lone_documents_through_sdpa(attention: str, section: ModelSection, use_cpu: bool, rows: Rows) -> Iterator[None]:
    """Inside, packed rows that hold one document take SDPA where that means cuDNN's kernel; the others flash-attn.

    Long documents that are split into rows fill most of these alone.
    """
    if attention != "flash_attention_2" or rows != "packed" or not _sdpa_takes_cudnn(section, use_cpu):
        yield
        return
    flash, sdpa = ALL_ATTENTION_FUNCTIONS[attention], ALL_ATTENTION_FUNCTIONS["sdpa"]
    logger.info("packed rows of one document: sdpa, which takes cuDNN's kernel")

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any):
        borders = kwargs.get("cu_seq_lens_q")
        is_lone = borders is not None and len(borders) == 2 and mask is None
        is_plain = all(kwargs.get(name) is None for name in ("sliding_window", "softcap", "s_aux"))
        if is_lone and is_plain and query.dtype != torch.float32 and query.shape[-1] <= _CUDNN_HEAD_DIM:
            return sdpa(module, query, key, value, None, *args, **kwargs)
        return flash(module, query, key, value, mask, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[attention] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[attention] = flash


def planned_attention(recipe: Recipe) -> str:
    """What `auto` takes on a GPU that is not here, with flash-attn installed."""
    if recipe.model.attention != "auto":
        return recipe.model.attention
    # flash-attn needs 16 bits.
    return "sdpa" if recipe.model.dtype == "float32" or rows_of(recipe) == "single" else "flash_attention_2"


def _flash_obstacle(section: ModelSection, use_cpu: bool) -> str | None:
    if use_cpu or not torch.cuda.is_available():
        return f"no CUDA device here; on one it needs `{FLASH_INSTALL}`"
    if not is_flash_attn_2_available():
        return f"flash-attn is not installed: `{FLASH_INSTALL}`"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if section.dtype == "float32":
        return "it needs model.dtype bfloat16 or float16"
    return None


def _sdpa_takes_cudnn(section: ModelSection, use_cpu: bool) -> bool:
    if use_cpu or not torch.cuda.is_available() or section.dtype == "float32":
        return False
    enabled = torch.backends.cuda.cudnn_sdp_enabled() and (torch.backends.cudnn.version() or 0) >= _CUDNN_VERSION
    return enabled and torch.cuda.get_device_capability() in _CUDNN_CAPABILITIES


def choose_head(recipe: Recipe, model: Any, use_cpu: bool) -> bool:
    """Whether the fused head (`fvae_dist.kernels.head`) takes the place of TRL's; the reason is logged.

    Raises:
        RecipeError: it was asked for and cannot be used with this model, or here.
    """
    asked = recipe.training.head
    problem = _head_obstacle(use_cpu) or head_problem(model)
    if asked == "fused" and problem:
        raise RecipeError(f"training.head: fused: {problem}")
    reason = f"auto: {problem or 'the head is frozen, and a plain matrix'}" if asked == "auto" else "asked for"
    is_fused = problem is None and asked != "trl"
    logger.info("head: %s (%s)", "fused" if is_fused else "TRL's", reason)
    return is_fused


def _head_obstacle(use_cpu: bool) -> str | None:
    return "it needs a GPU" if use_cpu else None if is_triton_available() else "it needs Triton"


def choose_liger(recipe: Recipe, config: PretrainedConfig, use_cpu: bool) -> tuple[bool, str]:
    """Whether Liger's layers (norm, gated unit, rotary embedding) are used, and the reason.

    The head is not Liger's: see `choose_head`.

    Raises:
        RecipeError: it was asked for and cannot be used here; or a fused head was.
    """
    asked = recipe.training.use_liger_kernel
    if recipe.training.head == "fused" and (problem := _head_obstacle(use_cpu)):
        raise RecipeError(f"training.head: fused: {problem}")
    if asked is False:
        return False, "asked for"
    obstacle = "Liger's kernels need a GPU" if use_cpu else _liger_obstacle(config)
    if recipe.model.task == "classification":
        obstacle = "not used in classifiers"
    if asked is True:
        if obstacle:
            raise RecipeError(f"training.use_liger_kernel: {obstacle}")
        return True, "asked for"
    return obstacle is None, f"auto: {obstacle or 'installed, and it knows ' + config.model_type}"


def planned_liger(recipe: Recipe, config: PretrainedConfig) -> bool:
    """What `auto` takes on a GPU that is not here, with the packages that are."""
    asked = recipe.training.use_liger_kernel
    return asked if asked != "auto" else _liger_obstacle(config) is None


def _liger_obstacle(config: PretrainedConfig) -> str | None:
    if not is_liger_kernel_available():
        return "Liger is not installed: `pip install liger-kernel`"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"Liger has no layers for {config.model_type}"
    return None
