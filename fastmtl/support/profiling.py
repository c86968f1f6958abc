"""The time of the named parts of a training step: a Chrome trace of some warm steps, and a table."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

__all__ = ["PARTS", "StepProfiler", "part"]

PARTS = ("loader", "forward", "VJPs", "traced", "gram", "solver", "combine", "optimizer")
# Distinguishes the parts from operators such as fastmtl::gram.
_PREFIX = "fastmtl "
_NOTHING = nullcontext()
_running: StepProfiler | None = None


def part(name: str) -> AbstractContextManager[Any]:
    """Return a context that records a part of the step if a profiler runs.

    ``name`` is one of ``PARTS``, which do not overlap, or ``"step"`` around them. Forward pass and VJPs together are
    ``"traced"`` where they are one graph.
    """
    # Compiled graphs have no parts.
    return _NOTHING if torch.compiler.is_compiling() or _running is None else _running.range(name)


class StepProfiler:
    """Profiles a few steps once training is warm, writes the trace and prints the table.

    On a GPU each part ends with a synchronisation, so that its kernels count for it; steps are slower meanwhile.

    Args:
        path: The Chrome trace to write.
        device: The device of the step.
        steps: Number of steps to profile.
        warm: Number of steps to run before, with the engine that is kept.
    """

    def __init__(self, path: Path, device: torch.device, steps: int = 5, warm: int = 3) -> None:
        self.path = path
        self.device = device
        self.steps = steps
        self.warm = warm
        self.done = False
        self.count = 0
        self._profiler: profile | None = None

    def before_step(self, warmth: int) -> None:
        """Start once ``warmth``, the number of steps run so far, reaches ``warm``."""
        global _running
        if self.done or self._profiler is not None or warmth < self.warm:
            return
        # At lower levels the profiler writes to stderr.
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities, acc_events=True)
        self._profiler.start()
        _running = self

    def after_step(self) -> None:
        """Count a step, and finish after the last."""
        if self._profiler is not None:
            self.count += 1
            if self.count == self.steps:
                self.finish()

    def finish(self) -> None:
        """Write the trace and print the table of the steps so far, if there are any."""
        profiler = self.stop()
        if profiler is None or not self.count:
            return
        self.done = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.path))
        print("\n" + self.table(profiler))
        print(f"Chrome trace: {self.path}")

    def stop(self) -> profile | None:
        """Stop profiling without output; return the profiler that ran."""
        global _running
        profiler, self._profiler, _running = self._profiler, None, None
        if profiler is not None:
            profiler.stop()
        return profiler

    def table(self, profiler: profile) -> str:
        """Return a table of the mean milliseconds, and the share of the step, of each part."""
        spent = dict.fromkeys((*PARTS, "step"), 0.0)
        for event in profiler.events() or []:
            name = event.name.removeprefix(_PREFIX)
            if event.name.startswith(_PREFIX) and name in spent:
                spent[name] += event.cpu_time_total / 1e3 / self.count
        total = spent.pop("step")
        spent["other"] = max(total - sum(spent.values()), 0.0)
        lines = [f"Where the step went, mean of {self.count} steps of {total:.2f} ms:"]
        lines += [f"  {name:<10} {time:10.2f} ms {time / total:6.1%}" for name, time in spent.items() if time]
        return "\n".join(lines)

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        """Record what runs inside under a name."""
        with record_function(_PREFIX + name):
            yield
            if self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize(self.device)
