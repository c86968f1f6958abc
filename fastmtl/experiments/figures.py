"""The figures of a report, as SVG."""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastmtl.experiments.reading import Run, pandas
from fastmtl.experiments.summary import Summary
from fastmtl.experiments.tables import shown
from fastmtl.support.extras import need

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Picture", "conflict_matrices", "curves", "layer_matrix", "lines", "signal_of", "task_weights", "trade_off"]

# Told apart by people with colour-blindness as well (Okabe and Ito), and by dashes and markers.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#5D4A1F")
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*<>"
BASELINE_COLOR = "#444444"
_SIZE = (5.2, 3.5)
# More tasks than that are too many numbers for a matrix of this size.
_MOST_WITH_NUMBERS = 8
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastmtl",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    # Half the time of a constrained layout.
    "savefig.bbox": "tight",
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure: its source for an ``img`` element, the text for who cannot see it, and its caption."""

    source: str
    alt: str
    caption: str


def _figure(size: tuple[float, float] = _SIZE, columns: int = 1) -> tuple[Any, Any]:
    figures = need("matplotlib.figure", "experiments", "A report")
    figure = figures.Figure(figsize=size, layout="constrained" if columns > 1 else None)
    return figure, figure.subplots(1, columns)


def _picture(figure: Any, alt: str, caption: str) -> Picture:
    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    encoded = base64.b64encode(content.getvalue().encode()).decode()
    return Picture(source=f"data:image/svg+xml;base64,{encoded}", alt=alt, caption=caption)


def _styled(draw: Any) -> Any:
    matplotlib = need("matplotlib", "experiments", "A report")
    with matplotlib.rc_context(_STYLE):
        return draw()


def _looks(names: Iterable[str], baseline: str | None = None) -> dict[str, dict[str, Any]]:
    """Return colour, dashes and marker of each name."""
    looks: dict[str, dict[str, Any]] = {}
    signs = itertools.cycle(MARKERS)
    others = [name for name in names if name != baseline]
    for place, name in enumerate(others):
        dash = DASHES[(place + place // len(COLORS)) % len(DASHES)]
        looks[name] = {"color": COLORS[place % len(COLORS)], "linestyle": dash, "marker": next(signs)}
    if baseline is not None:
        looks[baseline] = {"color": BASELINE_COLOR, "linestyle": (0, (1, 1)), "marker": "."}
    return looks


def trade_off(summary: Summary) -> Picture | None:
    """Return the first metrics of two tasks against each other, with the baseline as lines; None for other numbers."""
    runs = summary.runs
    tasks = runs[0].tasks
    if len(tasks) != 2:
        return None
    keys = [next(key for key in summary.means.columns if key[0] == task) for task in tasks]

    def draw() -> Picture:
        figure, axes = _figure((5.2, 4.2))
        told = []
        for name, look in _looks(summary.methods, summary.baseline).items():
            x, y = (summary.means.loc[name, key] for key in keys)
            if name == summary.baseline:
                axes.axvline(x, color=BASELINE_COLOR, linestyle=":", linewidth=1.2)
                axes.axhline(y, color=BASELINE_COLOR, linestyle=":", linewidth=1.2, label=f"{name} (lines)")
            else:
                dx, dy = (summary.stds.loc[name, key] for key in keys)
                axes.errorbar(
                    x,
                    y,
                    xerr=None if math.isnan(dx) else dx,
                    yerr=None if math.isnan(dy) else dy,
                    fmt=look["marker"],
                    color=look["color"],
                    capsize=2,
                    label=name,
                )
            told.append(f"{name} {shown(x)}, {shown(y)}")
        directions = ["higher" if summary.better[key] else "lower" for key in keys]
        axes.set_xlabel(f"{' '.join(keys[0])} ({directions[0]} is better)")
        axes.set_ylabel(f"{' '.join(keys[1])} ({directions[1]} is better)")
        axes.legend(fontsize=8, frameon=False, loc="best")
        alt = f"Scatter of {' '.join(keys[0])} and {' '.join(keys[1])}: {'; '.join(told)}."
        return _picture(figure, alt, "The two tasks against each other: means and standard deviations over the seeds.")

    return _styled(draw)


def curves(summary: Summary) -> list[Picture]:
    """Return for each task its first test metric and its training loss over the epochs."""
    pictures = []
    for task in summary.runs[0].tasks:
        key = next(key for key in summary.means.columns if key[0] == task)
        better = "higher" if summary.better[key] else "lower"
        of_methods = {
            name: [run.scores["test"][key] for run in method.runs.values()] for name, method in summary.methods.items()
        }
        title = f"{task} {key[1]} on the test split ({better} is better)"
        pictures.append(_epochs(summary, of_methods, title, f"{task}: {key[1]} on the test split over the epochs."))
        of_methods = {
            name: [run.losses["train"][task] for run in method.runs.values()]
            for name, method in summary.methods.items()
        }
        pictures.append(_epochs(summary, of_methods, f"training loss of {task}", f"{task}: training loss."))
    return pictures


def _epochs(summary: Summary, of_methods: dict[str, list[Any]], label: str, caption: str) -> Picture:
    pd = pandas()

    def draw() -> Picture:
        figure, axes = _figure()
        ends = []
        for name, look in _looks(summary.methods, summary.baseline).items():
            of_runs = pd.concat(of_methods[name], axis=1)
            mean, std = of_runs.mean(axis=1), of_runs.std(axis=1, ddof=1)
            epochs = mean.index + 1
            size = 4 if len(epochs) <= 20 else 0
            axes.plot(epochs, mean, label=name, linewidth=1.4, markersize=size, **look)
            if std.notna().any():
                axes.fill_between(epochs, mean - std, mean + std, color=look["color"], alpha=0.12, linewidth=0)
            ends.append(f"{name} {shown(mean.iloc[-1])}")
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=8, frameon=False, ncols=2)
        alt = f"Curves over the epochs of {label}; at the end: {', '.join(ends)}."
        return _picture(figure, alt, f"{caption} Means over the seeds; bands are one standard deviation.")

    return _styled(draw)


def signal_of(runs: Sequence[Run], kind: str) -> DataFrame:
    """Return the mean over runs of a signal, see `Run.signal`; empty if none has it."""
    pd = pandas()
    frames = [frame for run in runs if not (frame := run.signal(kind)).empty]
    if not frames:
        return pd.DataFrame()
    return pd.concat(frames).groupby(level=0).mean()


def lines(frame: DataFrame, ylabel: str, caption: str, *, zero: bool = False) -> Picture:
    """Return a picture of a signal over the steps, a line per column."""

    def draw() -> Picture:
        figure, axes = _figure()
        for name, look in _looks([str(column) for column in frame.columns]).items():
            look = {**look, "marker": ""}
            axes.plot(frame.index, frame[name], label=name, linewidth=1.2, **look)
        if zero:
            axes.axhline(0, color="#000000", linewidth=0.8)
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        if len(frame.columns) <= 2 * _MOST_WITH_NUMBERS:
            axes.legend(fontsize=8, frameon=False, ncols=2)
        ends = ", ".join(f"{name} {shown(value)}" for name, value in frame.mean().items())
        return _picture(figure, f"{ylabel} over the steps; means: {ends}.", caption)

    return _styled(draw)


def task_weights(summary: Summary) -> list[Picture]:
    """Return for each method with task weights that change their paths over the steps."""
    pictures = []
    for name, method in summary.methods.items():
        frame = signal_of(list(method.runs.values()), "weight")
        if not frame.empty and (frame.nunique() > 1).any():
            pictures.append(lines(frame, "task weight", f"{name}: task weights, mean over the seeds."))
    return pictures


def conflict_matrices(name: str, runs: Sequence[Run]) -> Picture | None:
    """Return the matrices of mean cosines and of shares of steps in conflict; None without gradients."""
    tasks = runs[0].tasks
    cosines, conflicts = signal_of(runs, "cosine"), signal_of(runs, "conflict")
    if cosines.empty or len(tasks) < 2:
        return None
    np = need("numpy", "experiments", "A report")
    matrices = []
    for frame, diagonal in ((cosines, 1.0), (conflicts, 0.0)):
        matrix = np.full((len(tasks), len(tasks)), np.nan)
        np.fill_diagonal(matrix, diagonal)
        means = frame.mean()
        for (i, a), (j, b) in itertools.combinations(enumerate(tasks), 2):
            matrix[i, j] = matrix[j, i] = means.get(f"{a}:{b}", math.nan)
        matrices.append(matrix)

    def draw() -> Picture:
        figure, both = _figure((7.0, 3.4), 2)
        titles, maps, limits = ("mean cosine", "steps in conflict"), ("PuOr", "cividis"), ((-1, 1), (0, 1))
        for axes, matrix, title, colors, limit in zip(both, matrices, titles, maps, limits, strict=True):
            image = axes.imshow(matrix, cmap=colors, vmin=limit[0], vmax=limit[1])
            axes.grid(False)
            axes.set_title(title, fontsize=9)
            axes.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", fontsize=8)
            axes.set_yticks(range(len(tasks)), tasks, fontsize=8)
            figure.colorbar(image, ax=axes, fraction=0.046)
            if len(tasks) <= _MOST_WITH_NUMBERS:
                for i, j in itertools.product(range(len(tasks)), repeat=2):
                    light = image.cmap(image.norm(matrix[i, j]))
                    ink = "#000000" if 0.3 * light[0] + 0.59 * light[1] + 0.11 * light[2] > 0.5 else "#ffffff"
                    axes.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", color=ink, fontsize=8)
        means = cosines.mean()
        worst = means.idxmin()
        alt = (
            f"Matrices of the tasks for {name}: mean cosines and conflicts. Lowest cosine: {worst}, {means[worst]:.2f}."
        )
        return _picture(figure, alt, f"{name}: mean cosines of the task gradients, and shares of steps in conflict.")

    return _styled(draw)


def layer_matrix(cosines: DataFrame, batches: int) -> Picture:
    """Return the cosines by layer, from input to output, and pair of tasks."""
    height = min(2.0 + 0.16 * len(cosines), 14.0)

    def draw() -> Picture:
        figure, axes = _figure((min(3.0 + 0.5 * len(cosines.columns), 9.0), height))
        image = axes.imshow(cosines.to_numpy(), cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
        axes.grid(False)
        axes.set_xticks(range(len(cosines.columns)), cosines.columns, rotation=45, ha="right", fontsize=7)
        axes.set_yticks(range(len(cosines)), cosines.index, fontsize=6)
        figure.colorbar(image, ax=axes, fraction=0.046, label="cosine")
        worst = cosines.stack().idxmin()
        lowest = f"Lowest: layer {worst[0]}, {worst[1]}, {cosines.loc[worst]:.2f}."
        alt = f"Matrix of the cosines of the task gradients by layer and pair of tasks. {lowest}"
        caption = f"Cosines by layer of the shared network, from input to output, over {batches} training batches."
        return _picture(figure, alt, f"{caption} {lowest}")

    return _styled(draw)
