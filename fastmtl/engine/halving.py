"""Batches cut into halves, for strategies that look ahead."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastmtl.engine.trees import leaves, mapping_like
from fastmtl.errors import UsageError
from fastmtl.support.kinds import Tree

__all__ = ["Halving", "Pair", "are_by_row", "check_split_batch", "checked_halves"]

# Inputs and labels.
Pair: TypeAlias = tuple[Tree, Tree]
Items: TypeAlias = list[Tree] | tuple[Tree, ...]

_PLAIN = (str, bytes, bool, int, float, complex, np.generic, torch.device, torch.dtype, type(None))


class Halving:
    """Cuts batches into a first and a second half of their rows; with too few rows both halves are the whole batch.

    Tensors and arrays whose first dimension is the batch, packed sequences, and lists and tuples with one entry per row
    are cut, in any containers; scalars and plain values belong to both halves. Everything else is refused, as a tensor
    of another length may be time-major. The labels determine the number of rows.

    A list of n parts with n rows each could also be a list with one entry per row; earlier batches decide.

    Attributes:
        least: Rows that a half needs: two where the network normalises over the batch.
    """

    def __init__(self, least: int = 1) -> None:
        self.least = least
        # Whether the list at a place has one entry per row.
        self._by_row: dict[str, bool] = {}

    def __call__(self, inputs: Tree, labels: Tree, multi_input: bool = False) -> tuple[Pair, Pair]:
        """Return two pairs of inputs and labels; with ``multi_input`` both are by task and cut task by task.

        Raises:
            UsageError: A part cannot be cut, or parts have different numbers of rows.
        """
        if not multi_input:
            return self._halves(inputs, labels, "")
        parts = {
            task: self._halves(part, labels[task], f"[{task!r}]") if task in labels else ((part, None), (part, None))
            for task, part in inputs.items()
        }
        first, second = (
            (
                {task: both[half][0] for task, both in parts.items()},
                {task: both[half][1] for task, both in parts.items()},
            )
            for half in (0, 1)
        )
        return first, second

    def _halves(self, inputs: Tree, labels: Tree, place: str) -> tuple[Pair, Pair]:
        rows = self._count_rows(inputs, labels, place)
        if rows < 2 * self.least:
            return (inputs, labels), (inputs, labels)
        both = self._cut(inputs, rows, f"inputs{place}"), self._cut(labels, rows, f"labels{place}")
        return (both[0][0], both[1][0]), (both[0][1], both[1][1])

    def _cut(self, tree: Tree, rows: int, place: str) -> Pair:
        """Return the two halves of a part of a batch that can have this number of rows by ``_lengths``."""
        if isinstance(tree, PackedSequence):
            return _cut_packed(tree, rows)
        if isinstance(tree, Tensor | np.ndarray):
            return _cut_tensor(tree, rows, place) if tree.ndim else (tree, tree)
        if isinstance(tree, Mapping):
            parts = {key: self._cut(value, rows, f"{place}[{key!r}]") for key, value in tree.items()}
            first, second = (mapping_like(tree, {key: both[half] for key, both in parts.items()}) for half in (0, 1))
            return first, second
        if not isinstance(tree, list | tuple):
            return tree, tree
        if self._has_entry_per_row(tree, rows, place):
            return tree[: rows // 2], tree[rows // 2 :]
        items = [self._cut(item, rows, f"{place}[{index}]") for index, item in enumerate(tree)]
        kind, of_first, of_second = type(tree), [both[0] for both in items], [both[1] for both in items]
        return (kind(*of_first), kind(*of_second)) if hasattr(tree, "_fields") else (kind(of_first), kind(of_second))

    def _has_entry_per_row(self, items: Items, rows: int, place: str) -> bool:
        if len(items) != rows or hasattr(items, "_fields"):
            self._by_row.setdefault(place, False)
        elif place not in self._by_row:
            inside = _inside(items, place, self._by_row)
            may_be_whole = not _is_of_targets(items, place) and all(_may_have_rows(item, rows) for item in items)
            if may_be_whole or (inside is not None and rows in inside):
                raise _refusal(
                    f"{place} is a list of {rows} parts with {rows} rows each, the number of rows of the labels: it is "
                    "unclear whether each part is one row"
                )
            self._by_row[place] = True
        return self._by_row[place] and len(items) == rows

    def _count_rows(self, inputs: Tree, labels: Tree, place: str) -> int:
        """Return the number of rows of the labels, which the inputs must have too."""
        by_labels, first = None, ""
        for name, part in _parts(labels, f"labels{place}"):
            lengths = self._known_lengths(part, name)
            if lengths is None and isinstance(part, list | tuple) and part:
                lengths = _plain_lengths(part)
            if lengths is None:
                continue
            before, by_labels = by_labels, lengths if by_labels is None else by_labels & lengths
            if not by_labels:
                raise _refusal(f"{name} has {_listed(lengths)} rows and {first} has {_listed(before or ())}")
            first = first or name
        if by_labels == {1}:
            return 1
        rows = by_labels
        for name, part in _parts(inputs, f"inputs{place}"):
            lengths = self._known_lengths(part, name)
            if lengths is None:
                continue
            rows = lengths if rows is None else rows & lengths
            if not rows:
                expected = f"the labels have {_listed(by_labels)} rows" if by_labels else "other inputs have another"
                raise _refusal(f"{name} has the length {_listed(lengths)} where {expected}")
        if rows is None or len(rows) > 1:
            raise _refusal(f"it has {_listed(rows or ())} rows" if rows else "nothing in it has rows")
        return rows.pop()

    def _known_lengths(self, part: Tree, name: str) -> set[int] | None:
        try:
            return _lengths(part, name, self._by_row)
        except _OpaqueError as opaque:
            raise _refusal(f"{name} is or contains a {opaque}, which has no known rows") from None


def check_split_batch(hook: object) -> None:
    """Refuse a ``split_batch`` that cannot be called with inputs and labels, with a UsageError."""
    if not callable(hook):
        raise UsageError(f"split_batch must be a function of inputs and labels, got {type(hook).__name__}.")
    try:
        inspect.signature(hook).bind(None, None)
    except TypeError as cause:
        raise UsageError(f"split_batch must take two arguments, inputs and labels: {cause}.") from None
    except ValueError:
        # Functions in C may have no signature.
        return


def checked_halves(result: Tree, labels: Mapping[str, Tree], multi_input: bool = False) -> tuple[Pair, Pair]:
    """Return the result of a user's ``split_batch`` for a batch with these labels by task.

    Raises:
        UsageError: It is not two pairs, or a half lacks a task of the batch, or has no rows.
    """

    def is_pair(value: object) -> bool:
        return isinstance(value, list | tuple) and len(value) == 2

    if not (is_pair(result) and all(is_pair(half) and isinstance(half[1], Mapping) for half in result)):
        raise UsageError(
            "split_batch must return two pairs of inputs and labels by task, ((inputs, labels), (inputs, labels))."
        )
    parts: list[Mapping[str, Tree]] = [half[1] for half in result]
    for task in labels:
        if any(task not in part for part in parts) or all(part[task] is None for part in parts):
            raise UsageError(
                f"split_batch must return the labels of every task in both halves, got none of {task!r}, which the "
                "batch has. A half without labels of a task must have None for it."
            )
    unknown = [name for part in parts for name, label in part.items() if label is not None and name not in labels]
    if unknown:
        raise UsageError(
            f"split_batch returned labels of {unknown[0]!r}, of which the batch has none: it has "
            f"{', '.join(map(repr, labels))}."
        )
    for half in result:
        _check_rows(half, labels, multi_input)
    return tuple(result[0]), tuple(result[1])


def _check_rows(half: Pair, labels: Mapping[str, Tree], multi_input: bool) -> None:
    """Refuse a half without rows, where the number of rows is known."""
    inputs, parts = half
    of_batch = {task: _rows_of(label) for task, label in labels.items()}
    # A tensor of the boxes of all images may be empty in one half.
    by_row = multi_input or bool(_common(of_batch.values()))
    empty = [f"labels[{task!r}]" for task, rows in of_batch.items() if rows != {0} and _rows_of(parts[task]) == {0}]
    named = {f"inputs[{task!r}]": inputs.get(task) for task in labels} if multi_input else {"inputs": inputs}
    without_rows = [*(name for name, part in named.items() if _rows_of(part) == {0}), *(empty if by_row else ())]
    if without_rows:
        raise UsageError(f"split_batch returned a half without rows in {without_rows[0]}: both halves need some.")


def _rows_of(part: Tree) -> set[int] | None:
    try:
        lengths = _lengths(part, "labels", {})
    except _OpaqueError:
        return None
    return {len(part)} if lengths is None and isinstance(part, list | tuple) else lengths


def are_by_row(preds: Mapping[str, Tree], labels: Mapping[str, Tree]) -> bool:
    """Return whether all predictions are tensors whose first dimension are the rows of the labels."""
    for task, pred in preds.items():
        try:
            rows = _lengths(labels.get(task), "labels", {})
        except _OpaqueError:
            return False
        for leaf in leaves(pred):
            if not isinstance(leaf, Tensor) or not leaf.dim() or (rows is not None and len(leaf) not in rows):
                return False
    return True


def _parts(tree: Tree, name: str) -> Iterable[tuple[str, Tree]]:
    """Yield the parts of a batch with their names, for messages."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _parts(value, f"{name}[{key!r}]")
    else:
        yield name, tree


def _lengths(tree: Tree, place: str, by_row: Mapping[str, bool]) -> set[int] | None:
    """Return the possible numbers of rows of a part of a batch; None where any is possible."""
    if isinstance(tree, PackedSequence):
        return {int(tree.batch_sizes[0])}
    if isinstance(tree, Tensor | np.ndarray):
        return {tree.size(0) if isinstance(tree, Tensor) else len(tree)} if tree.ndim else None
    if isinstance(tree, _PLAIN):
        return None
    if isinstance(tree, Mapping):
        return _common(_lengths(part, f"{place}[{key!r}]", by_row) for key, part in tree.items())
    if not isinstance(tree, list | tuple):
        raise _OpaqueError(type(tree).__name__)
    if by_row.get(place, False) and not hasattr(tree, "_fields"):
        return {len(tree)}
    inside = _inside(tree, place, by_row)
    if inside is None or place in by_row or hasattr(tree, "_fields"):
        return inside
    return inside | {len(tree)}


def _inside(items: Items, place: str, by_row: Mapping[str, bool]) -> set[int] | None:
    """Return the numbers of rows possible for all items; the empty set where each item must be one row."""
    if _is_of_targets(items, place):
        return set()
    try:
        return _common(_lengths(item, f"{place}[{index}]", by_row) for index, item in enumerate(items))
    except _OpaqueError:
        return set()


def _is_of_targets(items: Items, place: str) -> bool:
    """Return whether items are detection targets, dictionaries per row whose lengths may equal the number of rows."""
    return place.startswith("labels") and all(isinstance(item, Mapping) for item in items)


def _plain_lengths(items: Items) -> set[int]:
    """Return the possible numbers of rows of words or numbers: one entry per row, or several lists of columns."""
    inner = {len(item) if isinstance(item, list | tuple) else 0 for item in items}
    return {len(items)} | (inner if len(inner) == 1 else set()) - {0}


def _may_have_rows(item: Tree, rows: int) -> bool:
    """Return whether an item, tensors aside, may be collated words or numbers of ``rows`` rows."""
    if isinstance(item, Mapping):
        return any(_may_have_rows(part, rows) for part in item.values())
    if not isinstance(item, list | tuple):
        return False
    if hasattr(item, "_fields"):
        return any(_may_have_rows(entry, rows) for entry in item)
    is_plain = all(isinstance(entry, _PLAIN) for entry in item)
    return len(item) == rows if is_plain else all(_may_have_rows(entry, rows) for entry in item)


def _common(lengths: Iterable[set[int] | None]) -> set[int] | None:
    known = [possible for possible in lengths if possible is not None]
    return set.intersection(*known) if known else None


def _cut_tensor(tensor: Tree, rows: int, place: str) -> Pair:
    middle = rows // 2
    if isinstance(tensor, Tensor) and tensor.is_nested:
        items = tensor.unbind()
        return (
            torch.nested.as_nested_tensor(list(items[:middle]), layout=tensor.layout),
            torch.nested.as_nested_tensor(list(items[middle:]), layout=tensor.layout),
        )
    if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
        return _cut_sparse(tensor, middle, place)
    return tensor[:middle], tensor[middle:]


def _cut_sparse(tensor: Tensor, middle: int, place: str) -> Pair:
    compressed = tensor.layout in (torch.sparse_csr, torch.sparse_csc) and tensor.dim() == 2
    if tensor.layout != torch.sparse_coo and not compressed:
        raise _refusal(f"{place} is a tensor of {tensor.dim()} dimensions and the layout {tensor.layout}")
    # Rows of compressed tensors cannot be selected.
    by_place = tensor.to_sparse_coo() if compressed else tensor
    index = torch.arange(len(tensor), device=tensor.device)
    first, second = (by_place.index_select(0, part) for part in (index[:middle], index[middle:]))
    if compressed:
        return first.to_sparse(layout=tensor.layout), second.to_sparse(layout=tensor.layout)
    return first, second


def _cut_packed(packed: PackedSequence, rows: int) -> Pair:
    padded, lengths = pad_packed_sequence(packed, batch_first=True)
    is_sorted = packed.sorted_indices is None
    first, second = (
        pack_padded_sequence(padded[part], lengths[part], batch_first=True, enforce_sorted=is_sorted)
        for part in (slice(0, rows // 2), slice(rows // 2, rows))
    )
    return first, second


def _listed(lengths: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(lengths))) or "no number of"


def _refusal(why: str) -> UsageError:
    return UsageError(
        f"A strategy that looks ahead on halves of a batch got one that cannot be halved: {why}. Give Trainer "
        "split_batch, a function of inputs and labels that returns two pairs of them."
    )


class _OpaqueError(Exception):
    """A part of a batch that is not a tensor, container or plain value."""
