"""Cutting batches apart and putting them together, whatever containers their tensors are in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.engine.trees import leaves, map_tree

__all__ = ["halves", "joined"]


def halves(batch: tuple[Any, Any]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Return the first and the second half of a batch; a single row is both.

    Cut are tensors, and lists of something else for each row, such as names.
    """
    # Tasks with inputs of their own may have different numbers.
    rows = {len(leaf) for leaf in leaves(batch[0]) if _has_rows(leaf)}
    if 1 in rows:
        return batch, batch

    def is_by_row(each: Any) -> bool:
        if not isinstance(each, list) or len(each) not in rows:
            return False
        return not all(_has_rows(leaf) and len(leaf) in rows for leaf in leaves(each))

    def half(second: bool) -> Any:
        def cut(leaf: Any) -> Any:
            if not _has_rows(leaf) and not isinstance(leaf, list):
                return leaf
            middle = len(leaf) // 2
            return leaf[middle:] if second else leaf[:middle]

        return tuple(map_tree(cut, each, is_leaf=is_by_row) for each in batch)

    return half(False), half(True)


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def joined(parts: Sequence[Any]) -> Any:
    """Return the predictions for several parts of a batch as those for the whole."""
    if len(parts) == 1:
        return parts[0]
    return map_tree(lambda *each: torch.cat([part.detach() for part in each]), *parts)
