"""Tokenisation: from records of text to token ids and labels, and back to text for a look at the loss mask.

Names: `ids` are token ids, list[int] of length T; `labels` are list[int] of length T, the id where there is loss and
-100 elsewhere. `labels[0]` is always -100: nothing predicts the first token of a sequence. Trainers shift it away
anyway; having it in the data as well keeps packed documents apart whatever the collator does (TRL's padding-free one
also sets the labels at position 0 to -100).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from enum import IntEnum
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from trl.data_utils import common_prefix_length

from fvae_dist.training.recipe import DataSection, RecipeError, SourceSection
from fvae_dist.training.sources import place

IGNORED = -100  # the label that torch's cross entropy leaves out

# The marker by which a chat template says which part the assistant wrote; transformers looks for the same.
_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Outcome(IntEnum):
    """What became of a record; of one that was split each piece is a row. From DROPPED on nothing is left."""

    KEPT = 0
    TRUNCATED = 1  # kept, cut to max_length
    SPLIT = 2  # first piece of a longer record
    PIECE = 3  # a further one
    DROPPED = 4  # too long, with `overlong: drop`
    DROPPED_NO_LOSS = 5  # cut to max_length it would hold its prompt only


def resolve_chat_template(data: DataSection, tokenizer) -> str | None:
    """The Jinja text of the chat template, or None if no source needs one.

    Raises:
        RecipeError: `data.chat_template` is neither a file nor Jinja, or there is no template at all.
    """
    if not any(source.format == "messages" for source in [*data.train, *data.eval]):
        return None
    given = data.chat_template
    if given is None:
        try:
            return tokenizer.get_chat_template()
        except ValueError:
            raise RecipeError("data.chat_template: the tokenizer has no chat template; give one") from None
    if "{" in given or "\n" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"data.chat_template: neither Jinja nor a readable file: {given} ({error})") from None


def describe_tokenizer(tokenizer) -> Any:
    """What a tokenizer does, as JSON values, without where it came from; for the key of the cache."""
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Padding and truncation are left over from the last call, and may differ between processes.
        backend.pop("padding", None)
        backend.pop("truncation", None)
    else:
        backend = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.init_kwargs.items(), key=str)]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return [type(tokenizer).__name__, backend, special]


def tokenize_batch(
    batch: dict[str, list],
    *,
    source: SourceSection,
    data: DataSection,
    tokenizer,
    chat_template: str | None,
    classes: Collection[str] | None = None,
) -> dict[str, list]:
    """Tokenise a batch of records; for `datasets.map`.

    Args:
        batch: columns number, prompt, completion, messages (JSON text), N rows.
        classes: the labels of format classification, by class number.

    Returns:
        Columns of N rows, more where records are split: input_ids and labels (empty where the record is dropped; of
        format classification the number of the class alone),
        outcome, num_tokens and num_loss_tokens of what is kept, num_cut_tokens of what truncation took away.

    Raises:
        RecipeError: a record without any token to learn, or one that the chat template cannot render.
    """
    if classes is not None:
        class_of = {label: index for index, label in enumerate(classes)}
        texts = zip(batch["number"], encode_whole_texts(batch["prompt"], tokenizer), batch["completion"], strict=True)
        rows = [_fit_text(ids, class_of[label], data, place(source, number)) for number, ids, label in texts]
        return {name: [row[name] for row in rows] for name in rows[0]}
    if source.format == "messages":
        encoded = [
            _encode_messages(json.loads(messages), tokenizer, chat_template or "", place(source, number))
            for number, messages in zip(batch["number"], batch["messages"], strict=True)
        ]
    else:
        encoded = encode_completions(batch["prompt"], batch["completion"], tokenizer)
    rows = []
    for number, (ids, learned) in zip(batch["number"], encoded, strict=True):
        everything = not data.completion_only_loss
        labels = [id if bit or everything else IGNORED for id, bit in zip(ids, learned, strict=True)]
        labels[:1] = [IGNORED]
        if all(label == IGNORED for label in labels):
            raise RecipeError(f"{place(source, number)}: no token to learn is left after tokenisation")
        rows += _split(ids, labels, data) if data.overlong == "split" else [_fit(ids, labels, data)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _fit(ids: list[int], labels: list[int], data: DataSection) -> dict[str, Any]:
    """Cut or drop what is longer than max_length."""
    outcome, num_cut_tokens = Outcome.KEPT, 0
    if len(ids) > data.max_length:
        kept_labels = labels[: data.max_length]
        if data.overlong == "drop":
            outcome = Outcome.DROPPED
        elif all(label == IGNORED for label in kept_labels):
            outcome = Outcome.DROPPED_NO_LOSS
        else:
            outcome, num_cut_tokens = Outcome.TRUNCATED, len(ids) - data.max_length
        keep = data.max_length if outcome is Outcome.TRUNCATED else 0
        ids, labels = ids[:keep], labels[:keep]
    return _row(ids, labels, outcome, num_cut_tokens)


def _fit_text(ids: list[int], label: int, data: DataSection, where: str) -> dict[str, Any]:
    """A text and its class; of a longer one the beginning, or nothing."""
    if not ids:
        raise RecipeError(f"{where}: no token is left after tokenisation")
    num_cut_tokens = max(0, len(ids) - data.max_length)
    if num_cut_tokens and data.overlong == "drop":
        return _row([], [], Outcome.DROPPED)
    outcome = Outcome.TRUNCATED if num_cut_tokens else Outcome.KEPT
    return _row(ids[: data.max_length], [label], outcome, num_cut_tokens)


def _split(ids: list[int], labels: list[int], data: DataSection) -> list[dict[str, Any]]:
    """Consecutive pieces of max_length tokens; the last is shorter, the one before it by a token if that leaves two:
    of a token alone nothing could be learned."""
    ends = list(range(data.max_length, len(ids), data.max_length))
    if ends and len(ids) - ends[-1] == 1:
        ends[-1] -= 1
    rows = []
    for start, end in zip([0, *ends], [*ends, len(ids)], strict=True):
        outcome = (Outcome.PIECE if start else Outcome.SPLIT) if ends else Outcome.KEPT
        rows.append(_row(ids[start:end], [IGNORED, *labels[start + 1 : end]], outcome))
    return rows


def _row(ids: list[int], labels: list[int], outcome: Outcome, num_cut_tokens: int = 0) -> dict[str, Any]:
    return {
        "input_ids": ids,
        "labels": labels,
        "outcome": int(outcome),
        "num_tokens": len(ids),
        "num_loss_tokens": sum(label != IGNORED for label in labels),
        "num_cut_tokens": num_cut_tokens,
    }


# ------------------------------------------------------------------------------------ prompt and completion, and text


def encode_completions(prompts: list[str], completions: list[str], tokenizer) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompt + completion + EOS, and 1 for each token of the completion and its EOS.

    Prompt and completion are tokenised as one text, as at inference. The border is where the tokens of the prompt alone
    part from those of the whole: a token that merges across it belongs to the completion.
    """
    whole_texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    encoded = []
    for prompt_ids, ids in zip(encode_texts(prompts, tokenizer), encode_texts(whole_texts, tokenizer), strict=True):
        border = common_prefix_length(prompt_ids, ids)
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        encoded.append((ids, [0] * border + [1] * (len(ids) - border)))
    return encoded


def encode_texts(texts: list[str], tokenizer) -> list[list[int]]:
    """Ids with the special tokens that the tokenizer adds by itself, BOS only once even if the text begins with it."""
    all_ids = tokenizer(texts, padding=False, truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
    doubled = [tokenizer.bos_token_id] * 2
    return [ids[1:] if ids[:2] == doubled else ids for ids in all_ids]


def encode_whole_texts(texts: list[str], tokenizer) -> list[list[int]]:
    """As `encode_texts`, without an EOS at the end, which some tokenizers add; what a classifier reads."""
    all_ids = encode_texts(texts, tokenizer)
    return [ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids for ids in all_ids]


# --------------------------------------------------------------------------------------------------------------- chats


def _encode_messages(messages: list[dict], tokenizer, template: str, where: str) -> tuple[list[int], list[int]]:
    """Token ids of a conversation as the template renders it, and 1 for each token of an assistant turn."""
    try:
        if _GENERATION_MARKER.search(template):
            encoded = tokenizer.apply_chat_template(
                messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
            )
            return list(encoded["input_ids"]), list(encoded["assistant_masks"])
        return _mask_by_prefix(messages, tokenizer, template, where)
    except (TemplateError, ValueError, TypeError, KeyError) as error:  # what templates raise about roles, for one
        raise RecipeError(f"{where}: messages: the chat template fails: {' '.join(str(error).split())}") from None


def _mask_by_prefix(messages: list[dict], tokenizer, template: str, where: str) -> tuple[list[int], list[int]]:
    """Mask the assistant turns of a template without `{% generation %}`: turn i is what messages[:i+1] adds to [:i].

    Raises:
        RecipeError: the template renders the beginning of this conversation otherwise than the whole, so that there is
            no saying where a turn begins.
    """

    def render(part: list[dict], add_generation_prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            part, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # the template writes its own

    whole = render(messages)
    ids = encode(whole)
    learned = [0] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # Before the first message there is nothing to render (templates may refuse an empty conversation).
        before = render(messages[:index], add_generation_prompt=True) if index else ""
        through = render(messages[: index + 1])
        if not (through.startswith(before) and whole.startswith(through)):
            raise RecipeError(
                f"{where}: messages[{index}]: the chat template is not prefix-preserving (it renders the conversation "
                "up to here differently from the whole) and has no {% generation %} markers: no telling what to learn"
            )
        begin = common_prefix_length(encode(before), ids)
        through_ids = encode(through)
        end = common_prefix_length(through_ids, ids)
        end += end < len(through_ids)  # a token that merges across the end belongs to the turn, as at its beginning
        learned[begin:end] = [1] * (end - begin)
    return ids, learned


# ---------------------------------------------------------------------------------------------------------- to look at


def render_example(example: dict[str, list[int]], tokenizer, classes: list[str] | None = None) -> str:
    """An example decoded, the tokens with loss between ⟦ and ⟧; the documents of a packed one on lines of their own.

    Args:
        classes: the labels of format classification; the text's own then follows it, in the brackets.
    """
    if classes is not None:
        text = tokenizer.decode(example["input_ids"], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return f"{text} ⟦{classes[example['labels'][0]]}⟧"
    documents, start = [], 0
    for length in example.get("seq_lengths") or [len(example["input_ids"])]:
        stop = start + length
        documents.append(_render_document(example["input_ids"][start:stop], example["labels"][start:stop], tokenizer))
        start = stop
    return "\n──────\n".join(documents)


def _render_document(ids: list[int], labels: list[int], tokenizer) -> str:
    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    text, start = "", 0
    while start < len(ids):
        learned = labels[start] != IGNORED
        stop = start + 1
        while stop < len(ids) and (labels[stop] != IGNORED) == learned:
            stop += 1
        # What the span adds to the text before it: decoded alone, many tokenizers would lose its leading space.
        before, through = decode(ids[:start]), decode(ids[:stop])
        span = through[len(before) :] if through.startswith(before) else decode(ids[start:stop])
        text += f"⟦{span}⟧" if learned else span
        start = stop
    return text
