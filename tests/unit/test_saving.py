"""Saving in one process: fp32, complete, read back, refused when wrong. Gathering from ZeRO-3: tests/distributed."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from fvae_dist import FVAELoraConfig
from fvae_dist.training import saving
from fvae_dist.training.saving import ADAPTER_FILE, SaveError, save_adapter
from tests.distributed.tiny import ADAPTER, attach, llama_config


def tiny_llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(llama_config())


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(2, 12)[None]).logits


def test_saved_adapter_gives_the_same_logits(tmp_path):
    model = attach(tiny_llama())
    save_adapter(model, tmp_path / "new" / "folder", is_main=True)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "new" / "folder")
    assert torch.equal(logits(loaded), logits(model))


def test_saved_values_are_fp32_and_frozen_weights_are_not_saved(tmp_path):
    model = attach(tiny_llama().bfloat16())
    save_adapter(model, tmp_path, is_main=True)
    saved = load_file(tmp_path / ADAPTER_FILE)
    live = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    assert set(saved) == set(live)
    for name, tensor in saved.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, live[name]), name


def test_narrow_lora_weights_are_saved_in_fp32(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama().bfloat16(), lora, autocast_adapter_dtype=False)
    save_adapter(model, tmp_path, is_main=True)
    saved = load_file(tmp_path / ADAPTER_FILE)
    assert saved and all(tensor.dtype == torch.float32 for tensor in saved.values())


def test_every_adapter_is_saved(tmp_path):
    model = attach(tiny_llama())
    model.add_adapter("other", FVAELoraConfig(**(ADAPTER | {"r": 2})))
    save_adapter(model, tmp_path, is_main=True)
    assert (tmp_path / ADAPTER_FILE).is_file() and (tmp_path / "other" / ADAPTER_FILE).is_file()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "other")
    model.set_adapter("other")
    assert torch.equal(logits(loaded), logits(model))


def test_modules_to_save_are_saved(tmp_path):
    model = attach(tiny_llama(), modules_to_save=["lm_head"])
    save_adapter(model, tmp_path, is_main=True)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_other_ranks_write_nothing(tmp_path):
    save_adapter(attach(tiny_llama()), tmp_path / "adapter", is_main=False)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("value", "message"), [(torch.nan, "is not finite"), (torch.inf, "is not finite"), (None, "is empty")]
)
def test_bad_tensors_are_refused_and_nothing_is_written(tmp_path, value, message):
    model = attach(tiny_llama())
    name, parameter = next((n, p) for n, p in model.named_parameters() if n.endswith("decoder.scale"))
    parameter.data = torch.empty(0) if value is None else parameter.data.fill_(value)
    with pytest.raises(SaveError, match=message) as error:
        save_adapter(model, tmp_path, is_main=True)
    assert name.replace(".default", "") in str(error.value)
    assert not (tmp_path / ADAPTER_FILE).exists()


def test_unwritable_folder_is_a_save_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SaveError, match="file"):
        save_adapter(attach(tiny_llama()), tmp_path / "file", is_main=True)


@pytest.mark.parametrize("damage", ["value", "missing", "truncated"])
def test_what_is_on_disk_is_compared(tmp_path, monkeypatch, damage):
    """A file that came out wrong (full disk, faulty mount) must not pass for a saved adapter."""
    model = attach(tiny_llama())
    write = model.save_pretrained

    def write_badly(folder, **kwargs):
        write(folder, **kwargs)
        path = tmp_path / ADAPTER_FILE
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-100])
            return
        tensors = load_file(path)
        name = next(iter(tensors))
        if damage == "missing":
            del tensors[name]
        else:
            tensors[name] = tensors[name] + 1
        save_file(tensors, path)

    monkeypatch.setattr(model, "save_pretrained", write_badly)
    with pytest.raises(SaveError, match="not saved"):
        save_adapter(model, tmp_path, is_main=True)


def test_gathers_are_bounded(monkeypatch):
    """ZeRO-3 gathers a chunk of parameters at a time, on every rank alike, whether it keeps them or not."""
    from contextlib import nullcontext

    model = attach(tiny_llama())
    sizes = {True: [], False: []}
    for keep, seen in sizes.items():
        monkeypatch.setattr(
            saving, "_gathered", lambda parameters, s=seen: (s.append(len(parameters)), nullcontext())[1]
        )
        saving.full_trainable_state_dict(model, keep=keep)
    assert sizes[True] == sizes[False] and len(sizes[True]) > 1
    assert max(sizes[True]) <= saving._GATHER_CHUNK
