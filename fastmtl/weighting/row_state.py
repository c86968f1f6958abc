"""A vector of the shared parameters' size per task, for the strategies that keep one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.weighting.abstract_weighting import AbsWeighting

__all__ = ["RowState"]


class RowState:
    """(T, P) numbers that a strategy remembers under a name, seen as T rows in the shapes of the shared parameters.

    Args:
        owner: The strategy.
        name: The name.
        count: Number of rows, if they are not one for each task: a step of some tasks then sees all of them.
    """

    def __init__(self, owner: AbsWeighting, name: str, count: int | None = None) -> None:
        self._owner = owner
        self._name = name
        self._rows: list[list[Tensor | None]] = []
        self._shapes: list[torch.Size] | None = None
        rows = owner.task_num if count is None else count
        owner.remember(name, torch.zeros(rows, 0), task_dims=None if count is None else ())
        self.cut([param.shape for param in owner.get_share_params() if param.requires_grad])
        owner.row_states = {**owner.row_states, name: self}

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickles and copies hold: not the views, which would be of other memory there."""
        return {**self.__dict__, "_seen": None, "_rows": []}

    def cut(self, shapes: Sequence[torch.Size]) -> None:
        """Start anew with rows in the shapes of the pieces that this process has of each, unless they have them."""
        if self._shapes == list(shapes):
            return
        self._shapes = list(shapes)
        self._sizes = [shape.numel() for shape in shapes]
        self._seen: Tensor | None = None
        old: Tensor = getattr(self._owner, self._name)
        setattr(self._owner, self._name, old.new_zeros(len(old), sum(self._sizes)))

    @property
    def rows(self) -> list[list[Tensor | None]]:
        """Return the rows; writing into them changes the state."""
        flat: Tensor = getattr(self._owner, self._name)
        # The views are made once for each tensor the state lives in.
        if flat is not self._seen:
            self._seen = flat
            self._rows = [
                [part.view(shape) for part, shape in zip(row.split(self._sizes), self._shapes or (), strict=True)]
                for row in flat
            ]
        return self._rows
