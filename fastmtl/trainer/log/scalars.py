"""The numbers of a run by tag, as TensorBoard, Weights & Biases, MLflow and tables have them."""

from __future__ import annotations

import math

from fastmtl.trainer.log.logger import RunInfo, StepRecords

__all__ = ["of_epoch", "of_steps"]


def of_steps(records: StepRecords, info: RunInfo) -> dict[str, float]:
    """Return the means over a log interval: ``step_loss/<task>``, ..., ``steps_per_second``; finite ones only.

    Of groups of parameters there are ``group_weight/<group>/<task>`` and ``group_conflict/<group>``.
    """
    values = {
        f"step_{group}/{name}": value
        for group, named in records.means(info.task_names).items()
        for name, value in named.items()
    }
    for group, of_group in records.by_group(info.group_names).items():
        means = of_group.means(info.task_names)
        values |= {f"group_weight/{group}/{task}": value for task, value in means.get("weight", {}).items()}
        values |= {f"group_conflict/{group}": value for value in means.get("conflict", {}).values()}
    values["steps_per_second"] = records.steps_per_second
    if records.loss_scale is not None and records.skipped is not None:
        values |= {"loss_scale": records.loss_scale, "skipped_steps": records.skipped}
    return {tag: value for tag, value in values.items() if math.isfinite(value)}


def of_epoch(mode: str, losses: dict[str, float], metrics: dict[str, list[float]], info: RunInfo) -> dict[str, float]:
    """Return the results of a pass: ``<mode>_loss/<task>`` and ``<mode>_<metric>/<task>``; finite ones only."""
    values = {f"{mode}_loss/{task}": value for task, value in losses.items()}
    for task, of_task in metrics.items():
        for name, value in zip(info.metric_names[task], of_task, strict=True):
            values[f"{mode}_{name}/{task}"] = value
    return {tag: value for tag, value in values.items() if math.isfinite(value)}
