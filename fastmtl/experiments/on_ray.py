"""Runs the cells of an experiment on a Ray cluster. The experiment's folder must be seen by all its machines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastmtl.errors import BackendError
from fastmtl.experiments.grid import Cell
from fastmtl.experiments.runner import command_of, outcome, start
from fastmtl.support.extras import need

__all__ = ["RayPool"]

_LOCAL = "local"
_POLL = 1.0


class RayPool:
    """A Ray task for each cell, with one GPU where the cluster has any, else with its share of processors.

    Args:
        address: ``"local"`` for a new cluster on this machine, ``"auto"`` for the one it is in, or an address.
        threads: CPU threads of a cell, and the processors that its task asks for.

    Raises:
        UsageError: Ray is not installed.
        BackendError: There is no such cluster.
    """

    def __init__(self, address: str, threads: int = 1) -> None:
        self._ray = need("ray", "ray", "--ray")
        self.threads = threads
        try:
            self._ray.init(
                address=None if address == _LOCAL else address,
                include_dashboard=None if address != _LOCAL else False,
                log_to_driver=False,
                configure_logging=False,
            )
        except Exception as cause:
            # Ray raises many kinds of errors here, some with an explanation of several lines.
            raise BackendError(f"The Ray cluster {address} cannot be used: {_first_line(cause)}") from cause
        gpus = self._ray.cluster_resources().get("GPU", 0)
        self._remote = self._ray.remote(_run_cell).options(num_cpus=threads, num_gpus=1 if gpus else 0, max_retries=0)
        self._tasks: list[Any] = []

    def submit(self, cell: Cell, begins: Callable[[Cell], None]) -> Future[str | None]:
        """Return what will be the reason of a failure, or None."""
        cell = _absolute(cell)
        task = self._remote.remote(cell, self.threads)
        self._tasks.append(task)
        done: Future[str | None] = Future()
        threading.Thread(target=self._await, args=(cell, task, begins, done), daemon=True).start()
        return done

    def _await(self, cell: Cell, task: Any, begins: Callable[[Cell], None], done: Future[str | None]) -> None:
        try:
            self._wait_for_begin(cell, task)
            begins(cell)
            done.set_result(self._ray.get(task))
        except Exception as error:
            # A machine of the cluster may be lost, or the task cancelled.
            done.set_result(f"Ray: {_first_line(error)}")

    def _wait_for_begin(self, cell: Cell, task: Any) -> None:
        """Wait until the cell's process has begun, which Ray does not tell: it takes the lock of its run folder."""
        submitted = time.time()
        while not self._ray.wait([task], timeout=_POLL)[0]:
            lock = cell.run.parent / f".{cell.run.name}.lock"
            if lock.exists() and lock.stat().st_mtime >= submitted - _POLL:
                return

    def stop(self) -> None:
        """Cancel the tasks: their processes end where they are, and go on from their last checkpoints."""
        for task in self._tasks:
            self._ray.cancel(task, force=True)

    def close(self) -> None:
        """Leave the cluster."""
        self._ray.shutdown()


def _run_cell(cell: Cell, threads: int) -> str | None:
    """Run a cell on a machine of the cluster, in a process of its own, on the device that Ray leaves visible."""
    return outcome(start(command_of(cell, ""), threads))


def _absolute(cell: Cell) -> Cell:
    return replace(cell, folder=Path(cell.folder).resolve())


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
