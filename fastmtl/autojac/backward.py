"""Jacobians for the ``.jac`` fields of the tensors that the losses depend on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fastmtl.autojac.checks import as_list, check_chunk, check_outputs, unique
from fastmtl.autojac.fields import add_jacobians, check_writable
from fastmtl.autojac.jac import jacobians_of
from fastmtl.autojac.jac_to_grad import jac_to_grad
from fastmtl.engine.graph import check_graphs, reach, root_nodes
from fastmtl.engine.hidden import closed_nodes, refuse_hidden, refusing_inner_backward

if TYPE_CHECKING:
    from fastmtl.aggregation import Aggregator

__all__ = ["backward"]


def backward(
    tensors: Sequence[Tensor] | Tensor,
    aggregator: Aggregator | None = None,
    inputs: Iterable[Tensor] | None = None,
    retain_graph: bool = False,
    parallel_chunk_size: int | None = None,
    *,
    jac_tensors: Sequence[Tensor] | Tensor | None = None,
) -> None:
    """Add the Jacobians of ``tensors`` to the ``.jac`` fields of ``inputs``.

    Args:
        tensors: What to differentiate, at least one tensor.
        aggregator: Turns the Jacobians into ``.grad`` at once, as TorchJD's ``backward`` did before 0.9.
        inputs: What to differentiate with respect to: leaves that require grad, or tensors that retain their grad. All
            leaves the tensors depend on if None.
        retain_graph: Keep the graph for another backward pass.
        parallel_chunk_size: Rows per backward pass; see :func:`fastmtl.autojac.jac`.
        jac_tensors: For each tensor its cotangents (m, ...), for m rows; the identity if None: one row per entry of
            the tensors.

    Raises:
        UsageError: No tensors, a repeated one, one without a graph, cotangents that do not fit, or a reentrant
            checkpoint.

    Example:
        >>> param = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> backward([param @ torch.tensor([-1.0, 1.0]), (param**2).sum()])
        >>> param.jac
        tensor([[-1.,  1.],
                [ 2.,  4.]])
    """
    check_chunk(parallel_chunk_size)
    outputs = as_list(tensors)
    check_outputs(outputs, "tensors")
    if inputs is None:
        check_graphs(outputs, "tensors")
    reached = reach(root_nodes(outputs))
    wanted = list(reached.leaves) if inputs is None else unique(inputs)
    check_writable(wanted, ".jac")
    closed = closed_nodes(reached.nodes)
    refuse_hidden(closed, reached, None if inputs is None else wanted, "inputs")
    with refusing_inner_backward(closed):
        jacs = jacobians_of(outputs, wanted, jac_tensors, "tensors", retain_graph, parallel_chunk_size)
    add_jacobians(wanted, jacs)
    if aggregator is not None and wanted:
        jac_to_grad(wanted, aggregator)
