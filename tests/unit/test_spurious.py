"""Spurious suites: who gets which cue, and that both forms can be evaluated."""

import json
from collections import Counter

import numpy as np
import pytest

from fvae_dist.evaluation.spurious import CUES, as_questions, main, make_suite
from tests.recipes import write_records

EXAMPLES = [(f"Text number {i}. It has two sentences.", "pos" if i % 3 else "neg") for i in range(600)]  # 400 pos


def count(rows, *columns):
    return Counter(tuple(row[column] for column in columns) for row in rows)


@pytest.mark.parametrize("cue", CUES)
def test_cue_is_tied_in_training_and_free_in_the_test(cue):
    suite = make_suite(EXAMPLES, cue, probability=0.95, shares=(0.5, 0.25, 0.25))
    first, second = list(CUES[cue])[:2]
    assert count(suite["train"], "label", "cue") == {
        ("neg", first): 95,
        ("neg", second): 5,
        ("pos", first): 10,
        ("pos", second): 190,
    }
    for split in ("validation", "test"):
        assert count(suite[split], "label", "cue") == {
            ("neg", first): 25,
            ("neg", second): 25,
            ("pos", first): 50,
            ("pos", second): 50,
        }
    for row in (row for rows in suite.values() for row in rows):
        assert row["group"] == f"{row['label']}|{row['cue']}" and row["text"].strip()


@pytest.mark.parametrize("cue", CUES)
def test_variants_of_a_cue_differ_and_keep_the_text(cue):
    texts = {}
    for name, apply in CUES[cue].items():
        texts[name] = apply("One thing. And another.", np.random.default_rng(0))
        assert "one" in texts[name].lower() and "another" in texts[name].lower()
    assert len(set(texts.values())) == len(texts)


def test_splits_are_disjoint_whole_and_mixed():
    suite = make_suite(EXAMPLES, "format", seed=1)
    texts = [row["text"].split("number ")[1].split(".")[0] for rows in suite.values() for row in rows]
    assert sorted(map(int, texts)) == list(range(600))
    assert len({row["label"] for row in suite["train"][:20]}) == 2


def test_same_seed_same_suite():
    assert make_suite(EXAMPLES, "word", seed=3) == make_suite(EXAMPLES, "word", seed=3)
    assert make_suite(EXAMPLES, "word", seed=3) != make_suite(EXAMPLES, "word", seed=4)


def test_other_cues_share_what_is_left():
    examples = [(f"t {i}", "abc"[i % 3]) for i in range(300)]
    suite = make_suite(examples, "word", probability=0.8, shares=(1.0, 0.0, 0.0))
    assert sorted(count(suite["train"], "label", "cue").values()) == [10] * 6 + [80] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cue": "colour"}, "cue must be one of word, style, position, format"),
        ({"cue": "word", "examples": [("a", "x")]}, "is for 2 to 8 labels, there are 1"),
        ({"cue": "position", "examples": [("a", str(i)) for i in range(9)]}, "2 to 3 labels, there are 9"),
        ({"cue": "word", "examples": [("a", "x"), ("b", "y")] * 4}, "too few texts"),
        ({"cue": "word", "probability": 1.5}, "probability must be in"),
        ({"cue": "word", "shares": (0.5, 0.2, 0.2)}, "shares must add up to 1"),
    ],
)
def test_what_makes_no_suite_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_suite(**{"examples": EXAMPLES, **arguments})


def test_questions_name_their_answers():
    rows = make_suite(EXAMPLES, "word")["test"]
    for row, question in zip(rows, as_questions(rows), strict=True):
        assert question["instruction"].endswith("Answer format: neg/pos") and row["text"] in question["instruction"]
        assert question["answer"] == question["output"] == row["label"] and question["group"] == row["group"]


def test_command_writes_three_files(tmp_path, capsys):
    data = write_records(tmp_path / "data.jsonl", [{"text": text, "label": label} for text, label in EXAMPLES])
    for form, columns in {"answer": {"instruction", "answer"}, "classification": {"text", "label"}}.items():
        out = tmp_path / form
        assert main(["--data", str(data), "--cue", "style", "--out", str(out), "--form", form]) == 0
        sizes = {}
        for path in out.iterdir():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            assert rows[0].keys() >= columns | {"group"}
            sizes[path.name] = len(rows)
        assert sizes == {"train.jsonl": 420, "validation.jsonl": 60, "test.jsonl": 120}
    assert main(["--data", str(tmp_path / "no.jsonl"), "--cue", "style", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
