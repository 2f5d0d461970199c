"""The evaluate command: what it keeps when it is stopped, and what it refuses in one line."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from fvae_dist.evaluation.inference import Inference
from fvae_dist.training.control import lock_output_dir
from tests.evaluating import boolq, records_of, write_json

# ------------------------------------------------------------------------------------------------------------ resuming


def test_resumed_evaluation_is_the_uninterrupted_one(evaluate, models, tmp_path, monkeypatch):
    data = write_json(tmp_path / "boolq.json", boolq("tftfttf"))
    command = (models / "base", "commonsense", data, "--batch-size", "2", "--adapter", models / "adapter")
    whole = evaluate(*command, "--max-new-tokens", "4")
    path = tmp_path / "out" / "commonsense" / "boolq.jsonl"
    expected = path.read_bytes()
    lines = expected.splitlines(keepends=True)
    path.write_bytes(b"".join([lines[5], lines[0], lines[3], lines[2][:20]]))  # died while it wrote the fourth
    asked = []
    run = Inference.run
    monkeypatch.setattr(Inference, "run", lambda self, task, batch: asked.extend(batch) or run(self, task, batch))
    assert evaluate(*command, "--max-new-tokens", "4") == whole
    assert path.read_bytes() == expected
    assert 0 < len(asked) < 7  # only the batches that lacked a sample
    asked.clear()
    assert evaluate(*command, "--max-new-tokens", "4") == whole and not asked


def test_every_finished_batch_is_kept_when_the_process_dies(evaluate, models, tmp_path, monkeypatch):
    data = write_json(tmp_path / "boolq.json", boolq("tftfttf"))
    run, calls = Inference.run, []

    def run_twice(self, task, batch):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, task, batch)

    monkeypatch.setattr(Inference, "run", run_twice)
    with pytest.raises(KeyboardInterrupt):
        evaluate(models / "true", "commonsense", data, "--batch-size", "2")
    assert len(records_of(tmp_path / "out" / "commonsense" / "boolq.jsonl")) == 4
    assert not (tmp_path / "out" / "results.json").exists()
    evaluate(models / "true", "commonsense", data, "--batch-size", "2")
    assert len(records_of(tmp_path / "out" / "commonsense" / "boolq.jsonl")) == 7 and len(calls) == 5


def test_other_settings_do_not_mix(evaluate, refused, models, tmp_path):
    data = write_json(tmp_path / "boolq.json", boolq("tf"))
    evaluate(models / "true", "commonsense", data)
    before = (tmp_path / "out" / "commonsense" / "boolq.jsonl").read_bytes()
    arguments = ("--model", models / "true", "--suite", "commonsense", "--data", f"commonsense={data}")
    for other, reason in {
        ("--batch-size", "3"): "made with another batch_size (8, now 3)",
        ("--template", "published"): "made with another template (clean, now published)",
        ("--mode", "loglikelihood"): "made with another mode (generate, now score)",
        ("--limit", "1"): "made with another data",
    }.items():
        assert reason in refused(*arguments, *other)
    assert (tmp_path / "out" / "commonsense" / "boolq.jsonl").read_bytes() == before
    evaluate(models / "true", "commonsense", data, "--batch-size", "3", "--overwrite")


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--suite", "comonsense"], "--suite: unknown suite 'comonsense'; did you mean commonsense?"),
        (["--suite", "commonsense"], "--suite commonsense: needs its data: --data commonsense=PATH"),
        (["--suite", "commonsense", "--data", "commonsense=nowhere"], "--data commonsense: there is no nowhere"),
        (["--suite", "commonsense", "--data", "boolq.json"], "--data boolq.json: write SUITE=PATH"),
        (["--suite", "gsm8k", "--data", "groups=x"], "--data groups=x: --suite does not name groups"),
        (["--suite", "gsm8k,gsm8k"], "--suite gsm8k,gsm8k: gsm8k stands there twice"),
        (["--suite", "perplexity"], "--suite perplexity: needs a recipe"),
        (["--suite", "perplexity", "--data", "perplexity=none.yaml"], "none.yaml: cannot read the recipe"),
        (["--suite", "gsm8k", "--max-length", "300"], "--max-new-tokens: 512 of gsm8k leave no room"),
        (["--suite", "gsm8k", "--max-length", "5000"], "--max-length: 5000 is longer than the model's 512"),
        (["--suite", "gsm8k", "--batch-size", "0"], "argument --batch-size: must be a number >= 1, got 0"),
        (["--suite", "gsm8k", "--limit", "x"], "argument --limit: invalid number value: 'x'"),
        (["--suite", "gsm8k", "--adapter", "nowhere"], "--adapter nowhere: holds no adapter_config.json"),
        (["--suite", "gsm8k", "--deepspeed", "nowhere.json"], "--deepspeed: nowhere.json: no such file"),
        (["--suite", "gsm8k", "--attention", "flash_attention_2"], "--attention: flash_attention_2 cannot run here"),
        (["--suite", "gsm8k", "--model", ""], "--model '': String should have at least 1 character"),
        (["--suite", "gsm8k", "--model", "nowhere/at/all"], "--model: there is no folder nowhere/at/all"),
    ],
)
def test_bad_argument_is_one_line(refused, models, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    assert refused("--model", models / "base", *arguments).startswith(line)


def test_one_evaluation_a_folder(refused, models, tmp_path):
    data = write_json(tmp_path / "boolq.json", boolq("tf"))
    arguments = ("--model", models / "true", "--suite", "commonsense", "--data", f"commonsense={data}")
    with lock_output_dir(tmp_path / "out"):
        assert refused(*arguments).startswith(f"--out: {tmp_path / 'out'} is in use by process")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('[{"instruction": "q"}]', ':1: missing column "answer" (has: instruction)'),
        ('[\n{"instruction": "Answer format: a/b", "answer": "c"}]', ":2: the answer 'c' is none of a, b"),
        ('[{"answer": "a"}]', ':1: missing column "instruction"'),
        ("[[]]", ":1: a record must be an object, not list"),
        ("[{]", ":1: broken JSON"),
        ("[]", ": holds no record"),
    ],
)
def test_bad_data_is_named_by_line(refused, models, tmp_path, content, line):
    data = tmp_path / "set.json"
    data.write_text(content)
    message = refused("--model", models / "base", "--suite", "commonsense", "--data", f"commonsense={data}")
    assert message.startswith(f"{data}{line}")


def test_adapters_that_cannot_be_loaded(refused, models, tmp_path):
    data = write_json(tmp_path / "boolq.json", boolq("tf"))
    arguments = ("--model", models / "base", "--suite", "commonsense", "--data", f"commonsense={data}", "--adapter")
    folder = tmp_path / "adapter"
    shutil.copytree(models / "adapter", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), folder / "adapter_model.safetensors")
    assert "does not fit the base model" in refused(*arguments, folder)
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    assert "adapter_model.safetensors: Error while deserializing header" in refused(*arguments, folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "holds no adapter_model.safetensors (pickled files are not loaded)" in refused(*arguments, folder)
