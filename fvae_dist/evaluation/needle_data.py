"""Training records for the needle suite: a number hidden in a long text as the suite hides it, with the answer.

    python -m fvae_dist.evaluation.needle_data --tokenizer BASE --length 4096 16384 --num-records 1000 --out train.jsonl

Prompts are those of the suite; the numbers are never its numbers (`needle.draw_number`), whatever the seeds. Records
are of format prompt_completion, so that the loss falls on the number and the end of text alone. Length counts all
tokens of a record, as training does. Each length gets as many records as the others, and so does each depth; every
record begins at a word of the filler drawn anew.

`--bare` leaves out instruction and question, so that a record can have 40 tokens where it needs 150 with them: from
such records a model with random weights learns to copy numbers (launch/recipes/needle_copy.yaml).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fvae_dist.evaluation.needle import DEPTHS, LONGEST_NUMBER, draw_number, filler_words, hide_number, needle_prompt
from fvae_dist.evaluation.prompts import TEMPLATES
from fvae_dist.training.modeling import load_tokenizer
from fvae_dist.training.recipe import ModelSection, RecipeError
from fvae_dist.training.tokenization import encode_completions

_MOST_STEPS = 8  # of the search for a length; two or three do


def needle_records(
    tokenizer: Any,
    words: list[str],
    num_records: int,
    lengths: Sequence[int],
    *,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
    template: str = "clean",
    bare: bool = False,
) -> Iterator[dict[str, Any]]:
    """Records of prompt, completion, depth, length and num_tokens. Deterministic in the arguments.

    Args:
        words: the filler, see `needle.filler_words`.
        lengths: the most tokens of a record, prompt, answer and end of text; less than a word's tokens stay unused.
        depths: where in the text the number stands, 0 to 1.
        bare: the prompt is the text and a line break, whatever the template.

    Raises:
        ValueError: no records, lengths or depths; a depth out of range, or a length with no room for the question.
    """
    if num_records < 1 or not lengths or not depths:
        raise ValueError("there must be at least one record, one length and one depth")
    if not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths must lie in [0, 1], got {' '.join(map(str, depths))}")

    make_prompt = _bare_prompt if bare else partial(needle_prompt, template=template)
    question = partial(make_prompt, words, depth=0.5, number=LONGEST_NUMBER)
    smallest = _count(tokenizer, question, LONGEST_NUMBER, 0)
    generator = np.random.default_rng(seed)
    filler = " ".join(words)
    tokens_per_word = 2.0
    for index in range(num_records):
        length, depth = lengths[index % len(lengths)], depths[index // len(lengths) % len(depths)]
        number = draw_number(generator, "training")
        while number in filler:
            number = draw_number(generator, "training")
        start = int(generator.integers(len(words)))
        render = partial(make_prompt, words, depth=depth, number=number, start=start)
        measure = partial(_count, tokenizer, render, number)
        num_words = _fit(measure, max(round((length - smallest) / tokens_per_word), 0), length, smallest)
        count = measure(num_words)
        if num_words == 0:
            raise ValueError(f"a length of {length} tokens has no room: question and answer alone take {smallest}")
        tokens_per_word = max(count - smallest, 1) / num_words
        yield {"prompt": render(num_words), "completion": number, "depth": depth, "length": length, "num_tokens": count}


def _bare_prompt(words: list[str], num_words: int, depth: float, number: str, start: int = 0) -> str:
    return hide_number(words, num_words, depth, number, start) + "\n"


def _count(tokenizer: Any, render: Callable[[int], str], number: str, num_words: int) -> int:
    """Tokens of the record with so many words of filler."""
    return len(encode_completions([render(num_words)], [number], tokenizer)[0][0])


def _fit(measure: Callable[[int], int], num_words: int, length: int, smallest: int) -> int:
    """The most words with which a record has no more than `length` tokens; from a first guess, by Newton's steps."""
    for _ in range(_MOST_STEPS):
        count = measure(num_words)
        step = int((length - count) * max(num_words, 1) / max(count - smallest, 1))
        if step == 0:
            break
        num_words = max(num_words + step, 0)
    while num_words and measure(num_words) > length:
        num_words -= 1
    while measure(num_words + 1) <= length:
        num_words += 1
    return num_words


def main(argv: list[str] | None = None) -> int:
    """Write the records as JSONL. Exit codes: 0 done, 2 bad argument or file."""
    parser = argparse.ArgumentParser(
        prog="python -m fvae_dist.evaluation.needle_data", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--tokenizer", required=True, metavar="BASE", help="model or tokenizer, name or folder")
    parser.add_argument("--length", required=True, type=int, nargs="+", metavar="T", help="tokens of a record, at most")
    parser.add_argument("--out", required=True, metavar="FILE", help=".jsonl file to write")
    parser.add_argument("--num-records", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument(
        "--depth", type=float, nargs="+", default=DEPTHS, metavar="X", help="0 to 1; default: the suite's"
    )
    parser.add_argument("--filler", metavar="FILE", help="text to hide numbers in; default: the suite's sentences")
    parser.add_argument("--template", choices=TEMPLATES, default="clean", help="prompt (default: clean)")
    parser.add_argument("--bare", action="store_true", help="the text alone, without instruction and question")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    args = parser.parse_args(argv)
    try:
        if Path(args.out).suffix != ".jsonl":
            raise ValueError(f"--out {args.out}: must be a .jsonl file")
        words = filler_words(Path(args.filler) if args.filler else None, "--filler")
        tokenizer = load_tokenizer(ModelSection(name_or_path=args.tokenizer))
        records = needle_records(
            tokenizer,
            words,
            args.num_records,
            args.length,
            depths=args.depth,
            seed=args.seed,
            template=args.template,
            bare=args.bare,
        )
        longest = _write(Path(args.out), records)
    except (RecipeError, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).replace('model.name_or_path', '--tokenizer').split())}", file=sys.stderr)
        return 2
    print(f"{args.out}: {args.num_records} records, format prompt_completion, the longest of {longest} tokens")
    return 0


def _write(path: Path, records: Iterator[dict[str, Any]]) -> int:
    """One record a line, the file in place once all are written; returns the most tokens of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, longest = path.with_name(f".{path.name}.partial"), 0
    try:
        with open(aside, "w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                longest = max(longest, record["num_tokens"])
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return longest


if __name__ == "__main__":
    sys.exit(main())
