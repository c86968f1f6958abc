"""The run as JSON lines, to read back with any tool."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from fastmtl.trainer.log.facts import made_with, peak_memory
from fastmtl.trainer.log.files import FileLogger
from fastmtl.trainer.log.logger import RunInfo, StepRecords

__all__ = ["JsonlLogger", "read_jsonl"]

# What a line tells, by name, as JSON has it.
Row = dict[str, Any]


class JsonlLogger(FileLogger):
    """Writes one JSON object a line, told apart by ``event``.

    Events are ``run``, ``steps``, ``epoch``, ``checkpoint``, ``stop`` and ``end``.

    A ``steps`` line holds the means over a log interval and ``step``, the number of steps done by then; those of
    float16 also the ``loss_scale``, and how many steps of the run so far were ``skipped``. Its ``conflict`` has the
    ``share`` of pairs of tasks with opposed gradients, and for each pair the share of steps; its ``groups`` have the
    means of each group of shared parameters that is weighed apart. A ``run`` line has
    ``better``, 1 for metrics where higher is better, and what the process is ``made_with``; the ``epoch`` line of a
    training pass has the ``peak_memory`` of the process so far in bytes, on CUDA that of the device. A run that is
    stopped early has a ``stop`` line, with the ``best_epochs`` of the tasks. Every line is
    flushed, so the file is whole whenever the process dies. When a run goes on, the lines of steps that will be done
    again, and a torn last line, are dropped; the rest stays. NaN and infinity become null. The file is usually a
    ``metrics.jsonl``.
    """

    @override
    def on_start(self, info: RunInfo) -> None:
        super().on_start(info)
        same = ("epochs", "batches_per_epoch", "weighting", "architecture", "device")
        self._write(
            "run",
            step=info.start_step,
            epoch=info.start_epoch,
            **{name: getattr(info, name) for name in same},
            tasks=info.task_names,
            metrics=info.metric_names,
            better=info.metric_weights,
            made_with=made_with(torch.device(info.device)),
        )

    @override
    def on_steps(self, records: StepRecords) -> None:
        if self._info is None:
            return
        means = records.means(self._info.task_names)
        if "conflict" in means:
            means["conflict"] |= records.conflicts_of_pairs(self._info.task_names)
        groups = {
            name: {key: value for key, value in of_group.means(self._info.task_names).items() if key != "loss"}
            for name, of_group in records.by_group(self._info.group_names).items()
        }
        self._write(
            "steps",
            epoch=records.epoch,
            step=records.first_step + records.count,
            count=records.count,
            steps_per_second=records.steps_per_second,
            **means,
            **({"groups": groups} if groups else {}),
            **({} if records.skipped is None else {"loss_scale": records.loss_scale, "skipped": records.skipped}),
        )

    @override
    def on_epoch(
        self, epoch: int, mode: str, losses: dict[str, float], metrics: dict[str, list[float]], seconds: float
    ) -> None:
        if self._info is None:
            return
        names = self._info.metric_names
        named = {task: dict(zip(names[task], values, strict=True)) for task, values in metrics.items()}
        memory = {"peak_memory": peak_memory(torch.device(self._info.device))} if mode == "train" else {}
        self._write("epoch", epoch=epoch, mode=mode, loss=losses, metric=named, seconds=seconds, **memory)

    @override
    def on_checkpoint(self, path: Path, kind: str) -> None:
        self._write("checkpoint", kind=kind, path=str(path))

    @override
    def on_stop(self, epoch: int, best_epochs: dict[str, int]) -> None:
        self._write("stop", epoch=epoch, best_epochs=best_epochs)

    @override
    def on_end(self, best_epoch: int, best_result: dict[str, list[float]]) -> None:
        self._write("end", best_epoch=best_epoch, best_result=best_result)
        super().on_end(best_epoch, best_result)

    @override
    def _begun(self, info: RunInfo) -> str:
        kept = [row for row in read_jsonl(self.path) if _stays(row, info)] if info.start_step else []
        return "".join(json.dumps(row) + "\n" for row in kept)

    def _write(self, event: str, **facts: object) -> None:
        self._append(json.dumps(_finite({"event": event, **facts}), allow_nan=False) + "\n")


def read_jsonl(path: str | Path) -> list[Row]:
    """Return the rows of a ``metrics.jsonl``; none when there is no file. A torn or damaged line is left out."""
    path = Path(path)
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "event" in row:
            rows.append(row)
    return rows


def _stays(row: Row, info: RunInfo) -> bool:
    """Whether a row tells of something before the point the run goes on from."""
    match row.get("event"):
        case "run" | "steps":
            return bool(row["step"] <= info.start_step)
        case "epoch":
            return bool(row["epoch"] < info.start_epoch)
        case event:
            return event == "checkpoint"


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
