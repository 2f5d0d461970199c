"""RoPE scaling: as transformers has it, refused where it cannot be, and the same in training, evaluation and export."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaForCausalLM

from fvae_dist.cli import checkpoint_command, evaluate_command, export_command, plan_command, train_command
from fvae_dist.training.modeling import check_lengths, load_base_model, load_config, plan_model
from fvae_dist.training.recipe import Recipe, RecipeError
from fvae_dist.training.recipe_file import load_recipe
from fvae_dist.training.rope_scaling import check_scaled, positions_of
from tests.evaluating import write_adapted
from tests.recipes import make_model_folder, make_recipe, recipe_values, write_recipe, write_records

ROOT = Path(__file__).parents[2]
ORIGINAL, FACTOR, THETA = 64, 4.0, 5000.0
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = {
    "linear": {},
    "dynamic": {},
    "yarn": {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.2},
    "llama3": LLAMA3,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of 64 positions, with weights, and a theta of its own."""
    rope = {"rope_type": "default", "rope_theta": THETA}
    return write_adapted(tmp_path_factory.mktemp("m"), max_position_embeddings=ORIGINAL, rope_parameters=rope)[0]


def scaled_recipe(folder, base, scaling, **sections) -> Recipe:
    model = {"random_weights": False, "rope_scaling": scaling}
    return make_recipe(folder, base, **{"data": {"max_length": 256}, **sections, "model": model})


# ------------------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("kind", SCALINGS)
def test_logits_are_those_of_transformers(base, tmp_path, kind):
    """Beyond the original positions, against a configuration written by hand."""
    recipe = scaled_recipe(tmp_path, base, {"type": kind, "factor": FACTOR, **SCALINGS[kind]})
    ours = load_base_model(recipe, load_config(recipe.model), "sdpa")
    by_hand = AutoConfig.from_pretrained(base)
    parameters = {"rope_type": kind, "rope_theta": THETA, "factor": FACTOR, **SCALINGS[kind]}
    if kind in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = ORIGINAL
    by_hand.rope_parameters = parameters
    # The formula of dynamic takes max_position_embeddings for the original.
    by_hand.max_position_embeddings = ORIGINAL if kind == "dynamic" else int(ORIGINAL * FACTOR)
    theirs = LlamaForCausalLM.from_pretrained(base, config=by_hand, attn_implementation="sdpa")
    plain = LlamaForCausalLM.from_pretrained(base, attn_implementation="sdpa")
    ids = torch.randint(3, 250, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, expected, unscaled = (model.eval()(ids).logits for model in (ours, theirs, plain))
    assert torch.equal(logits, expected)
    assert (logits - unscaled)[:, ORIGINAL:].abs().max() > 1e-3
    assert positions_of(ours.config) == ORIGINAL * FACTOR
    assert ours.config.rope_parameters["rope_theta"] == THETA


@pytest.mark.parametrize("kind", SCALINGS)
def test_lengths_are_checked_against_the_scaled_positions(base, tmp_path, kind):
    recipe = scaled_recipe(tmp_path, base, {"type": kind, "factor": 2.5, **SCALINGS[kind]}, data={"max_length": 160})
    config = load_config(recipe.model)
    check_lengths(recipe, config)
    assert plan_model(recipe, config).trainable_parameters > 0
    recipe.data.max_length = 161
    message = (
        rf"data\.max_length: 161 is longer than the 160 positions of .*\(model.rope_scaling: {kind}, factor 2\.5\)"
    )
    with pytest.raises(RecipeError, match=message):
        check_lengths(recipe, config)


def test_a_scaling_of_the_models_own_is_replaced_only_knowingly(tmp_path):
    own = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 128, "rope_theta": THETA, **LLAMA3}
    folder = make_model_folder(tmp_path, max_position_embeddings=1024, rope_parameters=own)
    scaling = {"type": "linear", "factor": 2}
    with pytest.raises(RecipeError, match=r"^model\.rope_scaling: .* already scales its RoPE \(type llama3\)"):
        load_config(scaled_recipe(tmp_path, folder, scaling).model)
    scaling["original_max_position_embeddings"] = 128
    config = load_config(scaled_recipe(tmp_path, folder, scaling).model)
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": THETA}
    assert config.max_position_embeddings == 256


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ("{type: ntk, factor: 2}", ".type: Input should be 'linear', 'dynamic', 'yarn' or 'llama3' (got 'ntk')"),
        ("{type: yarn}", ".factor: missing (required)"),
        ("{factor: 2}", ".type: missing (required)"),
        ("{type: yarn, factor: 0}", ".factor: Input should be greater than or equal to 1 (got 0)"),
        ("{type: yarn, factor: -2.0}", ".factor: Input should be greater than or equal to 1 (got -2.0)"),
        ("{type: yarn, factor: .inf}", ".factor: "),
        ("{type: yarn, factor: four}", ".factor: Input should be a valid number (got 'four')"),
        ("{type: yarn, factr: 2}", ".factr: unknown key; did you mean factor?"),
        ("{type: linear, factor: 2, beta_fast: 3}", ": beta_fast: goes with type yarn, not linear"),
        ("{type: llama3, factor: 2, low_freq_factor: 1}", ": low_freq_factor, high_freq_factor: missing"),
        (
            "{type: llama3, factor: 2, low_freq_factor: 4, high_freq_factor: 4}",
            ": high_freq_factor: must be greater than low_freq_factor",
        ),
        ("{type: yarn, factor: 2, beta_slow: 32}", ": beta_fast: must be greater than beta_slow"),
        ("{type: yarn, factor: 2, original_max_position_embeddings: 0}", ".original_max_position_embeddings: "),
        ("yarn", ": must be a mapping of keys"),
    ],
)
def test_bad_scaling_is_one_line_with_its_key(base, tmp_path, scaling, message):
    path = write_recipe(tmp_path, recipe_values(tmp_path, base))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [f"model.rope_scaling={scaling}"])
    assert str(caught.value).startswith(f"--set model.rope_scaling{message}") and "\n" not in str(caught.value)


def test_models_that_cannot_be_scaled(tmp_path, base):
    scaling = {"type": "yarn", "factor": 2}
    GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=320).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"^model\.rope_scaling: .* \(gpt2\) has no rotary position embeddings"):
        load_config(scaled_recipe(tmp_path, tmp_path, scaling).model)
    unscaled = LlamaForCausalLM.from_pretrained(base)
    with pytest.raises(RecipeError, match=r"^model\.rope_scaling: x: its architecture takes no RoPE of type yarn"):
        check_scaled(unscaled, scaled_recipe(tmp_path, base, scaling).model.rope_scaling, "x")


def test_a_model_that_fails_under_a_scaling_names_it(tmp_path):
    """Two rotary dimensions: the formula of dynamic divides by none."""
    config = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 4}
    recipe = scaled_recipe(tmp_path, make_model_folder(tmp_path, **config), {"type": "dynamic", "factor": 2})
    with pytest.raises(RecipeError, match=r"cannot build .* \(model\.rope_scaling: dynamic, factor 2\): "):
        plan_model(recipe, load_config(recipe.model))


def test_exit_code_is_2(base, tmp_path, capfd):
    path = write_recipe(tmp_path, recipe_values(tmp_path, base))
    assert train_command(["--config", str(path), "--set", "model.rope_scaling={type: yarn}", "--dry-run"]) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: --set model.rope_scaling.factor: missing")


def test_help_lists_the_keys(capsys):
    assert train_command(["--help-recipe"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^  rope_scaling: # .* A mapping of:\n      type: .*\n", text, flags=re.MULTILINE)
    assert "    original_max_position_embeddings: " in text


# ------------------------------------------------------------------------------------------------- train, then evaluate


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A folder with recipe.yaml and the run that it made, two steps under yarn on texts beyond the original length."""
    folder = tmp_path_factory.mktemp("run")
    words = ["ant", "bee", "cow", "dog", "elk", "fox"]
    texts = [" ".join(words[(i * j) % 6] for j in range(30)) for i in range(1, 5)]
    write_records(folder / "data.jsonl", [{"text": text} for text in texts])
    source = {"path": str(folder / "data.jsonl"), "format": "text"}
    scaling = {"type": "yarn", "factor": FACTOR}
    values = recipe_values(
        folder,
        base,
        model={"random_weights": False, "rope_scaling": scaling},
        adapter={"encoder_layers": 0},
        data={"train": [source], "eval": [source], "max_length": 256},
        training={"max_steps": 2, "learning_rate": 1e-2, "save_steps": 2, "use_cpu": True},
        evaluation={"at_end": True},
        logging={"tensorboard": False},
    )
    path = write_recipe(folder, values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        assert train_command(["--config", str(path)]) == 0
    return folder


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def eval_loss(run, model, adapter, out) -> float:
    command = ["--model", model, "--suite", "perplexity", "--data", f"perplexity={run / 'recipe.yaml'}", "--out", out]
    command += ["--adapter", adapter] if adapter else []
    assert evaluate_command([*map(str, command), "--attention", "sdpa", "--overwrite"]) == 0
    suites = json.loads((out / "results.json").read_text())["suites"]
    return suites["perplexity"]["eval"]["loss"]["value"]


def trained_loss(run) -> float:
    return json.loads((run / "runs" / "run" / "metrics.json").read_text())["eval_end"]["loss"]


def test_evaluation_uses_the_runs_scaling(base, run, tmp_path, caplog):
    adapter = run / "runs" / "run" / "adapter"
    with caplog.at_level(logging.INFO, "fvae_dist"):
        loss = eval_loss(run, base, adapter, tmp_path / "out")
    lines = [record.getMessage() for record in caplog.records if "RoPE" in record.getMessage()]
    assert len(lines) == 1 and lines[0].startswith("RoPE scaling: yarn, factor 4.0: 256 positions (")
    assert loss == pytest.approx(trained_loss(run), rel=1e-5)
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert settings["rope_scaling"] == {"type": "yarn", "factor": 4.0}
    # The same adapter without what the run wrote beside it, on a base that would let the texts through.
    shutil.copytree(adapter, tmp_path / "bare")
    (tmp_path / "bare" / "rope_scaling.json").unlink()
    shutil.copytree(base, tmp_path / "longer")
    config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 256}
    (tmp_path / "longer" / "config.json").write_text(json.dumps(config))
    assert abs(eval_loss(run, tmp_path / "longer", tmp_path / "bare", tmp_path / "out2") - loss) > 1e-2


def test_checkpoints_and_exports_keep_the_scaling(base, run, tmp_path):
    adapter = run / "runs" / "run" / "adapter"
    kept = (adapter / "rope_scaling.json").read_text()
    assert (run / "runs" / "run" / "checkpoint-2" / "rope_scaling.json").read_text() == kept
    assert checkpoint_command(["verify", str(run / "runs" / "run")]) == 0
    assert checkpoint_command(["export", str(run / "runs" / "run"), "--out", str(tmp_path / "taken")]) == 0
    assert (tmp_path / "taken" / "rope_scaling.json").read_text() == kept
    for form in ("lora", "inference"):
        assert export_command(["--adapter", str(adapter), "--format", form, "--out", str(tmp_path / form)]) == 0
        assert (tmp_path / form / "rope_scaling.json").read_text() == kept
    # An adapter without scaling takes the place of one that had it: nothing of that may stay.
    shutil.copytree(adapter, tmp_path / "bare")
    (tmp_path / "bare" / "rope_scaling.json").unlink()
    command = ["--adapter", tmp_path / "bare", "--format", "inference", "--out", tmp_path / "inference"]
    assert export_command(list(map(str, command))) == 0
    assert not (tmp_path / "inference" / "rope_scaling.json").exists()


def test_merged_model_says_its_scaling(base, run, tmp_path):
    adapter, merged = shutil.copytree(run / "runs" / "run" / "adapter", tmp_path / "adapter"), tmp_path / "merged"
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in tensors.items():  # these layers have no bias to merge one into
        if name.endswith("encoder1.mean.bias"):
            tensor.zero_()
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    command = ["--adapter", adapter, "--base", base, "--format", "merged", "--out", merged]
    assert export_command(list(map(str, command))) == 0
    config = json.loads((merged / "config.json").read_text())
    assert config["max_position_embeddings"] == 256 and config["rope_parameters"]["rope_type"] == "yarn"
    shutil.copy(base / "tokenizer.json", merged)
    shutil.copy(base / "tokenizer_config.json", merged)
    loss = eval_loss(run, base, adapter, tmp_path / "out")
    assert eval_loss(run, merged, None, tmp_path / "out2") == pytest.approx(loss, rel=1e-5)


def test_model_card_loads_the_base_as_it_was(base, run):
    adapter = run / "runs" / "run" / "adapter"
    card = (adapter / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("THIS_FOLDER", str(adapter))
    names: dict = {}
    exec(code, names)
    ours = names["model"].get_base_model()
    recipe = load_recipe(run / "recipe.yaml")
    expected = load_config(recipe.model)
    assert ours.config.rope_parameters == expected.rope_parameters
    assert ours.config.max_position_embeddings == expected.max_position_embeddings
    rotary = AutoModelForCausalLM.from_config(expected).model.rotary_emb
    assert torch.equal(ours.model.rotary_emb.inv_freq, rotary.inv_freq)
    assert "rope_scaling:\n    type: yarn" in card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("other base", "another base model?"),
        ("{", "Expecting"),
        ('{"rope_scaling": {"type": "yarn"}}', "rope_scaling.factor: Field required"),
    ],
)
def test_a_scaling_that_does_not_fit_is_refused(run, base, tmp_path, capfd, change, message):
    adapter = shutil.copytree(run / "runs" / "run" / "adapter", tmp_path / "adapter")
    if change == "other base":
        base = write_adapted(tmp_path / "other", max_position_embeddings=ORIGINAL)[0]  # theta 10000
    else:
        (adapter / "rope_scaling.json").write_text(change)
    command = ["--model", base, "--adapter", adapter, "--suite", "needle", "--out", tmp_path / "out"]
    assert evaluate_command(list(map(str, command))) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: --adapter {adapter}/rope_scaling.json: ") and message in line


def test_dry_run_and_plan_show_the_scaling(run, tmp_path, capfd):
    assert train_command(["--config", str(run / "recipe.yaml"), "--dry-run"]) == 0
    assert "\nRoPE scaling: yarn, factor 4.0: 256 positions\n" in capfd.readouterr().out
    # Alone in its folder: the planner compares a recipe's configuration with those beside it.
    alone = shutil.copy(ROOT / "ds_configs" / "zero2.json", tmp_path)
    command = [
        "--config",
        str(run / "recipe.yaml"),
        "--gpu",
        "h100-80",
        "--gpus-per-node",
        "1",
        "--epoch-tokens",
        "999",
    ]
    assert plan_command([*command, "--set", f"training.deepspeed={alone}", "--set", "training.use_cpu=null"]) == 0
    assert "note       RoPE scaling: yarn, factor 4.0: 256 positions" in capfd.readouterr().out


def test_a_run_cannot_be_resumed_under_another_scaling(run, capfd):
    command = ["--config", str(run / "recipe.yaml"), "--resume", "auto", "--set", "model.rope_scaling.factor=5"]
    assert train_command([*command, "--set", "training.max_steps=3"]) == 2
    assert "was trained on another base model" in capfd.readouterr().err
