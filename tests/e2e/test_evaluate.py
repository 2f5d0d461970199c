"""The evaluate command on real tiny models: what it counts, what it keeps, and what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fvae_dist.evaluation.needle import needle_tasks
from fvae_dist.evaluation.prompts import render_prompt
from fvae_dist.evaluation.spurious import as_questions, make_suite
from fvae_dist.evaluation.tasks import Options
from tests.evaluating import boolq, records_of, write_json, write_speaker
from tests.models import randomise, tiny_adapter
from tests.recipes import RECORDS, byte_tokenizer, recipe_values, write_recipe, write_records

ROOT = Path(__file__).parents[2]


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
    # DeepSpeed cannot load other modules than the head, which is no part of the base, into a sharded model.
    command = ("--model", models / "base", "--adapter", tmp_path / "adapter", "--suite", "groups")
    sharded = ("--data", f"groups={data}", "--deepspeed", ROOT / "ds_configs" / "zero3.json")
    config = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"modules_to_save": ["score", "embed_tokens"]}))
    assert "brings whole modules (modules_to_save)" in refused(*command, *sharded)
    config.write_text(json.dumps(settings))
    assert "--suite gsm8k: needs a language model" in refused(*command[:-1], "gsm8k")
    correct = [row["correct"] for row in rows]
    assert result["groups"]["worst_group"]["value"] == min(sum(correct[:2]), sum(correct[2:])) / 2


# -------------------------------------------------------------------------------------------------------------- needle


def test_needle_hides_a_number_at_every_depth(evaluate, tmp_path):
    """The speaker knows no number, so nothing is found; the questions are as long and as deep as they say."""
    model = write_speaker(tmp_path / "model", "none", max_position_embeddings=2048)
    data = tmp_path / "filler.txt"
    data.write_text("some words that fill a page " * 3)
    settings = ("--max-length", "1616", "--limit", "6", "--repeats", "3")
    result = evaluate(model, "needle", data, *settings)["needle"]["needle"]
    assert result["num_samples"] == 6 and result["accuracy"]["value"] == 0.0
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


def test_spurious_suite_is_evaluated_by_group(evaluate, models, tmp_path):
    """A model that always says true is right in two of the four groups, whatever the cue."""
    examples = [(f"Number {i} is even.", ("true", "false")[i % 2]) for i in range(80)]
    suite = make_suite(examples, "position", shares=(0.5, 0.0, 0.5))
    data = write_records(tmp_path / "test.jsonl", as_questions(suite["test"]))
    result = evaluate(models / "true", "groups", data, "--mode", "generate")["groups"]["groups"]["groups"]
    accuracies = {name: (group["accuracy"]["value"], group["num_samples"]) for name, group in result["groups"].items()}
    assert accuracies == {
        "true|first": (1.0, 10),
        "true|last": (1.0, 10),
        "false|first": (0.0, 10),
        "false|last": (0.0, 10),
    }
    assert result["worst_group"]["value"] == 0.0 and result["gap"]["value"] == 0.5
