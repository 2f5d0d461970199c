"""The suites by name, and the tasks that they make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvae_dist.evaluation.commonsense import commonsense_tasks
from fvae_dist.evaluation.groups import groups_tasks
from fvae_dist.evaluation.gsm8k import gsm8k_tasks
from fvae_dist.evaluation.needle import needle_tasks
from fvae_dist.evaluation.perplexity import perplexity_tasks
from fvae_dist.evaluation.tasks import Options, Task
from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.recipe_help import unknown_key

SUITES = ("perplexity", "commonsense", "gsm8k", "needle", "groups")
_LM_EVAL = "lm_eval:"


@dataclass(frozen=True)
class Suites:
    """What --suite asks for: our own suites, and tasks of lm-evaluation-harness."""

    own: list[str]
    lm_eval: list[str]


def parse_suites(text: str) -> Suites:
    """Read NAME[,NAME]; after `lm_eval:TASK` every name that is no suite is another TASK.

    Raises:
        RecipeError: an unknown or repeated name, or none.
    """
    own: list[str] = []
    lm_eval: list[str] = []
    in_lm_eval = False
    for item in (part.strip() for part in text.split(",")):
        if item.startswith(_LM_EVAL):
            in_lm_eval, item = True, item.removeprefix(_LM_EVAL)
        elif item in SUITES:
            in_lm_eval = False
        target = lm_eval if in_lm_eval else own
        if item in target or not item:
            raise RecipeError(f"--suite {text}: " + (f"{item} stands there twice" if item else "an empty name"))
        if not in_lm_eval and item not in SUITES:
            hint = unknown_key(item, [*SUITES, "lm_eval:TASK"]).replace("key", f"suite {item!r}", 1)
            raise RecipeError(f"--suite: {hint}")
        target.append(item)
    return Suites(own, lm_eval)


def make_tasks(
    names: list[str],
    tokenizer: Any,
    options: Options,
    out: Path,
    num_labels: int | None = None,
    positions: int | None = None,
    classes: list[str] | None = None,
) -> list[Task]:
    """The tasks of the named suites.

    Args:
        out: where tokenised data may be kept.
        num_labels: of a classifier; None for a language model.
        positions: the model's longest sequence, tokens; None for no limit.
        classes: a classifier's labels, if they are known.

    Raises:
        RecipeError: `file:line` and what is wrong there, or a suite that this kind of model cannot answer.
    """
    tasks: list[Task] = []
    for name in names:
        if num_labels is not None and name != "groups":
            raise RecipeError(f"--suite {name}: needs a language model; the adapter is of task type SEQ_CLS")
        if name == "groups":
            tasks += groups_tasks(tokenizer, options, num_labels, classes)
        elif name == "perplexity":
            tasks += perplexity_tasks(tokenizer, options, out)
        else:
            make = {"commonsense": commonsense_tasks, "gsm8k": gsm8k_tasks, "needle": needle_tasks}[name]
            tasks += make(tokenizer, options)
    longest = max((s.num_tokens + task.max_new_tokens for task in tasks for s in task.samples), default=0)
    if positions is not None and longest > positions:
        raise RecipeError(f"sequences of {longest} tokens are longer than the model's {positions} positions")
    return tasks
