"""Which routes a run may take: one, or several among which the first steps decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastmtl.engine.cut import Structure
from fastmtl.engine.losses import Problem
from fastmtl.engine.methods.batched import BatchedRoute
from fastmtl.engine.methods.compressed import CompressedRoute
from fastmtl.engine.methods.representation import ForwardRepRoute, RepRoute
from fastmtl.engine.methods.routes import Route, SplitRoute, SumRoute, WholeRoute
from fastmtl.engine.methods.traced import TracedRoute, has_gradient_hooks
from fastmtl.engine.regions import Regions, cpp_compiler, is_compiled, traces_gradients
from fastmtl.engine.repeated import allow_repeated_backwards
from fastmtl.errors import BackendError, UsageError
from fastmtl.trainer.setup.options import StepOptions
from fastmtl.weighting import AbsWeighting

__all__ = ["routes_to_try"]

# With fewer tasks than this, what batching saves is less than what it costs.
_MANY_TASKS = 8
# Gradients, counted as tensors, that are compiled into one graph without being asked to.
_MOST_GRADIENTS = 400


def routes_to_try(
    problem: Problem,
    hyper: Mapping[str, Any],
    options: StepOptions,
    tell: Callable[[str], None],
    alone: bool,
) -> dict[str, Route]:
    """Return the routes by name, the plainest one first.

    Args:
        problem: What to differentiate.
        hyper: Hyper-parameters of the strategy.
        options: Checked options.
        tell: Told of compilations, and why a route that was asked for cannot be taken.
        alone: There are no other processes.

    Raises:
        BackendError: The step is to be compiled, and there is nothing to compile it with.
    """
    rule: Any = problem.model
    if options.compile and rule.device.type == "cpu":
        found, missing = cpp_compiler()
        if found is None and options.compile == "auto":
            tell(f"compile: the step runs eagerly, as {missing}")
            options = replace(options, compile=False)
        elif found is None:
            raise BackendError(f"compile must be off or auto here: {missing}.")
    weighs_heads = rule.weighs_heads
    needs_gradients = rule.needs not in ("losses", "lookahead")

    if needs_gradients:
        # For functions in it that are compiled, too, which cannot be found.
        allow_repeated_backwards()
    if needs_gradients and is_compiled(rule):
        # Backward passes that were compiled before may overwrite what the next task's needs.
        torch.compiler.reset()
        tell("parts of the network were compiled before: they are compiled anew, for one backward pass per task")

    structure = Structure(problem)

    def choose(compiled: bool) -> Route:
        return _plainest(structure, Regions(problem, compiled, tell), needs_gradients, weighs_heads)

    eager = choose(False)
    against_tracing = _against_tracing(eager, rule, alone) if options.compile else "the step is not compiled"
    traces = options.vjps == "traced" or (options.vjps == "auto" and _is_worth_tracing(problem))

    def compiled() -> Route:
        regional = choose(True)
        return TracedRoute(eager, regional, tell) if traces and against_tracing is None else regional

    plain = compiled() if options.compile is True else eager
    routes: dict[str, Route] = {"eager" if plain is eager else "compiled": plain}
    # Compiled backward passes have no batching rules and no layers.
    regions = plain.regions.with_trunk(problem.trunk)
    batched = BatchedRoute(structure, regions, weighs_heads, tell, forced=options.vjps == "batched")
    compressed = CompressedRoute(structure, regions, weighs_heads)
    against_batching = _against_batching(eager, rule, alone)
    reasons = {
        "batched": against_batching,
        "compressed": _against_compression(compressed, hyper, options) or against_batching,
        "traced": against_tracing,
    }
    others: dict[str, Route] = {"batched": batched, "compressed": compressed}
    if options.vjps == "auto":
        if len(problem.tasks) >= _MANY_TASKS and not options.cuda_graph and options.tasks_per_step is None:
            routes |= {name: route for name, route in others.items() if reasons[name] is None}
    elif options.vjps != "sequential":
        reason = reasons[options.vjps]
        if reason is not None:
            tell(f"vjps: one after the other, as {reason}")
        elif options.vjps != "traced":
            routes = {options.vjps: others[options.vjps]}
    if options.compile == "auto":
        routes["compiled"] = compiled()
    return routes


def _plainest(structure: Structure, regions: Regions, needs_gradients: bool, weighs_heads: bool) -> Route:
    """Return the route for a model and a strategy.

    Args:
        structure: The problem to differentiate.
        regions: The problem's functions, compiled or not.
        needs_gradients: The strategy needs the gradients of the tasks, not only their losses.
        weighs_heads: The strategy weighs the gradients of task-specific parameters too.

    Raises:
        UsageError: The combination cannot be compiled.
    """
    model = structure.problem.model
    if not needs_gradients:
        return SumRoute(structure, regions, weighs_heads)
    if model.rep_grad:
        if model.splits:
            return RepRoute(structure, regions, weighs_heads)
        if regions.compiled:
            raise UsageError(
                f"rep_grad cannot be compiled for {type(model).__mro__[1].__name__}, whose forward is one piece: "
                "give it trunk and branch, or leave compile off."
            )
        return ForwardRepRoute(structure, regions, weighs_heads)
    kind = SplitRoute if model.splits and not model.multi_input else WholeRoute
    return kind(structure, regions, weighs_heads)


def _against_batching(plain: Route, rule: Any, alone: bool) -> str | None:
    """Return why the cotangents cannot go through the trunk together, in a few words; None if nothing is known."""
    reasons = {
        "the strategy or the network does not have one VJP per task go through a trunk": type(plain) is not SplitRoute,
        "the strategy runs backward passes of its own": type(rule).backward is not AbsWeighting.backward,
        "several processes send each row when it is known": not alone,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _against_tracing(plain: Route, rule: Any, alone: bool) -> str | None:
    """Return why forward pass and VJPs cannot be one graph, in a few words; None if nothing is known."""
    reasons = {
        "the strategy or the network does not have one VJP per task": type(plain) not in (SplitRoute, WholeRoute),
        "the strategy runs backward passes of its own": type(rule).backward is not AbsWeighting.backward,
        "several processes send each row when it is known": not alone,
        "gradients have hooks, which a graph would not call": has_gradient_hooks(rule),
        "this version of torch does not trace gradients": not traces_gradients(),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _is_worth_tracing(problem: Problem) -> bool:
    """Return whether one graph of all VJPs is soon compiled, and gains.

    Convolutions, calls of a library in any graph, are most of a step with them; recurrent networks are not traced.
    """
    kinds = (nn.modules.conv._ConvNd, nn.RNNBase)
    if any(isinstance(module, kinds) for module in problem.model.modules()):
        return False
    return len(problem.shared_params) * len(problem.tasks) <= _MOST_GRADIENTS


def _against_compression(compressed: CompressedRoute, hyper: Mapping[str, Any], options: StepOptions) -> str | None:
    """Return why the rows are needed, in a few words; None if nothing is known."""
    rule: Any = compressed.problem.model
    reasons = {
        "the strategy needs more than one Gram matrix": rule.needs != "gram" or rule.samples > 1,
        "gradients are accumulated": options.accumulate > 1,
        "the precision is not fp32": options.precision != "fp32",
        "parts of the network are compiled": is_compiled(rule),
        "the device has no float64": rule.device.type == "mps",
        "the shared network has no linear layers": not compressed.layers,
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    if found is None and rule.groups(**hyper) is not None:
        return "the strategy weighs groups of parameters apart"
    return found
