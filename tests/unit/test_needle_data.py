"""Training records for the needle suite: the suite's prompts with other numbers, as long and as deep as asked for."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig

from fvae_dist.evaluation.needle import (
    DEPTHS,
    draw_number,
    filler_words,
    needle_prompt,
    needle_tasks,
    summarise_needles,
)
from fvae_dist.evaluation.needle_data import main, needle_records
from fvae_dist.evaluation.report import markdown_report
from fvae_dist.evaluation.tasks import Options
from fvae_dist.training.data import prepare_data
from fvae_dist.training.recipe import DataSection
from fvae_dist.training.recipe_file import load_recipe
from fvae_dist.training.tokenization import IGNORED
from tests.recipes import byte_tokenizer, make_model_folder

WORDS = filler_words(None, "--filler")
RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
UNEVEN = ["a"] * 300 + ["incomprehensibilities"] * 40  # a rate of tokens that changes within a text
LENGTHS = (500, 1200, 3000)


def records(num_records: int = 30, lengths=LENGTHS, **options) -> list[dict]:
    return list(needle_records(byte_tokenizer(), options.pop("words", WORDS), num_records, lengths, **options))


def test_records_are_deterministic_and_differ():
    first = records(seed=3)
    assert first == records(seed=3)
    assert [row["completion"] for row in first] != [row["completion"] for row in records(seed=4)]
    assert len({row["prompt"] for row in first}) == len({row["completion"] for row in first}) == len(first)


def test_lengths_and_depths_are_dealt_out_alike():
    counts = Counter((row["length"], row["depth"]) for row in records(30))
    assert counts == {(length, depth): 2 for length in LENGTHS for depth in DEPTHS}


@pytest.mark.parametrize("template", ["clean", "published"])
@pytest.mark.parametrize(
    "words", [WORDS, ["a", "considerably-longer-word", "of", "42", "letters"] * 9, ["one"], UNEVEN]
)
def test_records_are_as_long_as_asked(words, template):
    """At most the length, and short of it by less than a word and its space (a token a byte)."""
    longest_word = max(map(len, words)) + 1
    for row in records(words=words, template=template):
        tokens = byte_tokenizer()(row["prompt"] + row["completion"])["input_ids"]
        assert row["num_tokens"] == len(tokens) + 1  # the end of text
        assert row["length"] - longest_word < row["num_tokens"] <= row["length"]


def test_needle_stands_once_at_its_depth():
    for row in records(depths=(0.0, 0.1, 0.5, 0.9, 1.0)):
        needle = f"The secret number is {row['completion']}."
        assert row["prompt"].count(needle) == row["prompt"].count(row["completion"]) == 1
        text = row["prompt"].split("### Instruction:\n")[1].split("\n\nWhat is the secret number")[0]
        before, after = (len(part.split()) for part in text.split(needle))
        assert before == round(row["depth"] * (before + after))


def test_bare_records_are_the_text_and_its_number():
    for row in records(12, (48, 90), bare=True):
        text, end = row["prompt"][:-1], row["prompt"][-1:]
        needle = f"The secret number is {row['completion']}."
        assert end == "\n" and text.count(needle) == 1
        before, after = (part.split() for part in text.split(needle))
        assert set(before + after) <= set(WORDS) and len(before) == round(row["depth"] * len(before + after))
        assert row["num_tokens"] == len(row["prompt"] + row["completion"]) + 2 <= row["length"]  # <s>, </s>


def test_shipped_recipes_fit_each_other():
    """Each goes on from what the one before saves; rows have positions, and two devices heads to share."""
    copy, base, long = (load_recipe(RECIPES / f"needle_{name}.yaml") for name in ("copy", "base", "2k"))
    assert base.model.name_or_path == f"{copy.training.output_dir}/model"
    assert long.model.name_or_path == f"{base.training.output_dir}/model"
    config = AutoConfig.from_pretrained(RECIPES.parents[1] / copy.model.name_or_path)
    assert config.vocab_size == 1536  # of the tokenizer that launch/quickstart.py makes
    assert config.max_position_embeddings >= long.data.max_length
    assert config.num_key_value_heads % long.training.sequence_parallel == 0


def test_prompts_are_those_of_the_suite():
    row = records(1)[0]
    num_words = len(row["prompt"].split("### Instruction:\n")[1].split("\n\n")[0].split()) - 5
    rendered = [
        needle_prompt(WORDS, num_words, row["depth"], row["completion"], "clean", start=s) for s in range(len(WORDS))
    ]
    assert row["prompt"] in rendered


def test_numbers_of_training_and_evaluation_never_meet():
    generator = np.random.default_rng(0)
    for _ in range(2000):
        trained, asked = int(draw_number(generator, "training")), int(draw_number(generator, "evaluation"))
        assert trained % 7 != 0 and asked % 7 == 0
        assert len(str(trained)) == len(str(asked)) == 7
    (task,) = needle_tasks(byte_tokenizer(), Options(max_length=1600))
    assert all(int(sample.facts["answer"]) % 7 == 0 for sample in task.samples)
    assert all(int(row["completion"]) % 7 for row in records())


def test_suite_reports_accuracy_by_length_and_depth():
    rows = [
        {"length": length, "depth": depth, "correct": depth < 0.5, "prediction": "1"}
        for length in (100, 200)
        for depth in (0.0, 1.0)
    ]
    summary = summarise_needles(rows, seed=0)
    assert summary["cells"] == {"100 x 0%": 1.0, "100 x 100%": 0.0, "200 x 0%": 1.0, "200 x 100%": 0.0}
    assert summary["depths"] == {"0%": 1.0, "100%": 0.0} and summary["lengths"] == {"100": 0.5, "200": 0.5}
    assert summary["accuracy"]["value"] == 0.5
    assert markdown_report({"model": "m"}, {"needle": {"needle": summary}}).splitlines()[-5:] == [
        "| needle: tokens | 0% | 100% | all depths |",
        "|---|---|---|---|",
        "| 100 | 100.0 % | 0.0 % | 50.0 % |",
        "| 200 | 100.0 % | 0.0 % | 50.0 % |",
        "| all | 100.0 % | 0.0 % | 50.0 % |",
    ]


def test_command_writes_what_training_reads(tmp_path, capsys):
    """Through the data section: nothing is cut, and the loss falls on the number and the end of text alone."""
    base, out = make_model_folder(tmp_path / "base"), tmp_path / "new" / "train.jsonl"
    command = ["--tokenizer", base, "--length", 400, 900, "--num-records", 10, "--depth", 0, 0.5, "--out", out]
    assert main([str(part) for part in command]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 10 records, format prompt_completion, the longest of ")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == records(10, (400, 900), depths=(0.0, 0.5))
    section = DataSection.model_validate(
        {"train": [{"path": str(out), "format": "prompt_completion"}], "max_length": 900}
    )
    tokenizer = byte_tokenizer()
    prepared = prepare_data(section, tokenizer, seed=0, output_dir=str(tmp_path / "run"))
    assert prepared.report["train"]["num_truncated"] == 0 and len(prepared.train) == 10
    seen = []
    for example in prepared.train:
        learned = [label for label in example["labels"] if label != IGNORED]
        assert learned[-1] == tokenizer.eos_token_id
        seen.append(tokenizer.decode(learned[:-1]))
    assert sorted(seen) == sorted(row["completion"] for row in rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--length": ["20"]}, "a length of 20 tokens has no room: question and answer alone take "),
        ({"--depth": ["1.5"]}, "depths must lie in [0, 1], got 1.5"),
        ({"--num-records": ["0"]}, "there must be at least one record"),
        ({"--filler": ["no.txt"]}, "--filler: no.txt: is no readable text"),
        ({"--tokenizer": ["./nowhere"]}, "--tokenizer: "),
        ({"--out": ["x.json"]}, "--out x.json: must be a .jsonl file"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    make_model_folder(tmp_path / "base")
    options = {"--tokenizer": ["base"], "--length": ["400"], "--out": ["x.jsonl"], **change}
    assert main([part for name, values in options.items() for part in (name, *values)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not list(tmp_path.glob("*x.json*"))


def test_filler_that_tells_of_a_number_is_refused(tmp_path, capsys):
    path = tmp_path / "filler.txt"
    path.write_text("Once upon a time. The secret\nnumber is 5.")
    base = make_model_folder(tmp_path / "base")
    command = ["--tokenizer", base, "--length", "400", "--out", tmp_path / "x.jsonl", "--filler", path]
    assert main(list(map(str, command))) == 2
    assert "holds 'The secret number is' itself" in capsys.readouterr().err
