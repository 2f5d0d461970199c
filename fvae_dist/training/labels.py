"""The labels of a classifier: their order, and the file that keeps it beside each adapter."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import datasets
from transformers import PretrainedConfig

from fvae_dist.adapter.export import LABELS_FILE
from fvae_dist.training.recipe import RecipeError

_MOST_LABELS = 10_000


def count_labels(work: Path, splits: list[str]) -> dict[str, dict[str, int]]:
    """How often each label of all splits together occurs in each of them, in the order of the classes: by number where
    all labels are numbers, else by text.

    Args:
        work: where data.py has stored the records; the label is what completes a text.

    Raises:
        RecipeError: fewer than two labels in data.train, or so many that the column must be another.
    """
    counts: dict[str, Counter[str]] = {split: Counter() for split in splits}
    for split in splits:
        for path in sorted(work.glob(f"{split}-*-records.arrow")):
            column = datasets.Dataset.from_file(str(path)).data.column("completion")
            counts[split].update({pair["values"]: pair["counts"] for pair in column.value_counts().to_pylist()})
    found: set[str] = set().union(*counts.values())
    if len(counts["train"]) < 2:
        raise RecipeError(f"data.train: every record has the label {next(iter(counts['train']))!r}: nothing to learn")
    if len(found) > _MOST_LABELS:
        raise RecipeError(f"data.train: {len(found)} different labels; is column label the right one?")
    numbers = all(label.removeprefix("-").isdecimal() for label in found)
    classes = sorted(found, key=lambda label: (int(label) if numbers else 0, label))
    return {split: {label: count[label] for label in classes} for split, count in counts.items()}


def set_labels(config: PretrainedConfig, classes: list[str]) -> None:
    """Tell a model's configuration its classes."""
    config.id2label = dict(enumerate(classes))  # num_labels follows
    config.label2id = {label: number for number, label in enumerate(classes)}
    config.problem_type = "single_label_classification"


def write_labels(folder: Path, classes: list[str] | None) -> None:
    """Write labels.json into an adapter's folder; without labels, remove what another run left there."""
    path = folder / LABELS_FILE
    if classes is None:
        path.unlink(missing_ok=True)
        return
    path.write_text(json.dumps(classes, ensure_ascii=False) + "\n", encoding="utf-8")


def read_labels(folder: Path) -> list[str] | None:
    """The classes of the adapter in `folder`; None if it does not name them.

    Raises:
        RecipeError: labels.json is no list of different texts.
    """
    path = folder / LABELS_FILE
    try:
        classes = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    is_list = isinstance(classes, list) and all(isinstance(label, str) for label in classes)
    if not is_list or len(set(classes)) != len(classes) or len(classes) < 2:
        raise RecipeError(f"{path}: must be a list of two or more different texts")
    return classes
