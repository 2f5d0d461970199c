"""Prepared data: which tokens are learned, what is cut, dropped, repeated and packed, and when it is made anew."""

import json
import logging
import signal
import threading

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fvae_dist.training import data as data_module
from fvae_dist.training.data import prepare_data, render_example
from fvae_dist.training.recipe import DataSection, RecipeError
from fvae_dist.training.sources import alpaca_prompt

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# The same with markers; there the newline after EOS is not part of the turn.
MARKED_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "go"},
    {"role": "assistant", "content": "on"},
]


@pytest.fixture(autouse=True)
def _deadly_signal():
    """A pool ends its processes by SIGTERM, which they would survive where an earlier test has trained in this one: the
    run's handler, which waits for the end of a step, is then still there."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@pytest.fixture
def tokenizer():
    """One token per character, and "=a" as one token; BOS is put in front."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocab = {token: id for id, token in enumerate(["<pad>", "<s>", "</s>", *characters, "=a"])}
    backend = Tokenizer(models.BPE(vocab, [("=", "a")]))
    backend.add_special_tokens(["<pad>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def prepare(tmp_path, tokenizer):
    """prepare(rows, format=..., **data settings): rows go to a file; `train` may give the sources instead."""

    def prepare(rows=None, *, name="data", seed=1, is_builder=True, **settings):
        of_source = {key: settings.pop(key) for key in ("format", "weight", "limit", "columns") if key in settings}
        if rows is not None:
            settings["train"] = [{"path": write(tmp_path / f"{name}.jsonl", rows), **of_source}]
        section = DataSection.model_validate({"max_length": 1024, **settings})
        return prepare_data(
            section, tokenizer, seed=seed, output_dir=str(tmp_path / "run"), is_builder=is_builder, timeout_s=20
        )

    return prepare


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(*texts):
    return [{"prompt": prompt, "completion": completion} for prompt, completion in texts]


def shown(prepared, tokenizer):
    return [render_example(example, tokenizer) for example in prepared.train]


# ----------------------------------------------------------------------------------------------------- what is learned


def test_prompt_completion_learns_the_completion_and_one_eos(prepare, tokenizer):
    prepared = prepare(pairs(("ask ", "tell"), ("", "tell"), ("<s>ask ", "tell</s>")), format="prompt_completion")
    assert shown(prepared, tokenizer) == ["<s>ask ⟦tell</s>⟧", "<s>⟦tell</s>⟧", "<s>ask ⟦tell</s>⟧"]
    example = prepared.train[0]
    assert example["input_ids"] == [1, *tokenizer("ask tell", add_special_tokens=False)["input_ids"], 2]
    assert example["labels"] == [-100] * 5 + example["input_ids"][5:]
    assert prepared.train.column_names == ["input_ids", "labels"]


def test_token_that_merges_across_the_border_is_learned(prepare, tokenizer):
    prepared = prepare(pairs(("x=", "a")), format="prompt_completion")
    assert shown(prepared, tokenizer) == ["<s>x⟦=a</s>⟧"]


def test_alpaca_learns_the_output(prepare, tokenizer):
    prepared = prepare([{"instruction": "Add.", "input": "1 2", "output": "3"}])
    assert shown(prepared, tokenizer) == ["<s>" + alpaca_prompt("Add.", "1 2") + "⟦3</s>⟧"]


def test_everything_is_learned_in_text_and_without_completion_only_loss(prepare, tokenizer):
    assert shown(prepare([{"text": "a\nb"}], format="text"), tokenizer) == ["<s>⟦a\nb</s>⟧"]
    rows = pairs(("ask ", "tell"))
    prepared = prepare(rows, format="prompt_completion", completion_only_loss=False)
    assert shown(prepared, tokenizer) == ["<s>⟦ask tell</s>⟧"]


def test_messages_learn_the_assistant_turns(prepare, tokenizer):
    rows = [{"messages": CHAT}]
    plain = prepare(rows, format="messages", chat_template=TEMPLATE)
    assert shown(plain, tokenizer) == ["<user>hi</s>\n<assistant>⟦yo</s>\n⟧<user>go</s>\n<assistant>⟦on</s>\n⟧"]
    marked = prepare(rows, format="messages", chat_template=MARKED_TEMPLATE)
    assert shown(marked, tokenizer) == ["<user>hi</s>\n<assistant>⟦yo</s>⟧\n<user>go</s>\n<assistant>⟦on</s>⟧\n"]
    assert plain.train[0]["input_ids"] == marked.train[0]["input_ids"]
    everything = prepare(rows, format="messages", chat_template=TEMPLATE, completion_only_loss=False)
    assert everything.report["train"]["num_loss_tokens"] == everything.report["train"]["num_tokens"] - 1


def test_chat_template_comes_from_the_tokenizer_or_a_file(prepare, tokenizer, tmp_path):
    rows = [{"messages": CHAT}]
    with pytest.raises(RecipeError, match=r"data.chat_template: the tokenizer has no chat template"):
        prepare(rows, format="messages")
    with pytest.raises(RecipeError, match=r"data.chat_template: neither Jinja nor a readable file: none.jinja"):
        prepare(rows, format="messages", chat_template="none.jinja")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    from_file = prepare(rows, format="messages", chat_template=str(tmp_path / "chat.jinja"))
    tokenizer.chat_template = TEMPLATE
    from_tokenizer = prepare(rows, format="messages")
    assert from_file.train[0] == from_tokenizer.train[0]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        # Shortens all but the last message, as templates of reasoning models do with the thoughts.
        ("{% for m in messages %}{{ m.content if loop.last else m.content[:1] }}{% endfor %}", CHAT, "not prefix-pres"),
        (TEMPLATE, [{"role": "robot", "content": "x"}, *CHAT], "chat template fails: unknown role robot"),
        ("{% for m in messages %}", CHAT, "chat template fails: Unexpected end of template"),
        ("{{ messages[0].content }}{{ eos_token }}{% generation %}{% endgeneration %}", CHAT, "no token to learn"),
    ],
)
def test_chat_that_cannot_be_masked_is_named_by_line(prepare, template, messages, message):
    rows = [{"messages": messages}]
    with pytest.raises(RecipeError, match=r"data.jsonl:1: .*" + message):
        prepare(rows, format="messages", chat_template=template)


def test_tokenizer_without_eos_is_refused(prepare, tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(RecipeError, match="no EOS token"):
        prepare([{"text": "a"}], format="text")


# ---------------------------------------------------------------------------------------------- cut, dropped, repeated

LONG = pairs(("ab", "cdefghi"), ("abcdefgh", "i"), ("a", "b"))  # 11, 11 and 4 tokens with BOS and EOS


def test_overlong_records_are_cut_and_counted(prepare, tokenizer):
    prepared = prepare(LONG, format="prompt_completion", max_length=8)
    assert shown(prepared, tokenizer) == ["<s>ab⟦cdefg⟧", "<s>a⟦b</s>⟧"]
    report = prepared.report["train"]
    expected = {"num_records": 3, "num_truncated": 1, "num_cut_tokens": 3, "num_dropped": 0, "num_dropped_no_loss": 1}
    expected |= {"num_examples": 2, "num_tokens": 12, "num_loss_tokens": 7}
    assert {key: report[key] for key in expected} == expected
    assert report["num_sequences"] == len(prepared.train) == 2
    assert [{key: count[key] for key in expected} for count in report["sources"]] == [expected]


def test_overlong_records_are_dropped_and_counted(prepare, tokenizer):
    prepared = prepare(LONG, format="prompt_completion", max_length=8, overlong="drop")
    assert shown(prepared, tokenizer) == ["<s>a⟦b</s>⟧"]
    report = prepared.report["train"]
    assert (report["num_dropped"], report["num_dropped_no_loss"], report["num_truncated"]) == (2, 0, 0)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("max_length", [3, 4, 5, 7, 16])
def test_overlong_texts_are_split_and_nothing_is_lost(prepare, tokenizer, max_length, packing):
    texts = ["abcdefghijklmnopqrstuvwxyz"[:length] for length in range(1, 27)]
    prepared = prepare(
        [{"text": text} for text in texts], format="text", max_length=max_length, overlong="split", packing=packing
    )
    wholes = [[1, *tokenizer(text, add_special_tokens=False)["input_ids"], 2] for text in texts]
    pieces, found = [], []
    for example in prepared.train:
        assert len(example["input_ids"]) <= max_length
        for length in example.get("seq_lengths", [len(example["input_ids"])]):
            ids, labels = (example[name][:length] for name in ("input_ids", "labels"))
            assert length >= 2 and labels == [-100, *ids[1:]]
            example = {name: example[name][length:] for name in ("input_ids", "labels")}
            pieces.append(ids)
    if not packing:  # then they are in their order
        for ids in pieces:
            found += [[]] if ids[0] == 1 else []
            found[-1] += ids
        assert found == wholes
    assert sorted(id for ids in pieces for id in ids) == sorted(id for ids in wholes for id in ids)
    long = [len(ids) for ids in wholes if len(ids) > max_length]
    report = prepared.report["train"]
    assert (report["num_records"], report["num_split"]) == (26, len(long))
    assert report["num_pieces"] == sum(-(-length // max_length) for length in long)
    assert report["num_examples"] == len(pieces) == 26 - len(long) + report["num_pieces"]
    assert report["num_tokens"] == sum(map(len, wholes)) == report["num_loss_tokens"] + len(pieces)
    assert (report["num_truncated"], report["num_dropped"], report["num_cut_tokens"]) == (0, 0, 0)


def test_splitting_is_for_texts_alone(prepare, tmp_path):
    with pytest.raises(
        RecipeError, match=r"^data.overlong: split is for format text alone: .*data.jsonl: format promp"
    ):
        prepare(LONG, format="prompt_completion", max_length=8, overlong="split")
    held_out = {"path": write(tmp_path / "eval.jsonl", [{"messages": CHAT}]), "format": "messages"}
    with pytest.raises(RecipeError, match=r"eval.jsonl: format messages has prompts"):
        prepare([{"text": "a"}], format="text", overlong="split", eval=[held_out])
    with pytest.raises(RecipeError, match=r"^data.max_length: overlong: split needs pieces of at least 3 tokens"):
        prepare([{"text": "a"}], format="text", overlong="split", max_length=2)


def test_nothing_left_is_an_error(prepare):
    with pytest.raises(RecipeError, match=r"data.train: no record is left: 0 of 2 are longer .* 2 would lose all"):
        prepare(pairs(("abcdefgh", "i"), ("abcdefgh", "j")), format="prompt_completion", max_length=4)
    with pytest.raises(RecipeError, match=r"data.train: no record is left: 2 of 2 are longer than max_length 4"):
        prepare(LONG[:2], format="prompt_completion", max_length=4, overlong="drop")


def test_weights_are_passes_over_a_source(prepare, tokenizer, tmp_path):
    letters = [{"text": letter} for letter in "abcdefgh"]
    first, second = write(tmp_path / "a.jsonl", letters), write(tmp_path / "b.jsonl", [{"text": "z"}])

    def epoch(weight, seed=1):
        sources = [
            {"path": first, "format": "text", "weight": weight},
            {"path": second, "format": "text", "weight": 2.0},
        ]
        prepared = prepare(train=sources, seed=seed)
        assert [source["name"] for source in prepared.report["train"]["sources"]] == [first, second]
        return "".join(tokenizer.decode(ids, skip_special_tokens=True) for ids in prepared.train["input_ids"])

    assert epoch(1.0) == "abcdefghzz"
    assert epoch(2.0) == "abcdefgh" * 2 + "zz"
    half, one_and_half = epoch(0.5), epoch(1.5)
    assert len(half) == 4 + 2 and one_and_half == "abcdefgh" + half
    assert sorted(half[:4]) == list(half[:4]) and set(half[:4]) < set("abcdefgh")
    assert {epoch(0.5, seed) for seed in range(5)} != {half}
    assert len(epoch(0.01)) == 1 + 2


def test_limit_and_eval_split(prepare, tmp_path):
    rows = [{"text": letter} for letter in "abc"]
    held_out = write(tmp_path / "eval.jsonl", rows)
    prepared = prepare(rows, format="text", limit=2, eval=[{"path": held_out, "format": "text"}])
    assert (len(prepared.train), len(prepared.eval)) == (2, 3)
    assert prepared.report["eval"]["num_records"] == 3
    assert prepare(rows, format="text").eval is None


def test_bad_record_of_any_source_stops_before_tokenising(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "tokenize_batch", None)
    bad = write(tmp_path / "bad.jsonl", [{"text": "a"}, {"txt": "b"}])
    with pytest.raises(RecipeError, match=r'bad.jsonl:2: missing column "text"'):
        prepare([{"text": "a"}], format="text", eval=[{"path": bad, "format": "text"}])


# ------------------------------------------------------------------------------------------------------------- packing


def test_packing_keeps_every_document_and_token(prepare, tokenizer):
    rows = pairs(*[("p" * (i % 5), "c" * (1 + i % 11)) for i in range(40)])
    settings = {"format": "prompt_completion", "max_length": 13}
    plain, packed = prepare(rows, **settings), prepare(rows, **settings, packing=True)
    documents = []
    for example in packed.train:
        assert sum(example["seq_lengths"]) == len(example["input_ids"]) == len(example["labels"]) <= 13
        documents += render_example(example, tokenizer).split("\n──────\n")
    assert sorted(documents) == sorted(shown(plain, tokenizer))
    for key in ("num_records", "num_truncated", "num_cut_tokens", "num_examples", "num_tokens", "num_loss_tokens"):
        assert packed.report["train"][key] == plain.report["train"][key]
    assert plain.report["train"]["num_truncated"] > 0
    assert packed.report["train"]["num_sequences"] == len(packed.train) < len(plain.train)
    assert sum(map(len, packed.train["input_ids"])) == packed.report["train"]["num_tokens"]


def test_packed_documents_never_learn_their_first_token(prepare, tokenizer):
    prepared = prepare([{"text": "abc"}, {"text": "de"}], format="text", packing=True, max_length=32)
    (example,) = prepared.train
    assert render_example(example, tokenizer) == "<s>⟦abc</s>⟧\n──────\n<s>⟦de</s>⟧"
    assert [index for index, label in enumerate(example["labels"]) if label == -100] == [0, 5]
    # TRL's collator would mask these positions as well, so nothing changes there.
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([example])
    assert batch["labels"].tolist() == [example["labels"]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 9]


@pytest.mark.parametrize("packing", [False, True])
def test_num_proc_changes_nothing(prepare, tmp_path, packing):
    rows = [{"text": "x" * (1 + i % 17)} for i in range(1203)]
    settings = {"format": "text", "weight": 1.5, "packing": packing, "max_length": 16}
    results = [prepare(rows, **settings, num_proc=n, cache_dir=str(tmp_path / str(n))) for n in (1, 2)]
    assert results[0].train.to_dict() == results[1].train.to_dict()
    assert results[0].report == results[1].report


def test_bad_record_is_named_from_a_tokenising_process(prepare):
    rows = [{"messages": CHAT}] * 3 + [{"messages": [{"role": "robot", "content": "x"}, *CHAT]}]
    with pytest.raises(RecipeError, match=r"data.jsonl:4: messages: the chat template fails: unknown role robot"):
        prepare(rows, format="messages", chat_template=TEMPLATE, num_proc=2)


# --------------------------------------------------------------------------------------------------------------- cache


def folders(tmp_path):
    return {path for path in (tmp_path / ".data_cache").iterdir() if path.is_dir()}


def test_same_contents_are_tokenised_once(prepare, tmp_path, tokenizer, monkeypatch):
    rows = [{"text": "abc"}]
    first = prepare(rows, format="text")
    (folder,) = folders(tmp_path)
    assert {path.name for path in folder.iterdir()} == {"train", "report.json"}
    monkeypatch.setattr(data_module, "tokenize_batch", None)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)  # leaves its mark on the tokenizer
    moved = prepare(rows, format="text", name="other", num_proc=2, seed=2)
    assert moved.train[0] == first.train[0]
    assert moved.report["train"]["sources"][0]["name"].endswith("other.jsonl")
    assert folders(tmp_path) == {folder}


def test_key_follows_what_the_tokens_depend_on(prepare, tmp_path, tokenizer):
    rows = [{"text": "abc"}, {"text": "d"}]
    variants = [
        {},
        {"max_length": 9},
        {"overlong": "drop"},
        {"overlong": "split"},
        {"packing": True},
        {"weight": 2.0},
        {"limit": 1},
        {"completion_only_loss": False},
        {"weight": 0.5},
        {"weight": 0.5, "seed": 2},
    ]
    for variant in variants:
        prepare(rows, format="text", **variant)
    assert len(folders(tmp_path)) == len(variants)
    prepare(rows[:1], format="text")
    prepare(train=[{"path": str(tmp_path / "data.jsonl"), "format": "text"}] * 2)
    prepare(rows[:1], format="text", eval=[{"path": str(tmp_path / "data.jsonl"), "format": "text"}])
    assert len(folders(tmp_path)) == len(variants) + 3
    tokenizer.eos_token = "<pad>"
    prepare(rows, format="text")
    assert len(folders(tmp_path)) == len(variants) + 4


@pytest.mark.parametrize("damage", ["truncated", "missing", "report"])
def test_damaged_cache_is_made_anew(prepare, tmp_path, caplog, damage):
    rows = [{"text": "abc"}] * 5
    before = prepare(rows, format="text").train.to_dict()
    (folder,) = folders(tmp_path)
    arrow = next((folder / "train").glob("*.arrow"))
    if damage == "truncated":
        arrow.write_bytes(arrow.read_bytes()[:-200])
    elif damage == "missing":
        arrow.unlink()
    else:
        (folder / "report.json").write_text("{}")
    assert prepare(rows, format="text").train.to_dict() == before
    assert "making it anew" in caplog.text


@pytest.mark.parametrize("text", ["abc", ""], ids=["built", "failed"])
def test_waiting_process_never_tokenises(prepare, tmp_path, text):
    # Written once, before either reads: the key of the cache is made from the file's size and time of change.
    source = {"path": write(tmp_path / "data.jsonl", [{"text": text}]), "format": "text"}
    results = {}

    def run(is_builder):
        try:
            prepared = prepare(train=[source], is_builder=is_builder)
            results[is_builder] = prepared.train.to_dict(), prepared.report
        except RecipeError as error:
            results[is_builder] = str(error)

    waiting = threading.Thread(target=run, args=(False,))
    waiting.start()
    run(True)
    waiting.join()
    assert results[False] == results[True]
    assert isinstance(results[True], tuple if text else str)


def test_one_log_line_and_no_files_elsewhere(prepare, tmp_path, caplog, capfd, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home)
    with caplog.at_level(logging.INFO, logger="fvae_dist"):
        prepare([{"text": "abc"}] * 3, format="text", num_proc=2, packing=True)
    (line,) = [record.message for record in caplog.records if record.name.startswith("fvae_dist")]
    assert line.startswith("data: train: 3 records, 1 sequences, 15 tokens (12 with loss), 0 truncated (0 tokens cut)")
    assert capfd.readouterr().err == ""
    assert not home.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", ".data_cache"}


def test_groups_of_the_training_data_are_counted(prepare, caplog):
    rows = [{"text": f"t {i}", "group": "ab"[i % 3 == 0]} for i in range(7)]
    with caplog.at_level(logging.INFO):
        prepared = prepare(rows, format="text", groups="group", eval=[])
    assert prepared.report["train"]["groups"] == {"a": 4, "b": 3}
    assert "group a: 4, group b: 3" in caplog.text
    assert prepare(rows, format="text", groups="group", limit=2).report["train"]["groups"] == {"b": 1, "a": 1}
    assert "groups" not in prepare(rows, format="text").report["train"]
    with pytest.raises(RecipeError, match=r'data.groups: .*data.jsonl:1: missing column "place"'):
        prepare(rows, format="text", groups="place")
