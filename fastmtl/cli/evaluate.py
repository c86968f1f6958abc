"""`fastmtl eval`: the metrics of a checkpoint on a split of the run's data."""

from __future__ import annotations

import contextlib
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from fastmtl.cli.build import build_trainer, load_data
from fastmtl.data import DataBundle
from fastmtl.errors import CheckpointError, UsageError
from fastmtl.support.named import short_name
from fastmtl.support.names import resolve_name
from fastmtl.trainer.checkpoint.files import read_checkpoint
from fastmtl.trainer.run.config import TrainConfig, read_config
from fastmtl.trainer.run.directory import RunDirectory
from fastmtl.utils import count_improvement

__all__ = ["evaluate"]


class _Scores(NamedTuple):
    """What a checkpoint scores, and what it is of."""

    config: TrainConfig
    bundle: DataBundle
    weights: Path
    losses: dict[str, float]
    metrics: dict[str, list[float]]


def evaluate(
    path: Path, *, checkpoint: str, split: str, device: str | None, as_json: bool, baseline: Path | None = None
) -> None:
    """Run the command, whose options ``fastmtl eval --help`` describes.

    Raises:
        FastmtlError: No such run, checkpoint or split, or the checkpoint does not fit the run's model.
    """
    split = resolve_name(split, {"test": "test", "val": "val"}, "split")
    base = None if baseline is None else _score(baseline, "best", split, device)
    scores = _score(path, checkpoint, split, device)
    about = scores.bundle.task_dict
    improvement = None
    if base is not None:
        if base.bundle.name != scores.bundle.name:
            raise UsageError(
                f"The baseline {baseline} is of {base.bundle.name}, which cannot be compared with {scores.bundle.name}."
            )
        improvement = count_improvement(base.metrics, scores.metrics, {task: about[task]["weight"] for task in about})
    tasks = {
        task: {"loss": scores.losses[task], **dict(zip(of_task["metrics"], scores.metrics[task], strict=True))}
        for task, of_task in about.items()
    }
    if as_json:
        known = {task: {name: _or_none(value) for name, value in values.items()} for task, values in tasks.items()}
        facts = {"run": str(path), "checkpoint": str(scores.weights), "split": split, "tasks": known}
        print(json.dumps(facts if improvement is None else {**facts, "improvement": _or_none(improvement)}))
        return
    config, bundle = scores.config, scores.bundle
    rows = f"{bundle.rows[split]:,} {split} rows of {bundle.name}"
    print(f"{short_name(config.arch)} + {short_name(config.weighting)} from {scores.weights}, {rows}")
    for task, values in tasks.items():
        print(f"  {task}: " + ", ".join(f"{name} {_shown(value, '.4f')}" for name, value in values.items()))
    if base is not None and improvement is not None:
        shown = _shown(improvement, "+.2%")
        method = f"{short_name(base.config.arch)} + {short_name(base.config.weighting)}"
        print(f"Improvement over {method} from {base.weights}: {shown}")


def _shown(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _or_none(value: float) -> float | None:
    """Return a number, None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value


def _score(path: Path, checkpoint: str, split: str, device: str | None) -> _Scores:
    run = RunDirectory.open(path)
    weights = {"best": run.best, "last": run.last}.get(checkpoint.lower(), Path(checkpoint))
    if not weights.is_file():
        raise CheckpointError(f"There is no checkpoint {weights}.")
    # A last.pt holds more than a model's parameters, and is read as a run to go on with.
    content = read_checkpoint(weights, torch.device("cpu"))
    whole = isinstance(content, dict) and "model" in content
    config = replace(
        read_config(run.config).resolved(),
        load_path=None if whole else str(weights),
        load_strict=True,
        compile=False,
        # The checkpoint has the weights.
        pretrained=False,
        limit_batches=None,
    )
    if device is not None:
        config = replace(config, device=device)
    # The trainer prints its own line about what it loads and finds.
    with contextlib.redirect_stdout(io.StringIO()):
        config, bundle = load_data(config)
        loaders = bundle.test if split == "test" else bundle.val
        if loaders is None:
            raise UsageError(f"split must be test for {bundle.name}: it has no {split} split.")
        trainer = build_trainer(config, bundle, resume=weights if whole else None)
        trainer.test(loaders, mode=split)
    meter = trainer.meter
    losses = dict(zip(meter.task_name, map(float, meter.loss_item), strict=True))
    return _Scores(config=config, bundle=bundle, weights=weights, losses=losses, metrics=meter.results)
