"""Whether the training steps that a benchmark compares make the same update."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from fastmtl.benchmarks.contender import Contender
from torch import Tensor

__all__ = ["ALLOWED", "DRAW", "distances", "min_norm_gap", "wrong_steps"]

DRAW = ("PCGrad", "GradVac", "RLW", "MoDo", "SDMGrad")
"""Strategies with random choices."""
ALLOWED = 0.01
"""Greatest relative distance between two updates that count as the same."""


def distances(contenders: Mapping[str, Contender]) -> dict[str, float]:
    """Return how far the update of each contender's next step is from that of ``fastmtl``, relative to the latter.

    All make the same random choices.

    Args:
        contenders: Steps by library, ``fastmtl`` (our eager one) among them, all from the same start.
    """
    updates = {library: contender.update() for library, contender in contenders.items()}
    ours = updates["fastmtl"]
    return {library: float((ours - update).norm() / ours.norm()) for library, update in updates.items()}


def min_norm_gap(update: Tensor, rows: Tensor) -> float:
    """Return how far an update is from the shortest vector of the gradients' convex hull, as MGDA's is to be.

    With the weights w, of sum 1, that make the update u up to its length, in float64: the greatest of
    ``1 - min_t <g_t, u> / |u|^2``, ``-min_t w_t`` and ``|u - sum_t w_t g_t| / |u|``. All are 0 for the shortest vector
    and for no other (the Karush-Kuhn-Tucker conditions).

    Args:
        update: (P,) of any length.
        rows: (T, P) gradients g_t at the same start.
    """
    u, g = update.double().cpu(), rows.double().cpu()
    weights = torch.linalg.lstsq(g.T, u[:, None], driver="gelsd").solution[:, 0]
    u, weights = u / weights.sum(), weights / weights.sum()
    gaps = 1 - (g @ u).min() / (u @ u), -weights.min(), (u - weights @ g).norm() / u.norm()
    return max(float(gap) for gap in gaps)


def wrong_steps(distances: Mapping[str, float], gap: float | None = None) -> dict[str, str]:
    """Return which of our steps must not be timed, and why.

    All our steps are wrong if the eager one's update equals no peer's; without peers it counts as right. A compiled
    step is also wrong if its update is not the eager one's.

    Args:
        distances: Those that :func:`distances` returned.
        gap: How far our eager update is from the conditions of the exact solution, which then count in place of the
            peers' updates.
    """
    ours = [library for library in distances if library.startswith("fastmtl")]
    peers = {library: distance for library, distance in distances.items() if library not in ours}
    if gap is not None:
        peers = {}
        if not gap <= ALLOWED:
            return dict.fromkeys(ours, f"our update misses the conditions of the exact solution by {gap:.0e}")
    if peers and not any(distance <= ALLOWED for distance in peers.values()):
        apart = ", ".join(f"{distance:.0e} from that of {library}" for library, distance in peers.items())
        return dict.fromkeys(ours, f"our update is {apart}")
    return {
        library: f"its update is {distances[library]:.0e} from our eager one"
        for library in ours
        if library != "fastmtl" and not distances[library] <= ALLOWED
    }
