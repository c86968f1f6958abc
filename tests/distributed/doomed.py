"""The command, in which one process is killed, or stopped, before a step of its first start."""

from __future__ import annotations

import os
import runpy
import signal
from typing import Any

from fastmtl.trainer.step import TrainingStep

SIGNAL, STEP = os.environ.get("DOOM", "SIGKILL:0").split(":")
_steps = 0
_call = TrainingStep.__call__


def _step(self: TrainingStep, *args: Any, **kwargs: Any) -> Any:
    global _steps
    _steps += 1
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if first and os.environ["RANK"] == "1" and _steps == int(STEP):
        os.kill(os.getpid(), getattr(signal, SIGNAL))
    return _call(self, *args, **kwargs)


if __name__ == "__main__":
    TrainingStep.__call__ = _step  # type: ignore[method-assign]
    # As the command itself ends.
    runpy.run_module("fastmtl", run_name="__main__")
