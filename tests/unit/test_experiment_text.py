"""Text of the experiment: what is gathered, the base's folder, and labelled texts."""

import gzip
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "launch"))

import experiment_text  # noqa: E402

PROSE = "A sentence of the documentation, which is a little longer than it would have to be. "


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def library(tmp_path):
    """A folder of twenty different texts, one of them twice, and files that are left out."""
    folder = tmp_path / "library"
    (folder / "doc").mkdir(parents=True)
    for number in range(19):
        (folder / f"module{number}.py").write_text(f"# {number}\n" + PROSE * 4)
    (folder / "again.py").write_text("# 3\n" + PROSE * 4)
    (folder / "doc" / "changelog.gz").write_bytes(gzip.compress(("changes: é\n" + PROSE * 4).encode()))
    (folder / "short.txt").write_text("too short")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe" * 400)
    (folder / "program.so").write_text(PROSE * 4)
    return folder


def test_each_text_is_taken_once(library, tmp_path):
    out = tmp_path / "out"
    assert experiment_text.main(["text", str(library), "--out", str(out)]) == 0
    train, heldout = (lines_of(out / f"{part}.jsonl") for part in ("train", "heldout"))
    texts = [row["text"] for row in train + heldout]
    assert len(texts) == len(set(texts)) == 20 and len(train) > len(heldout)
    assert any(text.startswith("changes: é") for text in texts)
    before = (out / "train.jsonl").read_bytes()
    assert experiment_text.main(["text", str(library), "--out", str(out)]) == 0
    assert (out / "train.jsonl").read_bytes() == before


def test_base_can_be_pretrained(library, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    assert experiment_text.main(["text", str(library), "--out", str(tmp_path)]) == 0
    base = tmp_path / "base"
    command = ["base", "--text", str(tmp_path / "train.jsonl"), "--out", str(base), "--vocab-size", "400"]
    assert experiment_text.main([*command, "--hidden-size", "128", "--num-layers", "2"]) == 0
    config, tokenizer = AutoConfig.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    assert (config.vocab_size, config.hidden_size, config.num_attention_heads) == (400, 128, 2)
    assert len(tokenizer) <= 400 and tokenizer.eos_token_id == config.eos_token_id == 2
    ids = tokenizer(PROSE)["input_ids"]
    assert ids[0] == config.bos_token_id and tokenizer.decode(ids[1:]) == PROSE


def test_labelled_texts_are_balanced_and_in_one_source_alone(tmp_path):
    for name, numbers in {"a1": range(5), "a2": range(5, 9), "b": range(7, 13)}.items():
        records = [{"instruction": f"Choose. question: What is {i}?\n\nAnswer1: x Answer2: y"} for i in numbers]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    sources = [f"{label}={tmp_path}/{name}.json" for label, name in (("one", "a1"), ("one", "a2"), ("two", "b"))]
    out = tmp_path / "labelled.jsonl"
    command = ["labelled", *(part for source in sources for part in ("--source", source)), "--out", str(out)]
    assert experiment_text.main([*command, "--after", "question: ", "--before", "Answer1:"]) == 0
    rows = lines_of(out)
    assert sorted(row["label"] for row in rows) == ["one"] * 4 + ["two"] * 4
    assert not {"What is 7?", "What is 8?"} & {row["text"] for row in rows}
    assert {row["text"] for row in rows if row["label"] == "two"} == {f"What is {i}?" for i in range(9, 13)}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["text", "{}/none", "--out", "{}/out"], "none: no such folder"),
        (["text", "{}", "--out", "{}/out"], "no text was found"),
        (["labelled", "--source", "one", "--out", "{}/out"], "--source one: write LABEL=FILE"),
        (["labelled", "--source", "one={}/none.json", "--out", "{}/out"], "none.json: cannot be read"),
        (["base", "--text", "{}/none.jsonl", "--out", "{}/out"], "none.jsonl: cannot be read"),
        (["base", "--text", "x", "--out", "{}/out", "--hidden-size", "100"], "--hidden-size 100: must be a multiple"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path, capsys, command, message):
    assert experiment_text.main([part.format(tmp_path) for part in command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
