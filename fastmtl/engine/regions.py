"""The functions of a step that are compiled, each on its own."""

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
    """The functions of a `Problem`, each compiled on its own if asked for.

    The network is cut where its graph forks: a compiled backward pass computes all its gradients at once, so one
    graph for trunk and heads would run every head once per task. Only a graph that holds the backward passes itself
    needs no cut.

    Args:
        problem: The functions.
        compiled: Compile them with torch.compile.
        tell: Told when the compilation of a region begins and ends, and what goes another way than asked for.
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

    def __init__(self, problem: Problem, compiled: bool, tell: Callable[[str], None]) -> None:
        self.problem = problem
        self.compiled = compiled
        self.tell = tell
        if compiled:
            configure_backwards()
            allow_graphs(4 * max(len(problem.tasks), _MOST_SETS + 1))
        for name in _NAMES:
            function = getattr(problem, name)
            setattr(self, name, _Region(name, function, tell) if compiled else function)

    def used(self) -> list[_Region]:
        """Return the regions that were compiled."""
        return [region for region in vars(self).values() if isinstance(region, _Region) and any(region.first.values())]

    def with_trunk(self, trunk: Callable[..., Any]) -> Regions:
        """Return these regions with another trunk; what is compiled is compiled once for both."""
        other = copy.copy(self)
        other.trunk = trunk
        return other

    def with_gradients(self, gradients: Callable[..., Any]) -> Regions:
        """Return these regions and one more: the forward pass and all VJPs as a method of inputs and labels."""
        other = copy.copy(self)
        other.gradients = _Traced("network and losses", gradients, self.tell)
        return other


class _Region:
    """A function of a problem compiled at its first call, with a count of its graphs.

    A batch with labels of some of the tasks may need graphs of its own. After `_MOST_SETS` sets of tasks that did,
    others run eagerly: there may be as many sets as steps.

    Attributes:
        graphs: Compiled so far.
        first: Those of the first call; of each task's where each is a graph of its own.
        sets: The sets of tasks seen, and whether a graph was compiled for them.
    """

    fullgraph = False

    def __init__(self, name: str, function: Callable[..., Any], tell: Callable[[str], None]) -> None:
        self.name = name
        self.plain = function
        self.tell = tell
        self.graphs = 0
        self.first: dict[str | None, int] = {}
        self.sets: dict[tuple[str, ...], bool] = {}
        self._told = False
        self.function = torch.compile(_with_code_of_its_own(function), backend=self._backend, fullgraph=self.fullgraph)

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return compile_graph(graph, inputs)

    def __call__(self, *args: Any) -> Any:
        # With inputs of its own, each task is a graph of its own; the task's name is the last argument then.
        task = args[-1] if isinstance(args[-1], str) else None
        tasks = (task,) if task is not None else _labelled(args)
        if tasks not in self.sets and sum(self.sets.values()) > _MOST_SETS and task is None:
            if not self._told:
                self._told = True
                self.tell(f"{self.name}: compiled for {_MOST_SETS + 1} sets of tasks, eager for further ones")
            return self.plain(*args)
        what = self.name if task is None else f"{self.name} of {task}"
        first = task not in self.first
        if first:
            self.tell(f"compiling {what}")
        start, before = time.perf_counter(), self.graphs
        result = self._run(*args)
        compiled = self.graphs - before
        self.sets.setdefault(tasks, compiled > 0)
        if first:
            self.first[task] = compiled
        if first or compiled:
            again = "" if first else " again, for other shapes or tasks,"
            self.tell(f"compiled {what}{again} in {time.perf_counter() - start:.1f} s")
        return result

    def _run(self, *args: Any) -> Any:
        return self.function(*args)


class _Traced(_Region):
    """A region with its backward passes: one graph, or none."""

    fullgraph = True

    def _run(self, *args: Any) -> Any:
        import torch._dynamo.config as dynamo_config

        # Not for good: code of the user's may count on torch's default.
        before = dynamo_config.trace_autograd_ops
        dynamo_config.trace_autograd_ops = True
        try:
            return self.function(*args)
        finally:
            dynamo_config.trace_autograd_ops = before


def _with_code_of_its_own(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a bound method with a copy of its code: torch counts the graphs of all trainers that share one."""
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
    """Return the tasks of a call, its last argument, without those that have labels in other batches only."""
    # A trunk has inputs only.
    tasks = args[-1] if len(args) > 1 else ()
    labels = args[-2] if len(args) > 2 else {}
    return tuple(task for task in tasks if labels.get(task, task) is not None)
