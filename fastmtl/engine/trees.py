"""Trees of tensors, such as batches and predictions: nested mappings, lists and tuples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from fastmtl.support.kinds import Tree

__all__ = ["detached_tree", "joined", "leaves", "map_tree", "mapping_like", "tensors_of"]


def map_tree(
    function: Callable[..., Any], tree: Tree, *others: Any, is_leaf: Callable[[Any], bool] = lambda _: False
) -> Tree:
    """Return ``function`` of all leaves, in containers like those of ``tree``.

    Leaves are all objects but mappings, lists and tuples, and those that satisfy ``is_leaf``. Mappings are rebuilt by
    :func:`mapping_like`. ``others`` are trees of the same structure; ``function`` takes one leaf of each tree.
    """
    if isinstance(tree, Tensor) or is_leaf(tree):
        return function(tree, *others)
    if type(tree) is dict or isinstance(tree, Mapping):
        parts = {
            key: map_tree(function, entry, *(other[key] for other in others), is_leaf=is_leaf)
            for key, entry in tree.items()
        }
        return parts if type(tree) is dict else mapping_like(tree, parts)
    if isinstance(tree, list | tuple):
        items = [map_tree(function, *entry, is_leaf=is_leaf) for entry in zip(tree, *others, strict=True)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return function(tree, *others)


def mapping_like(tree: Any, parts: dict[Any, Any]) -> Tree:
    """Return a mapping of the class of ``tree`` with other values for its keys; a dictionary for plain classes.

    Further attributes are kept; attributes that are the same objects as values of ``tree`` are replaced too.
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
    # Its __getattr__ takes every name for a key, also those that copy looks up.
    like: dict[Any, Any] = type(tree).__new__(type(tree))
    vars(like).update(vars(tree))
    return like


def leaves(tree: Tree) -> list[Any]:
    """Return the leaves in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        return [leaf for part in tree.values() for leaf in leaves(part)]
    if isinstance(tree, list | tuple):
        return [leaf for part in tree for leaf in leaves(part)]
    return [tree]


def joined(parts: Sequence[Any]) -> Tree:
    """Concatenate the predictions for several parts of a batch."""
    if len(parts) == 1:
        return parts[0]
    return map_tree(lambda *entry: torch.cat([part.detach() for part in entry]), *parts)


def detached_tree(tree: Tree) -> Tree:
    """Return a tree with its tensors detached."""
    return map_tree(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def tensors_of(tree: Tree) -> list[Tensor]:
    """Return the leaves that are tensors, in order."""
    if type(tree) is tuple and len(tree) == 1 and isinstance(tree[0], Tensor):
        return [tree[0]]
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]
