"""Parameters whose use the autograd graph does not show, as inside ``checkpoint(use_reentrant=True)``.

A function written in Python may run a backward pass of its own inside its backward. The gradients of the parameters it
uses go to ``.grad`` then, and ``torch.autograd.grad``, which follows the graph to what it is asked for, finds none.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from fastmtl.engine.gradients import agree
from fastmtl.engine.graph import graph_nodes
from fastmtl.engine.vjp import Cotangents, vjp
from fastmtl.errors import UsageError

__all__ = ["VJP", "may_hide", "refuse_hidden", "vjp_that_reaches_all"]

VJP: TypeAlias = Callable[[Sequence[Tensor], Cotangents, Sequence[Tensor | GradientEdge], bool], list[Tensor | None]]

# Functions of these packages take all that they use as inputs.
_OPEN = ("torch.distributed", "torch._functorch", "torch._dynamo", "torch.nn", "fastmtl")


def may_hide(tensors: Sequence[Tensor]) -> bool:
    """Return whether the graph of some tensors has functions that may use parameters unseen."""
    return any(_is_closed(node) for node in _nodes(tensors))


def vjp_that_reaches_all(losses: Sequence[Tensor], params: Sequence[Tensor]) -> VJP | None:
    """Return a VJP that reaches all parameters, by ``backward``; None if ``vjp`` does. The graph is gone then.

    Args:
        losses: Scalars.
        params: All trainable parameters; their ``.grad`` stays as it is.

    Raises:
        UsageError: ``backward`` is needed, and cannot run more than once.
    """
    ones: list[Tensor | None] = [None] * len(losses)
    by_backward = partial(_backward_vjp, params)
    shown = _shown(losses, ones, params)
    complete = by_backward(losses, ones, params, True)
    if shown is not None and agree(shown, complete):
        return None
    try:
        again = by_backward(losses, ones, params, False)
    except Exception as cause:
        raise UsageError(_ONCE) from cause
    if not agree(again, complete):
        raise UsageError(_ONCE)
    return by_backward


_ONCE = (
    "A function of the network runs backward passes of its own, and only once for each forward pass, so that it has no "
    "gradient for each task: use one that takes its parameters as inputs (checkpoint with use_reentrant=False), or a "
    "weighting with one backward pass, such as EW."
)


def refuse_hidden(
    outputs: Sequence[Tensor], params: Sequence[Tensor] | None, name: str, excluded: Sequence[Tensor] = ()
) -> None:
    """Refuse a reentrant checkpoint that ``torch.autograd.grad`` cannot see through; warn of what else may hide.

    Args:
        outputs: What will be differentiated.
        params: What with respect to; the leaves of the graph if None.
        name: What the parameters are called.
        excluded: Tensors at which the way down ends.

    Raises:
        UsageError: A checkpoint uses parameters that are differentiated with respect to, or may do so.
    """
    nodes = _nodes(outputs, excluded)
    closed = [node for node in nodes if _is_closed(node)]
    if not closed:
        return
    reached = _variables(nodes)
    wanted = [] if params is None else [param for param in params if param.is_leaf and param.requires_grad]
    missing = [param for param in wanted if param not in reached]
    checkpoints = [node for node in closed if _is_checkpoint(node)]
    if checkpoints and (params is None or missing or not _variables(graph_nodes(checkpoints)).isdisjoint(wanted)):
        raise UsageError(
            "checkpoint(use_reentrant=True) hides the parameters it uses from torch.autograd.grad, so that they would "
            "have no gradient: use_reentrant must be False."
        )
    if missing and not checkpoints:
        functions = ", ".join(sorted({type(node)._forward_cls.__name__ for node in closed}))
        warnings.warn(
            f"The graph does not reach a tensor of {name}, of shape {tuple(missing[0].shape)}, which gets no gradient; "
            f"if {functions} uses it, let it be one of its inputs.",
            stacklevel=3,
        )


def _nodes(tensors: Sequence[Tensor], excluded: Sequence[Tensor] = ()) -> list[Any]:
    roots, ends = ([tensor.grad_fn for tensor in each if tensor.grad_fn is not None] for each in (tensors, excluded))
    return list(graph_nodes(roots, ends))


def _variables(nodes: Iterable[Any]) -> set[Tensor]:
    return {node.variable for node in nodes if hasattr(node, "variable")}


def _is_closed(node: Any) -> bool:
    if not isinstance(node, BackwardCFunction):
        return False
    module = getattr(getattr(type(node), "_forward_cls", None), "__module__", "")
    return not any(module == package or module.startswith(package + ".") for package in _OPEN)


def _is_checkpoint(node: Any) -> bool:
    return getattr(type(node), "_forward_cls", None) is torch.utils.checkpoint.CheckpointFunction


def _shown(losses: Sequence[Tensor], seeds: Cotangents, params: Sequence[Tensor]) -> list[Tensor | None] | None:
    """Return what ``vjp`` finds, None where a function refuses it."""
    try:
        return vjp(losses, seeds, params, True)
    except RuntimeError as cause:
        if "use_reentrant" not in str(cause):
            raise
        return None


def _backward_vjp(
    params: Sequence[Tensor],
    outputs: Sequence[Tensor],
    cotangents: Cotangents,
    inputs: Sequence[Tensor | GradientEdge],
    retain: bool,
) -> list[Tensor | None]:
    """Do what ``vjp`` does by ``backward``; ``.grad`` of ``params`` and of the inputs, leaves, stays as it is."""
    pairs = [
        (output, seed)
        for output, seed in zip(outputs, cotangents, strict=True)
        if output.requires_grad and (seed is not None or not output.dim())
    ]
    if not pairs:
        return [None] * len(inputs)
    tensors = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
    leaves = list(dict.fromkeys([*params, *tensors]))
    before = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        torch.autograd.backward([output for output, _ in pairs], [seed for _, seed in pairs], retain_graph=retain)
        return [leaf.grad for leaf in tensors]
    finally:
        for leaf, grad in zip(leaves, before, strict=True):
            leaf.grad = grad
