"""Prints the table of docs/invariances.md: python -m tests.distributed.table"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from tests.distributed import layouts
from tests.distributed.conftest import run_ranks
from tests.distributed.tiny import attach, load, pad_rows, write_model

_STAGES = {"ddp": "DDP", 0: "ZeRO-0", 2: "ZeRO-2", 3: "ZeRO-3"}
_FORMS = {
    "right": "padded right",
    "left": "padded left",
    "wide": "padded to 32",
    "padding_free": "side by side",
    "packed": "packed",
}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        table = layouts.LAYOUTS | layouts.SEQUENCE_PARALLEL
        ranks = run_ranks(folder, tuple(table))
        model = attach(load(folder / "model")).train()
        expected = layouts.reference_step(model, pad_rows(layouts.documents()))
        print(
            "| sharding | trainer | checkpointing | micro-batch x accumulation | documents | task | side | gradient |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for layout, (trainer, stage, checkpointing, _, form) in table.items():
            settings = layouts.settings(layout)
            shown = (
                _STAGES[stage] + (", rows shared" if layout in layouts.SEQUENCE_PARALLEL else ""),
                {"sft": "TRL", "plain": "transformers"}[trainer],
                checkpointing,
                f"{settings['micro_batch']} x {settings['accumulation']}",
                _FORMS[form],
                *(f"{value:.0e}" if value else "0" for value in deviations(ranks, layout, expected)),
            )
            print(f"| {' | '.join(shown)} |")


def deviations(ranks, layout: str, expected: dict) -> tuple[float, float, float]:
    """Task loss and side loss, relative; gradients, of each tensor's largest entry: the worst of both ranks."""
    worst = torch.zeros(3)
    for rank in range(2):
        result = ranks.result(layout, rank)
        log = result["log"][0]
        found = [abs(log[f"loss/{key}"] / expected[key] - 1) for key in ("task", "neg_elbo")]
        found.append(
            max(
                float((result["gradients"][name] - value).abs().max() / value.abs().max())
                for name, value in expected["gradients"].items()
            )
        )
        worst = torch.maximum(worst, torch.tensor(found))
    return tuple(worst.tolist())


if __name__ == "__main__":
    main()
