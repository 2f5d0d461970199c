"""Flat adapters: two parameters a VAE; state dicts, files and submodules have each of them as before."""

import copy
import io
import shutil

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

from fvae_dist import side_loss
from fvae_dist.adapter.flat import BIASES, WEIGHTS, flatten, join_flat, split_flat
from fvae_dist.adapter.noise import TokenNoise
from fvae_dist.adapter.vae import FactorizedVAE
from fvae_dist.kernels.launching import flat_order
from fvae_dist.training.checkpoint_state import load_optimizer_state, optimizer_state
from fvae_dist.training.gradient_split import GradientSplit
from fvae_dist.training.implementations import has_flat_adapters
from tests.adapted import IDS, add_trained, assert_same_weights, fvae_layers, logits, trained
from tests.fused import make, make_block, run, run_block
from tests.methods import one_process, prepare, train, write_base
from tests.models import named_gradients, named_parts, randomise, tiny_adapter, tiny_model
from tests.recipes import make_recipe

SETTINGS = [{}, {"encoder_layers": 0}, {"encoder_shared_trunk": False, "encoder_layers": 2}, {"inference_only": True}]
FILE = "adapter_model.safetensors"


class Block(nn.Module):
    """A VAE below another module, beside a parameter that is not its."""

    def __init__(self, flat: bool = True, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.fvae_vae = FactorizedVAE(6, tiny_adapter(**settings))
        self.other = nn.Parameter(torch.ones(2, 3))
        if flat:
            assert flatten(self) == 1


def block(**settings) -> Block:
    return randomise(Block(**settings))  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------------- the same


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_names_shapes_order_and_values_are_those_of_the_adapter_that_is_not_flat(settings):
    plain, flat = block(flat=False, **settings).state_dict(), block(**settings).state_dict()
    assert list(flat) == list(plain)
    assert all(torch.equal(value, plain[name]) for name, value in flat.items())


@pytest.mark.parametrize("kernel", ["torch", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_of_a_vae_are_the_same(kernel, dtype):
    x = torch.randn(9, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    plain, flat = (make(24) for _ in range(2))
    flat.flatten()
    expected, found = run(plain, x, kernel), run(flat, x, kernel)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("kernel", ["torch", "fused"])
@pytest.mark.parametrize("widths", [{"q_proj": 20, "k_proj": 8, "v_proj": 8}, {"q_proj": 20, "v_proj": 8}], ids=len)
def test_layers_with_one_input_are_the_same(kernel, widths):
    x = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(1))
    plain, flat = (make_block(20, widths, kernel) for _ in range(2))
    assert flatten(flat) == len(widths)
    (expected, _), (found, _) = (run_block(model, x, terms=True) for model in (plain, flat))
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_adamw_is_the_same(checkpointing):
    """With weight decay for matrices alone, as the trainer has it."""
    models = [trained("llama") for _ in range(2)]
    flatten(models[1])
    for model in models:
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        spared = [p for name, p in named if "bias" in name or name.endswith("scale")]
        decayed = [p for name, p in named if not ("bias" in name or name.endswith("scale"))]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        for step in range(3):
            noise = TokenNoise({"input_ids": IDS}, seed=0, step=step)
            with side_loss.collect(model.train(), noise=noise) as collected:
                loss = model(IDS, labels=IDS).loss
            (loss + collected.neg_elbo).backward()
            optimizer.step()
            optimizer.zero_grad()
    expected, found = (named_parts(model) for model in models)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_files_are_the_same_and_either_loads_them(tmp_path):
    plain, flat = trained("llama"), trained("llama")
    flatten(flat)
    for name, model in (("plain", plain), ("flat", flat)):
        model.save_pretrained(tmp_path / name)
    assert (tmp_path / "plain" / FILE).read_bytes() == (tmp_path / "flat" / FILE).read_bytes()
    assert torch.equal(logits(flat), logits(plain))
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "flat", is_trainable=True)
    assert flatten(loaded) > 0
    loaded.load_adapter(tmp_path / "plain", "default")
    assert torch.equal(logits(loaded.eval()), logits(plain))


def test_accelerate_saves_every_tensor(tmp_path):
    """It looks for tensors that share a storage, and keeps one of them."""
    model = trained("llama")
    flatten(model)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(model)
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path))
    assert_same_weights(model.state_dict(), expected)
    for value in model.state_dict().values():  # still the model's memory
        value.zero_()
    assert not any(parameter.any() for parameter in model.parameters())


def test_state_dict_with_the_names_of_the_parameters(tmp_path):
    """DeepSpeed puts one together so, of what ZeRO-3 has partitioned."""
    plain, flat = trained("llama"), trained("llama")
    flatten(flat)
    consolidated = {name: value.clone() for name, value in flat.state_dict().items() if ".fvae_vae." not in name}
    consolidated |= {name: value.detach().clone() for name, value in flat.named_parameters() if ".fvae_vae." in name}
    flat.save_pretrained(tmp_path, state_dict=consolidated)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path)), logits(plain))
    with torch.no_grad():
        for name, parameter in flat.named_parameters():
            if ".fvae_" in name:
                parameter.zero_()
    flat.load_state_dict(consolidated)
    assert torch.equal(logits(flat), logits(plain))


def test_moments_of_what_trains_beside_a_frozen_adapter():
    model = add_trained(trained("llama"), "frozen")
    model.set_adapter("default")
    assert flatten(model) == 2 * len(fvae_layers(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with side_loss.collect(model.train()) as collected:
        loss = model(IDS, labels=IDS).loss
    (loss + collected.neg_elbo).backward()
    optimizer.step()
    moments, step = optimizer_state(model, optimizer, keep=True)
    assert not any(".frozen." in name for name in moments)
    expected = {parameter: state["exp_avg"].clone() for parameter, state in optimizer.state.items()}
    fresh = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    load_optimizer_state(model, fresh, moments, step)
    assert all(torch.equal(fresh.state[parameter]["exp_avg"], value) for parameter, value in expected.items())
    name = next(name for name in moments if name.endswith("decoder.scale"))
    with pytest.raises(ValueError, match=r"optimizer state: exp_avg of .* is missing"):
        load_optimizer_state(model, fresh, {key: value for key, value in moments.items() if key != name}, step)


def test_norms_of_gradients_apart_where_a_layer_has_none():
    norms = []
    for is_flat in (False, True):
        model, x = nn.ModuleList(block(flat=is_flat) for _ in range(2)), torch.randn(3, 6)
        split = GradientSplit(model)
        torch.manual_seed(3)

        def losses(model=model, x=x) -> dict[str, torch.Tensor]:  # the second has no part in them
            z1, neg_elbo = model[0].fvae_vae(torch.ones_like(x))
            return {"task": z1.sum(), "side": neg_elbo.sum()}

        split.add(losses, torch.device("cpu"))
        norms.append(split.norms(lambda value, _: value, torch.device("cpu")))
    assert norms[1] == pytest.approx(norms[0], rel=1e-6) and norms[0]["gradient/side/decoder"] > 0


def test_saved_for_inference_alone(tmp_path):
    plain, flat = trained("llama"), trained("llama")
    flatten(flat)
    for name, model in (("plain", plain), ("flat", flat)):
        model.save_pretrained(tmp_path / name, inference_only=True)
    expected, found = (load_file(tmp_path / name / FILE) for name in ("plain", "flat"))
    assert found.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in found.items())


def test_recipe_trains_flat_adapters_and_resumes_either(tmp_path, monkeypatch):
    """Two of four steps with adapters of one kind, the others with those of the other: the same run."""
    one_process(monkeypatch)
    write_base(tmp_path)
    finals = {}
    for first, second in ((False, False), (True, True), (False, True), (True, False)):
        output = tmp_path / f"{first}-{second}"
        settings = {"output_dir": str(output), "max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
        adapter = {"peft_type": "FVAE_LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
        trainer = train(prepare(tmp_path, adapter, **settings, flat_adapters=first))
        assert any(name.endswith(WEIGHTS) for name, _ in trainer.model.named_parameters()) == first
        shutil.rmtree(output / "checkpoint-4")
        resume = str(output / "checkpoint-2")
        train(prepare(tmp_path, adapter, resume=resume, **settings, flat_adapters=second))
        finals[first, second] = load_file(output / "adapter" / FILE)
    expected = finals.pop((False, False))
    for kinds, tensors in finals.items():
        assert tensors.keys() == expected.keys()
        for name, value in expected.items():
            # Of a learning rate of 1e-2: where a gradient is nearly 0, Adam makes much of its last bits.
            torch.testing.assert_close(tensors[name], value, rtol=1e-5, atol=2e-6, msg=f"{kinds}: {name}")


@pytest.mark.parametrize(
    ("asked", "use_cpu", "dtype", "expected"),
    [
        ("auto", False, "bfloat16", True),
        ("auto", True, "bfloat16", False),
        ("auto", False, "float32", False),
        (True, True, "float32", True),
        (False, False, "bfloat16", False),
    ],
)
def test_flat_where_the_host_has_no_time(tmp_path, asked, use_cpu, dtype, expected):
    recipe = make_recipe(tmp_path, tmp_path, model={"dtype": dtype}, training={"flat_adapters": asked})
    assert has_flat_adapters(recipe, use_cpu) is expected


# ---------------------------------------------------------------------------------------------------- two parameters


def test_an_adapter_of_which_a_part_is_frozen_stays_as_it_is():
    model = Block(flat=False)
    model.fvae_vae.decoder.scale.requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    assert flatten(model) == 0 and [name for name, _ in model.named_parameters()] == names


def test_layers_with_one_input_of_which_one_is_flat():
    x = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(1))
    plain, mixed = (make_block(20, {"q_proj": 20, "v_proj": 8}, "fused") for _ in range(2))
    assert flatten(fvae_layers(mixed)["base_model.model.q_proj"]) == 1
    (expected, _), (found, _) = (run_block(model, x) for model in (plain, mixed))
    for name, value in expected.items():  # apart, they add up the gradient to x in another order
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))


def test_flattening_comes_before_the_optimizer():
    model = Block(flat=False)
    model.fvae_vae.decoder.scale.grad = torch.zeros_like(model.fvae_vae.decoder.scale)
    with pytest.raises(RuntimeError, match="before an optimizer is made"):
        flatten(model)
    model.fvae_vae.decoder.scale.grad = None
    model.fvae_vae.decoder.scale.ds_id = 1
    with pytest.raises(RuntimeError, match="before ZeRO-3 partitions them"):
        flatten(model)


def test_flattened_in_inference_mode_it_trains():
    model = Block(flat=False)
    with torch.inference_mode():
        assert flatten(model) == 1
    model.fvae_vae(torch.randn(3, 6))[1].sum().backward()
    assert all(parameter.grad is not None for parameter in model.fvae_vae.parameters())


def test_frozen_adapters_stay_frozen_and_flat_ones_flat():
    model = Block(flat=False).requires_grad_(False)
    assert flatten(model) == 1 and not any(p.requires_grad for p in model.parameters())
    before = list(model.parameters())
    assert flatten(model) == 1 and all(one is other for one, other in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_two_parameters_and_every_name_in_the_state_dict(settings):
    model = block(**settings)
    assert [name for name, _ in model.fvae_vae.named_parameters()] == [WEIGHTS, BIASES]
    state = model.state_dict()
    assert state.keys() == named_parts(model).keys()
    for name, value in state.items():
        assert (value.dim() > 1) == name.endswith(("weight", "other")), name
    parts = [value for name, value in state.items() if name != "other"]
    assert sum(value.numel() for value in parts) == sum(p.numel() for p in model.fvae_vae.parameters())
    assert len({value.data_ptr() for value in parts}) == len(parts)


def test_a_submodule_has_its_part_and_writes_into_it():
    vae = block().fvae_vae
    linear = vae.encoder1.mean
    assert torch.equal(linear.weight, vae.state_dict()["encoder1.mean.weight"])
    with torch.no_grad():
        linear.weight += 1
    with pytest.raises(AttributeError, match="change its values in place"):
        linear.weight = torch.zeros_like(linear.weight)
    with torch.no_grad():
        linear.weight.fill_(7.0)
        vae.decoder.scale.fill_(3.0)
    assert vae.state_dict()["encoder1.mean.weight"].eq(7).all() and vae.state_dict()["decoder.scale"].eq(3).all()
    assert vae.flat_weights.eq(7).sum() == linear.weight.numel()
    with pytest.raises(KeyError, match="already exists"):
        linear.weight = nn.Parameter(torch.zeros_like(linear.weight))


def test_a_view_outside_a_forward_leads_gradients_to_the_flat_parameter():
    vae = block().fvae_vae
    vae.encoder1.mean.weight.square().sum().backward()
    gradients = named_gradients(vae)
    assert torch.equal(gradients["encoder1.mean.weight"], 2 * vae.encoder1.mean.weight)
    assert not any(value.any() for name, value in gradients.items() if name != "encoder1.mean.weight")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_state_dict_goes_to_another_model(settings):
    model, other = block(**settings), Block(**settings)
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.fvae_vae.flat_weights.zero_()
    assert other.state_dict()["fvae_vae.encoder1.mean.weight"].any()


def test_what_is_wrong_with_a_state_dict_is_said():
    model = block()
    state = dict(model.state_dict())
    del state["fvae_vae.decoder.scale"]
    state["fvae_vae.encoder1.mean.bias"] = torch.zeros(3)
    state |= {"fvae_vae.decoder.new": torch.zeros(1), "fvae_vae.new": torch.zeros(1)}
    with pytest.raises(RuntimeError) as error:
        Block().load_state_dict(state)
    message = str(error.value)
    assert 'Missing key(s) in state_dict: "fvae_vae.decoder.scale"' in message
    for name in ("fvae_vae.new", "fvae_vae.decoder.new"):
        assert f'"{name}"' in message.partition("Unexpected key(s)")[2]
    assert "size mismatch for fvae_vae.encoder1.mean.bias" in message
    assert message.count("fvae_vae.") == 4


def test_some_values_alone_leave_the_others():
    model = block()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    name = "fvae_vae.encoder2.logvar.bias"
    result = model.load_state_dict({name: torch.full((4,), 5.0)}, strict=False)
    assert set(result.missing_keys) == before.keys() - {name} and not result.unexpected_keys
    for other, value in model.state_dict().items():
        assert value.eq(5).all() if other == name else torch.equal(value, before[other]), other


def test_from_the_meta_device():
    model = block()
    with torch.device("meta"):
        empty = Block()
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(model.state_dict(), assign=True)
    assert not any(parameter.is_meta for parameter in empty.parameters())
    assert all(torch.equal(value, empty.state_dict()[name]) for name, value in model.state_dict().items())
    x = torch.randn(3, 6)
    assert torch.equal(model.eval().fvae_vae(x)[0], empty.eval().fvae_vae(x)[0])


def test_values_that_the_meta_device_cannot_take():
    model = block()
    with torch.device("meta"):
        empty = Block()
    with pytest.warns(UserWarning, match="flat_weights is on the meta device: loading values is a no-op"):
        empty.load_state_dict(model.state_dict())
    some = {name: value for name, value in model.state_dict().items() if not name.endswith("scale")}
    with pytest.raises(RuntimeError, match=r"fvae_vae\.flat_biases is on the meta device and needs all its parts"):
        empty.load_state_dict(some, strict=False, assign=True)


def test_copies_are_their_own():
    model = block()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        with torch.no_grad():
            twin.fvae_vae.encoder1.mean.weight.zero_()
        assert not twin.fvae_vae.state_dict()["encoder1.mean.weight"].any()
        assert model.fvae_vae.encoder1.mean.weight.any()


def test_casts_and_functional_calls_reach_the_submodules():
    model = block().double()
    assert model.fvae_vae.encoder1.mean.weight.dtype == torch.float64
    x = torch.randn(3, 6, dtype=torch.float64)
    zero = {name: torch.zeros_like(parameter) for name, parameter in model.eval().fvae_vae.named_parameters()}
    assert model.fvae_vae(x)[0].any() and not functional_call(model.fvae_vae, zero, (x,))[0].any()


def test_split_and_join_are_each_others_reverse():
    model = block()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    parts = split_flat(model, parameters)
    assert "fvae_vae.decoder.output.weight" in parts and parts["other"] is parameters["other"]
    joined = join_flat(model, parts)
    assert joined.keys() == parameters.keys()
    assert all(torch.equal(value, parameters[name]) for name, value in joined.items())
    missing = {name: part for name, part in parts.items() if not name.endswith("scale")}
    for damaged in (parts | {"fvae_vae.decoder.scale": torch.zeros(5)}, missing):
        with pytest.raises(ValueError, match=r"fvae_vae.* is missing or has another shape"):
            join_flat(model, damaged)


def test_a_shard_of_zero3_is_empty_and_cannot_be_used():
    model = block()
    for name in (WEIGHTS, BIASES):
        getattr(model.fvae_vae, name).data = torch.empty(0)
    assert all(value.numel() == 0 for name, value in model.state_dict().items() if name != "other")
    assert model.fvae_vae.encoder1.mean.weight.numel() == 0
    with pytest.raises(RuntimeError, match="is partitioned by ZeRO-3 and has not been gathered"):
        model.fvae_vae(torch.randn(3, 6))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(block().state_dict())


def test_the_flat_parameters_are_in_the_order_of_the_kernels():
    plain, flat = make(24), make(24)
    flat.flatten()
    gradient = torch.cat([parameter.detach().flatten() for parameter in plain.fused_parameters()])
    ordered = gradient[flat_order(plain.fused_spec, 24, torch.device("cpu"))]
    assert torch.equal(ordered, torch.cat([parameter.detach() for parameter in flat.fused_parameters()]))
