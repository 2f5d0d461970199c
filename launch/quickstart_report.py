"""The report of a finished quickstart: what the adapter gained, one plot, and where everything lies."""

from __future__ import annotations

import json
import sys
from pathlib import Path


class QuickstartError(Exception):
    """Something is missing or unreadable; the message is one line for the user. Exits with 2."""


def report(directory: Path, output_dir: Path) -> bool:
    """Draw and print how the run in `output_dir` went; return whether the held-out loss fell."""
    if not (directory / "manifest.json").is_file():
        raise QuickstartError(f"{directory}/manifest.json: not there; run: python launch/quickstart.py prepare")
    metrics = read_metrics(output_dir / "metrics.json")
    adapter = output_dir / "adapter"
    if not adapter.is_dir():
        raise QuickstartError(f"{adapter}: no adapter there; the training run did not finish")
    plot = draw_losses(metrics, output_dir / "loss.png")
    base, adapted = metrics["eval_start"]["loss"], metrics["eval_end"]["loss"]
    print(f"held-out loss   base {base:.3f} -> adapted {adapted:.3f} nats per token ({adapted / base - 1:+.1%})")
    if not adapted < base:  # also true for NaN
        print(f"the held-out loss did not fall: look at {plot}", file=sys.stderr)
        return False
    print(f"adapter         {adapter}")
    print(f"plot            {plot}")
    print(f"curves          tensorboard --logdir {output_dir / 'tensorboard'}")
    print("next, with a real model: edit launch/recipes/llama3_8b_commonsense.yaml (model, data), then check it with")
    print("                deepspeed launch/train.py --config launch/recipes/llama3_8b_commonsense.yaml --dry-run")
    return True


def read_metrics(path: Path) -> dict:
    """Read the training run's metrics.json.

    Raises:
        QuickstartError: no such file, not JSON, or without the two held-out losses and a history.
    """
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        float(metrics["eval_start"]["loss"]), float(metrics["eval_end"]["loss"])
        complete = bool(metrics["history"])
    except OSError:
        raise QuickstartError(f"{path}: not there; the training run did not finish") from None
    except (KeyError, TypeError, ValueError) as error:
        raise QuickstartError(f"{path}: not a finished run's metrics ({type(error).__name__}: {error})") from None
    if not complete:
        raise QuickstartError(f"{path}: history is empty; the training run logged nothing")
    return metrics


def draw_losses(metrics: dict, path: Path) -> Path:
    """Draw task loss and held-out levels (left), negative ELBO and its terms (right) over steps; return `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (task_axis, elbo_axis) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    history = metrics["history"]
    _draw_series(task_axis, history, "loss/task", "training batches", color="tab:blue")
    for key, label, color in (("eval_start", "base", "tab:red"), ("eval_end", "adapted", "tab:green")):
        level = metrics[key]["loss"]
        task_axis.axhline(level, linestyle="--", color=color, label=f"held-out, {label}: {level:.2f}")
    task_axis.set(title="Task loss", xlabel="optimizer step", ylabel="cross-entropy, nats per completion token")
    task_axis.set_ylim(bottom=0)

    _draw_series(elbo_axis, history, "loss/neg_elbo", "negative ELBO", color="black", linewidth=2)
    for key, label in (
        ("elbo/nll", "reconstruction NLL (nats)"),
        ("elbo/kl_z1", "KL of z1 (nats)"),
        ("elbo/z1_sq", "mean z1²"),
        ("elbo/z2_sq", "mean (z2 − prior mean)²"),
    ):
        _draw_series(elbo_axis, history, key, label)
    # Linear around zero, logarithmic beyond: the reconstruction is hundreds of nats and may be negative.
    elbo_axis.set_yscale("symlog", linthresh=1.0)
    elbo_axis.set(title="Side loss and its terms", xlabel="optimizer step", ylabel="per token, mean over layers")
    for axis in (task_axis, elbo_axis):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)  # below the panel
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _draw_series(axis, history: list[dict], key: str, label: str, **style) -> None:
    """Plot the entries of `history` that have `key`; a key that no entry has (another adapter type) is left out."""
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, **style)
