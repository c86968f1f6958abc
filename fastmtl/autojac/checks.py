"""Checks of the arguments of autojac's functions, which raise a UsageError."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from fastmtl.errors import UsageError

__all__ = [
    "as_list",
    "check_chunk",
    "check_distinct",
    "check_lengths",
    "check_outputs",
    "check_rows",
    "check_shapes",
    "unique",
]


def as_list(tensors: Iterable[Tensor] | Tensor) -> list[Tensor]:
    """Return a single tensor as a list of one."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors in their order, each once."""
    return list(dict.fromkeys(tensors))


def check_distinct(tensors: Sequence[Tensor], name: str) -> None:
    """Refuse an empty list and repetitions."""
    if not tensors:
        raise UsageError(f"{name} must hold at least one tensor, got none.")
    if len(unique(tensors)) < len(tensors):
        raise UsageError(f"{name} must hold each tensor once, got one of them repeatedly.")


def check_outputs(tensors: Sequence[Tensor], name: str) -> None:
    """Refuse an empty list, repetitions and tensors that do not require grad."""
    check_distinct(tensors, name)
    for index, tensor in enumerate(tensors):
        if not tensor.requires_grad:
            raise UsageError(f"{name}[{index}] must depend on tensors that require grad, got one that does not.")


def check_chunk(parallel_chunk_size: int | None) -> None:
    """Refuse a chunk of no rows."""
    if parallel_chunk_size is not None and parallel_chunk_size < 1:
        raise UsageError(f"parallel_chunk_size must be None or at least 1, got {parallel_chunk_size}.")


def check_lengths(values: Sequence[object], tensors: Sequence[Tensor], name: str, tensors_name: str) -> None:
    """Refuse a list whose length differs from that of the tensors."""
    if len(values) != len(tensors):
        raise UsageError(
            f"`{name}` should have the same length as `{tensors_name}`. (got {len(values)} and {len(tensors)})"
        )


def check_shapes(
    cotangents: Sequence[Tensor], tensors: Sequence[Tensor], name: str, tensors_name: str, rows: bool
) -> None:
    """Refuse cotangents without the tensors' shapes, after a first dimension of rows if ``rows``."""
    check_lengths(cotangents, tensors, name, tensors_name)
    for index, (cotangent, tensor) in enumerate(zip(cotangents, tensors, strict=True)):
        if cotangent.shape[int(rows) :] != tensor.shape or (rows and not cotangent.dim()):
            behind = ", except for the first dimension" if rows else ""
            raise UsageError(
                f"Shape mismatch: `{name}[{index}]` has shape {tuple(cotangent.shape)} but `{tensors_name}[{index}]` "
                f"has shape {tuple(tensor.shape)}. They must be the same{behind}."
            )


def check_rows(jacobians: Sequence[Tensor], name: str) -> None:
    """Refuse Jacobians of different numbers of rows."""
    counts = {len(jacobian) if jacobian.dim() else 0 for jacobian in jacobians}
    if len(counts) > 1:
        raise UsageError(f"All Jacobians in `{name}` should have the same number of rows. (got {sorted(counts)})")
