"""A vector of the shared parameters' size per task, for the strategies that keep one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["RowState"]


class RowState:
    """(T, P) numbers, seen as T rows in the shapes of the shared parameters.

    Args:
        owner: The strategy, which remembers the numbers.
        name: Under which name.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._owner = owner
        self._name = name
        self._shapes = [param.shape for param in owner.get_share_params() if param.requires_grad]
        self._sizes = [shape.numel() for shape in self._shapes]
        owner.remember(name, torch.zeros(owner.task_num, sum(self._sizes)))

    @property
    def rows(self) -> list[list[Tensor | None]]:
        """Return the rows; writing into them changes the state."""
        flat: Tensor = getattr(self._owner, self._name)
        return [
            [part.view(shape) for part, shape in zip(row.split(self._sizes), self._shapes, strict=True)] for row in flat
        ]

    @torch.no_grad()
    def blend(self, rows: Sequence[Sequence[Tensor | None]], keep: Tensor, gains: Tensor) -> list[list[Tensor | None]]:
        """Set ``state_t = keep state_t + gains_t row_t`` and return the rows of the state.

        Args:
            rows: T rows, None for zero.
            keep: Scalar tensor.
            gains: (T,).
        """
        mine = self.rows
        getattr(self._owner, self._name).mul_(keep)
        for own, row, gain in zip(mine, rows, gains.unbind(), strict=True):
            for part, grad in zip(own, row, strict=True):
                if part is not None and grad is not None:
                    part.add_(grad * gain.to(grad.dtype))
        return mine
