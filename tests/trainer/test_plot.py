"""The picture shows what there is; the history behind it stays small."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest

from fastmtl.errors import UsageError
from fastmtl.trainer.log.history import Curve
from fastmtl.trainer.log.jsonl import JsonlLogger
from fastmtl.trainer.log.logger import Logger, LoggerList, RunInfo
from fastmtl.trainer.log.plot import PlotLogger, draw
from tests.trainer.runs import play, run_info, step_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

pytest.importorskip("matplotlib")


def _data(axis: Axes, line: int, which: Literal["x", "y"]) -> np.ndarray:
    drawn = axis.lines[line]
    return np.asarray(drawn.get_xdata() if which == "x" else drawn.get_ydata(), dtype=float)


def _titles(logger: PlotLogger) -> list[str]:
    assert logger.history is not None
    return [axis.get_title(loc="left") for axis in draw(logger.history).axes]


def _played(tmp_path: Path, info: RunInfo, *, gram: bool = True, weights: bool = True) -> PlotLogger:
    logger = PlotLogger(tmp_path / "curves.png")
    play(logger, info, gram=gram, weights=weights)
    return logger


@pytest.mark.slow
def test_a_single_epoch_has_a_whole_number(tmp_path: Path) -> None:
    logger = _played(tmp_path, run_info(epochs=1))
    assert logger.history is not None
    epochs = draw(logger.history).axes[-1].get_xticks()
    assert [tick for tick in epochs if 0.5 <= tick <= 1.5] == [1.0]


def test_picture_is_a_png_with_a_labelled_panel_for_each_thing(tmp_path: Path) -> None:
    logger = _played(tmp_path, run_info())
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert logger.history is not None
    figure = draw(logger.history)
    assert [axis.get_ylabel() for axis in figure.axes] == ["Loss", "Weight", "Cosine", "Acc"]
    assert [axis.get_xlabel() for axis in figure.axes] == ["Step", "Step", "Step", "Epoch"]
    losses, weights, cosines, accuracy = figure.axes
    assert (len(losses.lines), len(weights.lines)) == (2, 2)
    np.testing.assert_array_equal(_data(losses, 1, "x"), np.arange(1, 21))
    np.testing.assert_allclose(_data(losses, 1, "y"), np.arange(20) + 1)
    np.testing.assert_allclose(_data(cosines, 0, "y"), 0.5)
    assert len(accuracy.lines) == 4
    np.testing.assert_allclose(_data(accuracy, -1, "y"), [0.5, 0.6])


def test_picture_leaves_out_what_the_strategy_does_not_have(tmp_path: Path) -> None:
    assert _titles(_played(tmp_path, run_info(), gram=False, weights=False)) == ["Training loss", "Acc of each epoch"]
    assert len(_titles(_played(tmp_path, run_info(["one"])))) == 3


@pytest.mark.slow
def test_picture_of_many_tasks_sums_the_pairs_up(tmp_path: Path) -> None:
    tasks = [f"task {i}" for i in range(20)]
    logger = _played(tmp_path, run_info(tasks))
    assert logger.history is not None
    figure = draw(logger.history)
    assert "190 pairs" in figure.axes[2].get_title(loc="left")
    assert len(figure.axes[2].lines) == 2
    assert len(figure.axes[0].lines) == 20


@pytest.mark.slow
def test_picture_survives_gradients_that_vanish(tmp_path: Path) -> None:
    for tasks in (2, 5):
        logger = PlotLogger(tmp_path / "curves.png")
        logger.on_start(run_info([str(task) for task in range(tasks)]))
        records = step_records(0, 5, tasks)
        assert records.gram is not None
        records.gram[1:3] = 0.0
        logger.on_steps(records)
        logger.on_end(0, {})
        assert (tmp_path / "curves.png").exists()


@pytest.mark.slow
def test_metrics_of_different_names_get_panels_of_their_own(tmp_path: Path) -> None:
    info = run_info()
    info.metric_names = {"left": ["mIoU"], "right": ["abs_err"]}
    assert _titles(_played(tmp_path, info))[-2:] == ["mIoU of each epoch", "abs_err of each epoch"]


def test_resumed_picture_holds_the_earlier_steps_and_epochs(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    play(JsonlLogger(metrics), run_info(epochs=2))
    plot = PlotLogger(tmp_path / "curves.png", metrics)
    loggers: list[Logger] = [JsonlLogger(metrics), plot]
    play(LoggerList(loggers), run_info(epochs=3, start_epoch=2))
    assert plot.history is not None
    np.testing.assert_array_equal(plot.history.losses.steps[:5], [3, 8, 13, 18, 21])
    assert [epoch for mode, epoch in plot.history.results if mode == "test"] == [0, 1, 2]


def test_nothing_is_drawn_of_a_run_without_steps(tmp_path: Path) -> None:
    logger = PlotLogger(tmp_path / "curves.png")
    logger.on_start(run_info())
    logger.on_end(0, {})
    assert not (tmp_path / "curves.png").exists()


def test_curve_stays_within_its_capacity_and_keeps_the_mean() -> None:
    curve = Curve(capacity=64)
    values = np.arange(10_000, dtype=float)
    for start in range(0, 10_000, 7):
        part = values[start : start + 7]
        curve.add(part, np.stack([part, -part], axis=1))
    assert 32 <= len(curve.steps) <= 64
    np.testing.assert_allclose(curve.values[:, 0], curve.steps)
    np.testing.assert_allclose(curve.values[:, 1], -curve.steps)
    np.testing.assert_allclose(np.diff(curve.steps), curve.stride)
    many = Curve(capacity=64)
    many.add(values, values[:, None])
    assert 32 <= len(many.steps) <= 64


def test_curve_leaves_steps_without_a_task_out_of_its_means() -> None:
    curve = Curve(capacity=4)
    curve.add(np.arange(8.0), np.array([[1.0], [np.nan], [3.0], [5.0], [np.nan], [np.nan], [7.0], [9.0]]))
    assert curve.stride == 2
    np.testing.assert_array_equal(curve.values[:, 0], [1.0, 4.0, np.nan, 8.0])


def test_smoothing_is_a_centred_mean_that_leaves_nan_out() -> None:
    curve = Curve()
    curve.add(np.arange(5.0), np.array([[1.0], [2.0], [np.nan], [4.0], [5.0]]))
    np.testing.assert_allclose(curve.smooth(3)[:, 0], [1.5, 1.5, 3.0, 4.5, 4.5])
    np.testing.assert_array_equal(curve.smooth(1), curve.values)


def test_missing_matplotlib_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="pip install matplotlib"):
        PlotLogger(tmp_path / "curves.png")
