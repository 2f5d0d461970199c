"""The DeepSpeed configuration: shipped files, contradictions with the recipe, sizes from the adapter."""

import json
from pathlib import Path

import pytest

from fvae_dist.training.deepspeed_config import load_deepspeed_config, size_for_adapter, zero_stage
from fvae_dist.training.full import is_full
from fvae_dist.training.modeling import build_peft_config
from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.recipe_file import load_recipe
from tests.recipes import make_recipe

ROOT = Path(__file__).parents[2]
# Those named compare_* are comparisons: tests/unit/test_compare.py reads them.
RECIPES = [p for p in sorted((ROOT / "launch" / "recipes").glob("*.yaml")) if not p.name.startswith("compare_")]


@pytest.fixture
def load(tmp_path):
    """load(json, world_size, training=..., model=...): the resolved dict for a JSON file with these contents."""

    def load(contents, world_size: int = 2, training: dict | None = None, model: dict | None = None) -> dict:
        path = tmp_path / "ds.json"
        if isinstance(contents, bytes):
            path.write_bytes(contents)
        else:
            path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
        settings = {"deepspeed": str(path), "gradient_accumulation_steps": 4, **(training or {})}
        return load_deepspeed_config(make_recipe(tmp_path, tmp_path, training=settings, model=model or {}), world_size)

    return load


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_shipped_files_agree_with_a_recipe(path, tmp_path):
    recipe = make_recipe(tmp_path, tmp_path, training={"deepspeed": str(path)}, model={"dtype": "bfloat16"})
    config = load_deepspeed_config(recipe, 8)
    size_for_adapter(config, [256, 512], [4096, 8192])
    zero = config["zero_optimization"]
    assert "auto" not in json.dumps(config)
    assert config["train_batch_size"] == 8
    assert config["communication_data_type"] == config["data_types"]["grad_accum_dtype"] == "fp32"
    assert config["bf16"]["enabled"] is (zero["stage"] == 3)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_are_read_and_state_their_command(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    first_line = path.read_text(encoding="utf-8").splitlines()[0]
    assert first_line.startswith("# deepspeed ")
    assert f"launch/train.py --config launch/recipes/{path.name}" in first_line
    recipe = load_recipe(path)
    if not is_full(recipe.adapter):
        build_peft_config(recipe.adapter)
    config = load_deepspeed_config(recipe, 16)
    assert config is None or config["gradient_accumulation_steps"] == recipe.training.gradient_accumulation_steps


def test_no_deepspeed_is_stage_zero(tmp_path):
    assert load_deepspeed_config(make_recipe(tmp_path, tmp_path), 4) is None
    assert zero_stage(None) == 0


@pytest.mark.parametrize("world_size", [1, 3, 64])
def test_batch_sizes_follow_the_device_count(load, world_size):
    assert load({}, world_size, {"per_device_train_batch_size": 2})["train_batch_size"] == 2 * 4 * world_size


AGREEING = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1,
    "train_batch_size": 8,
    "bf16": {"enabled": False},
    "fp16": {"enabled": False},
    "optimizer": "auto",
    "scheduler": "auto",
}


@pytest.mark.parametrize("key", AGREEING)
def test_auto_and_equal_values_are_fine(load, key):
    value = AGREEING[key]
    auto = {"enabled": "auto"} if isinstance(value, dict) else "auto"
    assert load({key: value}) == load({key: auto}) == load({})


@pytest.mark.parametrize(
    ("contents", "named"),
    [
        ({"train_micro_batch_size_per_gpu": 2}, "train_micro_batch_size_per_gpu: is 2 here and 1 in the recipe"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps: is 1 here and 4 in the recipe"),
        ({"train_batch_size": 16}, "train_batch_size: is 16 here and 8 in the recipe"),
        ({"train_micro_batch_size_per_gpu": True}, "train_micro_batch_size_per_gpu: is True here"),
        ({"gradient_clipping": 0.5}, "gradient_clipping: is 0.5 here and 1.0 in the recipe"),
        ({"gradient_clipping": "1.0"}, "gradient_clipping: is '1.0' here"),
        ({"bf16": {"enabled": True}}, "bf16.enabled: is True here and False in the recipe"),
        ({"fp16": {"enabled": True}}, "fp16.enabled: is True here and False in the recipe"),
        ({"bf16": True}, "bf16: must be an object"),
        ({"communication_data_type": "bf16"}, "communication_data_type: is 'bf16' here"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer: is stated in the recipe"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: is stated in the recipe"),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage: must be 0, 1, 2 or 3, got 7"),
        ({"zero_optimization": {"stage": "3"}}, "zero_optimization.stage: must be 0, 1, 2 or 3, got '3'"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: must be 0, 1, 2 or 3, got True"),
        ({"zero_optimization": [3]}, "zero_optimization: must be an object"),
        ({"zero_optimisation": {"stage": 3}}, "zero_optimisation: unknown key; did you mean zero_optimization?"),
        ({"gradient_cliping": 1.0}, "gradient_cliping: unknown key; did you mean gradient_clipping?"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}, "3 does not divide the 2 ranks"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "x"}}, "'x' does not divide the 2 ranks"),
        ("{\n\n'a': 1}", "ds.json:3: not valid JSON: "),
        ("", "ds.json:1: not valid JSON: "),
        ('{"a": 1, "a": 2}', "duplicate key a"),
        ('{"a": {"b": 1, "b": 2}}', "duplicate key b"),
        ('{"gradient_clipping": NaN}', "not valid JSON: NaN"),
        ("[1]", "a DeepSpeed config is a JSON object"),
        (100_000 * "[", "not valid JSON: "),
        ('{"a": ' + 5000 * "9" + "}", "not valid JSON: "),
        (b'{"a": "\xff"}', "not UTF-8"),
    ],
    ids=lambda value: None if isinstance(value, (str, bytes)) else next(iter(value)),
)
def test_contradictions_name_file_and_key(load, contents, named):
    with pytest.raises(RecipeError) as caught:
        load(contents)
    assert "ds.json" in str(caught.value)
    assert named in str(caught.value)


def test_missing_file_names_the_recipe_key(tmp_path):
    recipe = make_recipe(tmp_path, tmp_path, training={"deepspeed": str(tmp_path / "nowhere.json")})
    with pytest.raises(RecipeError, match=r"^training\.deepspeed: .*nowhere\.json: no such file"):
        load_deepspeed_config(recipe, 1)


@pytest.mark.parametrize(
    ("dtype", "bf16", "fp16"), [("bfloat16", True, False), ("float16", False, True), ("float32", 0, 0)]
)
def test_stage_three_runs_in_the_dtype_of_the_base(load, dtype, bf16, fp16):
    config = load({"zero_optimization": {"stage": 3}}, model={"dtype": dtype})
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (bf16, fp16)
    # DeepSpeed would cast the adapters at the other stages.
    config = load({"zero_optimization": {"stage": 2}}, model={"dtype": dtype})
    assert not config["bf16"]["enabled"] and not config["fp16"]["enabled"]


def test_hpz_auto_is_the_node(load, monkeypatch):
    contents = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "auto"}}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert load(contents, 8)["zero_optimization"]["zero_hpz_partition_size"] == 4
    with pytest.raises(RecipeError, match="4 does not divide the 6 ranks"):
        load(contents, 6)


def test_adapter_tensors_stay_whole_and_base_matrices_are_sharded():
    zero = {"stage3_param_persistence_threshold": "auto", "reduce_bucket_size": "auto"}
    config = {"zero_optimization": dict(zero)}
    size_for_adapter(config, trainable_sizes=[10, 200, 30], base_sizes=[64, 1000, 5000])
    # 200 is kept whole (below the threshold), 1000 is not; the bucket holds all gradients.
    assert config["zero_optimization"] == {"stage3_param_persistence_threshold": 201, "reduce_bucket_size": 240}
    stated = {"zero_optimization": {"stage3_param_persistence_threshold": 5, "reduce_bucket_size": 6}}
    size_for_adapter(stated, [10], [1000])
    assert stated["zero_optimization"] == {"stage3_param_persistence_threshold": 5, "reduce_bucket_size": 6}
