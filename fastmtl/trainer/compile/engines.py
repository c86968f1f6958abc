"""Which engines a run may take: one, or several among which the first steps decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from fastmtl.engine.comm import Comm
from fastmtl.engine.cut import Structure
from fastmtl.engine.engine import Engine, ForeignEngine, GradientEngine, LossEngine
from fastmtl.engine.inductor import cpp_compiler, is_compiled, traces_gradients
from fastmtl.engine.layerwise.sketches import SketchedVJPs
from fastmtl.engine.layerwise.vjps import LayerwiseVJPs
from fastmtl.engine.lookahead import LookaheadEngine
from fastmtl.engine.losses import Problem
from fastmtl.engine.methods.base import Method
from fastmtl.engine.methods.batched import Batched
from fastmtl.engine.methods.blockwise import Blockwise
from fastmtl.engine.methods.layerwise import Layerwise
from fastmtl.engine.methods.representation import ForwardRepresentation, Representation
from fastmtl.engine.methods.split import Split
from fastmtl.engine.methods.traced import Traced, has_gradient_hooks
from fastmtl.engine.methods.whole import Whole
from fastmtl.engine.regions import Regions
from fastmtl.engine.repeated import allow_repeated_backwards
from fastmtl.errors import BackendError, UsageError
from fastmtl.support.dtypes import wide_dtype
from fastmtl.support.kinds import Settings
from fastmtl.trainer.setup.options import StepOptions
from fastmtl.weighting import AbsWeighting

__all__ = ["engines_to_try"]

# With fewer tasks than this, what batching saves is less than what it costs; on CUDA it saves launches too.
_MANY_TASKS, _MANY_ON_CUDA = 8, 3
# Added to the run's seed.
_SKETCH = 7919
# The ways that the first steps may choose: they give the same gradients.
_ROUTES = ("batched", "layerwise")
# Gradients, counted as tensors, that are compiled into one graph without being asked to.
_MOST_GRADIENTS = 400

Tell = Callable[[str], None]


def engines_to_try(
    strategy: AbsWeighting, problem: Problem, hyper: Settings, options: StepOptions, tell: Tell, comm: Comm
) -> Mapping[str, Engine]:
    """Return the engines by name, the plainest one first.

    Args:
        strategy: The strategy.
        problem: What to differentiate.
        hyper: Hyper-parameters of the strategy.
        options: Checked options.
        tell: Told of compilations, and why a way that was asked for cannot be taken.
        comm: The other processes.

    Raises:
        BackendError: The step is to be compiled, and there is nothing to compile it with.
    """
    options = _compilable(options, problem, tell)
    if strategy.needs not in ("losses", "lookahead"):
        _prepare_compiler(problem, tell)
    make = partial(_plainest, strategy, Structure(problem, comm), comm)
    eager = make(Regions(problem, False, tell))
    against_tracing = _against_tracing(eager, problem, comm) if options.compile else "the step is not compiled"

    def compiled() -> Engine:
        regional = make(Regions(problem, True, tell))
        if against_tracing or not isinstance(eager, GradientEngine) or not isinstance(regional, GradientEngine):
            return regional
        asked = options.vjps == "traced" or (options.vjps == "auto" and _is_worth_tracing(problem))
        return GradientEngine(Traced(eager.method, regional.method, tell)) if asked else regional

    plain = compiled() if options.compile is True else eager
    engines: dict[str, Engine] = {"eager" if plain is eager else "compiled": plain}
    others = _other_vjps(strategy, plain, eager, hyper, options, tell)
    if options.vjps == "auto":
        many = _MANY_ON_CUDA if problem.model.device.type == "cuda" else _MANY_TASKS
        if len(problem.tasks) >= many and options.cuda_graph is not True and options.tasks_per_step is None:
            engines |= {name: other for name in _ROUTES if not isinstance(other := others[name], str)}
    elif options.vjps != "sequential":
        way = "layerwise" if options.vjps == "compressed" else options.vjps
        asked = against_tracing if way == "traced" else others[way]
        if isinstance(asked, str):
            tell(f"vjps: one after the other, as {asked}")
        elif asked is not None:
            engines = {way: asked}
    if options.compile == "auto":
        engines["compiled"] = compiled()
    return engines


def _other_vjps(
    strategy: AbsWeighting, plain: Engine, eager: Engine, hyper: Settings, options: StepOptions, tell: Tell
) -> dict[str, Engine | str]:
    """Return the engines that take the VJPs together or not as a whole, or what stands against each in a few words.

    Args:
        strategy: The strategy.
        plain: The plainest engine of the run, of compiled functions or not.
        eager: The same of functions that are not compiled.
        hyper: Hyper-parameters of the strategy.
        options: Checked options.
        tell: Told what turns out not to work.
    """
    batching = _against_batching(eager)
    layers = _against_layers(strategy, eager, options)
    if not isinstance(plain, GradientEngine):
        assert batching is not None
        assert layers is not None
        return {"batched": batching, "layerwise": layers, "sketch": layers, "blockwise": layers}
    # Compiled backward passes have no batching rules and no layers.
    regions = plain.regions.with_trunk(plain.problem.trunk)
    shared = plain.method.structure, regions, plain.comm, plain.method.weighs_heads
    # On the CPU they are known not to gain; on CUDA it is measured.
    convolutions = plain.problem.model.device.type == "cuda"
    batched = Batched(*shared, tell, forced=options.vjps == "batched", convolutions=convolutions)
    kept = {"auto": None, "keep": True, "recompute": False}[options.cotangents]
    groups = strategy.groups(**hyper)
    if groups is not None:
        # A second backward pass would be one for each group.
        kept = True
    params = plain.problem.shared_params
    ways: dict[str, Engine | str] = {"batched": batching or GradientEngine(batched)}
    ways["layerwise"] = (
        layers
        or _against_exact_layers(strategy, plain.comm)
        or GradientEngine(Layerwise(*shared, LayerwiseVJPs(params, plain.comm, tell, kept)))
    )
    ways["blockwise"] = (
        layers
        or _against_blocks(strategy, options)
        or GradientEngine(Blockwise(*shared, groups or [], len(strategy.grouping.names) if strategy.grouping else 0))
    )
    if options.vjps == "sketch":
        vjps = SketchedVJPs(
            params,
            plain.comm,
            tell,
            kept,
            strategy.samples,
            width=options.sketch_width,
            check_every=options.gram_check_every,
            seed=_seed(plain.comm, plain.problem),
        )
        sharded = "parameters are in shards" if options.shard != "none" else None
        ways["sketch"] = layers or sharded or GradientEngine(Layerwise(*shared, vjps))
    return ways


def _seed(comm: Comm, problem: Problem) -> int:
    """Return the seed of the run, the main process's in all of them."""
    # Not the stream of numbers that made the parameters.
    seed = torch.tensor([(torch.initial_seed() + _SKETCH) % 2**63], dtype=torch.int64, device=problem.model.device)
    comm.broadcast([seed])
    return int(seed)


def _compilable(options: StepOptions, problem: Problem, tell: Tell) -> StepOptions:
    """Return the options without ``compile`` where there is no compiler and that is allowed."""
    if not options.compile or problem.model.device.type != "cpu":
        return options
    compiler, missing = cpp_compiler()
    if compiler is not None:
        return options
    if options.compile != "auto":
        raise BackendError(f"compile must be off or auto here: {missing}.")
    tell(f"compile: the step runs eagerly, as {missing}")
    return replace(options, compile=False)


def _prepare_compiler(problem: Problem, tell: Tell) -> None:
    """Let what is compiled in the network, or will be, run one backward pass per task."""
    # For functions in it that are compiled, too, which cannot be found.
    allow_repeated_backwards()
    if is_compiled(problem.model):
        # Backward passes that were compiled before may overwrite what the next task's needs.
        torch.compiler.reset()
        tell("parts of the network were compiled before: they are compiled anew, for one backward pass per task")


def _plainest(strategy: AbsWeighting, structure: Structure, comm: Comm, regions: Regions) -> Engine:
    """Return the engine for a model and a strategy, the plainest of those that have the same gradients."""
    needs = strategy.needs_of_step()
    if needs == "losses":
        return LossEngine(structure, regions, comm, strategy.reads_losses)
    if needs == "lookahead":
        return LookaheadEngine(structure, regions, comm)
    if needs == "backward":
        return ForeignEngine(regions)
    return GradientEngine(_method(structure.problem, regions)(structure, regions, comm, strategy.weighs_heads))


def _method(problem: Problem, regions: Regions) -> type[Method]:
    """Return how the gradients of a network are computed.

    Raises:
        UsageError: The combination cannot be compiled.
    """
    model = problem.model
    if not model.rep_grad:
        return Split if model.splits and not model.multi_input else Whole
    if model.splits:
        return Representation
    if regions.compiled:
        raise UsageError(
            f"rep_grad cannot be compiled for {model.architecture_name}, whose forward is one piece: "
            "give it trunk and branch, or leave compile off."
        )
    return ForwardRepresentation


def _against_batching(eager: Engine) -> str | None:
    """Return why the cotangents cannot go through the trunk together, in a few words; None if nothing is known."""
    if isinstance(eager, ForeignEngine):
        return "the strategy runs backward passes of its own"
    if not isinstance(eager, GradientEngine) or not isinstance(eager.method, Split):
        return "the strategy or the network does not have one VJP per task go through a trunk"
    return "several processes send each row when it is known" if eager.comm.shares_batches else None


def _against_tracing(plain: Engine, problem: Problem, comm: Comm) -> str | None:
    """Return why forward pass and VJPs cannot be one graph, in a few words; None if nothing is known."""
    if isinstance(plain, ForeignEngine):
        return "the strategy runs backward passes of its own"
    reasons = {
        "the strategy or the network does not have one VJP per task": not isinstance(plain, GradientEngine)
        or not isinstance(plain.method, Split | Whole),
        "several processes send each row when it is known": comm.shares_batches,
        "gradients have hooks, which a graph would not call": has_gradient_hooks(problem.model),
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


def _against_layers(strategy: AbsWeighting, eager: Engine, options: StepOptions) -> str | None:
    """Return why the rows are needed, in a few words; None if nothing is known."""
    if isinstance(eager, ForeignEngine):
        return "the strategy runs backward passes of its own"
    if not isinstance(eager, GradientEngine) or not isinstance(eager.method, Split):
        return "the strategy or the network does not have one VJP per task go through a trunk"
    model = eager.problem.model
    reasons = {
        "the strategy needs more than a Gram matrix": strategy.needs != "gram",
        "gradients are accumulated, so that the graphs are gone before the weights are known": options.accumulate > 1,
        "parts of the network are compiled": is_compiled(model),
        "the device has no float64": wide_dtype(model.device) != torch.float64,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _against_blocks(strategy: AbsWeighting, options: StepOptions) -> str | None:
    """Return why groups of parameters must be weighed together, in a few words; None if nothing is known."""
    reasons = {
        "groups is all": strategy.grouping is None,
        "the strategy takes several batches per step": strategy.samples > 1,
        "weight_momentum changes the weights after all are known": options.weight_momentum > 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _against_exact_layers(strategy: AbsWeighting, comm: Comm) -> str | None:
    """Return why only sketches can take the place of rows, in a few words; None if nothing is known."""
    if strategy.samples > 1:
        return "the strategy takes several batches per step"
    return "several processes have the layers' inputs" if comm.shares_batches else None
