"""Containers of tensors, as batches and predictions come: mappings, lists and tuples, one in the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from fastmtl.support.kinds import Tree

__all__ = ["joined", "leaves", "map_tree", "mapping_like", "tensors_of"]


def map_tree(
    function: Callable[..., Any], tree: Tree, *others: Any, is_leaf: Callable[[Any], bool] = lambda _: False
) -> Tree:
    """Return ``function`` of all leaves, in containers like those of ``tree``.

    Leaves are what is no mapping, list or tuple, and what ``is_leaf`` says is one. Mappings become what
    :func:`mapping_like` makes of them. ``others`` have the containers of ``tree``; ``function`` takes a leaf of each.
    """

    def mapped(entry: Any, *rest: Tree) -> Tree:
        return map_tree(function, entry, *rest, is_leaf=is_leaf)

    if is_leaf(tree):
        return function(tree, *others)
    if isinstance(tree, Mapping):
        return mapping_like(
            tree, {key: mapped(entry, *(other[key] for other in others)) for key, entry in tree.items()}
        )
    if isinstance(tree, list | tuple):
        items = [mapped(*entry) for entry in zip(tree, *others, strict=True)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return function(tree, *others)


def mapping_like(tree: Any, parts: dict[Any, Any]) -> Tree:
    """Return a mapping of the class of ``tree`` with other entries of the same keys; a dictionary for plain ones.

    Further attributes stay, and entries that are attributes too are so in what is returned.
    """
    if is_dataclass(tree):
        kind: Any = type(tree)
        return kind(**parts)
    if type(tree).__module__ in ("builtins", "collections") or not isinstance(tree, MutableMapping):
        return parts
    like = _copied(tree)
    like.update(parts)
    attributes = getattr(like, "__dict__", {})
    attributes.update({key: part for key, part in parts.items() if key in attributes and attributes[key] is tree[key]})
    return like


def _copied(tree: MutableMapping[Any, Any]) -> MutableMapping[Any, Any]:
    try:
        return copy.copy(tree)
    except (AttributeError, KeyError, TypeError):
        if not isinstance(tree, dict):
            raise
    # It answers to every name as if it were an entry, also to those that copies ask for.
    like: dict[Any, Any] = type(tree).__new__(type(tree))
    vars(like).update(vars(tree))
    return like


def leaves(tree: Tree) -> list[Any]:
    """Return the leaves in order."""
    if isinstance(tree, Mapping):
        return [leaf for part in tree.values() for leaf in leaves(part)]
    if isinstance(tree, list | tuple):
        return [leaf for part in tree for leaf in leaves(part)]
    return [tree]


def joined(parts: Sequence[Any]) -> Tree:
    """Return the predictions for several parts of a batch as those for the whole."""
    if len(parts) == 1:
        return parts[0]
    return map_tree(lambda *entry: torch.cat([part.detach() for part in entry]), *parts)


def tensors_of(tree: Tree) -> list[Tensor]:
    """Return the leaves that are tensors, in order; a trunk may hand on others, such as inputs in a dictionary."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]
