"""Whether the training steps that a benchmark compares make the same update."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from fastmtl.benchmarks.work import Contender
from torch import Tensor

from fastmtl.weighting import WEIGHTINGS

__all__ = ["ALLOWED", "DRAW", "distances", "same_choices", "wrong_steps"]

DRAW = ("PCGrad", "GradVac", "RLW", "MoDo", "SDMGrad")
"""Strategies with random choices."""
ALLOWED = 0.01
"""Greatest relative distance between two updates that count as the same."""


def distances(contenders: Mapping[str, Contender]) -> dict[str, float]:
    """Return how far the update of each contender's next step is from that of ``fastmtl``, relative to the latter.

    All make the same random choices: see :func:`same_choices`.

    Args:
        contenders: Steps by library, ``fastmtl`` (our eager one) among them, all from the same start.
    """
    updates = {library: _update(each) for library, each in contenders.items()}
    ours = updates["fastmtl"]
    return {library: float((ours - update).norm() / ours.norm()) for library, update in updates.items()}


def wrong_steps(distances: Mapping[str, float]) -> dict[str, str]:
    """Return which of our steps must not be timed, and why.

    Our eager step is wrong if its update is none of the peers'; where there is no peer, nothing says so. A compiled one
    is wrong, beside that, if its update is not the eager one's.

    Args:
        distances: Those that :func:`distances` returned.
    """
    ours = [library for library in distances if library.startswith("fastmtl")]
    peers = {library: distance for library, distance in distances.items() if library not in ours}
    if peers and not any(distance <= ALLOWED for distance in peers.values()):
        found = ", ".join(f"{distance:.0e} from that of {library}" for library, distance in peers.items())
        return dict.fromkeys(ours, f"our update is {found}")
    return {
        library: f"its update is {distances[library]:.0e} from our eager one"
        for library in ours
        if library != "fastmtl" and not distances[library] <= ALLOWED
    }


def _update(contender: Contender) -> Tensor:
    """Return by how much one step moves the shared parameters."""
    before = [param.detach().clone() for param in contender.shared]
    with same_choices():
        contender.run()
    return torch.cat([(old - param.detach()).flatten() for old, param in zip(before, contender.shared, strict=True)])


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
