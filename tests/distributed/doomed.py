"""The command, of which processes are killed, or stopped, while it runs.

``DOOM=SIGKILL:7`` sends rank 1 the signal before its 7th step, ``DOOM=SIGKILL:7:gather`` before its 7th all-gather and
``SIGKILL:7:scatter`` before its 7th reduce-scatter of tensors, in the first start. ``DOOM=random:3:20`` kills, by the
seed 3, a random rank at a random moment of each of the first 20 starts: before one of its messages, which the others
then wait for, or while it writes a checkpoint. ``DOOM_LOG`` names a file to which each death is added. By hand::

    python -m tests.distributed.doomed FOLDER SEED DEATHS [options of fastmtl train]
"""

from __future__ import annotations

import io
import os
import random
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastmtl.distributed import peers
from fastmtl.distributed.peers import Peers
from fastmtl.trainer.step import TrainingStep

ROOT = Path(__file__).parents[2]
OPTIONS = (
    "train --weighting mgda --encoder conv --train-size 64 --batch-size 16 --test-batch-size 16 --epochs 3 "
    "--limit-batches 4 --device cpu --no-plot --no-tensorboard --checkpoint-every 2 --peer-timeout {timeout} --run-dir"
)
# The random moments are among so many events of a start, of about 200 of a run of OPTIONS.
EVENTS = 80


def launch(folder: Path, doom: str, *options: str, restarts: int = 0, size: int = 2) -> tuple[Any, str, list[str]]:
    """Return the last checkpoint of a run under ``torchrun``, what it printed, and the deaths in it."""
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--standalone"]
    log = folder.with_name(folder.name + ".deaths")
    done = subprocess.run(
        [
            *(*launched, "--max-restarts", str(restarts), __file__),
            *(*OPTIONS.format(timeout=60).split(), str(folder), *options),
        ],
        env=environment(DOOM=doom, DOOM_LOG=str(log)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    deaths = log.read_text().splitlines() if log.exists() else []
    return torch.load(folder / "last.pt", weights_only=True), done.stdout, deaths


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a launched process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


class _Doom:
    """Counts the events of this process, and ends it at one of them."""

    def __init__(self, what: str) -> None:
        self._events = 0
        kind, moment, *rest = what.split(":")
        start, rank = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), int(os.environ["RANK"])
        self._signal = signal.SIGKILL if kind == "random" else getattr(signal, kind)
        self.counts = (rest or ["steps"])[0] if kind != "random" else "all"
        drawn = random.Random(f"{moment} {start}")
        ends = (drawn.randrange(int(os.environ["WORLD_SIZE"])), drawn.randint(1, EVENTS))
        starts = int(rest[0]) if kind == "random" else 1
        rank_that_ends, self._last = ends if kind == "random" else (1, int(moment))
        self._is_doomed = rank == rank_that_ends and start < starts
        self._name = f"start {start}, rank {rank}"

    def before(self, what: str) -> None:
        """Count an event, and end the process before the last one."""
        if self.comes():
            self.end(what)

    def comes(self) -> bool:
        """Count an event; return whether it is the last one."""
        self._events += 1
        return self._is_doomed and self._events == self._last

    def end(self, what: str) -> None:
        if "DOOM_LOG" in os.environ:
            with open(os.environ["DOOM_LOG"], "a", encoding="utf-8") as log:
                log.write(f"{self._name}, event {self._events}: {what}\n")
        os.kill(os.getpid(), self._signal)


def _follow(doom: _Doom) -> None:
    """Let steps, messages of a kind, or all messages and files be events."""
    kinds: dict[str, Any] = {"gather": peers._all_gather, "scatter": peers._reduce_scatter}
    step, send, save = TrainingStep.__call__, Peers._send, torch.save

    def stepped(self: TrainingStep, *args: Any, **options: Any) -> Any:
        doom.before("step")
        return step(self, *args, **options)

    def sent(self: Peers, collective: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if doom.counts == "all" or collective is kinds[doom.counts]:
            doom.before(collective.__name__)
        return send(self, collective, *args, **options)

    def saved(content: object, file: Any, *args: Any, **options: Any) -> None:
        # Torch itself saves other things.
        if Path(getattr(file, "name", "")).suffix == ".part" and doom.comes():
            whole = io.BytesIO()
            save(content, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            doom.end(f"half of {Path(file.name).name}")
        save(content, file, *args, **options)

    if doom.counts == "steps":
        TrainingStep.__call__ = stepped  # type: ignore[method-assign]
    else:
        Peers._send = sent  # type: ignore[method-assign]
    if doom.counts == "all":
        torch.save = saved  # type: ignore[assignment]


def main(folder: Path, seed: str, deaths: int, *options: str) -> None:
    """Print the deaths of a run, and whether it ends as one without any."""
    whole, _, _ = launch(folder / "whole", "SIGKILL:0", *options)
    run, _, died = launch(folder / "killed", f"random:{seed}:{deaths}", *options, restarts=deaths)
    print(*died, sep="\n")
    differing = [name for name, wanted in whole["model"].items() if not torch.equal(run["model"][name], wanted)]
    print(f"{len(died)} deaths; parameters that differ: {', '.join(differing) or 'none'}")


if __name__ == "__main__":
    if "DOOM" not in os.environ:
        main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
        sys.exit()
    _follow(_Doom(os.environ["DOOM"]))
    # As the command itself ends.
    runpy.run_module("fastmtl", run_name="__main__")
