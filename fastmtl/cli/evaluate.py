"""`fastmtl eval`: the metrics of a checkpoint on a split of the run's data."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from fastmtl.cli.build import build_trainer, load_data
from fastmtl.errors import CheckpointError, UsageError
from fastmtl.names import resolve_name
from fastmtl.trainer.checkpoint import read_checkpoint
from fastmtl.trainer.config import read_config
from fastmtl.trainer.logger import Logger
from fastmtl.trainer.run_directory import RunDirectory

__all__ = ["evaluate"]


class _Result(Logger):
    """Keeps the losses and metrics of the pass."""

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}
        self.metrics: dict[str, list[float]] = {}

    @override
    def on_epoch(
        self, epoch: int, mode: str, losses: dict[str, float], metrics: dict[str, list[float]], seconds: float
    ) -> None:
        self.losses, self.metrics = dict(losses), {task: list(values) for task, values in metrics.items()}


def evaluate(path: Path, *, checkpoint: str, split: str, device: str | None, as_json: bool) -> None:
    """Run the command.

    Args:
        path: Run directory.
        checkpoint: ``"best"``, ``"last"`` or the path of a checkpoint.
        split: ``"test"`` or ``"val"``.
        device: Where to evaluate; as the run was configured if None.
        as_json: Print JSON instead of a table.

    Raises:
        FastmtlError: No such run, checkpoint or split, or the checkpoint does not fit the run's model.
    """
    run = RunDirectory.open(path)
    split = resolve_name(split, {"test": "test", "val": "val"}, "split")
    weights = {"best": run.best, "last": run.last}.get(checkpoint.lower(), Path(checkpoint))
    if not weights.is_file():
        raise CheckpointError(f"There is no checkpoint {weights}.")
    # A last.pt holds more than a model's parameters, and is read as a run to go on with.
    content = read_checkpoint(weights, torch.device("cpu"))
    whole = isinstance(content, dict) and "model" in content
    config = replace(
        read_config(run.config).resolved(),
        load_path=None if whole else str(weights),
        compile=False,
        # The checkpoint has the weights.
        pretrained=False,
        limit_batches=None,
    )
    if device is not None:
        config = replace(config, device=device)
    result = _Result()
    # The trainer prints its own line about what it loads and finds.
    with contextlib.redirect_stdout(io.StringIO()):
        config, bundle = load_data(config)
        loaders = bundle.test if split == "test" else bundle.val
        if loaders is None:
            raise UsageError(f"split must be test for {bundle.name}: it has no {split} split.")
        trainer = build_trainer(config, bundle, resume=weights if whole else None, logger=result)
        trainer.test(loaders, mode=split)
    metric_names = {task: list(about["metrics"]) for task, about in bundle.task_dict.items()}
    tasks = {
        task: {"loss": result.losses[task], **dict(zip(metric_names[task], result.metrics[task], strict=True))}
        for task in metric_names
    }
    if as_json:
        print(json.dumps({"run": str(run.path), "checkpoint": str(weights), "split": split, "tasks": tasks}))
        return
    print(f"{config.arch} + {config.weighting} from {weights}, {bundle.rows[split]:,} {split} rows of {bundle.name}")
    columns = list(dict.fromkeys(name for values in tasks.values() for name in values))
    table = Table("task", *columns)
    for task, values in tasks.items():
        table.add_row(task, *(f"{values[name]:.4f}" if name in values else "" for name in columns))
    Console().print(table)
