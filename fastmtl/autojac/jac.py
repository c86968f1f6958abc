"""Jacobians as return values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastmtl.autojac.checks import as_list, check_chunk, check_outputs, check_rows, check_shapes, unique
from fastmtl.engine.graph import batches_well, reach, root_nodes
from fastmtl.engine.hidden import closed_nodes, refuse_hidden, refusing_inner_backward
from fastmtl.engine.vjp import batched_jacobians, identity_rows, jacobians
from fastmtl.errors import UsageError

__all__ = ["chunk_for", "jac", "jacobians_of", "showing_all"]

# With fewer rows batching costs more than separate backward passes; with longer rows the arithmetic dominates, and the
# number of calls does not matter.
_MANY_ROWS = 8
_LONG_ROW = 2**18


def jac(
    outputs: Sequence[Tensor] | Tensor,
    inputs: Iterable[Tensor] | Tensor,
    *,
    jac_outputs: Sequence[Tensor] | Tensor | None = None,
    retain_graph: bool = False,
    parallel_chunk_size: int | None = None,
) -> tuple[Tensor, ...]:
    """Return the Jacobians of ``outputs`` with respect to ``inputs``, multiplied from the left by ``jac_outputs``.

    Args:
        outputs: What to differentiate, at least one tensor.
        inputs: What to differentiate with respect to; they require grad.
        jac_outputs: For each output its cotangents (m, ...); the identity if None: one row per entry of the outputs.
        retain_graph: Keep the graph for another backward pass.
        parallel_chunk_size: Rows per backward pass; above 1 all operators need batching rules. If None, all rows at
            once where there are many short rows and all operators gain from it, otherwise 1.

    Returns:
        One (m, ...) tensor per input; zeros where no output depends on it.

    Raises:
        UsageError: No outputs, a repeated one, an input that does not require grad, cotangents that do not fit, an
            empty chunk, or a reentrant checkpoint.

    Example:
        >>> param = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> jac([param @ torch.tensor([-1.0, 1.0]), (param**2).sum()], param)
        (tensor([[-1.,  1.],
                [ 2.,  4.]]),)
    """
    repeated = as_list(inputs)
    wanted = unique(repeated)
    for index, source in enumerate(repeated):
        if not source.requires_grad:
            raise UsageError(f"inputs[{index}] must require grad, got a tensor that does not.")
    tensors = as_list(outputs)
    with showing_all(tensors, wanted, "inputs"):
        jacs = jacobians_of(tensors, wanted, jac_outputs, "outputs", retain_graph, parallel_chunk_size)
    by_input = dict(zip(wanted, jacs, strict=True))
    return tuple(by_input[source] for source in repeated)


@contextmanager
def showing_all(outputs: Sequence[Tensor], inputs: Sequence[Tensor], name: str) -> Iterator[None]:
    """Refuse graphs that may hide the use of ``inputs``, before VJPs in the block and while they run."""
    reached = reach(root_nodes(outputs))
    closed = closed_nodes(reached.nodes)
    refuse_hidden(closed, reached, list(inputs), name)
    with refusing_inner_backward(closed):
        yield


def jacobians_of(
    outputs: list[Tensor],
    inputs: list[Tensor],
    cotangents: Sequence[Tensor] | Tensor | None,
    name: str,
    retain: bool,
    chunk: int | None,
) -> list[Tensor]:
    """Return one Jacobian per distinct input, for :func:`jac` and ``backward``.

    For messages, ``name`` is the caller's name of ``outputs``, and ``jac_<name>`` that of ``cotangents``.
    """
    check_chunk(chunk)
    check_outputs(outputs, name)
    rows = None if cotangents is None else as_list(cotangents)
    if rows is not None:
        check_shapes(rows, outputs, f"jac_{name}", name, rows=True)
        check_rows(rows, f"jac_{name}")
    if not inputs:
        return []
    count = sum(tensor.numel() for tensor in outputs) if rows is None else len(rows[0])
    if not count:
        return [tensor.new_zeros((0, *tensor.shape)) for tensor in inputs]
    if chunk is None:
        chunk = chunk_for(outputs, inputs, count)
    if rows is None and chunk == 1:
        return jacobians(identity_rows(outputs), count, inputs, retain)
    return batched_jacobians(outputs, rows or _identity(outputs, count), inputs, chunk, retain)


def chunk_for(outputs: Sequence[Tensor], inputs: Sequence[Tensor], count: int) -> int:
    """Return how many of ``count`` rows one backward pass should compute."""
    gains = count >= _MANY_ROWS and sum(tensor.numel() for tensor in inputs) <= _LONG_ROW and batches_well(outputs)
    return count if gains else 1


def _identity(outputs: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return for each output the cotangents (count, ...) of which each row selects one entry of the outputs."""
    cotangents, start = [], 0
    for output in outputs:
        rows = torch.zeros(count, output.numel(), dtype=output.dtype, device=output.device)
        rows[start : start + output.numel()].fill_diagonal_(1)
        cotangents.append(rows.view(count, *output.shape))
        start += output.numel()
    return cotangents
