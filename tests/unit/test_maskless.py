"""Rows padded on the right train as with their mask; whatever needs a mask keeps it."""

import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fvae_dist.training import maskless
from fvae_dist.training.batches import NUM_LABELLED, PADDED_BEHIND, WithHostFacts
from fvae_dist.training.head import head_problem
from fvae_dist.training.maskless import is_causal
from tests.distributed.layouts import training_rows
from tests.distributed.tiny import VOCABULARY, llama_config
from tests.trainers import logged, train


class PadsBefore(DataCollatorForLanguageModeling):
    """Rows padded on the left."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        for row, mask in enumerate(batch["attention_mask"]):
            for key in ("input_ids", "labels", "attention_mask"):
                batch[key][row] = batch[key][row].roll(int((mask == 0).sum()))
        return batch


@pytest.fixture
def masks(monkeypatch):
    """Of every attention call: whether it has a mask."""
    found = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def recorded(*args, attn_mask=None, **kwargs):
        found.append(attn_mask is not None)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    return found


def test_rows_padded_on_the_right_train_the_same_without_a_mask(tmp_path, masks, monkeypatch):
    without = train(tmp_path / "without")
    assert masks and not any(masks)
    evaluated = without.evaluate()["eval_loss"]
    assert not any(masks)
    monkeypatch.setattr(maskless, "is_causal", lambda model: False)
    masks.clear()
    with_mask = train(tmp_path / "with")
    assert any(masks)
    for key in ("loss", "loss/task", "loss/neg_elbo", "grad_norm", "entropy"):
        assert len(logged(without, key)) == 3
        assert logged(without, key) == pytest.approx(logged(with_mask, key), rel=1e-5), key
    assert with_mask.evaluate()["eval_loss"] == pytest.approx(evaluated, rel=1e-5)


def test_rows_padded_on_the_left_keep_their_mask(tmp_path, masks):
    train(tmp_path, collator=PadsBefore(pad_token_id=0))
    assert any(masks)


def test_rows_that_are_filled_up_train_the_same(tmp_path, masks):
    filled = train(tmp_path / "filled", collator=DataCollatorForLanguageModeling(0, pad_to_multiple_of=32))
    assert masks and not any(masks)
    as_they_are = train(tmp_path / "as_they_are")
    for key in ("loss", "loss/neg_elbo", "grad_norm"):
        assert logged(filled, key) == pytest.approx(logged(as_they_are, key), rel=1e-5), key


def test_packed_rows_keep_theirs_without_flash_attention(tmp_path, masks):
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    train(tmp_path, collator=collator, data=training_rows("packed"), config={"per_device_train_batch_size": 1})
    assert any(masks)


def test_nobody_looks_for_documents_in_rows_that_have_one(tmp_path, monkeypatch):
    def looked(*args, **kwargs):
        raise AssertionError("transformers would wait for the device")

    monkeypatch.setattr(maskless.masking_utils, "find_packed_sequence_indices", looked)
    monkeypatch.setattr(maskless.modeling_flash_attention_utils, "_is_packed_sequence", looked)
    assert logged(train(tmp_path, config={"gradient_checkpointing": True}), "loss")
    assert maskless.masking_utils.find_packed_sequence_indices is looked


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_routers_loss_keeps_the_mask_and_trls_head(tmp_path, monkeypatch, attention):
    """It leaves padding out by it; TRL's trainer sets the loss, whatever the configuration on disk says."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=0,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])

    def run(folder):
        torch.manual_seed(0)
        base = MixtralForCausalLM._from_config(config, attn_implementation=attention)
        model = get_peft_model(base, lora)
        assert head_problem(model.get_base_model()) == "the model adds a loss of its own"
        return train(tmp_path / folder, model=model)

    found = run("found")
    monkeypatch.setattr(maskless, "is_causal", lambda model: False)
    expected = run("expected")
    for key in ("loss", "grad_norm", "aux_loss", "entropy"):
        assert len(logged(found, key)) == 3 and logged(found, key) == logged(expected, key), key


def test_the_collator_says_what_the_host_would_wait_for():
    right = WithHostFacts(DataCollatorForLanguageModeling(pad_token_id=0))
    left = WithHostFacts(PadsBefore(pad_token_id=0))
    unlike, alike = [{"input_ids": [5, 6, 7]}, {"input_ids": [5]}], [{"input_ids": [5, 6]}, {"input_ids": [7, 8]}]
    assert right(unlike)[PADDED_BEHIND] and right(alike)[PADDED_BEHIND] and left(alike)[PADDED_BEHIND]
    assert not left(unlike)[PADDED_BEHIND]
    assert right(unlike)[NUM_LABELLED] == left(alike)[NUM_LABELLED] == 4
    packed = WithHostFacts(DataCollatorForLanguageModeling(0, padding_free=True))(unlike)
    assert PADDED_BEHIND not in packed and packed[NUM_LABELLED] == int((packed["labels"] != -100).sum())
    copy = pickle.loads(pickle.dumps(right))  # as a loader process gets it
    assert copy(unlike)[PADDED_BEHIND] and copy.pad_token_id == 0


def test_a_model_is_causal_if_all_of_its_attention_says_so():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    assert is_causal(LlamaForCausalLM(llama_config()))
    assert is_causal(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2)))
    assert not is_causal(BertLMHeadModel(BertConfig(**sizes)))
    assert not is_causal(torch.nn.Linear(2, 2))
    other = LlamaForCausalLM(llama_config())
    other.config._attn_implementation = "somebodys_kernel"
    assert not is_causal(other)
