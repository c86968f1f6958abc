"""What float16 multiplies the losses by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TypeVar

from torch import Tensor, nn

from fastmtl.engine.weights import Rows

__all__ = ["LossScale", "Undoable"]

T = TypeVar("T")


class Undoable(Protocol[T]):
    """What learns in a step that may be taken back."""

    def learned(self) -> T:
        """Return what `take_back` goes back to."""

    def take_back(self, before: T, bad: Tensor) -> None:
        """Forget what was learned since ``before`` if the scalar ``bad`` is true."""


class LossScale:
    """The number that all losses are multiplied by; here 1: gradients are what they are.

    Args:
        masked: Scalar, 1 if the optimizer must not change anything.
    """

    def __init__(self, masked: Tensor) -> None:
        self.masked = masked

    def factor(self, share: Tensor | None) -> Tensor | None:
        """Return what the losses of a batch are multiplied by, its share in the step included; None for 1."""
        return share

    def up(self, value: Tensor) -> Tensor:
        """Return a number that belongs to unscaled gradients as one of those that are there."""
        return value

    def limit(self, max_norm: float) -> float | Tensor:
        """Return the greatest norm of the gradients that are there from that of unscaled ones."""
        return max_norm

    def gram(self, gram: Tensor) -> Tensor:
        """Return the Gram matrix of unscaled gradients from that of those that are there."""
        return gram

    def rows(self, rows: Rows) -> Rows:
        """Return unscaled rows."""
        return rows

    def watched(self, gram: Tensor | None, weights: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return what of a step's Gram matrix and weights is an error if it is not finite."""
        return gram, weights

    def unscale(self, params: Iterable[nn.Parameter]) -> None:
        """Divide ``.grad`` by the scale."""

    @contextmanager
    def undoing(self, state: Undoable[T]) -> Iterator[None]:
        """Take back what a strategy learns in the block if the gradients of this step overflow."""
        yield

    def settle(self, found_inf: Tensor) -> None:
        """Decide whether the optimizer may change anything, from the guard's flag, and adapt the scale."""

    def shown(self) -> list[Tensor]:
        """Return scalars for the log: the scale and the steps skipped so far."""
        return []

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on where `state_dict` was taken."""
