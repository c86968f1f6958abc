"""Runs a training script as it is, and times it step by step.

A step lasts from one call of the optimizer to the next, without the time that the script's loader takes. Between the
last step of an epoch and the first of the next one a script does other things: that time is left out.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import runpy
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from fastmtl.benchmarks.peers.libmtl import import_libmtl
from fastmtl.benchmarks.peers.repairs import OnDevice, repair_script
from fastmtl.benchmarks.peers.scripts import Setting, find_scripts
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import dataloader

__all__ = ["ScriptSteps"]

# A strategy's own optimizer moves a weight for each task; a network has more parameters than this.
_FEW = 1000
# Between the first call of the optimizer and the second, memory is asked for that later steps use again.
_WARM_UP = 1


class ScriptSteps:
    """A :class:`fastmtl.benchmarks.contender.Contender` for a script, in a copy of its checkout; it needs the process.

    Args:
        recipe: The recipe whose script it is.
        checkout: The folder of the project.
        setting: What it is asked to do.
        device: Where it runs.
    """

    def __init__(self, recipe: str, checkout: Path, setting: Setting, device: torch.device) -> None:
        ((_, script),) = find_scripts(recipe, [checkout])
        self._go, self._done = threading.Semaphore(0), queue.SimpleQueue[float | BaseException]()
        self._began, self._loading = 0.0, 0.0
        self._passed_over = False
        # Scripts write beside themselves.
        self._copy = tempfile.TemporaryDirectory(prefix="fastmtl-script-")
        project = Path(self._copy.name) / checkout.resolve().name
        shutil.copytree(checkout, project, ignore=shutil.ignore_patterns(".git"))
        folder = project / script.folder
        script.prepare(folder, setting)
        repair_script(device, (folder / script.entry).read_text(encoding="utf-8"))
        if (project / "LibMTL").is_dir():
            import_libmtl(project, "LibMTL.trainer").torch = OnDevice(device)
        self._time_loaders()
        register_optimizer_step_post_hook(self._after_step)
        sys.path[:0] = [str(folder), str(project)]
        sys.argv = [script.entry, *script.arguments(setting)]
        os.chdir(folder)
        threading.Thread(target=self._run, args=(folder / script.entry,), daemon=True).start()
        self._next()
        for _ in range(_WARM_UP):
            self()

    def __call__(self) -> None:
        self.seconds(1)

    def seconds(self, repeats: int) -> float:
        total = 0.0
        for _ in range(repeats):
            self._go.release()
            total += self._next()
        return total / repeats

    def update(self) -> Tensor:
        raise NotImplementedError("The script's network is its own.")

    def peak_bytes(self) -> int:
        raise NotImplementedError("The script's memory is not measured.")

    def launches(self) -> int:
        raise NotImplementedError("The script's operators are not counted.")

    def _next(self) -> float:
        result = self._done.get()
        if isinstance(result, BaseException):
            raise RuntimeError(f"the script ended: {type(result).__name__}: {result}") from result
        return result

    def _run(self, entry: Path) -> None:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                runpy.run_path(str(entry), run_name="__main__")
            raise RuntimeError("it has no more steps")
        except BaseException as error:
            self._done.put(error)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if sum(param.numel() for group in optimizer.param_groups for param in group["params"]) < _FEW:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        # At the end of a pass over its data a script evaluates, which is no part of a step.
        if not self._passed_over:
            self._done.put(time.perf_counter() - self._began - self._loading)
            self._go.acquire()
        self._passed_over = False
        self._began, self._loading = time.perf_counter(), 0.0

    def _time_loaders(self) -> None:
        iterators: Any = dataloader._BaseDataLoaderIter
        plain = iterators.__next__

        def timed(iterator: Any) -> Any:
            start = time.perf_counter()
            try:
                return plain(iterator)
            except StopIteration:
                self._passed_over = True
                raise
            finally:
                self._loading += time.perf_counter() - start

        iterators.__next__ = iterators.next = timed
