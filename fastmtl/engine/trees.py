"""Containers of tensors: mappings, lists and tuples, one in the other, as batches and predictions come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

__all__ = ["leaves", "map_tree"]


def map_tree(
    function: Callable[..., Any], tree: Any, *others: Any, is_leaf: Callable[[Any], bool] = lambda _: False
) -> Any:
    """Return ``function`` of all leaves, in containers like those of ``tree``.

    Mappings become dictionaries, but for those that are dataclasses.

    Args:
        function: Takes a leaf of ``tree`` and those of the others at the same place.
        tree: Leaves are what is no mapping, list or tuple.
        others: Trees that have at least the containers of ``tree``.
        is_leaf: Says of containers too whether they are to be taken as leaves.
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
