"""--dry-run through the command: the whole report, without a launcher, a GPU, weights or a trace in output_dir."""

import json
import re
from pathlib import Path

import pytest
import yaml

from fvae_dist.cli import train_command
from fvae_dist.training import run
from fvae_dist.training.dry_run import describe
from fvae_dist.training.recipe_file import load_recipe
from fvae_dist.training.sources import alpaca_prompt
from tests.recipes import RECORDS, make_model_folder, recipe_values, write_recipe, write_records

ROOT = Path(__file__).parents[2]
# Those named compare_* are comparisons: tests/unit/test_compare.py reads them.
RECIPES = [p for p in sorted((ROOT / "launch" / "recipes").glob("*.yaml")) if not p.name.startswith("compare_")]
ZERO3 = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}}


@pytest.fixture
def report(tmp_path, capsys):
    """report(*arguments, **sections): title -> text of the dry run's report; its model is made with `sizes`."""

    def report(*arguments: str, sizes: dict | None = None, records: list | None = None, **sections) -> dict[str, str]:
        model = make_model_folder(tmp_path / "model", **(sizes or {}))
        write_records(tmp_path / "data.jsonl", records)
        (tmp_path / "ds.json").write_text(json.dumps(ZERO3))
        recipe = write_recipe(tmp_path, recipe_values(tmp_path, model, **sections))
        assert train_command(["--config", str(recipe), "--dry-run", *arguments]) == 0
        output = capsys.readouterr().out
        return dict(re.findall(r"^== (.*?) ==\n(.*?)(?=\n\n== |\n\Z)", output, re.DOTALL | re.MULTILINE))

    return report


def part(sections: dict[str, str], start: str) -> str:
    return next(text for title, text in sections.items() if title.startswith(start))


def test_report_of_full_fine_tuning(tmp_path):
    model = make_model_folder(tmp_path / "model")
    write_records(tmp_path / "data.jsonl")
    path = write_recipe(tmp_path, recipe_values(tmp_path, model) | {"adapter": {"peft_type": "FULL"}})
    prepared = run.prepare(load_recipe(path), dry_run=True)
    text = describe(prepared, world_size=2)
    assert re.search(r"base: .*, [\d,]+ parameters, all trained\nattention: ", text)
    assert "unknown: full fine-tuning is not planned" in text


def test_report_says_what_will_be_done_and_leaves_no_trace(report, tmp_path):
    sections = report("--set", "training.seed=7")
    assert list(sections) == [
        "Recipe",
        "DeepSpeed config",
        "Model",
        "Data",
        "Memory per device, 1 device(s), estimated",
        "First example (loss on what stands between the brackets ⟦ ⟧)",
    ]
    assert not (tmp_path / "runs" / "run").exists()
    recipe = yaml.safe_load(part(sections, "Recipe"))
    assert recipe["training"]["seed"] == 7
    assert recipe["training"]["learning_rate"] == 2e-4  # defaults are shown too
    assert part(sections, "DeepSpeed") == "null"
    assert "adapted layers: 4: model.layers.0.self_attn.q_proj" in part(sections, "Model")
    assert re.search(r"adapter parameters: [\d,]+ in training .*, [\d,]+ of them at inference", part(sections, "Model"))
    # <s>, one token a byte, </s>
    texts = [alpaca_prompt(r["instruction"], r.get("input", "")) + r["output"] for r in RECORDS]
    num_tokens = sum(len(text) + 2 for text in texts)
    assert f"3 steps and {num_tokens} tokens an epoch; 3 steps in all" in part(sections, "Data")
    total = re.search(r"total +([\d.]+) GiB", part(sections, "Memory"))
    assert total and float(total[1]) >= 0
    assert part(sections, "First example").startswith("<s>Below is an instruction")
    assert part(sections, "First example").endswith("### Response:\n⟦hi there</s>⟧")


def test_earlier_runs_files_are_left_as_they_are(report, tmp_path):
    leftover = tmp_path / "runs" / "run" / "checkpoint-5" / "trainer_state.json"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("{}")
    report(training={"overwrite_output_dir": True})
    assert [path for path in (tmp_path / "runs" / "run").rglob("*") if path.is_file()] == [leftover]
    assert leftover.read_text() == "{}"


def test_devices_decide_batch_sizes_steps_and_memory(report, tmp_path):
    training = {"deepspeed": str(tmp_path / "ds.json"), "gradient_accumulation_steps": 2}
    sections = report("--devices", "4", training=training, records=20 * [{"instruction": "a", "output": "b"}])
    config = json.loads(part(sections, "DeepSpeed"))
    assert config["train_batch_size"] == 8
    assert "Memory per device, 4 device(s), estimated" in sections
    assert "8 sequences a step (1 a device x 2 accumulation x 4 devices)" in part(sections, "Data")
    assert part(sections, "Data").splitlines()[1].startswith("3 steps and ")
    # Resolved: the sizes that the adapter decides are filled in.
    assert "auto" not in part(sections, "DeepSpeed")


def test_devices_default_to_world_size(report, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    sections = report(training={"deepspeed": str(tmp_path / "ds.json")})
    assert json.loads(part(sections, "DeepSpeed"))["train_batch_size"] == 2


def test_other_ranks_say_nothing(report, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert report() == {}


def test_long_example_is_shortened_in_the_middle_and_keeps_its_brackets(report):
    words = " ".join(f"w{number}" for number in range(3000))
    sizes = {"max_position_embeddings": 20_000}
    sections = report(sizes=sizes, records=[{"instruction": "Go.", "output": words}], data={"max_length": 20_000})
    text = part(sections, "First example")
    assert len(text) < 4200
    head, note, tail = re.split(r"(\n\[\.\.\. [\d,]+ characters left out here \.\.\.\]\n)", text)
    assert head.startswith("<s>Below is") and head.endswith("⟧")
    assert tail.startswith("⟦") and tail.endswith("w2999</s>⟧")
    assert text.count("⟦") == text.count("⟧") == 2
    # In the prompt the brackets stay away from the gap.
    sections = report(sizes=sizes, records=[{"instruction": words, "output": "yes"}], data={"max_length": 20_000})
    text = part(sections, "First example")
    assert (text.count("⟦"), text.count("⟧")) == (1, 1)
    assert text.endswith("⟦yes</s>⟧")


def test_packed_example_shows_its_documents(report):
    sections = report(sizes={"max_position_embeddings": 1024}, data={"packing": True, "max_length": 1024})
    assert part(sections, "First example").count("──────") == 2


def test_llama3_8b_from_its_config_alone(report, tmp_path):
    """Shapes of meta-llama/Meta-Llama-3-8B; no weight is made for it."""
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    }
    adapter = {"target_modules": ["q_proj", "v_proj"], "r": 16, "decoder_hidden": 128}
    training = {"deepspeed": str(tmp_path / "ds.json")}
    sections = report("--devices", "8", sizes=sizes, adapter=adapter, training=training, model={"dtype": "bfloat16"})
    model = part(sections, "Model")
    assert "8,030,261,248 parameters, frozen" in model
    assert "adapted layers: 64: " in model
    trained = int(re.search(r"adapter parameters: ([\d,]+)", model)[1].replace(",", ""))
    assert trained == pytest.approx(47.5e6, rel=0.002)
    weights = float(re.search(r"base weights +([\d.]+) GiB", part(sections, "Memory"))[1])
    assert weights == pytest.approx(2 * 8_030_261_248 / 8 / 2**30, abs=1e-3)


def test_tied_embeddings_are_counted_once(report):
    untied = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32 + 2 * 320 * 32
    assert f"{untied:,} parameters" in part(report(), "Model")
    assert f"{untied - 320 * 32:,} parameters" in part(report(sizes={"tie_word_embeddings": True}), "Model")


def test_help_recipe_needs_no_recipe(capsys):
    assert train_command(["--help-recipe"]) == 0
    assert "learning_rate: float, default 0.0002" in capsys.readouterr().out


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_goes_through_the_command(path, tmp_path, monkeypatch, capsys):
    """The recipe as it stands, with a tiny model and data of its format in the place of those it names."""
    records = {
        "alpaca": [RECORDS[0]],
        "prompt_completion": [{"prompt": "a", "completion": "b"}],
        "text": [{"text": "some words"}],
        "messages": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
        "classification": [{"text": "some words", "label": label} for label in "ab"],
    }[yaml.safe_load(path.read_text())["data"]["train"][0]["format"]]
    base = make_model_folder(tmp_path / "base", num_attention_heads=8)  # eight devices may share rows
    data = write_records(tmp_path / "data.jsonl", [{**record, "group": "one"} for record in records] * 3)
    template = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    settings = {
        "model.name_or_path": base,
        "model.tokenizer": base,
        "model.attention": "auto",
        "data.train.0.path": data,
        "data.eval": "[]",
        "evaluation": "{}",
        "data.max_length": 512,
        "data.chat_template": f'"{template}"',
        "data.cache_dir": tmp_path / "cache",
    }
    monkeypatch.chdir(ROOT)
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    assert train_command(["--config", str(path.relative_to(ROOT)), "--dry-run", "--devices", "8", *overrides]) == 0
    assert "== First example" in capsys.readouterr().out
