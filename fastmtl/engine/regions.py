"""The compiled regions of a training step, and the measure of how much of it they are."""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from fastmtl.engine.losses import Problem
from fastmtl.engine.repeated import allow_repeated_backwards

__all__ = [
    "CompileReport",
    "Regions",
    "cpp_compiler",
    "graph_errors",
    "is_compiled",
    "measure_compiled",
    "traces_gradients",
]

_POOLING = (torch.ops.aten.max_pool2d_with_indices.default, torch.ops.aten.max_pool2d_with_indices_backward.default)
# Part of the key of torch's caches: to be renewed with what this module changes about inductor.
_CACHE_KEY = "fastmtl.regions.1"
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
        on_compile: Told when the compilation of a region begins and ends.
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

    def __init__(self, problem: Problem, compiled: bool, on_compile: Callable[[str], None]) -> None:
        self.problem = problem
        self.compiled = compiled
        self.on_compile = on_compile
        if compiled:
            _configure_backwards()
            _allow_graphs(len(problem.tasks))
        for name in _NAMES:
            function = getattr(problem, name)
            setattr(self, name, _Region(name, function, problem, on_compile) if compiled else function)

    def with_trunk(self, trunk: Callable[..., Any]) -> Regions:
        """Return these regions with another trunk; what is compiled is compiled once for both."""
        other = copy.copy(self)
        other.trunk = trunk
        return other

    def with_gradients(self, gradients: Callable[..., Any]) -> Regions:
        """Return these regions and one more: the forward pass and all VJPs as a method of inputs and labels."""
        other = copy.copy(self)
        other.gradients = _Traced("network and losses", gradients, self.problem, self.on_compile)
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

    def __init__(self, name: str, function: Any, problem: Problem, on_compile: Callable[[str], None]) -> None:
        self.name = name
        self.plain = function
        self.problem = problem
        self.on_compile = on_compile
        self.graphs = 0
        self.first: dict[str | None, int] = {}
        self.sets: dict[tuple[str, ...], bool] = {}
        self._told = False
        self.function = torch.compile(_with_code_of_its_own(function), backend=self._backend, fullgraph=self.fullgraph)

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self.graphs += 1
        if not all(map(_on_cpu, inputs)):
            return compile_fx(graph, inputs)
        # Inductor would turn convolutions to channels-last, and copy every weight and gradient to and fro in each pass.
        patches = {"layout_optimization": False, "joint_custom_pre_pass": _masks_anew()}
        with _library_kernels():
            return compile_fx(graph, inputs, config_patches=patches)

    def __call__(self, *args: Any) -> Any:
        # With inputs of its own, each task is a graph of its own; the task's name is the last argument then.
        task = args[-1] if isinstance(args[-1], str) else None
        tasks = (task,) if task is not None else self._labelled(args[-1])
        if tasks not in self.sets and sum(self.sets.values()) > _MOST_SETS and task is None:
            if not self._told:
                self._told = True
                self.on_compile(f"{self.name}: compiled for {_MOST_SETS + 1} sets of tasks, eager for further ones")
            return self.plain(*args)
        what = self.name if task is None else f"{self.name} of {task}"
        first = task not in self.first
        if first:
            self.on_compile(f"compiling {what}")
        start, before = time.perf_counter(), self.graphs
        result = self._run(*args)
        compiled = self.graphs - before
        self.sets.setdefault(tasks, compiled > 0)
        if first:
            self.first[task] = compiled
        if first or compiled:
            again = "" if first else " again, for other shapes or tasks,"
            self.on_compile(f"compiled {what}{again} in {time.perf_counter() - start:.1f} s")
        return result

    def _run(self, *args: Any) -> Any:
        return self.function(*args)

    def _labelled(self, labels: Any) -> tuple[str, ...]:
        """Return the tasks of a call, without those that have labels in other batches of the step only."""
        absent = [task for task, each in labels.items() if each is None] if isinstance(labels, Mapping) else []
        return tuple(task for task in self.problem.tasks if task not in absent)


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


def _with_code_of_its_own(method: Any) -> Any:
    """Return a bound method with a copy of its code: torch counts the graphs of all trainers that share one."""
    function = method.__func__
    copied = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return MethodType(copied, method.__self__)


def _on_cpu(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or value.device.type == "cpu"


def _masks_anew() -> Any:
    """Return a pass over joint graphs that has backward passes compare anew instead of reading a mask of booleans.

    What was compared is kept anyway, for the output of a region or for a product, and nothing in inductor's C++ is as
    slow as reading and writing booleans.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch.utils.checkpoint import CheckpointPolicy

    class MasksAnew(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            for node in graph.find_nodes(op="call_function", target=torch.ops.aten.le.Scalar):
                if all(user.target is torch.ops.aten.where.self for user in node.users):
                    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE

        def uuid(self) -> str:
            return _CACHE_KEY

    return MasksAnew()


@contextlib.contextmanager
def _library_kernels() -> Iterator[None]:
    """Have inductor call the library for batch norm and max pooling; told in its tables, as it knows no setting.

    Inductor's own batch norm saves little time per step and nearly doubles the time the C++ compiler takes; its max
    pooling takes three times as long as the library's. A table of our own as an argument would keep it from its cache.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import fallback_handler, lowerings

    rules = select_decomp_table()
    ours = {op: rule for op, rule in rules.items() if op in _POOLING or "batch_norm" in str(op)}
    called = {*_POOLING, *(op for op in ours if op not in lowerings)}
    calls = {op: fallback_handler(op, add_to_fallback_set=False) for op in called}
    before = {op: lowerings[op] for op in calls if op in lowerings}
    for op in ours:
        del rules[op]
    lowerings.update(calls)
    try:
        yield
    finally:
        rules.update(ours)
        for op in calls:
            del lowerings[op]
        lowerings.update(before)


def _configure_backwards() -> None:
    """Let a compiled backward pass run several times, and compile it when its forward pass is compiled."""
    import torch._functorch.config as functorch_config

    allow_repeated_backwards()
    # Backward graphs are compiled with the forward ones, so that progress is told where time is spent.
    if hasattr(functorch_config, "force_non_lazy_backward_lowering"):
        functorch_config.force_non_lazy_backward_lowering = True


def graph_errors() -> tuple[type[Exception], ...]:
    """Return what torch raises where something cannot be one graph, or not in as many versions as are needed."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return TorchDynamoException, FailOnRecompileLimitHit


def traces_gradients() -> bool:
    """Return whether torch can take gradients inside a graph."""
    import torch._dynamo.config as dynamo_config

    return hasattr(dynamo_config, "trace_autograd_ops")


def cpp_compiler() -> tuple[str | None, str]:
    """Return the compiler torch.compile would call on the CPU, and why there is none."""
    try:
        found = importlib.import_module("torch._inductor.cpp_builder").get_cpp_compiler()
    except Exception as error:
        return None, f"Inductor finds no C++ compiler ({type(error).__name__}); install g++ or set CXX"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return None, f"Python.h is missing in {sysconfig.get_path('include')}; install Python's development files"
    return str(found), ""


def is_compiled(model: nn.Module) -> bool:
    """Return whether a part of a network was compiled: as a module, by its ``compile()``, or by its ``forward``."""
    return any(
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or (
            hasattr(module.forward, "_torchdynamo_orig_callable")
            and not getattr(module.forward, "_torchdynamo_disable", False)
        )
        for module in model.modules()
    )


def _allow_graphs(tasks: int) -> None:
    """Keep torch from going on eagerly, with a warning only, when many tasks, or sets of them, share one function."""
    import torch._dynamo.config as dynamo_config

    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, 4 * tasks, 4 * (_MOST_SETS + 1))


@dataclass(kw_only=True, slots=True)
class CompileReport:
    """How much of a training step ran compiled.

    Attributes:
        share: Time in compiled forward and backward passes divided by the time of the step.
        regions: The compiled regions, by name.
        graph_breaks: Places where a region fell into more than one graph.
        recompiles: Graphs compiled after a region's first call, for other shapes or values.
    """

    share: float
    regions: list[str]
    graph_breaks: int
    recompiles: int

    def __str__(self) -> str:
        return (
            f"compiled {' and '.join(self.regions)} and their gradients: {self.share:.0%} of the step, "
            f"{self.graph_breaks} graph breaks, {self.recompiles} recompiles"
        )


def measure_compiled(step: Callable[[], Any], regions: Regions) -> CompileReport:
    """Run one training step under the profiler and say how much of it was compiled.

    Args:
        step: Runs the step; it has run before, so that its compilations are done.
        regions: The regions it runs.
    """
    # The profiler announces itself on stderr at any lower level.
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler, record_function("fastmtl::step"):
        step()
    compiled = total = 0.0
    for event in profiler.events() or []:
        if event.name == "fastmtl::step":
            total = event.cpu_time_total
        elif event.name == "CompiledFunctionBackward" or event.name.startswith("Torch-Compiled Region"):
            compiled += event.cpu_time_total
    used = [region for region in vars(regions).values() if isinstance(region, _Region) and any(region.first.values())]
    return CompileReport(
        share=compiled / total if total else 0.0,
        regions=[region.name for region in used],
        graph_breaks=sum(sum(region.first.values()) - len(region.first) for region in used),
        recompiles=sum(region.graphs - sum(region.first.values()) for region in used),
    )
