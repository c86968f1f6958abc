"""Containers of tensors, as batches and predictions come: mappings, lists and tuples, one in the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["halves", "joined", "leaves", "map_tree"]


def map_tree(
    function: Callable[..., Any], tree: Any, *others: Any, is_leaf: Callable[[Any], bool] = lambda _: False
) -> Any:
    """Return ``function`` of all leaves, in containers like those of ``tree``.

    Leaves are what is no mapping, list or tuple, and what ``is_leaf`` says is one. Mappings become dictionaries, but
    for those that are dataclasses. ``others`` have the containers of ``tree``; ``function`` takes a leaf of each.
    """

    def mapped(each: Any, *rest: Any) -> Any:
        return map_tree(function, each, *rest, is_leaf=is_leaf)

    if is_leaf(tree):
        return function(tree, *others)
    if isinstance(tree, Mapping):
        found = {key: mapped(each, *(other[key] for other in others)) for key, each in tree.items()}
        # Its entries are attributes too.
        return type(tree)(**found) if is_dataclass(tree) else found
    if isinstance(tree, list | tuple):
        items = [mapped(*each) for each in zip(tree, *others, strict=True)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return function(tree, *others)


def leaves(tree: Any) -> list[Any]:
    """Return the leaves in order."""
    found: list[Any] = []
    map_tree(found.append, tree)
    return found


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
