"""The evaluate command on real tiny models: what it counts, what it keeps, and what it refuses."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fvae_dist.cli import evaluate_command
from fvae_dist.evaluation.inference import Inference
from fvae_dist.evaluation.needle import needle_tasks
from fvae_dist.evaluation.prompts import render_prompt
from fvae_dist.evaluation.tasks import Options
from fvae_dist.training.control import lock_output_dir
from tests.evaluating import boolq, write_adapted, write_json, write_speaker
from tests.models import randomise, tiny_adapter
from tests.recipes import RECORDS, byte_tokenizer, recipe_values, write_recipe, write_records

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """true/ and garbage/ say just that; base/ and adapter/ are random."""
    folder = tmp_path_factory.mktemp("models")
    write_speaker(folder / "true", "true")
    write_speaker(folder / "garbage", "zz")
    write_adapted(folder)
    return folder


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def evaluate(tmp_path, capfd):
    """evaluate(model, suite, data, *arguments): run the command, which must succeed; returns results["suites"]."""

    def evaluate(model: Path, suite: str, data: Path, *arguments: str, out: str = "out"):
        command = ["--model", model, "--suite", suite, "--data", f"{suite}={data}", "--out", tmp_path / out, *arguments]
        assert evaluate_command([str(argument) for argument in command]) == 0, capfd.readouterr().err
        assert capfd.readouterr().out == (tmp_path / out / "results.md").read_text()
        return json.loads((tmp_path / out / "results.json").read_text())["suites"]

    return evaluate


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ right, wrong, garbage


@pytest.mark.parametrize(
    ("says", "answers", "accuracy", "failures"),
    [("true", "ttttt", 1.0, 0), ("true", "fffff", 0.0, 0), ("true", "ttftf", 0.6, 0), ("garbage", "ttttt", 0.0, 5)],
)
def test_what_the_model_always_says_is_what_it_gets(evaluate, models, tmp_path, says, answers, accuracy, failures):
    folder = write_json(tmp_path / "sets" / "boolq.test.json", boolq(answers)).parent
    result = evaluate(models / says, "commonsense", folder, "--batch-size", "2")["commonsense"]["boolq"]
    assert result["accuracy"]["value"] == accuracy and result["num_parse_failures"] == failures
    assert result["num_samples"] == 5
    for record, letter in zip(records_of(tmp_path / "out" / "commonsense" / "boolq.jsonl"), answers, strict=True):
        assert record["prediction"] == (None if failures else "true")
        assert record["correct"] is (letter == "t" and not failures)
        assert record["output"] == ("z" * 32 if failures else "true")


def test_likelihood_of_the_answers(evaluate, models, tmp_path):
    """Against the model's own loss on prompt + answer, one text at a time, without padding or batches."""
    records = boolq("tftf")
    folder = write_json(tmp_path / "sets" / "boolq" / "test.json", records).parent.parent
    command = ("--adapter", models / "adapter", "--mode", "loglikelihood", "--batch-size", "3")
    result = evaluate(models / "base", "commonsense", folder, *command)["commonsense"]["boolq"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models / "base"), models / "adapter")
    kept = records_of(tmp_path / "out" / "commonsense" / "boolq.jsonl")
    for record, row in zip(records, kept, strict=True):
        expected = torch.tensor([log_likelihood(model, record["instruction"], answer) for answer in ("true", "false")])
        assert row["choices"] == ["true", "false"]
        torch.testing.assert_close(torch.tensor(row["probabilities"]), expected.softmax(0), rtol=1e-4, atol=0)
        assert row["prediction"] == row["choices"][int(expected.argmax())]
    nll = -sum(math.log(row["probabilities"][row["choices"].index(row["answer"])]) for row in kept) / 4
    assert result["calibration"]["nll"] == pytest.approx(nll)


def log_likelihood(model, instruction: str, answer: str) -> float:
    tokenizer = byte_tokenizer()
    prompt = tokenizer(render_prompt("clean", instruction))["input_ids"]
    ids = torch.tensor([prompt + tokenizer(answer, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        log_TV = model.eval()(ids).logits[0].log_softmax(-1)
    return sum(float(log_TV[t - 1, ids[0, t]]) for t in range(len(prompt), ids.shape[1]))


def test_generation_is_the_models_own(evaluate, models, tmp_path):
    """Batched and padded on the left, against one prompt at a time."""
    records = boolq("tft")
    data = write_json(tmp_path / "boolq.json", records)
    evaluate(models / "base", "commonsense", data, "--adapter", models / "adapter", "--max-new-tokens", "8")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models / "base"), models / "adapter").eval()
    tokenizer = byte_tokenizer()
    for record, row in zip(records, records_of(tmp_path / "out" / "commonsense" / "boolq.jsonl"), strict=True):
        prompt = tokenizer(render_prompt("clean", record["instruction"]), return_tensors="pt")
        prompt.pop("token_type_ids", None)
        written = model.generate(**prompt, max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert row["output"] == tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_gsm8k_counts_the_last_number(evaluate, tmp_path):
    model = write_speaker(tmp_path / "model", "#72", max_position_embeddings=1024)
    records = [
        {"question": "How many?", "answer": "6 * 12 = 72\n#### 72"},
        {"question": "And now?", "answer": "#### 7"},
    ]
    data = write_records(tmp_path / "test.jsonl", records)
    result = evaluate(model, "gsm8k", data)["gsm8k"]["gsm8k"]
    assert result["accuracy"]["value"] == 0.5 and result["num_parse_failures"] == 0
    assert [row["prediction"] for row in records_of(tmp_path / "out" / "gsm8k" / "gsm8k.jsonl")] == ["72", "72"]


@pytest.mark.parametrize("split", ["eval", "train"])
def test_perplexity_of_a_recipes_data(evaluate, models, tmp_path, split):
    """The token-weighted mean loss on the completions, as the model computes it for each record alone."""
    write_records(tmp_path / "data.jsonl")
    values = recipe_values(tmp_path, models / "base")
    values["data"]["eval"] = [{"path": str(tmp_path / "data.jsonl"), "limit": 2}]
    recipe = write_recipe(tmp_path, values)
    command = ("--adapter", models / "adapter", "--batch-size", "2")
    result = evaluate(models / "base", "perplexity", Path(f"{recipe}:{split}"), *command)["perplexity"][split]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models / "base"), models / "adapter").eval()
    rows = records_of(tmp_path / "out" / "perplexity" / f"{split}.jsonl")
    assert len(rows) == result["num_samples"] == {"eval": 2, "train": 3}[split]
    tokenizer, total = byte_tokenizer(), 0.0
    for record, row in zip(RECORDS, rows):
        prompt = tokenizer(render_prompt("clean", record["instruction"], record.get("input", "")))["input_ids"]
        answer = [*tokenizer(record["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            loss = model(ids, labels=labels).loss
        assert row["num_tokens"] == len(answer)
        assert row["nll"] == pytest.approx(float(loss) * len(answer), rel=1e-5)
        total += row["nll"]
    assert result["loss"]["value"] == pytest.approx(total / result["num_tokens"])
    assert result["perplexity"]["value"] == pytest.approx(math.exp(result["loss"]["value"]))


# -------------------------------------------------------------------------------------------------------------- groups


def test_worst_group_of_answers_as_text(evaluate, models, tmp_path):
    records = boolq("ttf", group="easy") + boolq("ff", group="hard")
    data = write_json(tmp_path / "groups.json", records)
    result = evaluate(models / "true", "groups", data, "--mode", "generate")["groups"]["groups"]
    assert result["groups"]["worst_group"]["value"] == 0.0 and result["groups"]["worst_group_name"] == "hard"
    assert result["groups"]["average"]["value"] == 0.4
    assert result["groups"]["groups"]["easy"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert "| worst group (hard) |" in (tmp_path / "out" / "results.md").read_text()
    likely = evaluate(models / "true", "groups", data, out="likely")["groups"]["groups"]
    assert likely["groups"]["groups"] == result["groups"]["groups"] and likely["calibration"]["ece"] > 0


def test_worst_group_of_a_classifier(evaluate, refused, models, tmp_path):
    """An adapter of task type SEQ_CLS with the head it was trained with."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(models / "base", num_labels=2, pad_token_id=0)
    model = randomise(get_peft_model(base, tiny_adapter(task_type="SEQ_CLS", target_modules=["q_proj"]))).eval()
    model.save_pretrained(tmp_path / "adapter")
    texts = ["a cat", "the dog barks", "birds", "a cow says moo"]
    records = [{"text": text, "label": i % 2, "group": f"g{i // 2}"} for i, text in enumerate(texts)]
    data = write_json(tmp_path / "groups.json", records)
    result = evaluate(models / "base", "groups", data, "--adapter", tmp_path / "adapter")["groups"]["groups"]
    rows = records_of(tmp_path / "out" / "groups" / "groups.jsonl")
    for record, row in zip(records, rows, strict=True):
        ids = byte_tokenizer()(record["text"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = model(ids).logits[0].softmax(-1)
        torch.testing.assert_close(torch.tensor(row["probabilities"]), expected, rtol=1e-4, atol=1e-6)
    # DeepSpeed cannot load the head that the adapter brings into a sharded model.
    command = ("--model", models / "base", "--adapter", tmp_path / "adapter", "--suite", "groups")
    sharded = ("--data", f"groups={data}", "--deepspeed", ROOT / "ds_configs" / "zero3.json")
    assert "brings whole modules (modules_to_save)" in refused(*command, *sharded)
    assert "--suite gsm8k: needs a language model" in refused(*command[:-1], "gsm8k")
    correct = [row["correct"] for row in rows]
    assert result["groups"]["worst_group"]["value"] == min(sum(correct[:2]), sum(correct[2:])) / 2


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


@pytest.fixture
def refused(tmp_path, capfd):
    """refused(*arguments): the one line that the command prints; it must write no result."""

    def refused(*arguments) -> str:
        capfd.readouterr()
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.json*") if path.is_file()}
        assert evaluate_command([*map(str, arguments), "--out", str(tmp_path / "out")]) == 2
        captured = capfd.readouterr()
        lines = [line for line in captured.err.splitlines() if line and "Loading weights" not in line]
        assert captured.out == "" and len(lines) == 1 and lines[0].startswith("error: "), captured.err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.json*") if path.is_file()} == before
        return lines[0].removeprefix("error: ")

    return refused


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
    assert "adapter_model.safetensors is broken" in refused(*arguments, folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "holds no adapter_model.safetensors (pickled files are not loaded)" in refused(*arguments, folder)


# -------------------------------------------------------------------------------------------------------------- needle


def test_needle_hides_a_number_at_every_depth(evaluate, tmp_path):
    """The speaker knows no number, so nothing is found; the questions are as long and as deep as they say."""
    model = write_speaker(tmp_path / "model", "none", max_position_embeddings=2048)
    data = tmp_path / "filler.txt"
    data.write_text("some words that fill a page " * 3)
    result = evaluate(model, "needle", data, "--max-length", "1616", "--limit", "10")["needle"]["needle"]
    assert result["num_samples"] == 10 and result["accuracy"]["value"] == 0.0
    assert result["cells"] == {"400 x 0%": 0.0, "400 x 25%": 0.0}
    tokenizer = byte_tokenizer()
    options = Options({"needle": str(data)}, max_length=1616)
    (task,) = needle_tasks(tokenizer, options)
    assert sorted({sample.facts["length"] for sample in task.samples}) == [400, 800, 1600]
    for sample in task.samples:
        text = tokenizer.decode(sample.rows[0].ids)
        assert sample.facts["length"] - 40 < sample.num_tokens <= sample.facts["length"]
        assert text.count(sample.facts["answer"]) == 1
        before, after = (part.count("page") for part in text.split("The secret number is"))
        assert abs(before - sample.facts["depth"] * (before + after)) <= 1
    right, other = task.samples[:2]
    answer = right.facts["answer"]
    assert task.judge(right, f" It is {int(answer):,}.")["correct"] and not task.judge(other, answer)["correct"]
    assert task.judge(right, "no idea")["prediction"] is None
