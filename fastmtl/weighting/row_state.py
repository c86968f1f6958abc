"""A vector of the shared parameters' size per task, for the strategies that keep one."""

from __future__ import annotations

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
        self._seen: Tensor | None = None
        self._rows: list[list[Tensor | None]] = []
        owner.remember(name, torch.zeros(owner.task_num, sum(self._sizes)))

    @property
    def rows(self) -> list[list[Tensor | None]]:
        """Return the rows; writing into them changes the state."""
        flat: Tensor = getattr(self._owner, self._name)
        # The views are made once for each tensor the state lives in.
        if flat is not self._seen:
            self._seen = flat
            self._rows = [
                [part.view(shape) for part, shape in zip(row.split(self._sizes), self._shapes, strict=True)]
                for row in flat
            ]
        return self._rows
