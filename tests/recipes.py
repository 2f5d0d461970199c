"""What the tests of the command line run on: a tiny model folder with its tokenizer, and a recipe for it."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from fvae_dist.training import checkpoint_files
from fvae_dist.training.recipe import Recipe

RECORDS = [
    {"instruction": "Say hi.", "output": "hi there"},
    {"instruction": "Add.", "input": "1 + 2", "output": "3"},
    {"instruction": "Count to five.", "output": "1 2 3 4 5"},
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 320,
    "tie_word_embeddings": False,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, <s> in front, </s> as end."""
    special = ["<pad>", "<s>", "</s>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    backend.add_special_tokens(special)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_model_folder(folder: Path, **sizes: Any) -> Path:
    """config.json and a tokenizer, no weights: enough for every check before training."""
    LlamaConfig(**{**SIZES, **sizes}).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_records(path: Path, records: list[dict] | None = None) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in (RECORDS if records is None else records)))
    return path


def recipe_values(folder: Path, base: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe that can be run, as YAML holds it; `sections` are merged into it key by key."""
    values: dict[str, Any] = {
        "model": {"name_or_path": str(base), "dtype": "float32", "random_weights": True},
        "adapter": {"target_modules": ["q_proj", "v_proj"], "r": 4, "decoder_hidden": 8},
        "data": {"train": [{"path": str(folder / "data.jsonl")}], "max_length": 256},
        "training": {"output_dir": str(folder / "runs" / "run"), "deepspeed": None},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return values


def make_recipe(folder: Path, base: Path, /, **sections: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(recipe_values(folder, base, **sections))


def write_recipe(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def make_checkpoint(output: Path, step: int) -> Path:
    """A whole checkpoint of nothing in particular."""

    def write(folder: Path) -> None:
        save_file({"a": torch.ones(3)}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text("{}")
        state = {"global_step": step, "log_history": [{"step": step, "loss/task": 1.5}, {"eval_loss": 2.0}]}
        (folder / "trainer_state.json").write_text(json.dumps(state))

    checkpoint_files.publish(output / f"checkpoint-{step}", write, {"step": step, "global_batch_size": 8})
    return output / f"checkpoint-{step}"


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """Change a checkpoint's manifest and its checksum with it, as somebody who means it would."""
    manifest = checkpoint_files.read_manifest(folder) | changes
    del manifest["sha256"]
    manifest["sha256"] = checkpoint_files._digest(manifest)
    (folder / checkpoint_files.MANIFEST).write_text(json.dumps(manifest))
