"""Sources: every way of storing records gives the same ones, and every bad record is named by file and line."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fvae_dist.training import sources
from fvae_dist.training.recipe import RecipeError, SourceSection
from fvae_dist.training.sources import (
    alpaca_prompt,
    check_source,
    fingerprint_source,
    place,
    published_prompt,
    read_records,
)

ROWS = [
    {"instruction": "Add {input}", "input": "1 and 2", "output": "3"},
    {"instruction": "Grüße", "input": "", "output": "hallo\nwelt"},
]


def write(path, rows):
    """Store rows in the format that the extension names."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


def read(path, **settings):
    return list(read_records(SourceSection(path=str(path), **settings)))


def error_of(path, **settings):
    with pytest.raises(RecipeError) as caught:
        read(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(str(path))


@pytest.mark.parametrize("extension", [".json", ".jsonl", ".parquet"])
def test_read_records_gives_the_same_from_every_file_type(tmp_path, extension):
    records = read(write(tmp_path / f"data{extension}", ROWS))
    assert [record.prompt for record in records] == [alpaca_prompt("Add {input}", "1 and 2"), alpaca_prompt("Grüße")]
    assert [record.completion for record in records] == ["3", "hallo\nwelt"]
    assert [record.number for record in records] == ([2, 7] if extension == ".json" else [1, 2])


def test_published_prompt_is_that_of_the_papers_code():
    """Character by character as AGI-Edgerunners/LLM-Adapters, finetune.py, makes it."""
    pad = " " * 16
    head = "Below is an instruction that describes a task"
    ask = "Write a response that appropriately completes the request.  # noqa: E501"
    alone = [f"{head}. {ask}", "", f"{pad}### Instruction:", f"{pad}Do {{it}}.", pad, f"{pad}### Response:", pad]
    assert published_prompt("Do {it}.") == "\n".join(alone)
    context = f"{head}, paired with an input that provides further context. {ask}"
    with_input = [context, *alone[1:5], f"{pad}### Input:", f"{pad}a\nb", pad, *alone[5:]]
    assert published_prompt("Do {it}.", "a\nb") == "\n".join(with_input)


def test_template_of_a_source(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"instruction": "q", "output": "a"}])
    (record,) = read(path, template="published")
    assert (record.prompt, record.completion) == (published_prompt("q"), "a")
    with pytest.raises(ValueError, match="template: published is a prompt of format alpaca, not of text"):
        SourceSection(path=str(path), format="text", template="published")


def test_alpaca_prompt_is_the_standard_one():
    assert alpaca_prompt("Do {instruction}.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nDo {instruction}.\n\n### Response:\n"
    )
    assert alpaca_prompt("Do {input}.", "a {instruction}") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nDo {input}.\n\n### Input:\na {instruction}\n\n### Response:\n"
    )


@pytest.mark.parametrize(
    "row", [{"instruction": "a", "output": "b"}, {"instruction": "a", "input": None, "output": "b"}]
)
def test_alpaca_input_is_optional(tmp_path, row):
    assert read(write(tmp_path / "data.jsonl", [row]))[0].prompt == alpaca_prompt("a")


def test_text_file_documents_are_separated_by_blank_lines(tmp_path):
    path = tmp_path / "data.txt"
    path.write_bytes(b"\xef\xbb\xbf\n one\n  two\r\n\n \t\n\nthree")
    records = read(path, format="text")
    assert [(record.number, record.completion) for record in records] == [(2, " one\n  two"), (7, "three")]


def test_messages_and_other_formats_are_read(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    for extension in (".jsonl", ".parquet"):
        path = write(tmp_path / f"chat{extension}", [{"messages": chat}])
        assert read(path, format="messages")[0].messages == chat
    pairs = read(write(tmp_path / "a.jsonl", [{"prompt": "", "completion": "c"}]), format="prompt_completion")
    assert (pairs[0].prompt, pairs[0].completion) == ("", "c")
    assert read(write(tmp_path / "b.jsonl", [{"text": "t"}]), format="text")[0].completion == "t"


@pytest.mark.parametrize("extension", [".jsonl", ".parquet"])
def test_columns_map_our_names_to_the_files(tmp_path, extension):
    path = write(tmp_path / f"data{extension}", [{"question": "q", "answer": "a", "input": "unmapped"}])
    (record,) = read(path, columns={"instruction": "question", "output": "answer"})
    assert (record.prompt, record.completion) == (alpaca_prompt("q", "unmapped"), "a")
    where = ": row 1" if extension == ".parquet" else ":1"
    assert error_of(path, columns={"output": "reply"}).startswith(f'{where}: missing column "instruction"')
    assert error_of(path, columns={"instruction": "question", "output": "reply"}).startswith(
        f'{where}: missing column "reply"'
    )


def test_columns_with_an_unknown_name_lists_the_known_ones(tmp_path):
    path = write(tmp_path / "data.jsonl", ROWS)
    message = error_of(path, columns={"answer": "output"})
    assert message == ": columns: answer is no column of format alpaca; known: instruction, input, output"


def test_limit_reads_only_the_first_records(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\nbroken\n")
    assert len(read(path, limit=1)) == 1
    assert error_of(path, limit=2).startswith(":2: broken JSON")


GOOD = b'{"instruction": "a", "output": "b"}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", GOOD + b"\n{oops}", ":2: broken JSON: Expecting property name enclosed in double quotes"),
        ("x.jsonl", GOOD + b'\n\n["list"]', ":3: a record must be an object, not list"),
        ("x.jsonl", GOOD + b'\n{"instruction": "a"}', ':2: missing column "output" (has: instruction)'),
        ("x.jsonl", b'{"instruction": "a", "output": 5}', ':1: column "output" must be text, not int'),
        ("x.jsonl", b'{"instruction": "a", "output": null}', ':1: column "output" must be text, not null'),
        ("x.jsonl", b'{"instruction": "a", "output": " \\n"}', ':1: column "output" is empty'),
        ("x.jsonl", b'{"instruction": "", "output": "b"}', ':1: column "instruction" is empty'),
        ("x.jsonl", b'{"instruction": "\\ud800", "output": "b"}', ':1: column "instruction" holds a lone surrogate'),
        ("x.jsonl", GOOD + b'\n{"instruction": "\xff"}', ":2: not UTF-8 (byte 0xff)"),
        ("x.jsonl", b"\n\n", ": holds no record"),
        ("x.jsonl", b"", ": holds no record"),
        ("x.json", b"", ":1: the file is empty"),
        ("x.json", b"[ ]", ": holds no record"),
        ("x.json", GOOD, ":1: a .json file must be an array of objects"),
        ("x.json", b"[\n" + GOOD + b",\n\n{oops}]", ":4: broken JSON"),
        ("x.json", b"[\n" + GOOD + b",\n]", ":3: broken JSON"),
        ("x.json", b"[" + GOOD + b"\n" + GOOD + b"]", ":2: broken JSON: expected , or the end"),
        ("x.json", b"[" + GOOD + b"]\n\n{}", ":3: broken JSON: expected , or the end"),
        ("x.json", b"[" + GOOD, ":1: broken JSON: expected , or the end"),
        ("x.json", b"[" + GOOD + b',\n{\n"instruction":\n"a"}]', ':2: missing column "output"'),
        ("x.json", b"[" + GOOD + b',\n"text"]', ":2: a record must be an object, not str"),
        ("x.json", b"[\n\n\xc3(]", ":3: not UTF-8 (byte 0xc3)"),
        ("x.json", b"[" * 100_000, ":1: broken JSON"),
        ("x.parquet", b"PAR1 no", ": not a readable Parquet file"),
    ],
)
def test_bad_record_is_named_by_file_and_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    assert error_of(path).startswith(message)


def test_bad_line_in_the_middle_of_a_large_file_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes((GOOD + b"\n") * 20_000 + GOOD[:20] + b"\n" + (GOOD + b"\n") * 20_000)
    assert error_of(path).startswith(":20001: broken JSON: ")


@pytest.mark.parametrize(("content", "message"), [(b"", ": holds no record"), (b"a\n\nb\xff", ":3: not UTF-8")])
def test_bad_text_file_is_named_by_line(tmp_path, content, message):
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    assert error_of(path, format="text").startswith(message)


def test_bad_parquet_row_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", [*ROWS, {"instruction": "a", "input": "", "output": ""}])
    assert error_of(path) == ': row 3: column "output" is empty'
    column = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"text": column}), path)
    assert error_of(path, format="text") == ": row 2: not UTF-8"


USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a non-empty list"),
        ("hi", "messages must be a non-empty list"),
        (["hi"], "messages[0] must be an object, not str"),
        ([USER, {"role": "assistant"}], "messages[1] has no content"),
        ([{"content": "hi"}], "messages[0] has no role"),
        ([USER, {"role": "assistant", "content": None}], "messages[1].content must be text, not null"),
        ([{"role": 1, "content": "hi"}], "messages[0].role must be text, not int"),
        ([USER], "messages has no message of role assistant"),
        ([USER, REPLY, USER, {"role": "assistant", "content": " "}], "messages: the last assistant message is empty"),
    ],
)
def test_bad_messages_are_named(tmp_path, messages, message):
    path = write(tmp_path / "x.jsonl", [{"messages": [USER, REPLY]}, {"messages": messages}])
    assert error_of(path, format="messages").startswith(f":2: {message}")


def test_check_source_names_a_file_that_cannot_be_one(tmp_path):
    assert error_of(tmp_path / "none.jsonl") == ": there is no such file"
    assert error_of(tmp_path).startswith(": is a directory")
    (tmp_path / "data.csv").touch()
    assert error_of(tmp_path / "data.csv").startswith(": unknown extension '.csv'; known: .json,")
    (tmp_path / "data.txt").write_text("a")
    assert error_of(tmp_path / "data.txt").startswith(": a .txt file has no columns")
    check_source(SourceSection(path=str(tmp_path / "data.txt"), format="text"))


def test_fingerprint_follows_the_contents_not_the_name(tmp_path):
    first, second = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS)
    fingerprints = [fingerprint_source(SourceSection(path=str(path))) for path in (first, second)]
    assert fingerprints[0] == fingerprints[1]
    write(second, ROWS[:1])
    assert fingerprint_source(SourceSection(path=str(second))) != fingerprints[0]


def test_hub_records_are_read_at_the_fingerprinted_commit(monkeypatch):
    asked = {}

    def load_dataset(*args, **settings):
        asked.update(settings, args=args)
        return datasets.Dataset.from_list([*ROWS, {"instruction": "a", "input": "", "output": ""}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "_hub_revision", lambda source: "c0ffee")
    source = SourceSection(hub="org/set", hub_config="en", split="test", limit=2)
    assert [record.completion for record in read_records(source)] == ["3", "hallo\nwelt"]
    assert asked == {"args": ("org/set", "en"), "split": "test", "revision": "c0ffee"}
    assert fingerprint_source(source) == "org/set en test c0ffee"
    with pytest.raises(RecipeError, match=r'^org/set: row 3: column "output" is empty$'):
        list(read_records(source.model_copy(update={"limit": None})))
    assert place(source, 3) == "org/set: row 3"


def test_hub_error_names_the_data_set_in_one_line(monkeypatch):
    def load_dataset(*args, **settings):
        raise ValueError('Unknown split "tset".\nShould be one of\n["train"]')

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "_hub_revision", lambda source: None)
    with pytest.raises(RecipeError, match=r'^org/set: cannot load split tset: Unknown split "tset". Should be one of'):
        list(read_records(SourceSection(hub="org/set", split="tset")))


def test_hub_that_does_not_answer_is_an_error(monkeypatch):
    import huggingface_hub

    def dataset_info(self, name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(RecipeError, match=r"^org/set: cannot reach this data set on the Hub: no route to host$"):
        fingerprint_source(SourceSection(hub="org/set"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fingerprint_source(SourceSection(hub="org/set")) == "org/set None train None"
