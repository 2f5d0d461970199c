"""Files and folders from strangers: one clear line, exit code 2, and nothing of them runs or is followed."""

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fvae_dist.cli import checkpoint_command, evaluate_command, export_command, train_command
from fvae_dist.training.checkpoint_files import problem_with, publish
from tests.models import tiny_adapter
from tests.recipes import SIZES, byte_tokenizer, make_model_folder, recipe_values, write_recipe, write_records

TOKEN = "hf_" + "a1B2" * 9
WEIGHTS = "adapter_model.safetensors"


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.mkdir, (self.target,)


def bomb(tmp_path: Path) -> bytes:
    return pickle.dumps({"weight": Bomb(tmp_path / "exploded")})


def test_bomb_explodes(tmp_path):
    pickle.loads(bomb(tmp_path))
    assert (tmp_path / "exploded").exists()


@pytest.fixture
def base(tmp_path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path, base) -> Path:
    """A good one, to be spoiled."""
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), tiny_adapter(target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def as_pickle(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(bomb(folder.parent))


def as_bin(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(bomb(folder.parent))


def huge_header(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 10 << 30) + data[8:])


def offsets_outside(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    next(value for key, value in header.items() if key != "__metadata__")["data_offsets"][1] = 1 << 40
    changed = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + length :])


def not_a_number(folder: Path) -> None:
    def change(tensors):
        tensors[sorted(tensors)[0]].view(-1)[0] = torch.nan

    change_tensors(folder, change)


def wrong_shapes(folder: Path) -> None:
    def change(tensors):
        name = next(name for name in tensors if name.endswith("fvae_lora_B.weight"))
        tensors[name] = torch.zeros(7, 4)

    change_tensors(folder, change)


def strange_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[" * 100_000)


SPOILED = {
    as_pickle: WEIGHTS,
    as_bin: WEIGHTS,
    huge_header: WEIGHTS,
    offsets_outside: WEIGHTS,
    not_a_number: "is not finite",
    wrong_shapes: "q_proj",
    strange_config: "adapter_config.json",
}


@pytest.mark.parametrize("form", ["inference", "lora", "merged"])
@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_spoiled_adapter_is_refused(tmp_path, base, adapter, spoil, form, capsys):
    spoil(adapter)
    arguments = ["--adapter", str(adapter), "--base", str(base), "--format", form, "--out", str(tmp_path / "out")]
    assert export_command(arguments) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("error: ") and SPOILED[spoil] in line
    assert not (tmp_path / "out").exists() and not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_spoiled_adapter_is_not_evaluated(tmp_path, base, adapter, spoil, capsys):
    spoil(adapter)
    records = [{"instruction": "Yes? Answer format: yes/no", "output": "yes", "answer": "yes", "group": "a"}]
    data = write_records(tmp_path / "groups.jsonl", records)
    arguments = ["--model", str(base), "--adapter", str(adapter), "--suite", "groups", "--data", f"groups={data}"]
    assert evaluate_command([*arguments, "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: --adapter ") and SPOILED[spoil] in line
    assert not (tmp_path / "exploded").exists()


def test_good_adapter_is_exported(tmp_path, base, adapter):
    arguments = [
        "--adapter",
        str(adapter),
        "--base",
        str(base),
        "--format",
        "inference",
        "--out",
        str(tmp_path / "out"),
    ]
    assert export_command(arguments) == 0


# --------------------------------------------------------------------------------------------------------- base models


@pytest.fixture
def train(tmp_path, base, capsys):
    """Start training on the base model; the one line that refuses it."""
    write_records(tmp_path / "data.jsonl")

    def start(**model) -> str:
        values = recipe_values(tmp_path, base, model={"random_weights": False, **model}, training={"max_steps": 1})
        assert train_command(["--config", str(write_recipe(tmp_path, values))]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and line.startswith("error: ")
        return line

    return start


def test_base_model_as_pickle_is_refused(tmp_path, base, train):
    (base / "model.safetensors").unlink()
    assert "holds no weights (model.safetensors)" in train()
    (base / "pytorch_model.bin").write_bytes(bomb(tmp_path))
    line = train()
    assert "model.name_or_path" in line and "pytorch_model.bin" in line and "model.use_safetensors: false" in line
    train(use_safetensors=False)  # then torch refuses what is no tensor
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/stolen.safetensors", "pytorch_model.bin"])
def test_index_may_name_safetensors_of_its_folder_alone(tmp_path, base, train, name):
    (base / "model.safetensors").rename(tmp_path / "stolen.safetensors")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    line = train()
    assert "model.safetensors.index.json names" in line and name in line


def test_missing_shard_is_named(base, train):
    (base / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-00001-of-00002.safetensors" in train()
    (base / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json is no index of weights" in train()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_a_model_brings_along_does_not_run(tmp_path, base, train, file):
    (base / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'exploded')!r}).mkdir()\n")
    settings = json.loads((base / file).read_text())
    if file == "config.json":
        settings |= {
            "model_type": "evil",
            "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        }
    else:
        settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (base / file).write_text(json.dumps(settings))
    line = train()
    assert "model.name_or_path: cannot load" in line and "trust_remote_code" in line
    assert not (tmp_path / "exploded").exists()


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoint_may_name_files_of_its_folder_alone(tmp_path):
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "checkpoint-1"
    publish(folder, lambda path: (path / "data").write_text("data") and None, {"step": 1})
    assert problem_with(folder) == ""
    for name in ("../secret", str(tmp_path / "secret")):
        forge(folder, name)
        assert "outside the checkpoint" in problem_with(folder)


def forge(folder: Path, name: str) -> None:
    """A manifest that agrees with itself."""
    from fvae_dist.training.checkpoint_files import MANIFEST, _digest

    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop("sha256")
    manifest["files"] = {name: {"size": 6, "sha256": "0" * 64}}
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": _digest(manifest)}))


def test_link_out_of_a_checkpoint_is_not_followed(tmp_path, capsys):
    folder = tmp_path / "checkpoint-1"
    publish(folder, lambda path: (path / "data").write_text("data") and None, {"step": 1})
    (tmp_path / "secret").write_text("data")
    (folder / "data").unlink()
    (folder / "data").symlink_to(tmp_path / "secret")
    assert problem_with(folder) == "data is a link"
    assert checkpoint_command(["verify", str(folder)]) == 2
    assert "data is a link" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize("secret", [TOKEN, f"https://user:{'p' * 9}@example.org/model", "ghp_" + "x" * 36])
@pytest.mark.parametrize("by_override", [False, True])
def test_secret_in_a_recipe_is_refused_and_not_repeated(tmp_path, capsys, secret, by_override):
    make_model_folder(tmp_path / "model")
    write_records(tmp_path / "data.jsonl")
    values = recipe_values(tmp_path, tmp_path / "model")
    if not by_override:
        values["model"]["revision"] = secret
    recipe = str(write_recipe(tmp_path, values))
    overrides = ["--set", f"model.revision={secret}"] if by_override else []
    assert train_command(["--config", recipe, "--dry-run", *overrides]) == 2
    captured = capsys.readouterr()
    assert "holds an access token or password; give it by HF_TOKEN" in captured.err
    assert secret not in captured.err + captured.out and secret[8:24] not in captured.err + captured.out
