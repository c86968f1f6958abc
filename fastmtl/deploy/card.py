"""The model card: a ``README.md`` that says what a run's model is, in the layout of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from fastmtl.data.registry import find_dataset
from fastmtl.deploy.facts import ModelFacts
from fastmtl.support.named import short_name
from fastmtl.trainer.checkpoint.files import read_checkpoint
from fastmtl.trainer.log.jsonl import read_jsonl
from fastmtl.trainer.run.config import TrainConfig, read_config
from fastmtl.trainer.run.directory import RunDirectory

__all__ = ["card_of"]

_SPLITS = ("train", "val", "test")


def card_of(run: RunDirectory, weights: Path | None = None) -> str:
    """Return the card of a run's model: data, tasks, metrics of its epoch, how it was trained and how to load it.

    Args:
        run: The run.
        weights: The file of the weights, ``best.pt`` if not given. Nothing is said of metrics and training where they
            are another run's.

    Raises:
        FastmtlError: The run lacks a file.
    """
    config, facts = read_config(run.config), ModelFacts.read(run.facts)
    rows = read_jsonl(run.metrics)
    begun = next((row for row in reversed(rows) if row["event"] == "run"), {})
    info = find_dataset(config.dataset).value
    title = f"{short_name(config.arch)} with {short_name(config.weighting)} on {info.name}"
    which = _which(run, weights)
    epoch = _epoch_of(run, rows, which)
    scores = {row["mode"]: row for row in rows if row["event"] == "epoch" and row["epoch"] == epoch}
    front = {
        "library_name": "fastmtl",
        "tags": ["multi-task-learning", short_name(config.arch), short_name(config.weighting)],
        "model-index": [{"name": title, "results": _results(info.name, facts, scores.get("test", {}))}],
    }
    made = _made(begun) if which else "or another program: its weights are not those of the run beside them"
    folder = "" if config.dataset_path is None else " --dataset-path FOLDER"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {title}",
        "",
        f"A network for {len(facts.tasks)} tasks, trained by fastmtl {made}.",
        "",
        "## Data",
        "",
        f"`{config.dataset}`. {info.description} Source: {info.source or 'not said'}. "
        f"Licence: {info.licence or 'not said'}.",
        "",
        "## Tasks",
        "",
        "| task | kind | outputs | classes |",
        "|---|---|---|---|",
        *(
            f"| {name} | {about.kind} | {about.outputs} | {', '.join(about.labels)} |"
            for name, about in facts.tasks.items()
        ),
        "",
        *(_told_metrics(which, epoch, begun, scores) if which else []),
        *(_told_training(config, folder) if which else []),
        "## How to load it",
        "",
        "```python",
        "import fastmtl",
        "",
        'model = fastmtl.load("path/of/this/folder")',
        f"predictions = model(inputs)  # {_form(facts.inputs)}; a dictionary by task",
        "```",
        "",
        *_prepared(facts.data),
        "Or from the command line: `fastmtl predict FOLDER INPUTS`, `fastmtl export FOLDER --format onnx`.",
    ]
    return "\n".join(lines) + "\n"


def _which(run: RunDirectory, weights: Path | None) -> str | None:
    """Return ``"best"`` or ``"last"``; None for weights that are none of the run's."""
    if weights is None:
        return "best"
    named = {run.best.resolve(): "best", run.last.resolve(): "last"}
    return named.get(weights.resolve())


def _epoch_of(run: RunDirectory, rows: Sequence[Mapping[str, Any]], which: str | None) -> int | None:
    """Return the epoch after which a run had these weights, where that is known."""
    ended = next((row for row in reversed(rows) if row["event"] == "end"), None)
    if which == "best" and ended is not None:
        return None if ended["best_epoch"] is None else int(ended["best_epoch"])
    if which is None or not run.last.exists():
        return None
    state: Any = read_checkpoint(run.last, torch.device("cpu"))
    if which == "best":
        return int(state["best_result"]["epoch"])
    # In the middle of an epoch the weights are those of no epoch that was evaluated.
    return None if state["batch"] else int(state["epoch"]) - 1


def _told_metrics(
    which: str, epoch: int | None, begun: Mapping[str, Any], scores: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    if epoch is None:
        return ["## Metrics", "", "These weights were not evaluated.", ""]
    return [f"## Metrics after epoch {epoch}, the {which} one", "", *_table(begun, scores), ""]


def _told_training(config: TrainConfig, folder: str) -> list[str]:
    repeated = f"`fastmtl train --config config.yaml{folder}`"
    return [
        "## Training",
        "",
        *_training(config),
        "",
        f"The whole configuration is in `config.yaml`, which repeats the run: {repeated}.",
        "",
    ]


def _made(begun: Mapping[str, Any]) -> str:
    made = begun.get("made_with", {})
    return f"{made.get('fastmtl', '?')} with torch {made.get('torch', '?')}"


def _results(data: str, facts: ModelFacts, test: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the results as the Hub reads them."""
    return [
        {
            "task": {"type": "other", "name": f"{task} ({facts.tasks[task].kind})"},
            "dataset": {"name": data, "type": data, "split": "test"},
            "metrics": [{"type": name, "name": name, "value": value} for name, value in scores.items()],
        }
        for task, scores in test.get("metric", {}).items()
    ]


def _table(begun: Mapping[str, Any], scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    splits = [split for split in _SPLITS if split in scores]
    better = begun.get("better", {})
    lines = [f"| task | metric | better | {' | '.join(splits)} |", f"|---|---|---|{'---|' * len(splits)}"]
    for task, names in begun.get("metrics", {}).items():
        for place, name in enumerate(names):
            values = [scores[split]["metric"][task].get(name) for split in splits]
            direction = "higher" if better.get(task, [1] * len(names))[place] else "lower"
            shown = " | ".join("-" if value is None else f"{value:.4f}" for value in values)
            lines.append(f"| {task} | {name} | {direction} | {shown} |")
    return lines


def _training(config: TrainConfig) -> list[str]:
    facts = {
        "architecture": f"{short_name(config.arch)} {config.arch_args or ''}",
        "weighting": f"{short_name(config.weighting)} {config.weight_args or ''}",
        "encoder": f"{config.encoder} {config.encoder_args or ''}"
        + (", from its pretrained weights" if config.pretrained else ""),
        "optimizer": f"{config.optim}, lr {config.lr:g}, weight decay {config.weight_decay:g}",
        "epochs": str(config.epochs),
        "batch size": str(config.batch_size),
        "seed": str(config.seed),
    }
    return [f"- {name}: {str(value).strip()}" for name, value in facts.items()]


def _prepared(data: Mapping[str, Any]) -> list[str]:
    """Return how inputs are made of what a user has, where that is known."""
    if "image_mean" in data:
        height, width = data["image_size"]
        mean, std = (", ".join(f"{value:.4g}" for value in data[name]) for name in ("image_mean", "image_std"))
        said = (
            f"Inputs are images of {height} x {width} pixels from 0 to 1, less the mean {mean}, by the deviation {std}"
        )
    elif "mean" in data and "std" in data:
        said = "Inputs are numbers, less the `mean` in `model.json`, by the `std`"
    else:
        return []
    return [f"{said}; `model.predict(rows)` and `fastmtl predict` do that.", ""]


def _form(form: Any) -> str:
    if form is None:
        return "as the data set gives them"
    if "entries" in form:
        return ", ".join(f"{name}: {_form(entry)}" for name, entry in form["entries"].items())
    return f"{form['dtype']} ({', '.join(['batch', *map(str, form['shape'])])})"
