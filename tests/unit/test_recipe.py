"""The recipe file: strict types, errors that name file, line and key, overrides, help."""

import re

import pytest
import yaml

from fvae_dist.adapter.config import FVAELoraConfig
from fvae_dist.training.recipe import Recipe, RecipeError, TrainingSection
from fvae_dist.training.recipe_file import load_recipe, parse_yaml
from fvae_dist.training.recipe_help import describe_recipe
from tests.recipes import recipe_values, write_recipe

RECIPE = """\
model:
  name_or_path: some/model
adapter:
  target_modules: [q_proj, v_proj]
  rank_pattern: {q_proj: 8}
data:
  train:
    - path: a.jsonl
    - {hub: some/set, weight: 0.5}
training:
  output_dir: runs/a
"""


@pytest.fixture
def load(tmp_path):
    """load(text, *overrides): the recipe in `text`."""

    def load(text: str | bytes = RECIPE, *overrides: str) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_recipe(path, list(overrides))

    return load


@pytest.fixture
def refusal(load):
    """refusal(text, *overrides): the error's text, without the folder of the recipe."""

    def refusal(text: str | bytes = RECIPE, *overrides: str) -> str:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        return re.sub(r"\S*/(recipe\.yaml)", r"\1", str(caught.value))

    return refusal


# ------------------------------------------------------------------------------------------------------------- values


def test_recipe_defaults_fill_what_is_not_stated(load):
    recipe = load()
    assert recipe.training.learning_rate == 2e-4
    assert recipe.data.train[1].weight == 0.5
    assert recipe.evaluation.strategy == "no"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        (".5", 0.5),
        ("5.", 5.0),
        ("1_000", 1000),
        ("1e+3", 1e3),
        ("2", 2),
        ("1.5e3", 1500),
    ],
)
def test_numbers_are_numbers(load, text, number):
    assert load(RECIPE, f"training.learning_rate={text}").training.learning_rate == number
    assert load(RECIPE + f"  learning_rate: {text}\n").training.learning_rate == number


def test_negative_exponent_form_is_a_number():
    assert parse_yaml("x: -1e+3", "here")[0] == {"x": -1000.0}


@pytest.mark.parametrize(
    ("word", "value"), [("yes", True), ("no", False), ("on", True), ("off", False), ("True", True)]
)
def test_yaml_words_are_booleans(load, word, value):
    assert load(RECIPE, f"data.packing={word}").data.packing is value


@pytest.mark.parametrize("text", ["2024-01-01", "2024-99-99", "1:30", "0o17", "'1e-4'"])
def test_dates_times_and_quoted_numbers_are_text(load, text):
    assert load(RECIPE, f"training.output_dir={text}").training.output_dir == text.strip("'")


def test_anchors_and_merge_keys_are_allowed(load):
    text = RECIPE.replace("- path: a.jsonl", "- &a {path: a.jsonl, limit: 5}").replace("{hub: some/set", "{<<: *a")
    recipe = load(text)
    assert [source.limit for source in recipe.data.train] == [5, 5]


def test_override_of_an_aliased_list_changes_one_place(load):
    text = RECIPE.replace("    - path: a.jsonl\n", "    - &a {path: a.jsonl}\n    - *a\n")
    recipe = load(text, "data.train.1.limit=7")
    assert [source.limit for source in recipe.data.train] == [None, 7, None]


@pytest.mark.parametrize("change", [lambda text: text.replace("\n", "\r\n"), lambda text: "\ufeff" + text])
def test_windows_line_ends_and_byte_order_mark_are_read(load, change):
    assert load(change(RECIPE)) == load()


def test_unicode_is_kept(load):
    assert load(RECIPE, "training.output_dir=läufe/☃").training.output_dir == "läufe/☃"


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model:", "modle:", "recipe.yaml:1: modle: unknown key; did you mean model?"),
        ("name_or_path", "name_or_pat", "recipe.yaml:2: model.name_or_pat: unknown key; did you mean name_or_path?"),
        ("- path:", "- pth:", "recipe.yaml:8: data.train.0.pth: unknown key; did you mean path?"),
        ("weight:", "wieght:", "recipe.yaml:9: data.train.1.wieght: unknown key; did you mean weight?"),
        ("output_dir", "Output_Dir", "recipe.yaml:11: training.Output_Dir: unknown key; did you mean output_dir?"),
        ("  name_or_path: some/model", "  {}", "recipe.yaml:1: model.name_or_path: missing (required)"),
        ("hub: some/set", "limit: 5", "recipe.yaml:9: data.train.1: give exactly one of path and hub"),
        ("some/model", "5", "recipe.yaml:2: model.name_or_path: Input should be a valid string (got 5)"),
        ("some/model", "''", "recipe.yaml:2: model.name_or_path: String should have at least 1 character (got '')"),
    ],
)
def test_errors_name_file_line_and_key(refusal, old, new, message):
    assert old in RECIPE
    assert refusal(RECIPE.replace(old, new)) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "recipe.yaml:3: duplicate key a (first on line 1)"),
        ("a:\n  b:\n    c: 1\n    c: 1\n", "recipe.yaml:4: duplicate key a.b.c (first on line 3)"),
        ("a:\n- b: 1\n  b: 2\n", "recipe.yaml:3: duplicate key a.0.b (first on line 2)"),
        ("a: 1\r\na: 1\r\n", "recipe.yaml:2: duplicate key a (first on line 1)"),
    ],
)
def test_duplicate_keys_name_both_lines(refusal, text, message):
    assert refusal(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe.yaml: a recipe is a mapping with the sections model, "),
        ("- model", "recipe.yaml: a recipe is a mapping with the sections model, "),
        ("just text", "recipe.yaml: a recipe is a mapping with the sections model, "),
        ("model:\n\tname_or_path: x", "recipe.yaml:2: not valid YAML: found character '\\t'"),
        ("model: {a", "recipe.yaml:1: not valid YAML: "),
        ("a: 1\n---\nb: 2", "recipe.yaml:2: not valid YAML: "),
        ("a: *nowhere", "recipe.yaml:1: not valid YAML: found undefined alias 'nowhere'"),
        ("a: 1\nb: !!python/object/apply:os.getcwd []", "recipe.yaml:2: not valid YAML: could not determine a constr"),
        ("a: !!int abc", "recipe.yaml:1: not valid YAML: 'abc' is no int"),
        ("a: !!float ''", "recipe.yaml:1: not valid YAML: '' is no float"),
        ("a: 1\nb: " + 5000 * "9", "recipe.yaml:2: not valid YAML: '9999"),
        ("on: 1", "recipe.yaml:1: the key on is not text"),
        ("a: {1: 2}", "recipe.yaml:1: the key a.1 is not text"),
        ("[a]: 1", "recipe.yaml:1: the key ? is not text"),
        ("a: 1\nb: '\\0'".replace("'", '"'), "recipe.yaml:2: b: holds a NUL"),
        ('a: "\\ud800"', "recipe.yaml:1: a: holds a NUL or half a surrogate pair"),
        (5000 * "[", "recipe.yaml: not a recipe: nested too deeply"),
        ("&a [*a]", "recipe.yaml: not a recipe: nested too deeply"),
        (b"a: 1\nb: \x00\x01", "recipe.yaml:2: not valid YAML: character #x0000"),
        (b"\xff\xfea\x00", "recipe.yaml: cannot read the recipe: not utf-8"),
        ("model: é".encode("latin1"), "recipe.yaml: cannot read the recipe: not utf-8"),
    ],
)
def test_what_is_no_recipe_is_refused(refusal, text, message):
    assert refusal(text).startswith(message)


def test_alias_bomb_is_refused(refusal):
    levels = [f"l{n}: &l{n} [{', '.join(10 * [f'*l{n - 1}'])}]" for n in range(1, 10)]
    assert "once its aliases are expanded" in refusal("\n".join(["l0: &l0 [x]", *levels]))


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: cannot read the recipe: no such file"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match="cannot read the recipe: is a directory"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    "value", ["true", "1.5", "1e3", "'5'", "null", "[1]", "{a: 1}", "-1", "0", ".nan", "1:30", 99 * "9"]
)
def test_integers_are_strict(refusal, value):
    message = refusal(RECIPE, f"training.per_device_train_batch_size={value}")
    assert message.startswith("--set training.per_device_train_batch_size: ")


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e400", "0", "-1e-4", "true", "'1e-4'", 400 * "9"])
def test_learning_rate_is_finite_and_positive(refusal, value):
    assert refusal(RECIPE, f"training.learning_rate={value}").startswith("--set training.learning_rate: ")


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("training.max_steps=0", "must be > 0"),
        ("training.seed=-1", "greater than or equal to 0"),
        ("training.seed=4294967296", "less than 4294967296"),
        ("data.train.0.weight=1e300", "less than or equal to 1000"),
        (f"training.output_dir={5000 * 'x'}", "longer than a name can be"),
        ("training.recompute=half", "Input should be 'auto', 'none', 'selective' or 'full'"),
        ("training.recompute=false", "Input should be 'auto'"),
        ("data=5", "must be a mapping of keys (got 5)"),
    ],
)
def test_values_that_cannot_be_run_are_refused(refusal, override, word):
    message = refusal(RECIPE, override)
    assert message.startswith(f"--set {override.partition('=')[0]}")
    assert word in message


@pytest.mark.parametrize("key", ["gradient_checkpointing", "gradient_checkpointing_kwargs.use_reentrant"])
def test_transformers_names_of_recomputation_lead_to_recompute(refusal, key):
    expected = f"--set training.{key.partition('.')[0]}: unknown key; did you mean recompute?"
    assert refusal(RECIPE, f"training.{key}=true") == expected


@pytest.mark.parametrize("key", ["strategy: steps", "at_start: true", "at_end: true"])
def test_evaluation_needs_evaluation_data(refusal, key):
    name = key.partition(":")[0]
    assert refusal(f"{RECIPE}evaluation:\n  {key}\n") == f"recipe.yaml:13: evaluation.{name}: needs data.eval"


def test_long_values_are_shortened_in_messages(refusal):
    assert len(refusal(RECIPE, f"data.packing={'x' * 5000}")) < 200


# ---------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("training.max_steps=7", ("training", "max_steps"), 7),
        ("data.train.1.hub=other/set", ("data", "train", 1, "hub"), "other/set"),
        ("adapter.rank_pattern.q_proj=4", ("adapter", "rank_pattern", "q_proj"), 4),
        ("adapter.alpha_pattern.v_proj=4", ("adapter", "alpha_pattern", "v_proj"), 4),
        ("adapter.target_modules.0=k_proj", ("adapter", "target_modules", 0), "k_proj"),
        ("adapter.target_modules=[a, b]", ("adapter", "target_modules"), ["a", "b"]),
        ("training.deepspeed=null", ("training", "deepspeed"), None),
        ("training.deepspeed=", ("training", "deepspeed"), None),
        ("model.revision='5'", ("model", "revision"), "5"),
        ('model.revision="a b"', ("model", "revision"), "a b"),
        ("data.chat_template=a=b=c", ("data", "chat_template"), "a=b=c"),
        ("data.train.0.columns={output: answer}", ("data", "train", 0, "columns"), {"output": "answer"}),
        ("evaluation.steps=9", ("evaluation", "steps"), 9),
        (" training.seed =3", ("training", "seed"), 3),
    ],
)
def test_override_sets_one_value(load, override, path, value):
    expected = load().model_dump()
    *parents, last = path
    target = expected
    for key in parents:
        target = target.setdefault(key, {}) if isinstance(target, dict) else target[key]
    target[last] = value
    assert load(RECIPE, override).model_dump() == expected


def test_last_override_of_a_key_wins(load):
    assert load(RECIPE, "training.seed=1", "training.seed=2").training.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps", "--set training.max_steps: write section.key=value"),
        ("=5", "--set =5: write section.key=value"),
        ("trainig.seed=5", "--set trainig: unknown key; did you mean training?"),
        ("training.sed=5", "--set training.sed: unknown key; did you mean seed?"),
        ("data.train.2.path=x", "--set data.train.2.path: data.train is a list of 2 (first: 0)"),
        ("data.train.-1.path=x", "--set data.train.-1.path: data.train is a list of 2 (first: 0)"),
        ("data.train.².path=x", "--set data.train.².path: data.train is a list of 2 (first: 0)"),
        ("model.name_or_path.x=1", "--set model.name_or_path.x: model.name_or_path is not a section"),
        ("training.seed=[", "--set training.seed:1: not valid YAML: "),
        ("training.seed={a: 1, a: 2}", "--set training.seed:1: duplicate key a"),
        ("data.eval.0.path=x", "--set data.eval: Input should be a valid list"),
        ("training.=1", "--set training.: unknown key; did you mean "),
    ],
)
def test_bad_overrides_are_named(refusal, override, message):
    assert refusal(RECIPE, override).startswith(message)


# --------------------------------------------------------------------------------------------------------------- help


def test_help_describes_every_field():
    text = describe_recipe()
    keys = set(re.findall(r"^ +(\w+):", text, re.MULTILINE))
    assert set(TrainingSection.model_fields) <= keys
    assert set(FVAELoraConfig.__annotations__) <= keys
    for section in Recipe.model_fields:
        assert f"{section}:" in text.splitlines()
    for field in TrainingSection.model_fields.values():
        assert field.description in text
    assert text.count("Local .json, .jsonl, .parquet or .txt file.") == 1


def test_recipe_survives_a_round_trip_through_yaml(load):
    recipe = load()
    assert load(yaml.safe_dump(recipe.model_dump())) == recipe


@pytest.mark.parametrize("key", ["training.save_strategy", "evaluation.strategy"])
def test_unquoted_no_is_a_strategy(tmp_path, key):
    path = write_recipe(tmp_path, recipe_values(tmp_path, tmp_path))
    section, name = key.split(".")
    assert getattr(getattr(load_recipe(path, [f"{key}=no"]), section), name) == "no"
