"""The loss scale of float16, and its absence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

from torch import Tensor

from fastmtl.engine.weights import Rows

__all__ = ["LossScale", "Undoable"]

T = TypeVar("T")


class Undoable(Protocol[T]):
    """State that changes in a step that may be undone."""

    def learned(self) -> T:
        """Return the state that `take_back` restores."""

    def take_back(self, before: T, bad: Tensor) -> None:
        """Restore the state ``before`` where the scalar ``bad`` is true."""


class LossScale:
    """The number that all losses are multiplied by, here 1; the scalar ``masked`` is 1 if a step must be skipped."""

    def __init__(self, masked: Tensor) -> None:
        self.masked = masked

    def factor(self, share: Tensor | None) -> Tensor | None:
        """Return the factor of a batch's losses, its share in the step included; None for 1."""
        return share

    def up(self, value: Tensor) -> Tensor:
        """Return a value times the scale."""
        return value

    def limit(self, max_norm: float) -> float | Tensor:
        """Return the limit on the norm of scaled gradients from the limit for unscaled ones."""
        return max_norm

    def gram(self, gram: Tensor) -> Tensor:
        """Return the Gram matrix of unscaled gradients from that of scaled ones."""
        return gram

    def rows(self, rows: Rows) -> Rows:
        """Return unscaled rows."""
        return rows

    def watched(self, gram: Tensor | None, weights: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return those of a step's Gram matrix and weights that must be finite."""
        return gram, weights

    def unscale(self, params: Iterable[Tensor], any_shard: Callable[[Tensor], Tensor]) -> None:
        """Divide ``.grad`` by the scale; ``any_shard`` returns a flag that is 1 if it is in any process."""

    def undoing(self, state: Undoable[T]) -> AbstractContextManager[None]:
        """Undo the state changes of the block if the gradients of this step overflow."""
        return nullcontext()

    def settle(self, found_inf: Tensor) -> None:
        """Set ``masked`` from the guard's flag, and adapt the scale."""

    def logged(self) -> list[Tensor]:
        """Return scalars for the log: the scale and the steps skipped so far."""
        return []

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore a ``state_dict``."""
