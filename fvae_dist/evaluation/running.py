"""Sending a task's samples through the model, split over the ranks.

Batches are cut from the whole set, longest samples first, and never anew: not after an interruption, not for another
number of ranks. So a sample always shares its batch, and with it its padding, with the same others, and its
numbers are the same bits however many processes took part and however often they were interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

from fvae_dist.evaluation.inference import Inference
from fvae_dist.evaluation.ranks import Ranks
from fvae_dist.evaluation.store import SampleStore
from fvae_dist.evaluation.tasks import Sample, Task


def make_batches(samples: list[Sample], batch_size: int) -> list[list[Sample]]:
    """Batches of samples of like length, the longest first: what does not fit into memory fails at once."""
    ordered = sorted(samples, key=lambda sample: (-sample.num_tokens, sample.index))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def run_task(
    task: Task,
    inference: Inference,
    batch_size: int,
    ranks: Ranks,
    store: SampleStore | None = None,
    after_batch: Callable[[], Any] = lambda: None,
) -> list[dict[str, Any]]:
    """Run what is not finished yet; all ranks must call it.

    Every rank runs one batch a round, and rank 0 writes the round's records. Where the batches end in mid-round, the
    other ranks repeat one: under ZeRO-3 each forward is a collective.

    Args:
        store: rank 0's finished samples; None elsewhere, or to keep nothing.
        after_batch: called after each round, as a sign of life.

    Returns:
        All records in the order of the set, on rank 0; an empty list elsewhere.
    """
    finished = ranks.broadcast(set(store.records) if store is not None else set())
    batches = make_batches(task.samples, batch_size)
    todo = [batch for batch in batches if any(sample.index not in finished for sample in batch)]
    done: dict[int, dict[str, Any]] = {}
    label = f"{task.suite}/{task.name}" if task.suite != task.name else task.name
    # None: no bar where nobody looks at a terminal.
    bar = tqdm(total=len(task.samples), initial=len(finished), desc=label, disable=None if ranks.is_first else True)
    with bar:
        for start in range(0, len(todo), ranks.world_size):
            number = start + ranks.rank
            batch = todo[min(number, len(todo) - 1)]
            outputs = inference.run(task, batch)
            records = {}
            if number < len(todo):
                records = {s.index: task.judge(s, output) for s, output in zip(batch, outputs, strict=True)}
            for part in ranks.gather(records):
                if store is not None:
                    store.append(part)
                else:
                    done |= part
                bar.update(len(part.keys() - finished))
            after_batch()
    if not ranks.is_first:
        return []
    return store.finish() if store is not None else [done[index] for index in sorted(done)]
