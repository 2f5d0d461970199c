"""Rows cut for sequence parallelism, attention of packed rows, and what is refused. Training: tests/distributed."""

import pytest
import torch
from transformers import LlamaConfig, MistralConfig

from fvae_dist.adapter.noise import TOKEN_KEYS, TokenNoise
from fvae_dist.training.batches import COUNTED, LENGTHS, WithLengths, token_mask_of
from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.sequence_parallel import _Attention, _by_document, check_shares, part_of
from tests.distributed.layouts import collator, documents, training_rows
from tests.distributed.tiny import pad_rows
from tests.recipes import SIZES, make_recipe

COLUMNS = ("input_ids", "position_ids", "shift_labels", "labels", COUNTED, TOKEN_KEYS)


def batch_of(form):
    packed = form in ("packed", "padding_free")
    made = WithLengths(collator(form)) if packed else collator(form)
    batch = made(training_rows(form)[: 1 if form == "packed" else None])
    return batch | {COUNTED: token_mask_of(batch)}


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("form", ["right", "wide", "packed", "padding_free"])
def test_parts_are_the_whole_batch(form, size):
    batch = batch_of(form)
    length = batch["input_ids"].shape[1]
    parts = [part_of(batch, size, index) for index in range(size)]
    assert len({part[key].shape for part in parts for key in COLUMNS}) == 1
    assert all(part[key].is_contiguous() for part in parts for key in COLUMNS)  # NCCL gathers positions as they are
    joined = {key: torch.cat([part[key] for part in parts], dim=1) for key in COLUMNS}
    assert torch.equal(joined["input_ids"][:, :length], batch["input_ids"])
    assert torch.equal(joined[COUNTED][:, :length], batch[COUNTED]) and not joined[COUNTED][:, length:].any()
    assert torch.equal(joined["shift_labels"][:, : length - 1], batch["labels"][:, 1:])
    assert (joined["shift_labels"][:, length - 1 :] == -100).all()
    assert torch.equal(joined["labels"], joined["shift_labels"])
    counted = batch[COUNTED].bool()
    expected = TokenNoise(batch, seed=1, step=2).keys.view_as(counted)[counted]
    keys = torch.cat([TokenNoise(part, seed=1, step=2).keys.view_as(part["input_ids"]) for part in parts], dim=1)
    assert torch.equal(keys[:, :length][counted], expected) and len(expected.unique()) == len(expected)
    assert all("attention_mask" not in part and LENGTHS not in part for part in parts)


@pytest.mark.parametrize("form", ["right", "packed"])
def test_positions_are_those_of_the_documents(form):
    batch = batch_of(form)
    parts = [part_of(batch, 4, index) for index in range(4)]
    positions = torch.cat([part["position_ids"] for part in parts], dim=1)
    length = batch["input_ids"].shape[1]
    if form == "right":
        assert torch.equal(positions[:, :length], torch.arange(length).expand(len(positions), -1))
        return
    assert torch.equal(positions[:, :length], batch["position_ids"])
    assert positions[0, length:].tolist() == list(range(-length % 4))  # a document of its own
    for part in parts:
        borders = part["cu_seq_lens_q"]
        assert torch.equal(borders, part["cu_seq_lens_k"]) and borders.dtype == torch.int32
        assert borders.tolist() == [*(positions[0] == 0).nonzero().flatten().tolist(), positions.shape[1]]
        assert part["max_length_q"] == part["max_length_k"] == borders.diff().max()


def test_rows_are_filled_up():
    """Ulysses wants as many in each batch; what was filled in counts for nothing."""
    batch = batch_of("right")
    num_rows = len(batch["input_ids"]) + 2
    part = part_of(batch, 2, 0, num_rows)
    assert all(len(part[key]) == num_rows for key in COLUMNS)
    assert not part[COUNTED][-2:].any() and (part["shift_labels"][-2:] == -100).all()
    assert torch.equal(part["position_ids"][-1], torch.arange(part["position_ids"].shape[1]))


def test_padding_on_the_left_is_refused():
    batch = pad_rows(documents(), "left")
    with pytest.raises(ValueError, match="padding on the left cannot be cut"):
        part_of(batch | {COUNTED: token_mask_of(batch)}, 2, 0)


def test_attention_of_packed_rows_is_that_of_each_document():
    def attention(module, query, key, value, mask, **kwargs):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask), None

    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 9, 4, generator=generator)
    positions = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3]])
    found, _ = _by_document(attention)(None, query, key, value, None, position_ids=positions)
    for start, end in ((0, 4), (4, 5), (5, 9)):
        own = [tensor[:, :, start:end] for tensor in (query, key, value)]
        expected = torch.nn.functional.scaled_dot_product_attention(*own, is_causal=True)
        torch.testing.assert_close(found[:, :, start:end], expected)


def test_evaluation_goes_past_ulysses_with_the_models_own_groups():
    module = torch.nn.Linear(1, 1)
    module.num_key_value_groups = 4
    attention = _Attention(lambda module: ("own", module.num_key_value_groups), lambda module: "ulysses", module)
    module.num_key_value_groups = 1  # as Ulysses leaves it where it repeats heads
    assert attention(module.train()) == "ulysses"
    assert attention(module.eval()) == ("own", 4)


REFUSED = {
    "ranks": ({}, {}, 3, "sdpa", r"3 device\(s\) cannot be divided into groups of 2"),
    "deepspeed": ({"training": {"deepspeed": None}}, {}, 2, "sdpa", "needs training.deepspeed"),
    "heads": ({}, {"num_attention_heads": 3, "hidden_size": 48}, 2, "sdpa", "3 attention heads cannot be shared by 2"),
    "kv_heads": (
        {"training": {"sequence_parallel": 4}},
        {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 48},
        4,
        "sdpa",
        "6 key-value heads can neither be shared by 4 devices nor repeated",
    ),
    "eager": ({}, {}, 2, "eager", "use sdpa or flash_attention_2"),
    "rows": (
        {"data": {"packing": True}, "training": {"per_device_train_batch_size": 2}},
        {},
        2,
        "sdpa",
        "set training.per_device_train_batch_size to 1",
    ),
    "rope": ({}, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 2, "sdpa", "dynamic, longrope"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_wrong_is_refused(tmp_path, case):
    changes, sizes, ranks, attention, message = REFUSED[case]
    changes = {
        **changes,
        "training": {"sequence_parallel": 2, "deepspeed": "zero3.json", **changes.get("training", {})},
    }
    recipe = make_recipe(tmp_path, tmp_path, **changes)
    with pytest.raises(RecipeError, match=message) as error:
        check_shares(recipe, LlamaConfig(**{**SIZES, **sizes}), ranks, attention)
    assert str(error.value).startswith(f"training.sequence_parallel: {recipe.training.sequence_parallel}: ")


def test_window_is_kept_by_flash_attention_alone(tmp_path):
    config = MistralConfig(**SIZES, sliding_window=16)
    training = {"sequence_parallel": 2, "deepspeed": "zero3.json"}
    recipe = make_recipe(tmp_path, tmp_path, data={"max_length": 64}, training=training)
    check_shares(recipe, config, 2, "flash_attention_2")
    with pytest.raises(RecipeError, match="window of 16 tokens would be lost with sdpa"):
        check_shares(recipe, config, 2, "sdpa")
    within = make_recipe(tmp_path, tmp_path, data={"max_length": 16}, training=training)
    check_shares(within, config, 2, "sdpa")


def test_key_value_heads_may_be_repeated(tmp_path):
    training = {"sequence_parallel": 4, "deepspeed": "zero3.json"}
    check_shares(make_recipe(tmp_path, tmp_path, training=training), LlamaConfig(**SIZES), 8, "sdpa")
