"""What the suites ask and how they read an answer, without a model."""

from decimal import Decimal

import pytest

from fvae_dist.evaluation.choices import Question, answer_pattern
from fvae_dist.evaluation.commonsense import find_sets, read_questions
from fvae_dist.evaluation.gsm8k import find_number
from fvae_dist.evaluation.prompts import render_prompt
from fvae_dist.evaluation.report import markdown_report
from fvae_dist.evaluation.running import make_batches
from fvae_dist.evaluation.suites import Suites, parse_suites
from fvae_dist.evaluation.tasks import Options, Row, Sample, continuation_rows, prompt_row
from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.sources import alpaca_prompt
from tests.evaluating import boolq, write_json
from tests.recipes import byte_tokenizer

ANSWERS = ("answer1", "answer2", "answer3")


def test_templates():
    assert render_prompt("clean", "Do it.", "With {this}") == alpaca_prompt("Do it.", "With {this}")
    first = "Below is an instruction that describes a task. "
    first += "Write a response that appropriately completes the request. "
    indent = 16 * " "
    lines = [first, "", f"{indent}### Instruction:", f"{indent}Do it.", "", f"{indent}### Response:", indent]
    assert render_prompt("published", "Do it.", "never shown") == "\n".join(lines)


@pytest.mark.parametrize(
    ("choices", "text", "expected"),
    [
        (("true", "false"), "the correct answer is true, not false", "true"),
        (("true", "false"), "False", None),  # case counts, as published
        (ANSWERS, "answer5 or answer1", "answer5"),  # five are known, whatever occurs
        (ANSWERS, "Answer1", None),
        (("option1", "option2"), "option10", "option1"),
        (("a", "ab"), "xab", "ab"),  # the longer one
        (("a+b", "c"), "a+b", "a+b"),
    ],
)
def test_first_answer_counts(choices, text, expected):
    found = answer_pattern([Question("q", choices, choices[0])]).search(text)
    assert (found.group() if found else None) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 12 = 72\n#### 72", "72"),
        ("#### 1,234.50 dollars, after 3 days", "1234.50"),
        ("so 3 and then -7", "-7"),
        ("it is .5.", ".5"),
        ("that makes 72.", "72"),
        ("####", None),
        ("none", None),
    ],
)
def test_number_of_a_text(text, number):
    assert find_number(text) == (None if number is None else Decimal(number))


def test_lead_is_what_all_outputs_begin_with(tmp_path):
    records = [{**record, "output": f"the correct answer is {record['answer']}"} for record in boolq("tf")]
    path = write_json(tmp_path / "a.json", records)
    assert {question.lead for question in read_questions(path, Options())} == {"the correct answer is "}
    records[1]["output"] = "as I know: false"
    write_json(path, records)
    assert {question.lead for question in read_questions(path, Options())} == {""}


def test_choices_come_from_column_instruction_or_answers(tmp_path):
    records = [
        {"instruction": "Answer format: a/b/c", "answer": "a"},
        {"instruction": "Which?", "answer": "x", "choices": ["x", "y"]},
        {"instruction": "Which?", "answer": "z"},
    ]
    questions = read_questions(write_json(tmp_path / "a.json", records), Options())
    assert [question.choices for question in questions] == [("a", "b", "c"), ("x", "y"), ("a", "x", "z")]


def test_sets_of_a_folder(tmp_path):
    write_json(tmp_path / "one" / "boolq.test.json", [])
    write_json(tmp_path / "one" / "boolq.train.json", [])
    write_json(tmp_path / "two" / "piqa" / "test.json", [])
    write_json(tmp_path / "three" / "own.json", [])
    assert list(find_sets(tmp_path / "one")) == ["boolq"]
    assert list(find_sets(tmp_path / "two")) == ["piqa"]
    assert list(find_sets(tmp_path / "three")) == ["own"]
    assert list(find_sets(tmp_path / "one" / "boolq.test.json")) == ["boolq"]
    (tmp_path / "none").mkdir()
    with pytest.raises(RecipeError, match="holds neither"):
        find_sets(tmp_path / "none")


def test_suites_of_a_line():
    assert parse_suites("groups,lm_eval:arc,piqa,gsm8k") == Suites(["groups", "gsm8k"], ["arc", "piqa"])
    with pytest.raises(RecipeError, match="an empty name"):
        parse_suites("groups,")


def test_long_prompts_lose_their_beginning():
    tokenizer = byte_tokenizer()
    row, num_cut = prompt_row("abcdef", tokenizer, 4)
    assert tokenizer.decode(row.ids) == "<s>def" and num_cut == 3
    (row,), num_cut = continuation_rows("abcdef", ["gh"], tokenizer, 5)
    assert tokenizer.decode(row.ids) == "<s>efgh" and row.scored == [0, 0, 0, 1, 1] and num_cut == 4


def test_batches_do_not_depend_on_order():
    samples = [Sample(index, [Row([0] * (3 + index * 5 % 4))]) for index in range(7)]
    batches = make_batches(samples, 3)
    assert batches == make_batches(samples[::-1], 3)
    assert [len(batch) for batch in batches] == [3, 3, 1]
    lengths = [sample.num_tokens for batch in batches for sample in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_report_shows_what_was_measured():
    entry = {"value": 0.5, "low": 0.25, "high": 0.75}
    metrics = {"accuracy": entry, "num_samples": 8, "num_parse_failures": 2, "calibration": {"ece": 0.125, "nll": 1.5}}
    text = markdown_report({"model": "m", "adapter": None}, {"commonsense": {"boolq": metrics}})
    assert "| commonsense | boolq | 8 | accuracy | 50.00 % | 25.00 .. 75.00 | 12.5 % | 1.500 | 2 |" in text
    loss = {"loss": {"value": 2.0, "low": 1.0, "high": 3.0}, "num_samples": 3}
    assert "| perplexity | eval | 3 | loss | 2.0000 | 1.0000 .. 3.0000 |" in markdown_report(
        {"model": "m"}, {"perplexity": {"eval": loss}}
    )
