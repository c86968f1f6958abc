"""Progress of a run for somebody who watches: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO, cast

from rich.console import Console, Group
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from typing_extensions import override

from fastmtl.trainer.log.logger import Logger, RunInfo, StepRecords
from fastmtl.trainer.run.directory import Tee

__all__ = ["ProgressLogger"]

_SECONDS_BETWEEN_LINES = 30.0
_LOSSES_SHOWN = 4


class ProgressLogger(Logger):
    """Shows the epoch, its losses, and the time left for the epoch and for the run.

    On a terminal this is a bar below whatever else is printed, in a notebook a widget (with the package ipywidgets);
    elsewhere a plain line at most every 30 seconds.
    The time left is taken from the last log intervals, so the first, slow steps do not spoil it for long. Without a
    ``console`` it is shown on stdout; ``clock`` gives seconds, monotonic.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._display: _Display | None = None
        self._teed: list[tuple[Tee, TextIO]] = []
        self._info: RunInfo | None = None
        self._epoch = 0
        self._recent: deque[tuple[int, float]] = deque(maxlen=8)
        self._evaluation_seconds = 0.0
        self._last_line = -math.inf

    @override
    def on_start(self, info: RunInfo) -> None:
        self.close()
        self._info, self._epoch, self._last_line = info, info.start_epoch, self._clock()
        shown = sys.stdout.stream if isinstance(sys.stdout, Tee) else None
        console = self._console or Console(file=shown)
        if console.is_jupyter:
            # A widget of its own; what is printed goes to the cell as it is. Without widgets, lines as in a log.
            if importlib.util.find_spec("ipywidgets") is not None:
                self._display = _Display(console, redirect=False)
                self._display.show(self._title(), info.start_batch, info.batches_per_epoch, "")
                # A widget that the thread which draws makes may belong to no cell.
                self._display.draw()
            return
        if not console.is_terminal:
            return
        # A tee keeps what is printed but must not keep the bar, so the bar is put between the tee and the terminal.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Tee):
                self._teed.append((stream, stream.stream))
                stream.stream = cast(TextIO, FileProxy(console, stream.stream))
        self._display = _Display(console, redirect=not self._teed)
        self._display.show(self._title(), info.start_batch, info.batches_per_epoch, "")

    @override
    def on_steps(self, records: StepRecords) -> None:
        if self._info is None:
            return
        self._recent.append((records.count, records.seconds))
        self._epoch = records.epoch
        total = self._info.batches_per_epoch
        done = records.first_step + records.count - records.epoch * total
        if self._display is not None:
            self._display.end_compiling()
            self._display.show(self._title(), done, total, self._note(records, done))
        elif self._clock() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._line(f"{self._title()}  step {done}/{total}  {self._note(records, done)}")

    @override
    def on_epoch(
        self, epoch: int, mode: str, losses: dict[str, float], metrics: dict[str, list[float]], seconds: float
    ) -> None:
        if mode != "train":
            self._evaluation_seconds = seconds
        elif self._display is not None and self._info is not None:
            total = self._info.batches_per_epoch
            self._display.show(self._title(), total, total, "evaluating")

    @override
    def on_compile(self, message: str) -> None:
        if self._display is None:
            self._line(message)
        elif message.startswith("compiling"):
            self._display.begin_compiling(message)
        else:
            self._display.end_compiling()
            print(message)

    @override
    def on_end(self, best_epoch: int, best_result: dict[str, list[float]]) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away and give stdout and stderr back."""
        for tee, stream in self._teed:
            tee.flush()
            tee.stream = stream
        self._teed.clear()
        if self._display is not None:
            self._display.close()
            self._display = None

    def _title(self) -> str:
        assert self._info is not None
        return f"Epoch {self._epoch + 1}/{self._info.epochs}"

    def _note(self, records: StepRecords, done: int) -> str:
        """Losses, then the time left for the epoch and for the run."""
        assert self._info is not None
        means = records.means(self._info.task_names)["loss"]
        losses = [f"{task} {_number(loss)}" for task, loss in list(means.items())[:_LOSSES_SHOWN]]
        if len(means) > _LOSSES_SHOWN:
            # A task without labels since the last line has no loss.
            known = [loss for loss in means.values() if not math.isnan(loss)]
            mean = sum(known) / len(known) if known else math.nan
            losses = [*losses[: _LOSSES_SHOWN - 1], "...", f"mean {_number(mean)}"]
        steps = sum(count for count, _ in self._recent)
        step_seconds = sum(seconds for _, seconds in self._recent) / steps
        total = self._info.batches_per_epoch
        epoch_left = (total - done) * step_seconds
        epochs_after = self._info.epochs - self._epoch - 1
        run_left = epoch_left + epochs_after * total * step_seconds + (epochs_after + 1) * self._evaluation_seconds
        return f"{'  '.join(losses)}  to go: epoch {_time(epoch_left)}, run {_time(run_left)}"

    def _line(self, text: str) -> None:
        self._last_line = self._clock()
        print(text, flush=True)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _time(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


class _Display:
    """The live part of a terminal: the epoch's bar, and above it what is being compiled and for how long."""

    def __init__(self, console: Console, redirect: bool) -> None:
        self._compiling = Progress(SpinnerColumn(), TextColumn("{task.description} ..."), TimeElapsedColumn())
        note = TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True))
        title, bar = TextColumn("{task.description}"), BarColumn(bar_width=20)
        self._epoch = Progress(title, bar, MofNCompleteColumn(), note, expand=True)
        self._bar = self._epoch.add_task("", note="")
        self._spinner: TaskID | None = None
        # Drawing takes a share of one core that the training step could use, hence twice a second.
        self._live = Live(
            Group(self._compiling, self._epoch),
            console=console,
            refresh_per_second=2,
            transient=True,
            redirect_stdout=redirect,
            redirect_stderr=redirect,
        )
        self._live.start()

    def show(self, title: str, done: int, total: int, note: str) -> None:
        self._epoch.update(self._bar, description=title, completed=done, total=total, note=note)

    def begin_compiling(self, message: str) -> None:
        self.end_compiling()
        self._spinner = self._compiling.add_task(message, total=None)
        # Compilation may keep the thread that draws waiting.
        self.draw()

    def end_compiling(self) -> None:
        if self._spinner is not None:
            self._compiling.remove_task(self._spinner)
            self._spinner = None

    def draw(self) -> None:
        self._live.refresh()

    def close(self) -> None:
        self._live.stop()
