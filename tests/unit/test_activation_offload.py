"""What the backward pass needs, kept elsewhere meanwhile: the same losses and gradients, side loss and all."""

from contextlib import nullcontext

import pytest
import torch
from torch.autograd.graph import save_on_cpu
from transformers import LlamaForCausalLM

from fvae_dist.training.tiled_mlp import tile_mlps
from tests.distributed.layouts import reference_step
from tests.distributed.tiny import attach, llama_config


def step(context, device="cpu", kernel="torch", checkpointing=True, tiled=True):
    torch.manual_seed(0)
    model = attach(LlamaForCausalLM(llama_config()), kernel=kernel).to(device).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if tiled:
        tile_mlps(model, zero3=False)
    ids = torch.randint(2, 60, (2, 40), generator=torch.Generator().manual_seed(1)).to(device)
    with context(model):
        return reference_step(model, {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})


def assert_same(found, expected):
    assert found["task"] == expected["task"] and found["neg_elbo"] == expected["neg_elbo"]
    for name, gradient in expected["gradients"].items():
        assert torch.equal(found["gradients"][name], gradient), name


@pytest.mark.parametrize(
    ("kernel", "checkpointing", "tiled"),
    [("torch", False, False), ("torch", False, True), ("torch", True, False), ("fused", True, True)],
)
def test_saved_elsewhere_and_brought_back(kernel, checkpointing, tiled):
    settings = {"kernel": kernel, "checkpointing": checkpointing, "tiled": tiled}
    assert_same(step(lambda _: save_on_cpu(), **settings), step(lambda _: nullcontext(), **settings))


@pytest.mark.gpu
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trl_offloads_beside_the_computation(checkpointing, tiled):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from trl.models import get_act_offloading_ctx_manager

    settings = {"device": "cuda", "kernel": "fused", "checkpointing": checkpointing, "tiled": tiled}
    assert_same(step(get_act_offloading_ctx_manager, **settings), step(lambda _: nullcontext(), **settings))
