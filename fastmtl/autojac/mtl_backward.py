"""Gradients for the task heads, a Jacobian for the shared network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl.autojac.checks import as_list, check_chunk, check_lengths, check_outputs, check_shapes, unique
from fastmtl.autojac.fields import add_jacobians, check_writable
from fastmtl.autojac.jac import chunk_for
from fastmtl.autojac.jac_to_grad import jac_to_grad
from fastmtl.engine.gradients import add_grads
from fastmtl.engine.graph import Node, check_graphs, reach, root_nodes
from fastmtl.engine.hidden import closed_nodes, refuse_hidden, refusing_inner_backward
from fastmtl.engine.vjp import Cotangents, batched_jacobians, jacobians, vjp, without_losses
from fastmtl.errors import UsageError

if TYPE_CHECKING:
    from fastmtl.aggregation import Aggregator

__all__ = ["mtl_backward"]


def mtl_backward(
    tensors: Sequence[Tensor] | None = None,
    /,
    features: Sequence[Tensor] | Tensor | None = None,
    aggregator: Aggregator | None = None,
    tasks_params: Sequence[Iterable[Tensor]] | None = None,
    shared_params: Iterable[Tensor] | None = None,
    retain_graph: bool = False,
    parallel_chunk_size: int | None = None,
    *,
    grad_tensors: Sequence[Tensor] | None = None,
    losses: Sequence[Tensor] | None = None,
) -> None:
    """Add each task's gradient to ``.grad`` of its own parameters, and all tasks' to ``.jac`` of the shared ones.

    Each loss is differentiated down to its own parameters and the features; then follows one VJP per task through the
    shared network.

    Args:
        tensors: The T losses.
        features: The output of the shared network that the heads read, one tensor or several.
        aggregator: Turns the shared Jacobians into ``.grad`` at once, as TorchJD's ``mtl_backward`` did before 0.9.
        tasks_params: For each task its own parameters; if None, the leaves its loss depends on other than through the
            features. Gradients of parameters of several tasks are added.
        shared_params: The parameters of the shared network; the leaves the features depend on if None.
        retain_graph: Keep the graph for another backward pass.
        parallel_chunk_size: Tasks per backward pass through the shared network; see :func:`fastmtl.autojac.jac`.
        grad_tensors: The cotangent of each tensor, for ``tensors`` that are no scalars.
        losses: The name of ``tensors`` in TorchJD before 0.9.

    Raises:
        UsageError: No losses or features, one repeated or without a graph, ``tasks_params`` or ``grad_tensors`` of
            another length than the losses, a parameter both shared and task-specific, or a reentrant checkpoint.

    Example:
        >>> shared = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> heads = [torch.tensor(weight, requires_grad=True) for weight in (3.0, -1.0)]
        >>> features = shared**2
        >>> mtl_backward([(head * features).sum() for head in heads], features=features)
        >>> shared.jac, heads[0].grad
        (tensor([[ 6., 12.],
                [-2., -4.]]), tensor(5.))
    """
    check_chunk(parallel_chunk_size)
    tasks, cuts = _outputs(tensors, losses, features, grad_tensors)
    shared, by_task, closed = _parameters(tasks, cuts, shared_params, tasks_params)
    with refusing_inner_backward(closed):
        cotangents = _through_heads(tasks, cuts, by_task, grad_tensors, retain_graph)
        jacs = _through(cuts, cotangents, shared, retain_graph, parallel_chunk_size)
    add_jacobians(shared, jacs)
    if aggregator is not None and shared:
        jac_to_grad(shared, aggregator)


def _outputs(
    tensors: Sequence[Tensor] | None,
    losses: Sequence[Tensor] | None,
    features: Sequence[Tensor] | Tensor | None,
    grad_tensors: Sequence[Tensor] | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return losses and features."""
    outputs = losses if tensors is None else tensors
    if outputs is None or (tensors is not None and losses is not None):
        raise UsageError("losses must be passed either as the first argument or as losses=.")
    if features is None:
        raise UsageError("features must be the output of the shared network, got None.")
    tasks, cuts = as_list(outputs), as_list(features)
    check_outputs(tasks, "tensors")
    check_outputs(cuts, "features")
    if grad_tensors is not None:
        check_shapes(grad_tensors, tasks, "grad_tensors", "tensors", rows=False)
    elif any(task.dim() for task in tasks):
        raise UsageError("grad_tensors must be given for tensors that are not scalars.")
    return tasks, cuts


def _parameters(
    tasks: list[Tensor],
    features: list[Tensor],
    shared_params: Iterable[Tensor] | None,
    tasks_params: Sequence[Iterable[Tensor]] | None,
) -> tuple[list[Tensor], list[list[Tensor]], list[Node]]:
    """Return the shared parameters, those of each task, and the functions that may hide some."""
    if shared_params is None or tasks_params is None:
        check_graphs(features, "features")
    if tasks_params is None:
        check_graphs(tasks, "tensors")
    trunk, heads = reach(root_nodes(features)), reach(root_nodes(tasks), root_nodes(features))
    shared = list(trunk.leaves) if shared_params is None else unique(shared_params)
    if tasks_params is None:
        by_task = heads.by_output(len(tasks))
    else:
        check_lengths(tasks_params, tasks, "tasks_params", "tensors")
        by_task = [unique(params) for params in tasks_params]
    every = [param for params in by_task for param in params]
    common = set(shared).intersection(every)
    if common:
        raise UsageError(f"tasks_params must hold no parameter of shared_params, got {len(common)} in both.")
    check_writable(shared, ".jac")
    check_writable(every, ".grad")
    below, above = closed_nodes(trunk.nodes), closed_nodes(heads.nodes)
    refuse_hidden(below, trunk, None if shared_params is None else shared, "shared_params")
    refuse_hidden(above, heads, None if tasks_params is None else every, "tasks_params")
    return shared, by_task, [*below, *above]


def _through_heads(
    tasks: list[Tensor],
    features: list[Tensor],
    by_task: list[list[Tensor]],
    grad_tensors: Sequence[Tensor] | None,
    retain: bool,
) -> list[Cotangents]:
    """Add to ``.grad`` of the task-specific parameters and return the features' cotangents, task by task."""
    cotangents: list[Cotangents] = []
    for index, (task, params) in enumerate(zip(tasks, by_task, strict=True)):
        start = None if grad_tensors is None else grad_tensors[index]
        grads = vjp([task], [start], [*params, *features], retain=retain)
        add_grads(params, grads[: len(params)])
        cotangents.append(grads[len(params) :])
    return cotangents


def _through(
    features: list[Tensor], cotangents: list[Cotangents], shared: list[Tensor], retain: bool, chunk: int | None
) -> list[Tensor]:
    """Return the Jacobians of the shared parameters, one VJP per task."""
    if not shared:
        return []
    count = len(cotangents)
    if chunk is None:
        chunk = chunk_for(features, shared, count)
    if chunk == 1:
        rows = [without_losses(features, row) for row in cotangents]
        return jacobians(((features, row) for row in rows), count, shared, retain)
    stacked = [
        torch.stack([torch.zeros_like(feature) if cotangent is None else cotangent for cotangent in column])
        for feature, column in zip(features, zip(*cotangents, strict=True), strict=True)
    ]
    return batched_jacobians(features, stacked, shared, chunk, retain)
