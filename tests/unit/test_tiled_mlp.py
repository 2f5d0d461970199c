"""MLPs over tiles give what whole ones give. Under ZeRO-3: tests/distributed."""

import pytest
import torch
from transformers import LlamaForCausalLM

from fvae_dist import side_loss
from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.tiled_mlp import tile_mlps
from tests.distributed.layouts import reference_step
from tests.distributed.tiny import attach, llama_config


def model_of(**adapter):
    torch.manual_seed(0)
    return attach(LlamaForCausalLM(llama_config()), **adapter).train()


def batch_of(length):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 60, (2, length), generator=generator)
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("length", [16, 17, 50])  # the model is 16 wide
def test_tiles_change_nothing(length, checkpointing):
    found = []
    for is_tiled in (False, True):
        model = model_of()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if is_tiled:
            assert tile_mlps(model, zero3=False) == 2
        found.append(reference_step(model, batch_of(length)))
    whole, tiled = found
    for key in ("task", "neg_elbo"):
        assert tiled[key] == pytest.approx(whole[key], rel=1e-6)
    for name, gradient in whole["gradients"].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(tiled["gradients"][name], gradient, rtol=0, atol=1e-5 * scale)


def test_a_tile_is_all_that_is_kept():
    """Of what the backward pass keeps, nothing is as wide as the gated unit and as long as the row."""
    length, sizes = 64, []
    for is_tiled in (False, True):
        model = model_of()
        if is_tiled:
            tile_mlps(model, zero3=False)
        kept = []

        def keep(tensor, kept=kept):
            kept.append(tuple(tensor.shape))
            return tensor.detach()  # itself it would keep its own graph alive

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), side_loss.collect(model):
            model(**batch_of(length)).loss.backward()
        width = model.config.intermediate_size
        sizes.append(sum(shape[-1:] == (width,) and shape[-2] >= length for shape in kept if len(shape) > 1))
    assert sizes[0] >= 6 and sizes[1] == 0


def test_of_a_norm_its_input_alone_is_kept():
    model, kept = model_of().bfloat16(), []
    tile_mlps(model, zero3=False)
    norm = model.get_base_model().model.norm
    x = torch.randn(1, 64, 16, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = norm(x)
    assert [(tensor.shape, tensor.dtype) for tensor in kept] == [(x.shape, x.dtype)]
    out.backward(torch.ones_like(out))
    whole = x.detach().requires_grad_(True)
    expected = type(norm).forward(norm, whole)
    expected.backward(torch.ones_like(out))
    assert torch.equal(out, expected) and torch.equal(x.grad, whole.grad)


def test_norms_of_others_and_trained_ones_stay():
    model = model_of()
    layers = model.get_base_model().model.layers
    layers[0].input_layernorm.forward = own = lambda x: x  # as Liger sets it
    layers[1].input_layernorm.weight.requires_grad_(True)
    tile_mlps(model, zero3=False)
    assert layers[0].input_layernorm.forward is own and "forward" not in vars(layers[1].input_layernorm)
    assert "forward" in vars(layers[1].post_attention_layernorm)


def test_trained_mlps_are_refused():
    with pytest.raises(RecipeError, match=r"training.tiled_mlp: .*mlp is trained; leave MLPs out of adapter.target"):
        tile_mlps(model_of(target_modules=["q_proj", "down_proj"]), zero3=False)


def test_a_model_without_such_mlps_is_refused():
    with pytest.raises(RecipeError, match=r"training\.tiled_mlp: this model has no MLP of gate_proj"):
        tile_mlps(torch.nn.Linear(2, 2), zero3=False)
