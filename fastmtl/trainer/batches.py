"""Cutting batches apart and putting them together, whatever containers their tensors are in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.trainer.trees import leaves, map_tree

__all__ = ["halves", "joined"]


def halves(batch: tuple[Any, Any]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Return the first and the second half of a batch; a single row is both."""
    if min(len(leaf) for leaf in leaves(batch) if isinstance(leaf, Tensor)) == 1:
        return batch, batch

    def half(second: bool) -> Any:
        def cut(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            middle = len(leaf) // 2
            return leaf[middle:] if second else leaf[:middle]

        return map_tree(cut, batch)

    return half(False), half(True)


def joined(parts: Sequence[Any]) -> Any:
    """Return the predictions for several parts of a batch as those for the whole."""
    if len(parts) == 1:
        return parts[0]
    return map_tree(lambda *each: torch.cat([part.detach() for part in each]), *parts)
