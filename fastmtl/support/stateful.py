"""Objects with state between calls."""

from __future__ import annotations

from abc import ABC, abstractmethod

__all__ = ["Stateful"]


class Stateful(ABC):
    """An aggregator, weighting or scalarizer with a state."""

    @abstractmethod
    def reset(self) -> None:
        """Reset the state."""
