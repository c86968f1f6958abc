"""Whether the training steps that a benchmark compares make the same update."""

from __future__ import annotations

from collections.abc import Mapping

from fastmtl.benchmarks.contender import Contender

__all__ = ["ALLOWED", "DRAW", "distances", "wrong_steps"]

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


def wrong_steps(distances: Mapping[str, float]) -> dict[str, str]:
    """Return which of our steps must not be timed, and why.

    All our steps are wrong if the eager one's update equals no peer's; without peers it counts as right. A compiled
    step is also wrong if its update is not the eager one's.

    Args:
        distances: Those that :func:`distances` returned.
    """
    ours = [library for library in distances if library.startswith("fastmtl")]
    peers = {library: distance for library, distance in distances.items() if library not in ours}
    if peers and not any(distance <= ALLOWED for distance in peers.values()):
        apart = ", ".join(f"{distance:.0e} from that of {library}" for library, distance in peers.items())
        return dict.fromkeys(ours, f"our update is {apart}")
    return {
        library: f"its update is {distances[library]:.0e} from our eager one"
        for library in ours
        if library != "fastmtl" and not distances[library] <= ALLOWED
    }
