"""Parameters whose use the autograd graph does not show, as inside ``checkpoint(use_reentrant=True)``.

An autograd function may run an inner backward pass in its backward. The gradients of the parameters it uses are then
accumulated in ``.grad``, and ``torch.autograd.grad``, which follows the outer graph, does not return them.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from fastmtl.engine.gradients import agree
from fastmtl.engine.graph import Node, Reached, graph_nodes, reach, reached_leaves, root_nodes
from fastmtl.engine.side_effects import preserving_rng_state
from fastmtl.engine.vjp import Cotangents, seeded, vjp
from fastmtl.errors import UsageError

__all__ = [
    "VJP",
    "closed_nodes",
    "may_hide",
    "refuse_hidden",
    "refusing_inner_backward",
    "vjp_that_reaches_all",
]

VJP: TypeAlias = Callable[[Sequence[Tensor], Cotangents, Sequence[Tensor | GradientEdge], bool], list[Tensor | None]]

# The original, as the watchers below replace it.
_BACKWARD = torch.autograd.backward
# Functions of these packages have all that they use among their inputs.
_OPEN = ("torch.distributed", "torch._functorch", "torch._dynamo", "torch.nn", "fastmtl")


def may_hide(tensors: Sequence[Tensor]) -> bool:
    """Return whether the graph has functions that may use parameters it does not show."""
    return bool(closed_nodes(graph_nodes(root_nodes(tensors))))


def closed_nodes(nodes: Iterable[Node]) -> list[Node]:
    """Return the functions that may use parameters which the graph does not show."""
    return [node for node in nodes if isinstance(node, BackwardCFunction) and _is_closed(node)]


def vjp_that_reaches_all(losses: Sequence[Tensor], params: Sequence[Tensor], device: torch.device) -> tuple[bool, VJP]:
    """Return whether ``vjp`` misses gradients, and a VJP by ``backward`` that misses none; frees the graph.

    ``losses`` are scalars; ``params`` are all trainable parameters, whose ``.grad`` is unchanged.

    Raises:
        UsageError: ``backward`` is needed, but cannot run more than once.
    """
    by_backward = partial(_backward_vjp, params)
    seeds: list[Tensor | None] = [None] * len(losses)
    reached = reached_leaves(losses)
    calls: list[None] = []

    def complete(retain: bool) -> list[Tensor | None]:
        # Functions that run the network again may draw random numbers.
        with preserving_rng_state(device):
            return by_backward(losses, seeds, params, retain)

    with _grads_set_aside(params):
        with _watching_backward(lambda: calls.append(None)):
            grads = complete(True)
        unseen = any(grad is not None and param not in reached for param, grad in zip(params, grads, strict=True))
        if not calls and not unseen and agree(vjp(losses, seeds, params, True), grads):
            return False, by_backward
        try:
            second = complete(False)
        except Exception as cause:
            raise UsageError(_ONCE) from cause
    if not agree(second, grads):
        raise UsageError(_ONCE)
    return True, by_backward


_ONCE = (
    "A function of the network runs backward passes of its own, and only once per forward pass, so that the "
    "tasks' gradients cannot be computed one by one: use a function that takes its parameters as inputs (checkpoint "
    "with use_reentrant=False), or a weighting with one backward pass, such as EW."
)
_INNER = (
    "A function of the graph runs a backward pass of its own, whose gradients torch.autograd.grad does not return: "
    "pass it the parameters it uses as inputs (checkpoint with use_reentrant=False)."
)


@contextmanager
def refusing_inner_backward(closed: Sequence[Node]) -> Iterator[None]:
    """Raise a UsageError when one of these functions starts a backward pass of its own in the block."""

    def refuse() -> None:
        raise UsageError(_INNER)

    if closed:
        with _watching_backward(refuse):
            yield
    else:
        yield


@contextmanager
def _watching_backward(on_call: Callable[[], None]) -> Iterator[None]:
    """Call ``on_call`` before each ``backward`` in the block, by this thread or those of autograd."""
    caller = threading.current_thread()

    def watched(*args: Any, **kwargs: Any) -> None:
        thread = threading.current_thread()
        # Threads not created in Python are autograd's.
        if thread is caller or type(thread) is not threading.Thread:
            on_call()
        _BACKWARD(*args, **kwargs)

    autograd: Any = torch.autograd
    before, autograd.backward = autograd.backward, watched
    try:
        yield
    finally:
        autograd.backward = before


@contextmanager
def _grads_set_aside(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Set ``.grad`` to None in the block, and restore it afterwards."""
    before = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, grad in zip(leaves, before, strict=True):
            leaf.grad = grad


def refuse_hidden(closed: Sequence[Node], reached: Reached, params: Sequence[Tensor] | None, name: str) -> None:
    """Refuse reentrant checkpoints that hide parameters; warn of other functions that may.

    Args:
        closed: The :func:`closed_nodes` of the graph.
        reached: The graph that is to be differentiated.
        params: With respect to what, the argument ``name``; to all leaves if None.
        name: The name of an argument, for the warning.

    Raises:
        UsageError: A checkpoint uses some of the parameters, or may.
    """
    if not closed:
        return
    wanted = [] if params is None else [param for param in params if param.is_leaf and param.requires_grad]
    missing = [param for param in wanted if param not in reached.leaves]
    checkpoints = [node for node in closed if _is_checkpoint(node)]
    if checkpoints and (params is None or missing or not reach(checkpoints).leaves.keys().isdisjoint(wanted)):
        raise UsageError(
            "checkpoint(use_reentrant=True) hides the parameters it uses from torch.autograd.grad, so that they would "
            "get no gradient: use_reentrant must be False."
        )
    if missing and not checkpoints:
        functions = ", ".join(sorted({type(node)._forward_cls.__name__ for node in closed}))
        warnings.warn(
            f"The graph does not reach a tensor of {name}, of shape {tuple(missing[0].shape)}, which gets no gradient; "
            f"if {functions} uses it, pass it as one of its inputs.",
            stacklevel=3,
        )


def _is_closed(node: Node) -> bool:
    module = getattr(getattr(type(node), "_forward_cls", None), "__module__", "")
    return not any(module == package or module.startswith(package + ".") for package in _OPEN)


def _is_checkpoint(node: Node) -> bool:
    return getattr(type(node), "_forward_cls", None) is torch.utils.checkpoint.CheckpointFunction


def _backward_vjp(
    params: Sequence[Tensor],
    outputs: Sequence[Tensor],
    cotangents: Cotangents,
    inputs: Sequence[Tensor | GradientEdge],
    retain: bool,
) -> list[Tensor | None]:
    """Compute ``vjp`` by ``backward``; ``.grad`` of ``params`` and of the inputs, which are leaves, is unchanged."""
    pairs = seeded(outputs, cotangents)
    if not pairs:
        return [None] * len(inputs)
    tensors = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
    with _grads_set_aside(list(dict.fromkeys([*params, *tensors]))):
        _BACKWARD([output for output, _ in pairs], [seed for _, seed in pairs], retain_graph=retain)
        return [leaf.grad for leaf in tensors]
