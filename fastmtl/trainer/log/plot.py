"""A picture of the run: losses, task weights and gradient cosines over the steps, metrics over the epochs."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from fastmtl.errors import UsageError
from fastmtl.trainer.log.history import Curve, History, mean_cosines
from fastmtl.trainer.log.logger import Logger, RunInfo, StepRecords, pair_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PlotLogger", "draw"]

# Told apart by people with colour-blindness as well (Okabe and Ito), then two more.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#5D4A1F")
_PAIR_COLORS = ("#3B4CC0", "#B40426", "#2E8B57", "#8A5FBF", "#C47F17", "#4A9DB5")
Color = str | tuple[float, float, float, float]

_MODES: dict[str, dict[str, Any]] = {
    "train": {"linestyle": "--", "alpha": 0.6, "marker": "."},
    "val": {"linestyle": ":", "marker": "."},
    "test": {"linestyle": "-", "marker": "o", "markersize": 4},
}
_METRIC_PANELS = 3
_COSINES_TITLE = "Cosine of task gradients (below 0: conflict)"


class PlotLogger(Logger):
    """Draws the run as a PNG, anew at the end of an epoch and of the run. Needs the package matplotlib.

    Epochs so short that drawing would take more than a twentieth of the time are not all drawn; the end always is.
    When a run goes on, its earlier steps are taken from the ``metrics.jsonl`` named by ``metrics``.

    Raises:
        UsageError: matplotlib is not installed.
    """

    def __init__(self, path: str | Path, metrics: str | Path | None = None) -> None:
        try:
            import matplotlib  # noqa: F401
        except ImportError as cause:
            raise UsageError(
                f"The picture of the run needs the package matplotlib (pip install matplotlib): {cause}."
            ) from cause
        self.path = Path(path)
        self.metrics = None if metrics is None else Path(metrics)
        self.history: History | None = None
        self._not_before = 0.0

    @override
    def on_start(self, info: RunInfo) -> None:
        self.history = History(info=info)
        if self.metrics is not None and info.start_step:
            self.history.read_earlier(self.metrics)

    @override
    def on_steps(self, records: StepRecords) -> None:
        if self.history is None:
            return
        steps = records.first_step + np.arange(1, records.count + 1, dtype=float)
        self.history.losses.add(steps, records.losses)
        if records.weights is not None:
            self.history.weights.add(steps, records.weights)
        if records.cosines is not None and records.cosines.shape[1]:
            self.history.cosines.add(steps, records.cosines)
        groups = [of_group.cosines for of_group in records.by_group(self.history.info.group_names).values()]
        if groups and groups[0] is not None and groups[0].shape[1]:
            self.history.groups.add(steps, mean_cosines(np.stack(groups, axis=1)))  # type: ignore[arg-type]

    @override
    def on_epoch(
        self, epoch: int, mode: str, losses: dict[str, float], metrics: dict[str, list[float]], seconds: float
    ) -> None:
        if self.history is None:
            return
        self.history.results[mode, epoch] = {task: list(values) for task, values in metrics.items()}
        # The test pass is an epoch's last.
        if mode == "test" and time.monotonic() >= self._not_before:
            self._save(self.history)

    @override
    def on_end(self, best_epoch: int, best_result: dict[str, list[float]]) -> None:
        if self.history is not None:
            self._save(self.history)

    def _save(self, history: History) -> None:
        if not len(history.losses.steps):
            return
        begun = time.monotonic()
        part = self.path.with_name(self.path.name + ".part")
        draw(history).savefig(part, format="png", dpi=120)
        os.replace(part, self.path)
        ended = time.monotonic()
        self._not_before = ended + 20 * (ended - begun)


def draw(history: History) -> Figure:
    """Return the picture: a panel each for losses, weights, cosines and groups, if any, and up to three metrics."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    info, names = history.info, history.info.task_names
    metrics = _metric_panels(info, history)
    cosines = len(history.cosines.steps) > 0 and not np.isnan(history.cosines.values).all()
    there = {"loss": True, "weight": len(history.weights.steps) > 0, "cosine": cosines}
    there["group"] = len(history.groups.steps) > 0
    panels = [*(panel for panel in there if there[panel]), *(f"metric {name}" for name in metrics)]
    grid = [panels[i : i + 2] for i in range(0, len(panels), 2)]
    grid[-1] = grid[-1] * (2 // len(grid[-1]))

    figure = Figure(figsize=(11, 0.7 + 3.4 * len(grid)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes: dict[str, Axes] = figure.subplot_mosaic(grid)  # type: ignore[arg-type]
    figure.suptitle(f"{info.architecture} + {info.weighting}", fontsize=13, fontweight="bold", x=0.01, ha="left")
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#E6E6E6", linewidth=0.8)
        axis.set_axisbelow(True)

    colors = _task_colors(len(names))
    smooth = _draw_curve(axes["loss"], history.losses, colors, "Training loss", "Loss")
    known = smooth[np.isfinite(smooth)]
    if known.size and known.min() > 0 and known.max() > 30 * known.min():
        axes["loss"].set_yscale("log")
    if "weight" in axes:
        _draw_curve(axes["weight"], history.weights, colors, "Task weight", "Weight")
    if "cosine" in axes:
        _draw_cosines(axes["cosine"], history)
    if "group" in axes:
        _draw_groups(axes["group"], history)
    for name in metrics:
        _draw_metric(axes[f"metric {name}"], history, name, colors)
    _name_tasks(figure, names, colors)
    return figure


def _metric_panels(info: RunInfo, history: History) -> list[str]:
    """The names of the tasks' first metrics; one panel a name, as different metrics have different units."""
    names = [info.metric_names[task][0] for task in info.task_names if info.metric_names[task]]
    return list(dict.fromkeys(names))[:_METRIC_PANELS] if history.results else []


def _task_colors(count: int) -> list[Color]:
    if count <= len(_COLORS):
        return list(_COLORS[:count])
    from matplotlib import colormaps

    return [colormaps["viridis"](position) for position in np.linspace(0.0, 0.92, count)]


def _draw_curve(axis: Axes, curve: Curve, colors: Sequence[Color], title: str, label: str) -> np.ndarray:
    """Draw each column: its values in pale, their moving average, which is returned, on top."""
    window = max(1, len(curve.steps) // 25)
    smooth = curve.smooth(window)
    for column, color in enumerate(colors):
        # Pale traces of many tasks hide each other.
        if window > 1 and len(colors) <= len(_COLORS):
            axis.plot(curve.steps, curve.values[:, column], color=color, alpha=0.2, linewidth=0.6)
        marker = "o" if len(curve.steps) == 1 else None
        axis.plot(curve.steps, smooth[:, column], color=color, linewidth=1.8, marker=marker)
    _label(axis, title, "Step", label)
    axis.margins(x=0.01)
    return smooth


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, loc="left", fontsize=11)
    axis.set(xlabel=x, ylabel=y)


def _draw_cosines(axis: Axes, history: History) -> None:
    curve, pairs = history.cosines, pair_names(history.info.task_names)
    if len(pairs) <= len(_PAIR_COLORS):
        _draw_curve(axis, curve, _PAIR_COLORS[: len(pairs)], _COSINES_TITLE, "Cosine")
        lines = [line for line in axis.lines if line.get_alpha() is None]
        shown = [pair.replace(":", ", ") for pair in pairs]
        axis.legend(lines, shown, loc="lower left", fontsize=8, frameon=False, ncols=3)
    else:
        smooth = curve.smooth(max(1, len(curve.steps) // 25))
        known = ~np.isnan(smooth).all(axis=1)
        steps = curve.steps[known]
        low, lower, middle, upper, high = np.nanpercentile(smooth[known], [0, 25, 50, 75, 100], axis=1)
        axis.fill_between(steps, low, high, color=_PAIR_COLORS[0], alpha=0.15, linewidth=0, label="all")
        axis.fill_between(steps, lower, upper, color=_PAIR_COLORS[0], alpha=0.3, linewidth=0, label="middle half")
        axis.plot(steps, middle, color=_PAIR_COLORS[0], linewidth=1.8, label="median")
        _label(axis, f"{_COSINES_TITLE}, {len(pairs)} pairs", "Step", "Cosine")
        axis.margins(x=0.01)
        axis.legend(loc="lower left", fontsize=8, frameon=False, ncols=3)
    axis.axhspan(-1.05, 0.0, color="#D55E00", alpha=0.05, linewidth=0)
    axis.axhline(0.0, color="#888888", linewidth=0.8)
    axis.set_ylim(-1.05, 1.05)


def _draw_groups(axis: Axes, history: History) -> None:
    """Draw the mean cosine of each group of parameters over the steps as a map of colours."""
    curve, names = history.groups, history.info.group_names
    width = max(1, len(curve.steps) // 200)
    smooth = curve.smooth(width)[::width].T
    first, last = curve.steps[0], curve.steps[-1]
    image = axis.imshow(
        smooth,
        aspect="auto",
        cmap="RdBu",
        vmin=-1,
        vmax=1,
        interpolation="nearest",
        extent=(first - 0.5, last + 0.5, len(names) - 0.5, -0.5),
    )
    axis.grid(visible=False)
    stride = -(-len(names) // 14)
    axis.set_yticks(range(0, len(names), stride), names[::stride], fontsize=7)
    axis.figure.colorbar(image, ax=axis)
    _label(axis, "Mean cosine in each group of parameters (red: conflict)", "Step", "")


def _draw_metric(axis: Axes, history: History, name: str, colors: Sequence[Color]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    info = history.info
    modes = [mode for mode in _MODES if any(tested == mode for tested, _ in history.results)]
    for mode in modes:
        epochs = sorted(epoch for tested, epoch in history.results if tested == mode)
        for task, color in zip(info.task_names, colors, strict=True):
            if name in info.metric_names[task][:1]:
                values = [history.results[mode, epoch][task][0] for epoch in epochs]
                axis.plot([epoch + 1 for epoch in epochs], values, color=color, linewidth=1.6, **_MODES[mode])
    _label(axis, f"{name} of each epoch", "Epoch", name)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_xlim(0.5, max((epoch for _, epoch in history.results), default=0) + 1.5)
    lines = [Line2D([], [], color="#555555", **_MODES[mode]) for mode in modes]
    axis.legend(lines, modes, loc="best", fontsize=8, frameon=False)


def _name_tasks(figure: Figure, names: Sequence[str], colors: Sequence[Color]) -> None:
    from matplotlib.lines import Line2D

    shown = list(zip(names, colors, strict=True))
    if len(shown) > 12:
        shown = [shown[0], shown[len(shown) // 2], shown[-1]]
    lines = [Line2D([], [], color=color, linewidth=3) for _, color in shown]
    figure.legend(
        lines, [name for name, _ in shown], loc="upper right", ncols=min(len(shown), 6), frameon=False, fontsize=9
    )
