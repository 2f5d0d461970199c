"""Runs the reference code (idiap/FVAE-LoRA) on given tensors; see tests/parity/reference.py, which starts it.

    PYTHONPATH=<reference>/peft/src python tests/parity/reference_worker.py FOLDER

FOLDER/jobs.json holds a list of jobs, each with a `kind` (a function below), a `name` and arguments; FOLDER/NAME.in is
a safetensors file of its tensors, and FOLDER/NAME.out is written. Nothing of this project is imported: the reference
is a fork of PEFT, and only one PEFT fits into a process.
"""

import json
import sys
from pathlib import Path

import torch
from peft import FVAEPEFTConfig, get_peft_model
from peft.tuners.fvae_peft.fvae_peft_mlp_layer import FVAEPEFTLoraLayerWrapped
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM


def replay(noise):
    """Make the reference draw these tensors, one after the other, in place of random ones."""
    draws = iter(noise)
    torch.randn_like = lambda like: next(draws).reshape(like.shape)


def build_layer(settings, lora_alpha, weight, tensors):
    """The reference's layer around a frozen linear; `tensors` under its own names, `lora_A.` written as `fvae.`."""
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    base.weight = nn.Parameter(weight, requires_grad=False)
    config = FVAEPEFTConfig(**settings)
    layer = FVAEPEFTLoraLayerWrapped(base, "default", config, r=8, lora_alpha=lora_alpha)
    for name, tensor in tensors.items():
        parameter = parameters(layer)[name]
        assert parameter.shape == tensor.shape, name
        parameter.data.copy_(tensor)
    assert set(parameters(layer)) == set(tensors)
    return layer


def parameters(layer):
    """The trained tensors that enter its forward."""
    found = {f"fvae.{name}": parameter for name, parameter in layer.lora_A["default"].named_parameters()}
    return {**found, "lora_B": layer.lora_B["default"]}


def one_layer(job, tensors):
    """Every term, the outputs and all gradients of one layer, in float64: what tests/parity/data holds."""
    given = {name.removeprefix("in/"): tensor for name, tensor in tensors.items()}
    weight, x, eps1, eps2 = (given.pop(name) for name in ("W", "x", "eps1", "eps2"))
    layer = build_layer(job["settings"], job["lora_alpha"], weight, given)
    x.requires_grad_(True)
    replay([eps1, eps2])
    layer.train()
    y = layer(x)
    task = y.square().mean()
    total = job["settings"]["lambda_downstream"] * task + layer.fvae_peft_current_elbo
    total.backward()
    out = {"y": y, "task": task, "total": total, "neg_elbo": layer.fvae_peft_current_elbo}
    replay([eps1, eps2])
    kl_z1, nll, *_, z1_sq, z2_sq = layer.lora_A["default"](x)
    out |= {"kl_z1": kl_z1, "nll": nll, "z1_sq": z1_sq, "z2_sq": z2_sq}
    replay([eps1, eps2])
    out["y_eval"] = layer.eval()(x)
    out = {f"out/{name}": tensor.reshape(tensor.shape or (1,)) for name, tensor in out.items()}
    grads = {f"grad/{name}": parameter.grad for name, parameter in parameters(layer).items()}
    return {**out, **grads, "grad/x": x.grad}


def trajectory(job, tensors):
    """The parameters of two adapted linears, tanh between them, after the steps that `checkpoints` lists.

    in: `K.W`, `K.fvae...`, `K.lora_B` for the layers K = 0, 1; `x`; `target`; `noise` (steps, layers, 2, ..., r).
    """
    layers = []
    for index in range(2):
        given = {name.removeprefix(f"{index}."): t for name, t in tensors.items() if name.startswith(f"{index}.")}
        layers.append(build_layer(job["settings"], job["lora_alpha"], given.pop("W"), given))
    trained = {f"{index}.{name}": p for index, layer in enumerate(layers) for name, p in parameters(layer).items()}
    optimizer = getattr(torch.optim, job["optimizer"])(list(trained.values()), lr=job["lr"])
    out = {}
    for step, noise in enumerate(tensors["noise"], start=1):
        replay(noise.flatten(0, 1))
        hidden = torch.tanh(layers[0].train()(tensors["x"]))
        task = (layers[1].train()(hidden) - tensors["target"]).square().mean()
        neg_elbo = sum(layer.fvae_peft_current_elbo for layer in layers) / len(layers)
        optimizer.zero_grad()
        (job["settings"]["lambda_downstream"] * task + neg_elbo).backward()
        optimizer.step()
        if step in job["checkpoints"]:
            out |= {f"{step}/{name}": parameter.detach().clone() for name, parameter in trained.items()}
    return out


def adapter(job, tensors):
    """A causal language model with the reference's adapter, saved by its own save_pretrained; fp32."""
    torch.set_default_dtype(torch.float32)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(job["base"]), FVAEPEFTConfig(**job["settings"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(job["folder"])
    ids = tensors["ids"]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
        drawn = []

        def draw(like):
            drawn.append(torch.randn(like.shape, generator=generator))
            return drawn[-1]

        torch.randn_like = draw
        outputs = model.train()(input_ids=ids, labels=ids)
    return {"logits": logits, "train_logits": outputs.logits, "total": outputs.loss[None], "noise": torch.stack(drawn)}


def main(folder):
    for job in json.loads((folder / "jobs.json").read_text()):
        torch.set_default_dtype(torch.float64)
        result = globals()[job["kind"]](job, load_file(folder / f"{job['name']}.in"))
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in result.items()}, folder / f"{job['name']}.out"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
