"""Choosing settings on the validation split, with the same number of runs for every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastmtl.experiments.grid import Cell, Grid
from fastmtl.experiments.reading import Run, pandas, read_run
from fastmtl.experiments.runner import failure_of, state_of
from fastmtl.experiments.statistics import Selection, delta_m, selected

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Choice", "choose"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the tuning of a method has come to.

    Attributes:
        method: The method's name.
        chosen: The settings that were chosen; None if every run failed.
        tried: A row per run: the settings, ``score`` (mean relative difference from the mean of all tries in percent,
            lower is better; NaN for a failed one).
        reason: Why every run failed.
    """

    method: str
    chosen: Mapping[str, Any] | None
    tried: DataFrame
    reason: str = ""


def choose(grid: Grid, cells: Sequence[Cell], selection: Selection) -> list[Choice]:
    """Return for each method the settings whose run is best on the validation split.

    A run's score is `delta_m` of its validation metrics against their mean over the runs of the same method, so that no
    try is favoured and no metric counts more for its unit.

    Raises:
        UsageError: A run has no validation split.
    """
    return [
        _choose(method.name, [cell for cell in cells if cell.method.name == method.name], selection)
        for method in grid.methods
    ]


def _choose(method: str, cells: Sequence[Cell], selection: Selection) -> Choice:
    pd = pandas()
    runs: dict[int, Run] = {k: read_run(cell.run) for k, cell in enumerate(cells) if state_of(cell) == "done"}
    tried = pd.DataFrame([dict(cell.tried) for cell in cells])
    tried["score"] = float("nan")
    if runs:
        better = pd.Series(next(iter(runs.values())).better, index=next(iter(runs.values())).scores["test"].columns)
        values = pd.DataFrame({k: selected(run, selection, "val") for k, run in runs.items()}).T
        scores = delta_m(values, values.mean(), better)
        tried.loc[scores.index, "score"] = scores
        if scores.notna().any():
            return Choice(method=method, chosen=cells[scores.idxmin()].tried, tried=tried)
    reasons = [failure["reason"] for cell in cells if (failure := failure_of(cell))]
    return Choice(
        method=method, chosen=None, tried=tried, reason=next(iter(reasons), "its tuning runs have not ended.")
    )
