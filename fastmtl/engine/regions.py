"""The functions of a step, each compiled separately."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch

from fastmtl.engine.inductor import allow_graphs, compile_graph, configure_backwards
from fastmtl.engine.losses import Problem
from fastmtl.engine.model import Tasks

__all__ = ["Regions"]

_MOST_SETS = 8
_NAMES = ("trunk", "heads", "reps", "decode", "whole", "single", "single_rep", "single_decode")


class Regions:
    """The functions of a `Problem`, each compiled separately if ``compiled``.

    Trunk and heads are separate regions: a compiled backward pass computes all its gradients at once, so a single
    region would run every head once per task. Only a graph that contains the backward passes needs no cut.

    ``report`` is called with messages about compilations, and about requests that cannot be met.
    """

    trunk: Callable[..., Any]
    heads: Callable[..., Any]
    reps: Callable[..., Any]
    decode: Callable[..., Any]
    whole: Callable[..., Any]
    single: Callable[..., Any]
    single_rep: Callable[..., Any]
    single_decode: Callable[..., Any]
    gradients: Callable[..., Any]

    def __init__(self, problem: Problem, compiled: bool, report: Callable[[str], None]) -> None:
        self.problem = problem
        self.compiled = compiled
        self.report = report
        if compiled:
            configure_backwards()
            allow_graphs(4 * max(len(problem.tasks), _MOST_SETS + 1))
        for name in _NAMES:
            function = getattr(problem, name)
            setattr(self, name, _Region(name, function, report) if compiled else function)

    def used(self) -> list[_Region]:
        """Return the regions that have compiled something."""
        return [region for region in vars(self).values() if isinstance(region, _Region) and any(region.first.values())]

    def with_trunk(self, trunk: Callable[..., Any]) -> Regions:
        """Return these regions with another trunk; both share all other compiled functions."""
        other = copy.copy(self)
        other.trunk = trunk
        return other

    def with_gradients(self, gradients: Callable[..., Any]) -> Regions:
        """Return these regions and a further one, ``gradients``: the forward pass and all VJPs."""
        other = copy.copy(self)
        other.gradients = _Traced("network and losses", gradients, self.report)
        return other


class _Region:
    """A function of a problem compiled at its first call, with a count of its graphs.

    Each set of tasks with labels may need its own graph. After `_MOST_SETS` sets that did, further ones run eagerly, as
    there may be as many as steps.

    Attributes:
        graphs: Number of graphs compiled so far.
        first: Number of graphs compiled by the first call, by task for functions of one task.
        sets: The sets of tasks seen, and whether a graph was compiled for them.
    """

    fullgraph = False

    def __init__(self, name: str, function: Callable[..., Any], report: Callable[[str], None]) -> None:
        self.name = name
        self.plain = function
        self.report = report
        self.graphs = 0
        self.first: dict[str | None, int] = {}
        self.sets: dict[tuple[str, ...], bool] = {}
        self._reported = False
        self.function = torch.compile(_with_copied_code(function), backend=self._backend, fullgraph=self.fullgraph)

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return compile_graph(graph, inputs)

    def __call__(self, *args: Any) -> Any:
        # The last argument is a task's name in functions of one task, each of which is a separate graph.
        task = args[-1] if isinstance(args[-1], str) else None
        tasks = (task,) if task is not None else _labelled(args)
        if tasks not in self.sets and sum(self.sets.values()) > _MOST_SETS and task is None:
            if not self._reported:
                self._reported = True
                self.report(f"{self.name}: compiled for {_MOST_SETS + 1} sets of tasks, eager for further ones")
            return self.plain(*args)
        what = self.name if task is None else f"{self.name} of {task}"
        first = task not in self.first
        if first:
            self.report(f"compiling {what}")
        start, before = time.perf_counter(), self.graphs
        result = self._run(*args)
        compiled = self.graphs - before
        self.sets.setdefault(tasks, compiled > 0)
        if first:
            self.first[task] = compiled
        if first or compiled:
            again = "" if first else " again, for other shapes or tasks,"
            self.report(f"compiled {what}{again} in {time.perf_counter() - start:.1f} s")
        return result

    def _run(self, *args: Any) -> Any:
        """Call the compiled function; a network's own derivatives, as those of its inputs, are traced with it."""
        import torch._dynamo.config as dynamo_config

        # Restored afterwards: the user's code may rely on torch's default.
        before = dynamo_config.trace_autograd_ops
        dynamo_config.trace_autograd_ops = True
        try:
            return self.function(*args)
        finally:
            dynamo_config.trace_autograd_ops = before


class _Traced(_Region):
    """A region with its backward passes, as exactly one graph."""

    fullgraph = True


def _with_copied_code(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a bound method with a copied code object, as torch limits the number of graphs per code object."""
    assert isinstance(method, MethodType)
    function: Any = method.__func__
    copied = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return MethodType(copied, method.__self__)


def _labelled(args: Sequence[Any]) -> Tasks:
    """Return the tasks of a call, its last argument, without those whose labels are None."""
    # The trunk's only argument are the inputs.
    tasks = args[-1] if len(args) > 1 else ()
    labels = args[-2] if len(args) > 2 else {}
    return tuple(task for task in tasks if labels.get(task, task) is not None)
