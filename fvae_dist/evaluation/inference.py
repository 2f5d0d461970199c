"""The model's three answers to a batch: what it writes, how likely it finds tokens, and which class it sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fvae_dist.evaluation.tasks import Row, Sample, Task

_CHUNK = 2048  # scored tokens whose log-probabilities over the vocabulary are held in fp32 at a time


@dataclass
class Inference:
    """A model and how it is asked. Under ZeRO-3 (`sharded`) all ranks must ask as often, of the same kind.

    num_beams: of generation; 1 is greedy search.
    """

    model: nn.Module
    tokenizer: Any
    device: torch.device
    sharded: bool = False
    num_beams: int = 1

    @torch.no_grad()
    def run(self, task: Task, samples: list[Sample]) -> list[Any]:
        """One call of the model; for each sample what `Task.judge` wants."""
        if task.kind == "generate":
            return self.generate([sample.rows[0].ids for sample in samples], task.max_new_tokens)
        rows = [row for sample in samples for row in sample.rows]
        flat: list[Any] = self.score(rows) if task.kind == "score" else self.classify(rows)
        answers = iter(flat)
        return [[next(answers) for _ in sample.rows] for sample in samples]

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
        """What the model writes after each prompt, without special tokens; padded on the left."""
        ids, mask = self._pad(prompts, left=True)
        model: Any = self.model
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            num_beams=self.num_beams,
            use_cache=True,
            # A rank whose texts are done goes on with the others: each forward gathers weights from all.
            synced_gpus=self.sharded,
        )
        return self.tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)

    def score(self, rows: list[Row]) -> list[tuple[float, int]]:
        """Of each row the summed log-probability (nats, fp32 softmax) of its scored tokens, and their number."""
        ids, mask = self._pad([row.ids for row in rows], left=False)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        where = [(i, t) for i, row in enumerate(rows) for t, scored in enumerate(row.scored) if scored]
        sums = torch.zeros(len(rows), dtype=torch.float64)
        for start in range(0, len(where), _CHUNK):
            row_P, position_P = torch.tensor(where[start : start + _CHUNK], device=self.device).T
            # The token at t is predicted at t - 1.
            log_PV = logits[row_P, position_P - 1].float().log_softmax(-1)
            log_P = log_PV.gather(1, ids[row_P, position_P, None]).squeeze(1)
            sums.index_add_(0, row_P.cpu(), log_P.double().cpu())
        return [(float(total), sum(row.scored)) for total, row in zip(sums, rows, strict=True)]

    def classify(self, rows: list[Row]) -> list[list[float]]:
        """The class logits of each row, (K,)."""
        ids, mask = self._pad([row.ids for row in rows], left=False)
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().tolist()

    def _pad(self, rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, (rows, longest)."""
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            place = slice(longest - len(row), longest) if left else slice(0, len(row))
            ids[index, place] = torch.tensor(row)
            mask[index, place] = 1
        return ids.to(self.device), mask.to(self.device)
