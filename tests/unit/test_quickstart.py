"""launch/quickstart.py: what `prepare` makes and reuses, what `report` draws and refuses."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "quickstart.py"


def _load_script():
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module  # dataclasses look their module up by name
    sys.path.insert(0, str(SCRIPT.parent))  # as it is when python runs the script
    spec.loader.exec_module(module)
    return module


quickstart = _load_script()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quickstart") / "prepared"
    assert quickstart.main(["prepare", "--fast", "--dir", str(directory)]) == 0
    return directory


@pytest.fixture
def run_dir(tmp_path):
    """A finished run as the training command leaves it; tests take from it what they need missing."""
    history = [
        {
            "step": step,
            "loss/total": 7000 / step,
            "loss/task": 7 / step,
            "loss/neg_elbo": 150 / step - 20,
            "elbo/nll": 130 / step - 25,
            "elbo/kl_z1": 20 / step,
            "elbo/z1_sq": 3.0,
            "elbo/z2_sq": 0.3,
        }
        for step in range(1, 6)
    ]
    metrics = {"eval_start": {"loss": 7.0}, "eval_end": {"loss": 2.0}, "history": history}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "adapter").mkdir()
    return tmp_path


def _report(directory, output_dir):
    return quickstart.main(["report", "--dir", str(directory), "--output-dir", str(output_dir)])


def test_split_topics_parts_share_no_paragraph():
    parts = quickstart.split_topics(quickstart.load_topics())
    keys = {part: {" ".join(paragraph.split()) for paragraph in parts[part]} for part in parts}
    assert set(keys) == {"base", "train", "heldout"}
    assert keys["base"].isdisjoint(keys["train"] | keys["heldout"])
    assert keys["train"].isdisjoint(keys["heldout"])
    total = sum(len(paragraph) for part in parts.values() for paragraph in part)
    for part, share in sys.modules["quickstart_text"].PART_SHARES.items():
        assert sum(map(len, parts[part])) / total == pytest.approx(share, abs=0.06)


def test_split_topics_ignores_the_order_of_topics():
    topics = quickstart.load_topics()
    assert quickstart.split_topics(topics) == quickstart.split_topics(dict(reversed(topics.items())))


def test_make_pairs_completion_fills_the_gaps():
    text = 'The "while" statement is used for repeated execution as long as an expression is true.'
    records = quickstart.make_pairs([text], 3, seed=0)
    assert len(records) == 3
    for record in records:
        blanked = record["prompt"].removeprefix("Text: ").removesuffix("\nMissing words:")
        for word in record["completion"].strip().split(", "):
            blanked = blanked.replace(" _ ", f" {word} ", 1)
        assert blanked == text


def test_prepare_heldout_sentences_are_in_no_training_text(prepared):
    parts = quickstart.split_topics(quickstart.load_topics())
    known = " ".join(" ".join(paragraph.split()) for part in ("base", "train") for paragraph in parts[part])
    records = [json.loads(line) for line in (prepared / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(records) == quickstart.FAST.num_heldout_pairs
    for record in records:
        sentence = record["prompt"].removeprefix("Text: ").removesuffix("\nMissing words:")
        for word in record["completion"].strip().split(", "):
            sentence = sentence.replace(" _ ", f" {word} ", 1)
        assert sentence not in known


def test_prepare_tokenizer_round_trips_text(prepared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared / "model")
    special = {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(special) == 4 and None not in special
    for text in ("for x in y:\n    pass\n\n\n  two  spaces ", " lead", "tab\tumlaut ü 漢字 — “quote”", ""):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text
        assert tokenizer.unk_token_id not in ids


def test_prepare_prompt_ids_open_prompt_and_completion_ids(prepared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared / "model")
    for line in (prepared / "train.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        prompt_ids = tokenizer(record["prompt"])["input_ids"]
        assert tokenizer(record["prompt"] + record["completion"])["input_ids"][: len(prompt_ids)] == prompt_ids


def test_prepare_base_model_loads_and_has_learned(prepared):
    from transformers import AutoModelForCausalLM

    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["base_loss_last"] < manifest["base_loss_first"] - 0.5
    model = AutoModelForCausalLM.from_pretrained(prepared / "model")
    assert model.config.vocab_size == quickstart.FAST.vocab_size
    assert (prepared / "model" / "model.safetensors").is_file()


def test_prepare_again_reuses(prepared, capsys):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    assert quickstart.main(["prepare", "--fast", "--dir", str(prepared)]) == 0
    assert capsys.readouterr().out.startswith("reusing")
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before


@pytest.mark.parametrize("damage", ["no manifest", "other settings", "no model"])
def test_is_prepared_refuses_unfinished_or_other(tmp_path, damage):
    for name in quickstart.ARTIFACTS:
        (tmp_path / name).mkdir()
    (tmp_path / "manifest.json").write_text(json.dumps({"fingerprint": "a"}))
    assert quickstart._is_prepared(tmp_path, "a")
    if damage == "no manifest":
        (tmp_path / "manifest.json").unlink()
    if damage == "no model":
        (tmp_path / "model").rmdir()
    assert not quickstart._is_prepared(tmp_path, "b" if damage == "other settings" else "a")


def test_prepare_killed_while_training_is_not_finished(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "write_model", killed)
    with pytest.raises(KeyboardInterrupt):
        quickstart.prepare(tmp_path, quickstart.FAST)
    assert [path.name for path in tmp_path.iterdir()] == [".partial"]


def test_report_draws_and_prints(prepared, run_dir, capsys):
    assert _report(prepared, run_dir) == 0
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for expected in ("base 7.000 -> adapted 2.000", "-71.4%", str(run_dir / "adapter"), "tensorboard --logdir"):
        assert expected in printed


def test_report_draws_a_baseline_without_elbo(prepared, run_dir):
    metrics = json.loads((run_dir / "metrics.json").read_text())
    metrics["history"] = [{"step": 1, "loss/task": 3.0}, {"step": 2, "loss/task": 2.0}]
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    assert _report(prepared, run_dir) == 0


@pytest.mark.parametrize("adapted", [7.0, 7.5, float("nan")])
def test_report_exits_1_when_the_heldout_loss_did_not_fall(prepared, run_dir, capsys, adapted):
    metrics = json.loads((run_dir / "metrics.json").read_text())
    metrics["eval_end"]["loss"] = adapted
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    assert _report(prepared, run_dir) == 1
    assert "did not fall" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "{", "[]", '{"eval_start": {"loss": 1.0}}'])
def test_report_exits_2_without_usable_metrics(prepared, run_dir, capsys, content):
    path = run_dir / "metrics.json"
    path.unlink() if content is None else path.write_text(content)
    assert _report(prepared, run_dir) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "metrics.json" in message


def test_report_exits_2_without_adapter_or_preparation(prepared, run_dir, tmp_path, capsys):
    assert _report(tmp_path / "absent", run_dir) == 2
    (run_dir / "adapter").rmdir()
    assert _report(prepared, run_dir) == 2
    assert capsys.readouterr().err.count("\n") == 2
