"""Vector-Jacobian products, alone or as the rows of a Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fastmtl.ops._rows import is_dense

__all__ = [
    "Cotangents",
    "batched_jacobians",
    "batched_vjps",
    "identity_rows",
    "jacobians",
    "seeded",
    "vjp",
    "vjp_of_present",
    "without_losses",
]

Cotangents = Sequence[Tensor | None]


def vjp(
    outputs: Sequence[Tensor], cotangents: Cotangents, inputs: Sequence[Tensor | GradientEdge], retain: bool
) -> list[Tensor | None]:
    """Return the gradients of ``sum <output, cotangent>``; None as the cotangent of a scalar loss is 1.

    Other outputs without a cotangent are left out; inputs that require no gradient get None.
    """
    # Torch's annotation allows no mixture of tensors and edges.
    wanted: Any = [source for source in inputs if _has_gradient(source)]
    pairs = seeded(outputs, cotangents)
    if not pairs or not wanted:
        return [None] * len(inputs)
    roots, seeds = zip(*pairs, strict=True)
    grads = torch.autograd.grad(roots, wanted, seeds, retain_graph=retain, allow_unused=True)
    if len(wanted) == len(inputs):
        return list(grads)
    rest = iter(grads)
    return [next(rest) if _has_gradient(source) else None for source in inputs]


def vjp_of_present(
    outputs: Sequence[Tensor], cotangents: Cotangents, inputs: Sequence[Tensor | GradientEdge], retain: bool
) -> list[Tensor | None]:
    """Return `vjp` of those outputs that have a cotangent, whatever their shape."""
    pairs = [pair for pair in zip(outputs, cotangents, strict=True) if pair[1] is not None]
    return vjp([output for output, _ in pairs], [cotangent for _, cotangent in pairs], inputs, retain)


def without_losses(outputs: Sequence[Tensor], cotangents: Cotangents) -> list[Tensor | None]:
    """Return the cotangents with zeros for scalars that have none, which `vjp` would take for losses."""
    return [
        torch.zeros_like(output) if cotangent is None and not output.dim() else cotangent
        for output, cotangent in zip(outputs, cotangents, strict=True)
    ]


def seeded(outputs: Sequence[Tensor], cotangents: Cotangents) -> list[tuple[Tensor, Tensor]]:
    """Return the outputs that take part in a VJP with their cotangents, 1 for None of a scalar."""
    return [
        (output, torch.ones_like(output) if cotangent is None else cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output.requires_grad and (cotangent is not None or not output.dim())
    ]


def _has_gradient(source: Tensor | GradientEdge) -> bool:
    return isinstance(source, GradientEdge) or source.requires_grad


def batched_vjps(
    outputs: Sequence[Tensor], cotangents: Sequence[Cotangents], inputs: Sequence[Tensor | GradientEdge]
) -> list[list[Tensor | None]]:
    """Return `vjp` of each of the T cotangents, as views of (T, ...) gradients of one backward pass; keeps the graph.

    Raises:
        RuntimeError: An operator of the graph has no batching rule.
    """
    pairs = [
        (output, torch.stack([torch.zeros_like(output) if cotangent is None else cotangent for cotangent in column]))
        for output, column in zip(outputs, zip(*cotangents, strict=True), strict=True)
        if output.requires_grad and any(cotangent is not None for cotangent in column)
    ]
    wanted: Any = [source for source in inputs if _has_gradient(source)]
    if not pairs or not wanted:
        return [[None] * len(inputs) for _ in cotangents]
    roots, seeds = zip(*pairs, strict=True)
    grads = iter(torch.autograd.grad(roots, wanted, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True))
    columns: list[Sequence[Tensor | None]] = []
    for source in inputs:
        grad = next(grads) if _has_gradient(source) else None
        columns.append([None] * len(cotangents) if grad is None else grad.unbind(0))
    return [
        [row if row is None or is_dense(row) else row.contiguous() for row in rows]
        for rows in zip(*columns, strict=True)
    ]


def identity_rows(outputs: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield for each entry of the outputs the output and the cotangent that selects the entry."""
    for output in outputs:
        for entry in range(output.numel()):
            cotangent = torch.zeros_like(output, memory_format=torch.contiguous_format)
            cotangent.view(-1)[entry] = 1
            yield [output], [cotangent]


def _empty(like: Tensor, num_rows: int) -> Tensor:
    """Return ``num_rows`` rows of the shape and, where it is dense, the memory layout of ``like``."""
    shape = (num_rows, *like.shape)
    if like.is_contiguous() or not is_dense(like):
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    strides = (max(like.numel(), 1), *like.stride())
    return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)


def jacobians(
    rows: Iterable[tuple[Sequence[Tensor], Cotangents]],
    num_rows: int,
    inputs: Sequence[Tensor],
    retain: bool,
    extras: Sequence[Sequence[Tensor]] = (),
    on_extra: Callable[[Sequence[Tensor], list[Tensor | None]], None] | None = None,
) -> list[Tensor]:
    """Return one (m, ...) Jacobian per input, with one VJP per row; a sparse one where all rows are.

    Each dense row is copied to its place before the next one is computed, so that no second copy of the Jacobian
    exists.

    Args:
        rows: The outputs and cotangents of each row.
        num_rows: Their number m.
        inputs: What to differentiate with respect to; zeros where a row does not depend on an input.
        retain: Keep the graph after the last row.
        extras: For each row further tensors to differentiate with respect to, in the same backward pass.
        on_extra: Called with them and their gradients for each row.
    """
    jacs: list[Tensor | None] = [None] * len(inputs)
    sparse: list[list[Tensor | None]] = [[] for _ in inputs]
    for number, (outputs, cotangents) in enumerate(rows):
        extra = extras[number] if extras else ()
        grads = vjp(outputs, cotangents, [*inputs, *extra], retain=retain or number + 1 < num_rows)
        if on_extra is not None:
            on_extra(extra, grads[len(inputs) :])
        found = []
        for k, grad in enumerate(grads[: len(inputs)]):
            known = jacs[k]
            if known is None and grad is not None and not grad.is_sparse:
                known = jacs[k] = _started(inputs[k], num_rows, sparse[k])
            if known is None:
                sparse[k].append(grad)
            elif grad is None:
                known[number].zero_()
            elif grad.is_sparse:
                known[number].copy_(grad.to_dense())
            else:
                found.append((known[number], grad))
        if found:
            torch._foreach_copy_([place for place, _ in found], [grad for _, grad in found])
        # So that the next row's gradients can reuse the memory.
        del grads, grad, found
    return [
        known if known is not None else _stacked(of_input, source)
        for known, of_input, source in zip(jacs, sparse, inputs, strict=True)
    ]


def _started(like: Tensor, num_rows: int, before: Sequence[Tensor | None]) -> Tensor:
    """Return memory for the rows of a Jacobian, of which the first are filled."""
    jac = _empty(like, num_rows)
    for number, grad in enumerate(before):
        jac[number] = 0 if grad is None else grad.to_dense()
    return jac


def _stacked(rows: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Return the Jacobian (m, ...) of sparse rows, of zeros if there is none."""
    known = next((row for row in rows if row is not None), None)
    if known is None:
        return _empty(like, len(rows)).zero_()
    nothing = torch.zeros_like(known)
    return torch.stack([nothing if row is None else row for row in rows])


def batched_jacobians(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor], chunk: int, retain: bool
) -> list[Tensor]:
    """Return one (m, ...) Jacobian per input, by batched VJPs of ``chunk`` rows; ``chunk`` 1 needs no batching rules.

    ``cotangents`` holds m rows (m, ...) per output; ``retain`` keeps the graph after the last row.
    """
    num_rows = len(cotangents[0])
    if chunk == 1 or num_rows == 1:
        rows = ((outputs, [cotangent[t] for cotangent in cotangents]) for t in range(num_rows))
        return jacobians(rows, num_rows, inputs, retain)
    parts = []
    for start in range(0, num_rows, chunk):
        chunk_rows = [cotangent[start : start + chunk] for cotangent in cotangents]
        grads = torch.autograd.grad(
            outputs,
            inputs,
            chunk_rows,
            retain_graph=retain or start + chunk < num_rows,
            allow_unused=True,
            is_grads_batched=True,
        )
        parts.append(
            [
                source.new_zeros((len(chunk_rows[0]), *source.shape)) if grad is None else grad
                for grad, source in zip(grads, inputs, strict=True)
            ]
        )
    if len(parts) == 1:
        return [part if is_dense(part) else part.contiguous() for part in parts[0]]
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
