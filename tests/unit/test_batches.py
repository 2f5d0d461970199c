"""Which tokens of a batch count, and rows that only fill it up."""

import copy

import pytest
import torch

from fvae_dist.training.batches import (
    COUNTED,
    LENGTHS,
    WithLengths,
    drop_fillers,
    find_records,
    token_mask_of,
    unlabel_after_padding,
)
from tests.distributed.layouts import collator, documents, training_rows
from tests.distributed.tiny import pad_rows


def batch_of(form, rows):
    made = collator(form)
    made = WithLengths(made) if form in ("packed", "padding_free") else made
    batch = made(rows)
    return batch | {COUNTED: token_mask_of(batch)}


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_that_count(side):
    batch = pad_rows(documents(), side)
    assert torch.equal(token_mask_of(batch), batch["attention_mask"])
    assert torch.equal(token_mask_of(batch, "labelled"), (batch["labels"] != -100).long())
    del batch["attention_mask"]
    assert token_mask_of(batch).all()


def test_mask_of_four_dimensions_is_refused():
    with pytest.raises(ValueError, match="2-D padding mask"):
        token_mask_of({"input_ids": torch.zeros(1, 3), "attention_mask": torch.zeros(1, 1, 3, 3)})


def test_nothing_is_predicted_from_padding():
    """Both sides of padding leave the same labels to predict: all of a row but its first token's."""
    counts = []
    for side in ("left", "right"):
        batch = pad_rows([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}], side)
        unlabel_after_padding(batch)
        counts.append((batch["labels"][:, 1:] != -100).sum(-1).tolist())
    assert counts == [[2, 0], [2, 0]]


@pytest.mark.parametrize("form", ["right", "left", "wide", "padding_free", "packed"])
@pytest.mark.parametrize("num_real", [0, 1, 2, 3])
def test_fillers_count_for_nothing(form, num_real):
    rows = training_rows(form)[:3]
    batch = batch_of(form, rows)
    before = copy.deepcopy(batch)
    drop_fillers(batch, num_real)
    real = rows[:num_real]
    assert batch[COUNTED].sum() == sum(len(row["input_ids"]) for row in real)
    lengths = [row.get("seq_lengths", [len(row["input_ids"])]) for row in real]
    # A padding-free collator drops the label on each document's first token.
    labels = torch.tensor([label for row in real for label in row["labels"]], dtype=torch.long)
    if form in ("padding_free", "packed"):
        starts = torch.tensor([0, *[n for row in lengths for n in row]]).cumsum(0)[:-1]
        labels[starts[: len(labels)]] = -100
    assert (batch["labels"] != -100).sum() == (labels != -100).sum()
    # What the model reads stays as it is: a row without any token to attend to would be a case of its own.
    for key in ("input_ids", "attention_mask", "position_ids"):
        assert key not in batch or torch.equal(batch[key], before[key])


def test_collator_with_lengths_is_the_collator_and_the_lengths():
    rows = training_rows("packed")
    plain = collator("packed")
    wrapped = WithLengths(plain)
    batch = wrapped(rows)
    assert batch.pop(LENGTHS).tolist() == [len(row["input_ids"]) for row in rows]
    expected = plain(rows)
    assert set(batch) == set(expected)
    assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(batch[key])) for key, value in expected.items())
    assert wrapped.padding_free is True
    with pytest.raises(AttributeError):
        _ = wrapped.no_such_setting


def test_find_records_finds_whole_records_at_token_boundaries():
    data = [{"input_ids": ids} for ids in ([5, 6, 7], [256, 9], [8, 8, 8], [1, 2])]
    batch = torch.tensor([[5, 6, 7, 0], [0, 256, 9, 0]])
    assert find_records(data, batch) == [0, 1]
    assert find_records(data, torch.tensor([[0x0500, 0x0600, 0x0700]])) == []
