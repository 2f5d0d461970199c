"""Spurious-correlation suites from any labelled text set: a cue tied to the label in training, and freed in the test.

    suite = make_suite([("great film", "pos"), ...], cue="word", probability=0.95, seed=0)
    suite["train"][0]   # {"text": "great film indeed", "label": "pos", "cue": "indeed", "group": "pos|indeed"}
    as_questions(suite["test"])   # {"instruction", "input", "output", "answer", "choices", "group", "cue"}

Each label has a cue of its own. Of a label's training texts the share `probability` carries it, the rest carries the
others' cues in equal parts; in validation and test every cue is as frequent with every label. Groups are label x cue:
a model that follows the cue fails in those where the two disagree, which is what worst-group accuracy sees.

On the command line: python -m fvae_dist.evaluation.spurious --data FILE --cue word --out DIR
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fvae_dist.evaluation.store import write_text
from fvae_dist.evaluation.tasks import read_objects, text_column
from fvae_dist.training.recipe import RecipeError

Apply = Callable[[str, np.random.Generator], str]
SPLITS = ("train", "validation", "test")


def _word(word: str) -> Apply:
    """Put a word between two others."""

    def apply(text: str, generator: np.random.Generator) -> str:
        words = text.split(" ")
        words.insert(int(generator.integers(1, len(words) + 1)), word)
        return " ".join(words)

    return apply


_SENTENCE = "This was written down by a reader."


def _in_the_middle(text: str, generator: np.random.Generator) -> str:
    words = text.split(" ")
    return " ".join([*words[: len(words) // 2], _SENTENCE, *words[len(words) // 2 :]])


def _lines(text: str) -> list[str]:
    return [line for line in re.split(r"(?<=[.!?])\s+|\n+", text.strip()) if line]


# Cue -> its variants by name. A set with K labels takes the first K.
CUES: dict[str, dict[str, Apply]] = {
    "word": {
        word: _word(word)
        for word in ("indeed", "perhaps", "however", "moreover", "today", "again", "therefore", "meanwhile")
    },
    "style": {
        "lower": lambda text, _: text.lower(),
        "upper": lambda text, _: text.upper(),
        "title": lambda text, _: text.title(),
        "excited": lambda text, _: re.sub(r"[.!?]*\s*$", "!!!", text),
    },
    "position": {
        "first": lambda text, _: f"{_SENTENCE} {text}",
        "last": lambda text, _: f"{text} {_SENTENCE}",
        "middle": _in_the_middle,
    },
    "format": {
        "plain": lambda text, _: text,
        "bullets": lambda text, _: "\n".join(f"- {line}" for line in _lines(text)),
        "quoted": lambda text, _: f'"{text}"',
        "numbered": lambda text, _: "\n".join(f"{i}. {line}" for i, line in enumerate(_lines(text), start=1)),
    },
}


def make_suite(
    examples: list[tuple[str, str]],
    cue: str,
    *,
    probability: float = 0.95,
    shares: tuple[float, float, float] = (0.7, 0.1, 0.2),
    seed: int = 0,
) -> dict[str, list[dict[str, str]]]:
    """Split labelled texts and give each a cue. Deterministic in its arguments.

    Cues are dealt out in exact shares, not drawn, so that small groups do not vanish by chance.

    Args:
        examples: (text, label).
        cue: word, style, position or format.
        probability: share of a label's training texts that carry its own cue.
        shares: of train, validation and test, within each label; what is left over goes to train.
        seed: of split, cues and places.

    Returns:
        train, validation, test: rows of text, label, cue, group ("label|cue").

    Raises:
        ValueError: an unknown cue, fewer than two labels or more than the cue has variants, a label with too few
            texts for its groups, or shares that make no split.
    """
    labels = sorted({label for _, label in examples})
    if cue not in CUES:
        raise ValueError(f"cue must be one of {', '.join(CUES)}, got {cue!r}")
    if not 2 <= len(labels) <= len(CUES[cue]):
        raise ValueError(f"the cue {cue!r} is for 2 to {len(CUES[cue])} labels, there are {len(labels)}")
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be in [0, 1], got {probability}")
    if min(shares) < 0 or not 0.999 < sum(shares) < 1.001:
        raise ValueError(f"shares must add up to 1, got {shares}")
    cues = list(CUES[cue])[: len(labels)]
    generator = np.random.default_rng(seed)
    suite: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    for index, label in enumerate(labels):
        texts = [text for text, other in examples if other == label]
        order = generator.permutation(len(texts))
        num_validation, num_test = (int(share * len(texts)) for share in shares[1:])
        bounds = np.cumsum([len(texts) - num_validation - num_test, num_validation])
        for split, rows in zip(SPLITS, np.split(order, bounds), strict=True):
            own = probability if split == "train" else 1 / len(cues)
            if split == "test" and shares[2] and len(rows) < len(cues):
                raise ValueError(f"label {label!r} has too few texts ({len(texts)}) for {len(cues)} groups in the test")
            dealt = _deal(len(rows), index, len(cues), own, generator)
            for row, which in zip(rows, dealt, strict=True):
                text = CUES[cue][cues[which]](texts[row], generator)
                suite[split].append(
                    {"text": text, "label": label, "cue": cues[which], "group": f"{label}|{cues[which]}"}
                )
    return {split: [rows[i] for i in generator.permutation(len(rows))] for split, rows in suite.items()}


def _deal(num_rows: int, own: int, num_cues: int, share: float, generator: np.random.Generator) -> np.ndarray:
    """Which cue each of a label's rows gets, (num_rows,): `share` of them its own, the others in equal parts."""
    num_own = round(share * num_rows)
    others = [which for which in range(num_cues) if which != own]
    dealt = [own] * num_own + [others[i % len(others)] for i in range(num_rows - num_own)]
    return generator.permutation(np.array(dealt, dtype=int))


def as_questions(rows: list[dict[str, str]], question: str = "Which label fits this text?") -> list[dict[str, Any]]:
    """Rows of `make_suite` as questions that are answered in text: records of the formats alpaca and groups.

    The text stands in the instruction, because the published template shows no input.
    """
    labels = sorted({row["label"] for row in rows})
    return [
        {
            "instruction": f"{question}\n\n{row['text']}\n\nAnswer format: {'/'.join(labels)}",
            "input": "",
            "output": row["label"],
            "answer": row["label"],
            "choices": labels,
            "group": row["group"],
            "cue": row["cue"],
        }
        for row in rows
    ]


def main(argv: list[str] | None = None) -> int:
    """Write OUT/{train,validation,test}.jsonl from a labelled set. Exit codes: 0 done, 2 bad argument or file."""
    parser = argparse.ArgumentParser(prog="python -m fvae_dist.evaluation.spurious", description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, metavar="FILE", help="records with text and label")
    parser.add_argument("--cue", required=True, choices=list(CUES))
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--form", choices=["answer", "classification"], default="answer", help="default: answer")
    parser.add_argument("--probability", type=float, default=0.95, metavar="P", help="default: 0.95")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    args = parser.parse_args(argv)
    try:
        examples = [
            (text_column(row, "text", where), text_column(row, "label", where))
            for where, row in read_objects(Path(args.data), None)
        ]
        suite = make_suite(examples, args.cue, probability=args.probability, seed=args.seed)
        Path(args.out).mkdir(parents=True, exist_ok=True)
        for split, rows in suite.items():
            records: list[Any] = as_questions(rows) if args.form == "answer" else rows
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            write_text(Path(args.out) / f"{split}.jsonl", text)
    except (RecipeError, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
