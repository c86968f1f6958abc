"""Pictures of predicted maps: classes in colours with a legend, depth with a scale, normals as colours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmtl.deploy.facts import TaskFacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

_WIDTH = 4.2
# Classes that a legend has room for.
_LEGEND = 16


def draw(path: Path, image: Any, maps: Mapping[str, np.ndarray], tasks: Mapping[str, TaskFacts]) -> None:
    """Draw an image and its predicted maps side by side as a PNG.

    Args:
        path: The file.
        image: A PIL image or an array (h, w, channels); None for none.
        maps: Task to its map: classes (h, w), or numbers (h, w) or (channels, h, w).
        tasks: What the tasks predict.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = next(iter(maps.values())).shape[-2:]
    panels = len(maps) + (image is not None)
    figure = Figure(figsize=(_WIDTH * panels, _WIDTH * height / width + 1.1), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.set_axis_off()
        # A scale or a legend below a panel makes it no lower than the others.
        axis.set_anchor("N")
    if image is not None:
        axis = axes.pop(0)
        axis.imshow(_shown(image), extent=(0, width, height, 0), cmap="gray", interpolation="nearest")
        axis.set_title("input", loc="left", fontsize=11)
    for axis, (task, values) in zip(axes, maps.items(), strict=True):
        _draw_map(axis, values, tasks[task])
        axis.set_title(task, loc="left", fontsize=11)
    figure.savefig(path, format="png", dpi=110)


def _shown(image: Any) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return image if image.dtype == np.uint8 else np.clip(image, 0, 1)
    return np.asarray(image.convert("RGB"))


def _draw_map(axis: Axes, values: np.ndarray, about: TaskFacts) -> None:
    figure: Any = axis.figure
    if about.kind == "segmentation":
        _draw_classes(axis, values, about)
    elif about.kind == "normals":
        axis.imshow((values.transpose(1, 2, 0) + 1) / 2, interpolation="nearest")
        axis.text(0, -0.04, "red: x, green: y, blue: z", transform=axis.transAxes, va="top", fontsize=8)
    else:
        # Of several channels without a meaning that is known, their mean.
        plane = values.mean(0) if values.ndim == 3 else values
        drawn = axis.imshow(plane, cmap="viridis", interpolation="nearest")
        figure.colorbar(drawn, ax=axis, orientation="horizontal", fraction=0.05, pad=0.03, panchor=False)


def _draw_classes(axis: Axes, values: np.ndarray, about: TaskFacts) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    palette = [*colormaps["tab20"].colors, *colormaps["tab20b"].colors]  # type: ignore[attr-defined]
    # Neighbouring colours of the map are pairs: first all dark ones.
    palette = [to_rgb(color) for color in (*palette[::2], *palette[1::2])]
    colors = np.asarray([palette[index % len(palette)] for index in range(about.outputs)])
    axis.imshow(colors[values], interpolation="nearest")
    there, counts = np.unique(values, return_counts=True)
    shown = sorted(there[np.argsort(-counts)][:_LEGEND])
    names = [about.labels[index] if about.labels else str(index) for index in shown]
    patches = [Patch(color=colors[index], label=name) for index, name in zip(shown, names, strict=True)]
    axis.legend(
        handles=patches,
        loc="upper left",
        bbox_to_anchor=(0, -0.02),
        ncols=min(4, len(patches)),
        fontsize=8,
        frameon=False,
        borderaxespad=0,
        handlelength=1,
        columnspacing=1,
    )
