"""The bar lives with prints on a terminal; elsewhere lines are few."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fastmtl.trainer.log.progress import ProgressLogger
from fastmtl.trainer.run.directory import Tee
from tests.trainer.runs import play, run_info, step_records


class Clock:
    """Goes forward by `step` seconds at each look."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.mark.parametrize(("step", "lines"), [(0.1, 0), (31.0, 4)])
def test_plain_lines_come_at_most_every_half_minute(
    step: float, lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    play(ProgressLogger(clock=Clock(step)), run_info())
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == lines
    assert all("\x1b" not in line for line in printed)


def test_line_tells_losses_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    logger = ProgressLogger(clock=Clock(60.0))
    logger.on_start(run_info(epochs=3))
    logger.on_steps(step_records(10, 4))
    # Four steps took 1 s: 6 steps of the epoch are left, and 10 of the last one.
    assert capsys.readouterr().out == ("Epoch 2/3  step 4/10  left 11.500  right 12.500  to go: epoch 0:02, run 0:04\n")


def test_run_time_counts_the_evaluations_to_come(capsys: pytest.CaptureFixture[str]) -> None:
    logger = ProgressLogger(clock=Clock(60.0))
    logger.on_start(run_info(epochs=3))
    logger.on_epoch(0, "test", {}, {}, 100.0)
    logger.on_steps(step_records(10, 4))
    assert capsys.readouterr().out.endswith("epoch 0:02, run 3:24\n")


def test_many_losses_are_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    logger = ProgressLogger(clock=Clock(60.0))
    logger.on_start(run_info([f"t{i}" for i in range(9)]))
    logger.on_steps(step_records(0, 1, 9))
    assert "t0 0.000  t1 1.000  t2 2.000  ...  mean 4.000" in capsys.readouterr().out


def test_a_task_without_labels_has_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    logger = ProgressLogger(clock=Clock(60.0))
    logger.on_start(run_info([f"t{i}" for i in range(5)]))
    records = step_records(0, 1, 5)
    records.losses[:, [1, 4]] = np.nan
    logger.on_steps(records)
    assert "t0 0.000  t1 -  t2 2.000  ...  mean 1.667" in capsys.readouterr().out


def test_compilation_is_told_on_any_output(capsys: pytest.CaptureFixture[str]) -> None:
    logger = ProgressLogger()
    logger.on_start(run_info())
    logger.on_compile("compiling trunk")
    logger.on_compile("compiled trunk in 3.2 s")
    assert capsys.readouterr().out == "compiling trunk\ncompiled trunk in 3.2 s\n"


def _on_terminal(monkeypatch: pytest.MonkeyPatch, log: io.StringIO) -> tuple[io.StringIO, ProgressLogger]:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Tee(shown, log))
    return shown, ProgressLogger(Console(file=shown, force_terminal=True, width=100))


def test_terminal_shows_bar_and_prints_and_the_log_only_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    shown, logger = _on_terminal(monkeypatch, log)
    logger.on_start(run_info())
    logger.on_compile("compiling trunk")
    logger.on_compile("compiled trunk in 3.2 s")
    print("Epoch: 0000 | TRAIN: 1.0 | ", end="")
    logger.on_steps(step_records(0, 5))
    print("TEST: 2.0")
    logger.on_end(0, {})
    print("after")
    assert log.getvalue() == "compiled trunk in 3.2 s\nEpoch: 0000 | TRAIN: 1.0 | TEST: 2.0\nafter\n"
    assert "Epoch: 0000 | TRAIN: 1.0 | TEST: 2.0" in shown.getvalue()
    assert "compiling trunk" in shown.getvalue()
    assert "Epoch 1/2" in shown.getvalue()
    assert shown.getvalue().endswith("after\n")


def test_streams_come_back_when_a_run_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, logger = _on_terminal(monkeypatch, io.StringIO())
    logger.on_start(run_info())
    logger.close()
    logger.close()
    tee = sys.stdout
    assert isinstance(tee, Tee)
    assert tee.stream is shown


def test_without_a_tee_the_streams_come_back_too(tmp_path: Path) -> None:
    before = sys.stdout, sys.stderr
    logger = ProgressLogger(Console(file=io.StringIO(), force_terminal=True, width=100))
    play(logger, run_info())
    assert (sys.stdout, sys.stderr) == before
