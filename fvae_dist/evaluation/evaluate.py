"""What `fvae-dist evaluate` does: suites in, per-sample records, results.json and a Markdown table out."""

from __future__ import annotations

import argparse
import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from fvae_dist.evaluation.commonsense import commonsense_tasks
from fvae_dist.evaluation.groups import groups_tasks
from fvae_dist.evaluation.gsm8k import gsm8k_tasks
from fvae_dist.evaluation.inference import Inference
from fvae_dist.evaluation.lm_eval_suite import LmEvalSuite
from fvae_dist.evaluation.loading import ModelSource, find_model, load_model
from fvae_dist.evaluation.perplexity import perplexity_tasks
from fvae_dist.evaluation.ranks import Ranks, start_process_group
from fvae_dist.evaluation.report import write_report
from fvae_dist.evaluation.running import run_task
from fvae_dist.evaluation.store import SampleStore
from fvae_dist.evaluation.tasks import Options, Task
from fvae_dist.training.recipe import RecipeError, unknown_key

logger = logging.getLogger(__name__)

SUITES = ("perplexity", "commonsense", "gsm8k", "groups")
_LM_EVAL = "lm_eval:"
_DEFAULT_MAX_LENGTH = 2048


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


def evaluate(args: argparse.Namespace) -> str | None:
    """Run the suites that the arguments name; all ranks must call it.

    Returns:
        The Markdown table, on rank 0; None elsewhere.

    Raises:
        RecipeError: an argument, or a file it names, that cannot be used. What was finished before stays.
    """
    suites = parse_suites(args.suite)
    source = find_model(
        args.model,
        args.adapter,
        dtype=args.dtype,
        attention=args.attention,
        deepspeed=args.deepspeed,
        trust_remote_code=args.trust_remote_code,
    )
    options = _options(args, suites, source)
    out = _output_folder(args.out)
    # Before any weight is loaded: a mistake in the data is reported in seconds.
    tasks = make_tasks(suites.own, source, options, out)
    harness = LmEvalSuite(suites.lm_eval, args.lm_eval_tasks) if suites.lm_eval else None
    if harness is not None and source.num_labels is not None:
        raise RecipeError("--suite lm_eval: needs a language model; the adapter is of task type SEQ_CLS")
    settings = {
        **source.settings(),
        "template": options.template,
        "batch_size": args.batch_size,
        "num_beams": args.num_beams,
        "seed": options.seed,
    }
    ranks, device = start_process_group(with_deepspeed=source.deepspeed is not None)
    with contextlib.ExitStack() as stack:
        stores = _open_stores(out, tasks, settings, args.overwrite, ranks)
        for store in stores:
            stack.callback(store.close)
        num_missing = sum(len(task.samples) - len(store.records) for task, store in zip(tasks, stores))
        inference = None
        if ranks.broadcast(num_missing) or harness is not None:
            transformers.set_seed(options.seed)
            model = load_model(source, device)
            inference = Inference(model, source.tokenizer, device, source.deepspeed is not None, args.num_beams)
        results: dict[str, dict[str, Any]] = {}
        for index, task in enumerate(tasks):
            records = _run(task, inference, args.batch_size, ranks, stores[index] if stores else None)
            if ranks.is_first:
                metrics = task.summarise(records) | task.facts
                results.setdefault(task.suite, {})[task.name] = metrics
        if harness is not None and inference is not None:
            asked = settings | {"limit": options.limit, "max_length": options.max_length}
            results["lm_eval"] = harness.run(inference, options, args.batch_size, asked, out, ranks)
    if not ranks.is_first:
        return None
    return write_report(out, settings | {"limit": options.limit, "mode": options.mode}, results)


def make_tasks(names: list[str], source: ModelSource, options: Options, out: Path) -> list[Task]:
    """The tasks of the named suites.

    Raises:
        RecipeError: `file:line` and what is wrong there, or a suite that this kind of model cannot answer.
    """
    tasks: list[Task] = []
    for name in names:
        if source.num_labels is not None and name != "groups":
            raise RecipeError(f"--suite {name}: needs a language model; the adapter is of task type SEQ_CLS")
        if name == "groups":
            tasks += groups_tasks(source.tokenizer, options, source.num_labels)
        elif name == "perplexity":
            tasks += perplexity_tasks(source.tokenizer, options, out)
        else:
            tasks += {"commonsense": commonsense_tasks, "gsm8k": gsm8k_tasks}[name](source.tokenizer, options)
    longest = max((s.num_tokens + task.max_new_tokens for task in tasks for s in task.samples), default=0)
    if source.positions is not None and longest > source.positions:
        raise RecipeError(f"sequences of {longest} tokens are longer than the model's {source.positions} positions")
    return tasks


def _options(args: argparse.Namespace, suites: Suites, source: ModelSource) -> Options:
    data: dict[str, str] = {}
    for item in args.data:
        name, separator, path = item.partition("=")
        if not separator or not path or name not in SUITES:
            raise RecipeError(f"--data {item}: write SUITE=PATH; suites with data: {', '.join(SUITES)}")
        if name in data:
            raise RecipeError(f"--data {item}: {name} stands there twice")
        if name not in suites.own:
            raise RecipeError(f"--data {item}: --suite does not name {name}")
        data[name] = path
    positions = source.positions or _DEFAULT_MAX_LENGTH
    max_length = args.max_length or min(positions, _DEFAULT_MAX_LENGTH)
    if max_length > positions:
        raise RecipeError(f"--max-length: {max_length} is longer than the model's {positions} positions")
    options = Options(data, args.mode, args.template, args.max_new_tokens, max_length, args.limit, args.seed)
    for suite, default in {"commonsense": 32, "gsm8k": 512}.items():
        if suite in suites.own and max_length <= (args.max_new_tokens or default):
            raise RecipeError(
                f"--max-new-tokens: {args.max_new_tokens or default} of {suite} leave no room for a prompt in "
                f"{max_length} tokens"
            )
    return options


def _output_folder(path: str) -> Path:
    out = Path(path)
    existing = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise RecipeError(f"--out {out}: {existing} is a file, not a folder")
    return out


def _open_stores(
    out: Path, tasks: list[Task], settings: dict[str, Any], overwrite: bool, ranks: Ranks
) -> list[SampleStore]:
    """Rank 0's stores; a refusal is raised on every rank."""
    # Not their names: fingerprints say whether another path holds the same files.
    known = {key: value for key, value in settings.items() if key not in ("model", "adapter")}
    stores, problem = [], None
    if ranks.is_first:
        try:
            for task in tasks:
                own = known | {"mode": task.kind, "max_new_tokens": task.max_new_tokens, "data": task.digest()}
                stores.append(SampleStore(out, task.suite, task.name, own, overwrite))
        except RecipeError as error:
            problem = str(error)
        except OSError as error:
            problem = f"--out {out}: {error}"
    problem = ranks.broadcast(problem)
    if problem is not None:
        raise RecipeError(problem)
    return stores


def _run(
    task: Task, inference: Inference | None, batch_size: int, ranks: Ranks, store: SampleStore | None
) -> list[dict[str, Any]]:
    if inference is not None:
        return run_task(task, inference, batch_size, ranks, store)
    logger.info("%s/%s: all %d samples were finished before", task.suite, task.name, len(task.samples))
    return store.finish() if store is not None else []
