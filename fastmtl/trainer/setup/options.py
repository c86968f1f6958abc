"""What a training step may be told beside model and strategy, and which of it goes together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastmtl.errors import UsageError
from fastmtl.support.names import resolve_name
from fastmtl.trainer.precision import PRECISIONS
from fastmtl.trainer.setup.checks import check_counts, is_real, is_whole
from fastmtl.weighting import AbsWeighting

__all__ = ["GRAMS", "SHARDS", "VJPS", "StepOptions", "check_distributed", "check_options"]

GRAMS = ("exact", "local")
SHARDS = ("none", "fsdp")
VJPS = ("auto", "sequential", "batched", "compressed", "traced")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """Options of the training step.

    Attributes:
        compile: Compile the forward and backward passes; ``"auto"`` finds out whether to.
        cuda_graph: Capture the step as a CUDA graph and replay it, where that can be.
        vjps: How the tasks' gradients go through the shared network: ``"sequential"``, one after the other;
            ``"batched"``, together; ``"compressed"``, as far as their Gram matrix needs them; ``"traced"``, in one
            compiled graph with the forward pass; ``"auto"`` chooses.
        precision: ``"fp32"``; or ``"bf16"``, ``"fp16"``: autocast, the latter with a loss scale.
        accumulate: Batches of a step.
        clip_grad_norm: Greatest norm of all gradients together; None for no limit.
        update_weights_every: Steps between two solves of a strategy that needs the gradients; the weights of the last
            one hold in between.
        weight_momentum: Decay of a moving average of the weights.
        tasks_per_step: Tasks of a step; all if None.
        gram: With several processes, ``"exact"``: the Gram matrix of the whole batch's gradients; ``"local"``: the mean
            of the processes' own.
        shard: With several processes, ``"fsdp"`` if each has a shard of the parameters; ``"none"`` if all have all.
    """

    compile: bool | Literal["auto"] = False
    cuda_graph: bool = False
    vjps: str = "auto"
    precision: str = "fp32"
    accumulate: int = 1
    clip_grad_norm: float | None = None
    update_weights_every: int = 1
    weight_momentum: float = 0.0
    tasks_per_step: int | None = None
    gram: str = "exact"
    shard: str = "none"


def check_options(model: Any, weighting: str, hyper: Mapping[str, Any], options: StepOptions) -> StepOptions:
    """Return the options as the step takes them.

    Args:
        model: The model.
        weighting: Name of its strategy.
        hyper: The strategy's hyper-parameters.
        options: As given.

    Raises:
        UsageError: A value outside its range, or options that do not go together.
    """
    if not isinstance(options.compile, bool) and options.compile != "auto":
        raise UsageError(f"compile must be True, False or 'auto', got {options.compile!r}.")
    if not isinstance(options.cuda_graph, bool):
        raise UsageError(f"cuda_graph must be True or False, got {options.cuda_graph!r}.")
    check_counts(accumulate=options.accumulate, update_weights_every=options.update_weights_every)
    if not is_real(options.weight_momentum) or not 0 <= options.weight_momentum < 1:
        raise UsageError(f"weight_momentum must be at least 0 and below 1, got {options.weight_momentum!r}.")
    legacy = model.backward.__func__ is not AbsWeighting.backward
    if options.weight_momentum and (legacy or model.samples > 1 or model.needs in ("reps", "lookahead")):
        raise UsageError(f"weight_momentum must be 0 for {weighting}, which has no weights of one step to average.")
    limit = options.clip_grad_norm
    if limit is not None and (not is_real(limit) or not limit > 0):
        raise UsageError(f"clip_grad_norm must be a number above 0, or None for no limit, got {limit!r}.")
    precision = resolve_name(options.precision, {name: name for name in PRECISIONS}, "precision")
    if precision == "fp16" and (legacy or model.needs == "lookahead"):
        raise UsageError(f"{weighting} runs backward passes of its own, so precision must be fp32 or bf16, got fp16.")
    options = replace(options, precision=precision, update_weights_every=_interval(model, weighting, hyper, options))
    _check_accumulation(model, weighting, options, legacy)
    options = replace(options, gram=resolve_name(options.gram, {name: name for name in GRAMS}, "gram"))
    options = replace(options, shard=resolve_name(options.shard, {name: name for name in SHARDS}, "shard"))
    options = replace(options, vjps=resolve_name(options.vjps, {name: name for name in VJPS}, "vjps"))
    if options.vjps == "traced" and not options.compile:
        raise UsageError("vjps='traced' is a way to compile a step: it needs compile=True or 'auto'.")
    return replace(options, tasks_per_step=_sampled(model, weighting, options, legacy))


def check_distributed(model: Any, weighting: str, options: StepOptions) -> None:
    """Refuse what several processes cannot share.

    Raises:
        UsageError: The strategy or an option works in one process only.
    """
    from torch.distributed.tensor import DTensor

    on_mesh = [name for name, param in model.named_parameters() if isinstance(param, DTensor)]
    reasons = {
        f"parameters on a mesh, such as those of tensor parallelism ({', '.join(on_mesh[:2])})": bool(on_mesh),
        f"{weighting}, which runs backward passes of its own": model.backward.__func__ is not AbsWeighting.backward,
        f"gram='local' and {weighting}, which remembers gradients": model.needs == "rows" and options.gram == "local",
        "cuda_graph": options.cuda_graph,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UsageError(f"Several processes cannot train with {reason}: start one.")
    unsharded = {
        "compile": bool(options.compile),
        "precision='fp16'": options.precision == "fp16",
        "gram='local'": options.gram == "local",
    }
    for reason, holds in unsharded.items():
        if holds and options.shard == "fsdp":
            raise UsageError(f"shard='fsdp' cannot be combined with {reason}.")


def _interval(model: Any, weighting: str, hyper: Mapping[str, Any], options: StepOptions) -> int:
    """Return the steps between two solves, from the trainer's option or the strategy's own of the same name."""
    interval = max(options.update_weights_every, hyper.get("update_weights_every", 1))
    if interval > 1 and model.needs != "gram":
        raise UsageError(f"update_weights_every must be 1 for {weighting}: its weights do not come from a Gram matrix.")
    return interval


def _check_accumulation(model: Any, weighting: str, options: StepOptions, legacy: bool) -> None:
    if options.accumulate == 1:
        return
    reasons = {
        "runs backward passes of its own": legacy or model.needs == "lookahead",
        "takes several batches per step by itself": model.samples > 1,
        "looks at every example of a step at once": model.needs == "reps",
    }
    for reason, holds in reasons.items():
        if holds:
            raise UsageError(f"accumulate must be 1 for {weighting}, which {reason}.")


def _sampled(model: Any, weighting: str, options: StepOptions, legacy: bool) -> int | None:
    """Return the tasks of a step if they are not all."""
    given = options.tasks_per_step
    if given is None:
        return None
    if not is_whole(given) or not 1 <= given <= model.task_num:
        raise UsageError(
            f"tasks_per_step must be a whole number from 1 to {model.task_num}, the number of tasks, got {given!r}."
        )
    if given == model.task_num:
        return None
    reasons = {
        "compile=True, which would compile every choice of tasks": bool(options.compile),
        "weight_momentum": options.weight_momentum > 0,
        "update_weights_every": options.update_weights_every > 1,
        f"{weighting}, which is written for all tasks": legacy,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UsageError(f"tasks_per_step cannot be combined with {reason}.")
    return given
