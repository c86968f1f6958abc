"""The live table of an experiment: what runs, how far it is, and about how long the rest takes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastmtl.experiments.grid import Cell
from fastmtl.experiments.runner import state_of

__all__ = ["LiveTable", "progress_of"]

_TAIL = 1 << 14


def progress_of(cell: Cell) -> tuple[float, str]:
    """Return which share of a cell's steps is done, and its last losses in a few words."""
    rows = _last_rows(cell.run / "metrics.jsonl")
    steps = next((row for row in reversed(rows) if row.get("event") == "steps"), None)
    if steps is None:
        return 0.0, "starting"
    losses = "  ".join(f"{task} {loss:.3f}" for task, loss in list(steps["loss"].items())[:3] if loss is not None)
    per_epoch = _steps_per_epoch(cell.run / "metrics.jsonl")
    share = steps["step"] / (per_epoch * cell.config.epochs) if per_epoch else 0.0
    return min(share, 1.0), losses


def _last_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    return [row for line in lines if (row := _row(line)) is not None]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def _steps_per_epoch(path: Path) -> int:
    with path.open(encoding="utf-8", errors="replace") as file:
        first = _row(file.readline()) or {}
    return int(first.get("batches_per_epoch", 0))


class LiveTable:
    """Shows the cells: a table on a terminal, elsewhere a line when one ends.

    Args:
        title: What the cells are for.
        cells: All of them.
        console: Where to show it; stdout if not given.
        clock: Gives seconds, monotonic.
    """

    def __init__(
        self,
        title: str,
        cells: Sequence[Cell],
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title, self._cells, self._clock = title, list(cells), clock
        self._console = console or Console()
        self._done = sum(state_of(cell) == "done" for cell in cells)
        self._already = self._done
        self._failed = 0
        self._running: dict[str, tuple[Cell, float, float]] = {}
        self._begun = clock()
        self._live = (
            Live(console=self._console, auto_refresh=False, transient=True) if self._console.is_terminal else None
        )

    def __enter__(self) -> LiveTable:
        if self._already:
            self._console.print(f"{self._title}: {self._already} of {len(self._cells)} were done before.")
        failed = sum(state_of(cell) == "failed" for cell in self._cells)
        if failed:
            self._console.print(f"{self._title}: {failed} failed before; what fails alike is left, or give --retry.")
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def begins(self, cell: Cell) -> None:
        """A cell begins or goes on."""
        self._running[cell.name] = (cell, self._clock(), progress_of(cell)[0])

    def ends(self, cell: Cell, reason: str | None) -> None:
        """A cell has ended; with the reason if it has failed."""
        _, since, _ = self._running.pop(cell.name, (cell, self._clock(), 0.0))
        self._done += reason is None
        self._failed += reason is not None
        count = f"[{self._done + self._failed}/{len(self._cells)}]"
        took = _time(self._clock() - since)
        text = f"{count} {cell.name}: {'done in ' + took if reason is None else 'failed: ' + reason}"
        self._console.print(Text(text, style="" if reason is None else "red"), soft_wrap=True)

    def looks(self) -> None:
        """Draw the table anew."""
        if self._live is not None:
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        work = 0.0
        for cell, since, share_before in list(self._running.values()):
            share, note = progress_of(cell)
            work += max(share - share_before, 0.0)
            bar = ProgressBar(total=1.0, completed=share, width=20)
            table.add_row(cell.name, bar, f"{share:4.0%}", _time(self._clock() - since), note)
        done_now = self._done + self._failed - self._already + work
        at_work = sum(1 - progress_of(cell)[0] for cell, _, _ in list(self._running.values()))
        left = len(self._cells) - self._done - self._failed - len(self._running) + at_work
        elapsed = self._clock() - self._begun
        to_go = f", about {_time(elapsed * left / done_now)} to go" if done_now > 0.05 else ""
        failed = f", {self._failed} failed" if self._failed else ""
        head = f"{self._title}: {self._done} of {len(self._cells)} done{failed}, {_time(elapsed)}{to_go}"
        return Group(Text(head, style="bold"), table)


def _time(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
