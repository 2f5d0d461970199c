"""Full fine-tuning by the real command on two CPU ranks under ZeRO-3, beside one process without DeepSpeed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.harness import start_ranks
from tests.methods import one_process, prepare, train, write_base
from tests.recipes import RECORDS, write_recipe, write_records

ROOT = Path(__file__).parents[2]
FULL = {"peft_type": "FULL"}
pytestmark = pytest.mark.distributed


def on_two_ranks(recipe: Path, *arguments: str) -> None:
    start_ranks(["--config", str(recipe), *arguments], recipe.parent / "ranks", 2).succeed()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero3_trains_the_same_weights_and_resumes_bit_for_bit(tmp_path, monkeypatch, dtype):
    one_process(monkeypatch)
    write_base(tmp_path)
    write_records(tmp_path / "data.jsonl", RECORDS * 4)
    settings = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    alone = prepare(tmp_path, FULL, out="alone", dtype=dtype, gradient_accumulation_steps=2, **settings)
    values = alone.recipe.model_dump()
    train(alone)
    values["training"] |= {"gradient_accumulation_steps": 1, "deepspeed": str(ROOT / "ds_configs" / "zero3.json")}
    finals = {}
    for name, arguments in (("whole", ()), ("resumed", ("--resume", str(tmp_path / "whole" / "checkpoint-2")))):
        values["training"]["output_dir"] = str(tmp_path / name)
        on_two_ranks(write_recipe(tmp_path, values), *arguments)
        finals[name] = load_file(tmp_path / name / "model" / "model.safetensors")
    expected = load_file(tmp_path / "alone" / "model" / "model.safetensors")
    start = load_file(tmp_path / "base" / "model.safetensors")
    assert set(finals["whole"]) == set(expected)
    for name, value in finals["whole"].items():
        assert value.dtype == torch.float32 and torch.equal(value, finals["resumed"][name]), name
        change, wanted = value - start[name], expected[name] - start[name]
        if dtype == "float32":
            torch.testing.assert_close(change, wanted, rtol=0, atol=1e-6)
        else:  # weights rounded before products, not with them: the same way, not the same steps
            assert torch.nn.functional.cosine_similarity(change.flatten(), wanted.flatten(), dim=0) > 0.8, name
