"""What `fvae-dist evaluate` does: suites in, per-sample records, results.json and a Markdown table out."""

from __future__ import annotations

import argparse
import contextlib
import logging
from pathlib import Path
from typing import Any

import transformers

from fvae_dist.evaluation.inference import Inference
from fvae_dist.evaluation.lm_eval_suite import LmEvalSuite
from fvae_dist.evaluation.loading import ModelSource, as_argument, find_model, load_model
from fvae_dist.evaluation.ranks import Ranks, start_process_group
from fvae_dist.evaluation.report import write_report
from fvae_dist.evaluation.running import run_task
from fvae_dist.evaluation.store import SampleStore
from fvae_dist.evaluation.suites import SUITES, Suites, make_tasks, parse_suites
from fvae_dist.evaluation.tasks import Options, Task
from fvae_dist.training.control import lock_output_dir
from fvae_dist.training.recipe import RecipeError

logger = logging.getLogger(__name__)

_DEFAULT_MAX_LENGTH = 2048


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
    tasks = make_tasks(suites.own, source.tokenizer, options, out, source.num_labels, source.positions, source.classes)
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
        stores = _open_stores(out, tasks, settings, args.overwrite, ranks, stack)
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
    return Options(data, args.mode, args.template, args.max_new_tokens, max_length, args.limit, args.seed, args.repeats)


def _output_folder(path: str) -> Path:
    out = Path(path)
    existing = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise RecipeError(f"--out {out}: {existing} is a file, not a folder")
    return out


def _open_stores(
    out: Path,
    tasks: list[Task],
    settings: dict[str, Any],
    overwrite: bool,
    ranks: Ranks,
    stack: contextlib.ExitStack,
) -> list[SampleStore]:
    """Rank 0's stores, closed with `stack`, in a folder that nobody else writes; a refusal is raised on every rank."""
    # Not their names: fingerprints say whether another path holds the same files.
    known = {key: value for key, value in settings.items() if key not in ("model", "adapter")}
    stores, problem = [], None
    if ranks.is_first:
        try:
            stack.enter_context(lock_output_dir(out))
            for task in tasks:
                own = known | {"mode": task.kind, "max_new_tokens": task.max_new_tokens, "data": task.digest()}
                stores.append(SampleStore(out, task.suite, task.name, own, overwrite))
                stack.callback(stores[-1].close)
        except RecipeError as error:
            problem = str(as_argument(error))
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
