"""What a benchmark of training steps compares: a step of somebody's, here or in another process."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np
import torch
from fastmtl.benchmarks.launches import LaunchCounter
from fastmtl.benchmarks.machine import wait_for
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fastmtl.weighting import WEIGHTINGS

__all__ = ["Contender", "LocalContender", "same_choices"]


# A step that follows somebody else's finds threads asleep and caches full of other data. Where that tells, in shorter
# steps than this, the one after it is timed.
_LONG = 0.1


class Contender(Protocol):
    """A training step of somebody's."""

    def __call__(self) -> None:
        """Run the step."""

    def seconds(self, repeats: int) -> float:
        """Return the seconds a step takes, the mean of ``repeats`` if it is short."""

    def update(self) -> Tensor:
        """Return by how much a step moves the shared parameters: (P,), with the :func:`same_choices` for everybody."""

    def peak_bytes(self) -> int:
        """Return the bytes between the least memory in use, old gradients freed, and the most during a step."""

    def launches(self) -> int:
        """Return the operators of a step that do work on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalContender:
    """A training step that runs in this process.

    Attributes:
        run: Runs it.
        shared: The shared parameters, which it moves.
    """

    run: Callable[[], None]
    shared: list[nn.Parameter]

    def __call__(self) -> None:
        self.run()

    def seconds(self, repeats: int) -> float:
        first = self._clocked(1)
        return first if first >= _LONG else self._clocked(repeats)

    def _clocked(self, repeats: int) -> float:
        device = self.shared[0].device
        wait_for(device)
        start = time.perf_counter()
        for _ in range(repeats):
            self.run()
        wait_for(device)
        return (time.perf_counter() - start) / repeats

    def update(self) -> Tensor:
        before = [param.detach().clone() for param in self.shared]
        with same_choices():
            self.run()
        return torch.cat([(old - param.detach()).flatten() for old, param in zip(before, self.shared, strict=True)])

    def launches(self) -> int:
        self.run()
        with LaunchCounter() as counter:
            self.run()
        return counter.total

    def peak_bytes(self) -> int:
        device = self.shared[0].device
        self.run()
        # The profiler announces itself on stderr at any lower level.
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            self.run()
            wait_for(device)
        in_use = least = most = 0
        results: Any = profiler.profiler
        for event in results.kineto_results.events():
            if event.name() == "[memory]" and event.device_type().name.lower() == device.type:
                in_use += event.nbytes()
                least, most = min(least, in_use), max(most, in_use)
        return most - least


@contextmanager
def same_choices() -> Iterator[None]:
    """Let everybody's strategies make the same random choices, so that their updates can be compared.

    In gradient surgery (PCGrad, GradVac) each task meets the others in the order of their index, in our steps and, as
    they shuffle with ``random`` or permute with torch, in the peers'. Random weights (RLW) are drawn by torch's
    generator on the CPU, where LibMTL draws them for any device. All generators begin with the same seed.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

    def in_order(self: Any, like: Tensor) -> Tensor:
        return torch.arange(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)

    def on_the_cpu(self: Any, like: Tensor) -> Tensor:
        return torch.softmax(torch.randn(like.shape), dim=-1).to(like)

    with (
        patch.object(WEIGHTINGS["PCGrad"], "draw_orders", in_order),
        patch.object(WEIGHTINGS["GradVac"], "draw_orders", in_order),
        patch.object(WEIGHTINGS["RLW"], "draw", on_the_cpu),
        patch.object(random, "shuffle", lambda order: None),
        patch.object(torch, "randperm", torch.arange),
    ):
        yield
