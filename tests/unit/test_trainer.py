"""The trainer mixin in one process: losses, gradients, logs, refusals. Ranks and ZeRO: tests/distributed."""

import math

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fvae_dist import FVAELoraConfig, FVAETrainerMixin, side_loss
from fvae_dist.adapter import vae
from fvae_dist.adapter.noise import TokenNoise
from fvae_dist.training.callbacks import StartupChecks
from fvae_dist.training.checks import StartupError, check_trainable_parameters
from fvae_dist.training.no_waiting import NonFiniteLossError
from tests.distributed.layouts import reference_step, task_loss
from tests.distributed.tiny import attach, llama_config, pad_rows, rows

RTOL = 1e-5


class SFT(FVAETrainerMixin, SFTTrainer):
    pass


class Plain(FVAETrainerMixin, transformers.Trainer):
    pass


def tiny_llama(**overrides):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(llama_config(**overrides))


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models

    core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


class Gradients(TrainerCallback):
    """Gradients right before the first optimizer step."""

    def __init__(self):
        self.values = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.values:
            self.values = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


OF_MIXIN = ("side_loss_tokens", "telemetry", "gradient_split_every")


def make_trainer(tmp_path, tokenizer, trainer=SFT, model=None, data=None, eval_data=None, collator=None, **arguments):
    of_mixin = {key: arguments.pop(key) for key in OF_MIXIN if key in arguments}
    values = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
        "seed": 5,
    }
    if issubclass(trainer, SFTTrainer):
        special = {"max_length": None, "packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        args = SFTConfig(**(values | special | arguments))
    else:
        args = TrainingArguments(**(values | arguments))
    return trainer(
        model=attach(tiny_llama()) if model is None else model,
        args=args,
        train_dataset=Dataset.from_list(rows(8) if data is None else data),
        eval_dataset=Dataset.from_list(eval_data) if eval_data else None,
        data_collator=collator or DataCollatorForLanguageModeling(pad_token_id=0),
        processing_class=tokenizer,
        **of_mixin,
    )


@pytest.fixture(scope="module")
def reference():
    """The eight rows as one batch, without a trainer."""
    return reference_step(attach(tiny_llama()).train(), pad_rows(rows(8)))


def assert_step_equals(reference, trainer):
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss/task"] == pytest.approx(reference["task"], rel=RTOL)
    assert log["loss/neg_elbo"] == pytest.approx(reference["neg_elbo"], rel=RTOL)
    assert log["loss/total"] == pytest.approx(1000 * log["loss/task"] + log["loss/neg_elbo"], rel=RTOL)
    for term in ("nll", "kl_z1", "z1_sq", "z2_sq"):
        assert log[f"elbo/{term}"] == pytest.approx(reference["terms"][term], rel=RTOL)
    assert log["elbo/active_units"] == reference["terms"]["active_z1"]
    assert log["perf/tokens_per_s_per_gpu"] > 0
    assert set(gradients.values) == set(reference["gradients"])
    for name, expected in reference["gradients"].items():
        atol = RTOL * expected.abs().max().item()
        torch.testing.assert_close(
            gradients.values[name], expected, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


# ------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("trainer", [SFT, Plain])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_step_is_that_of_the_global_batch(tmp_path, tokenizer, reference, trainer, accumulation, checkpointing):
    built = make_trainer(
        tmp_path,
        tokenizer,
        trainer,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
    )
    assert_step_equals(reference, built)


def test_padding_amount_does_not_matter(tmp_path, tokenizer, reference):
    collator = DataCollatorForLanguageModeling(pad_token_id=0, pad_to_multiple_of=32)
    assert_step_equals(reference, make_trainer(tmp_path, tokenizer, collator=collator))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_packed_step_equals_unpacked(tmp_path, tokenizer, reference, accumulation):
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    # TRL drops the loss on each document's first token: nothing predicts it.
    built = make_trainer(
        tmp_path,
        tokenizer,
        collator=collator,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    assert_step_equals(reference, built)


def test_incomplete_last_accumulation_is_weighted_by_its_own_tokens(tmp_path, tokenizer):
    """Three batches of two, accumulated by two: the second step has one batch, and its logs are that batch's."""
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        data=rows(6),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        learning_rate=1e-12,
    )
    seen = []
    original = trainer.get_batch_samples

    def watch(*args, **kwargs):
        samples = original(*args, **kwargs)
        seen.append([batch["input_ids"][:, 0].tolist() for batch in samples[0]])
        return samples

    trainer.get_batch_samples = watch
    trainer.train()
    by_first_token = {row["input_ids"][0]: row for row in rows(6)}
    assert [len(step) for step in seen] == [2, 1]
    model = attach(tiny_llama()).train()
    for index, (step, log) in enumerate(zip(seen, trainer.state.log_history)):
        batch = pad_rows([by_first_token[token] for micro_batch in step for token in micro_batch])
        expected = reference_step(model, batch, step=index)
        assert log["loss/task"] == pytest.approx(expected["task"], rel=RTOL)
        assert log["loss/neg_elbo"] == pytest.approx(expected["neg_elbo"], rel=RTOL)


def test_eval_loss_has_no_side_loss(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, eval_data=rows(5, seed=3), per_device_eval_batch_size=5)
    model = attach(tiny_llama()).eval()
    with torch.no_grad():
        expected = task_loss(model, pad_rows(rows(5, seed=3))).item()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=RTOL)
    assert not any("elbo" in key for key in metrics)


def test_evaluation_is_the_plain_trainers(tmp_path, tokenizer):
    """An incomplete last batch, larger than a training batch: nothing of it may be taken for filler."""
    losses = []
    for trainer in (Plain, transformers.Trainer):
        built = make_trainer(
            tmp_path,
            tokenizer,
            trainer,
            eval_data=rows(7, seed=3),
            per_device_train_batch_size=1,
            per_device_eval_batch_size=4,
        )
        losses.append(built.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


def test_logs_average_over_steps(tmp_path, tokenizer):
    """A line every second step holds the mean of what two lines would have said."""
    lines = []
    for index, logging_steps in enumerate((1, 2)):
        trainer = make_trainer(
            tmp_path / str(index), tokenizer, per_device_train_batch_size=2, max_steps=2, logging_steps=logging_steps
        )
        trainer.train()
        lines.append([row for row in trainer.state.log_history if "loss/task" in row])
    for key in ("loss/task", "loss/neg_elbo", "loss/total"):
        assert lines[1][0][key] == pytest.approx((lines[0][0][key] + lines[0][1][key]) / 2, rel=RTOL), key


def test_baseline_of_another_method_is_left_alone(tmp_path, tokenizer):
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, tokenizer, model=get_peft_model(tiny_llama(), lora))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss/total"] == log["loss/task"] == pytest.approx(log["loss"], rel=1e-6)
    assert "loss/neg_elbo" not in log and log["perf/tokens_per_s_per_gpu"] > 0
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("trainer", [SFT, Plain])
@pytest.mark.parametrize("argument", ["gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"])
def test_reentrant_checkpointing_is_refused(tmp_path, tokenizer, trainer, argument):
    if argument not in TrainingArguments.__dataclass_fields__:
        pytest.skip("this transformers has only the old name")
    with pytest.raises(ValueError, match=r"use_reentrant.*side"):
        make_trainer(tmp_path, tokenizer, trainer, gradient_checkpointing=True, **{argument: {"use_reentrant": True}})


def test_checkpointing_is_non_reentrant_by_default(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, gradient_checkpointing=True)
    trainer.train()
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in trainer.model.modules()]
    keywords = [function.keywords for function in functions if function is not None]
    assert keywords and all(entry["use_reentrant"] is False for entry in keywords)


def test_padded_packing_is_refused(tmp_path, tokenizer):
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=8)
    with pytest.raises(ValueError, match="pad_to_multiple_of"):
        make_trainer(tmp_path, tokenizer, collator=collator)


def test_non_finite_loss_names_step_and_records(tmp_path, tokenizer):
    model = attach(tiny_llama())
    data = rows(8)
    for row in data:
        row["input_ids"] = [2 if token == 63 else token for token in row["input_ids"]]
    data[5]["input_ids"][-1] = 63
    with torch.no_grad():
        model.get_input_embeddings().weight[63] = math.nan
    trainer = make_trainer(tmp_path, tokenizer, model=model, data=data, per_device_train_batch_size=1, max_steps=8)
    with pytest.raises(NonFiniteLossError, match=r"non-finite loss in step \d on rank\(s\) 0; rank 0 .* records \[5\]"):
        trainer.train()


# ------------------------------------------------------------------------------------------------- what can be seen


def test_labelled_tokens_alone_can_count(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, side_loss_tokens="labelled")
    trainer.train()
    batch = pad_rows(rows(8))
    model = attach(tiny_llama()).train()
    noise = TokenNoise(batch, seed=5, step=0)
    with side_loss.collect(model, token_mask=batch["labels"] != -100, noise=noise) as collected:
        task = task_loss(model, batch)
    log = trainer.state.log_history[0]
    assert log["loss/neg_elbo"] == pytest.approx(collected.neg_elbo.item(), rel=RTOL)
    assert log["loss/task"] == pytest.approx(task.item(), rel=RTOL)
    assert int(collected.num_tokens) < batch["attention_mask"].sum()


def test_telemetry_changes_nothing_and_off_it_computes_nothing(tmp_path, tokenizer, monkeypatch):
    calls = []
    compute = vae.token_statistics
    monkeypatch.setattr(vae, "token_statistics", lambda *args: calls.append(1) or compute(*args))
    finals = []
    for telemetry, num_calls in ((True, 2 * 4), (False, 0)):
        calls.clear()
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            max_steps=3,
            logging_steps=3,
            logging_first_step=True,
            gradient_checkpointing=True,
            telemetry=telemetry,
        )
        trainer.train()
        # Four layers, in the two steps that are logged; recomputation computes none.
        assert len(calls) == num_calls
        lines = [row for row in trainer.state.log_history if "loss/task" in row]
        assert [row["step"] for row in lines] == [1, 3]
        assert all(("elbo/nll" in row) == telemetry and "loss/neg_elbo" in row for row in lines)
        finals.append({name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad})
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())


def test_collapsed_latents_are_warned_of(tmp_path, tokenizer, caplog):
    """A fresh adapter's mean heads are zero; a learning rate of nothing leaves them so."""
    model = get_peft_model(tiny_llama(), FVAELoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer = make_trainer(tmp_path, tokenizer, model=model, max_steps=4, learning_rate=1e-12)
    trainer.train()
    (record,) = [record for record in caplog.records if "collapse" in record.getMessage()]
    assert "layers.0.self_attn.q_proj" in record.getMessage()


@pytest.mark.parametrize("trainer", [SFT, Plain])
def test_gradients_of_the_losses_apart_are_logged_when_due(tmp_path, tokenizer, trainer):
    built = make_trainer(tmp_path, tokenizer, trainer, max_steps=4, gradient_split_every=2)
    built.train()
    lines = [row for row in built.state.log_history if "loss/task" in row]
    assert [any(key.startswith("gradient/") for key in row) for row in lines] == [False, True, False, True]
    norms = {key: value for key, value in lines[1].items() if key.startswith("gradient/")}
    assert norms["gradient/task/lora_B"] > 0 and norms["gradient/side/decoder"] > 0
    assert norms["gradient/task/decoder"] == norms["gradient/task/encoder2"] == 0


def test_adapter_for_inference_only_is_refused(tmp_path, tokenizer):
    attach(tiny_llama()).save_pretrained(tmp_path / "adapter", inference_only=True)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"inference_only=True: encoder 2 and decoder are missing"):
        make_trainer(tmp_path, tokenizer, model=model)


# ------------------------------------------------------------------------------------------------- start-up checks


def test_start_refuses_narrow_and_frozen_adapters():
    model = attach(tiny_llama())
    check_trainable_parameters(model)
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.data = parameter.data.bfloat16()
    with pytest.raises(StartupError, match=r"is torch.bfloat16, not float32"):
        check_trainable_parameters(model)
    model.requires_grad_(False)
    with pytest.raises(StartupError, match="no parameter is trainable"):
        check_trainable_parameters(model)


def test_start_refuses_a_trainable_base():
    model = attach(tiny_llama())
    next(p for name, p in model.named_parameters() if ".base_layer." in name).requires_grad_(True)
    with pytest.raises(StartupError, match="belongs to the frozen base"):
        check_trainable_parameters(model)


def test_start_seeds_noise_by_rank(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    StartupChecks(trainer).on_train_begin(trainer.args, trainer.state, trainer.control)
    drawn = torch.randn(3)
    torch.manual_seed(5 + 1)
    assert torch.equal(drawn, torch.randn(3))


# ------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(attention):
    """transformers builds block masks from position_ids that restart; a packed batch has no attention mask."""
    documents = rows(4)
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(documents)
    assert "attention_mask" not in batch and batch["input_ids"].shape[0] == 1
    model = attach(tiny_llama(attn_implementation=attention)).eval()
    with torch.no_grad():
        packed = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[0]
        separate = [model(input_ids=torch.tensor([document["input_ids"]])).logits[0] for document in documents]
    torch.testing.assert_close(packed, torch.cat(separate), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trainer", [SFT, Plain])
def test_weight_decay_spares_biases_and_the_decoder_scale(tmp_path, tokenizer, trainer):
    instance = make_trainer(tmp_path, tokenizer, trainer, weight_decay=0.1)
    names = {id(p): name for name, p in instance.model.named_parameters()}
    groups = instance.create_optimizer().param_groups
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    spared = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert decayed | spared == {name for name, p in instance.model.named_parameters() if p.requires_grad}
    assert all(name.endswith(".weight") for name in decayed)
    assert all(name.endswith((".bias", ".decoder.scale")) for name in spared)
