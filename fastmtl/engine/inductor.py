"""Settings of torch's compiler for regions, and what it can do on this machine."""

from __future__ import annotations

import contextlib
import importlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastmtl.engine.model import HasModules
from fastmtl.engine.repeated import allow_repeated_backwards

__all__ = [
    "allow_graphs",
    "compile_graph",
    "configure_backwards",
    "cpp_compiler",
    "graph_errors",
    "is_compiled",
    "traces_gradients",
]

_POOLING = (torch.ops.aten.max_pool2d_with_indices.default, torch.ops.aten.max_pool2d_with_indices_backward.default)
# Part of the key of torch's caches; to be changed whenever this module changes inductor's output.
_CACHE_KEY = "fastmtl.regions.1"


def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """Return a graph compiled by inductor."""
    from torch._inductor.compile_fx import compile_fx

    if any(isinstance(value, torch.Tensor) and value.device.type != "cpu" for value in inputs):
        return compile_fx(graph, inputs)
    # Inductor would convert convolutions to channels-last, copying every weight and gradient in each pass.
    patches = {"layout_optimization": False, "joint_custom_pre_pass": _recompute_masks()}
    with _library_kernels():
        return compile_fx(graph, inputs, config_patches=patches)


def _recompute_masks() -> Any:
    """Return a pass over joint graphs that makes backward passes repeat comparisons instead of loading a boolean mask.

    The compared tensor is saved anyway, as an output or for a product, and inductor's C++ is slowest with booleans.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch.utils.checkpoint import CheckpointPolicy

    class RecomputeMasks(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            for node in graph.find_nodes(op="call_function", target=torch.ops.aten.le.Scalar):
                if all(user.target is torch.ops.aten.where.self for user in node.users):
                    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE

        def uuid(self) -> str:
            return _CACHE_KEY

    return RecomputeMasks()


@contextlib.contextmanager
def _library_kernels() -> Iterator[None]:
    """Make inductor call the library for batch norm and max pooling, by changing its tables: there is no setting.

    Inductor's own batch norm saves little time per step and nearly doubles the time the C++ compiler takes; its max
    pooling takes three times as long as the library's. Passing a table as an argument would disable its cache.
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


def configure_backwards() -> None:
    """Let a compiled backward pass run several times, and compile it when its forward pass is compiled."""
    import torch._functorch.config as functorch_config

    allow_repeated_backwards()
    # So that the time of both is reported together.
    if hasattr(functorch_config, "force_non_lazy_backward_lowering"):
        functorch_config.force_non_lazy_backward_lowering = True


def graph_errors() -> tuple[type[Exception], ...]:
    """Return the errors torch raises where a function cannot be one graph, or needs too many versions of it."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return TorchDynamoException, FailOnRecompileLimitHit


def traces_gradients() -> bool:
    """Return whether torch can take gradients inside a graph."""
    import torch._dynamo.config as dynamo_config

    return hasattr(dynamo_config, "trace_autograd_ops")


def cpp_compiler() -> tuple[str | None, str]:
    """Return the compiler that torch.compile calls on the CPU, or None and the reason."""
    try:
        compiler = importlib.import_module("torch._inductor.cpp_builder").get_cpp_compiler()
    except Exception as error:
        return None, f"Inductor finds no C++ compiler ({type(error).__name__}); install g++ or set CXX"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return None, f"Python.h is missing in {sysconfig.get_path('include')}; install Python's development files"
    return str(compiler), ""


def is_compiled(model: HasModules) -> bool:
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


def allow_graphs(count: int) -> None:
    """Raise torch's limit of graphs per function, beyond which it falls back to eager with only a warning."""
    import torch._dynamo.config as dynamo_config

    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, count)
