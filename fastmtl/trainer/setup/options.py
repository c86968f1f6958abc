"""What a training step may be told beside model and strategy, and which of it goes together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastmtl.errors import UsageError
from fastmtl.support.kinds import Settings, State
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
    """Options of the training step: the arguments of `fastmtl.trainer.trainer.Trainer` of the same names."""

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


def check_options(model: Any, weighting: str, hyper: Settings, options: StepOptions) -> StepOptions:
    """Return the options as the step takes them, for a model, and a strategy's name and hyper-parameters.

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
    legacy = _is_legacy(model)
    if options.weight_momentum and (legacy or model.samples > 1 or model.needs in ("reps", "lookahead")):
        raise UsageError(f"weight_momentum must be 0 for {weighting}, which has no weights of one step to average.")
    limit = options.clip_grad_norm
    if limit is not None and (not is_real(limit) or not limit > 0):
        raise UsageError(f"clip_grad_norm must be a number above 0, or None for no limit, got {limit!r}.")
    options = _spelled(options, "precision", tuple(PRECISIONS))
    if options.precision == "fp16" and (legacy or model.needs == "lookahead"):
        raise UsageError(f"{weighting} runs backward passes of its own, so precision must be fp32 or bf16, got fp16.")
    # A strategy may have an option of its own of this name.
    interval = max(options.update_weights_every, hyper.get("update_weights_every", 1))
    if interval > 1 and model.needs != "gram":
        raise UsageError(f"update_weights_every must be 1 for {weighting}: its weights do not come from a Gram matrix.")
    options = replace(options, update_weights_every=interval)
    if options.accumulate > 1:
        reasons = {
            "runs backward passes of its own": legacy or model.needs == "lookahead",
            "takes several batches per step by itself": model.samples > 1,
            "looks at every example of a step at once": model.needs == "reps",
        }
        _refuse(f"accumulate must be 1 for {weighting}, which {{}}.", reasons)
    for name, known in (("gram", GRAMS), ("shard", SHARDS), ("vjps", VJPS)):
        options = _spelled(options, name, known)
    if options.vjps == "traced" and not options.compile:
        raise UsageError("vjps='traced' is a way to compile a step: it needs compile=True or 'auto'.")
    return replace(options, tasks_per_step=_sampled(model, weighting, options))


def check_distributed(model: Any, weighting: str, options: StepOptions) -> None:
    """Refuse a strategy or an option that works in one process only."""
    from torch.distributed.tensor import DTensor

    on_mesh = [name for name, param in model.named_parameters() if isinstance(param, DTensor)]
    reasons = {
        f"parameters on a mesh, such as those of tensor parallelism ({', '.join(on_mesh[:2])})": bool(on_mesh),
        f"{weighting}, which runs backward passes of its own": _is_legacy(model),
        f"gram='local' and {weighting}, which remembers gradients": model.needs == "rows" and options.gram == "local",
        "cuda_graph": options.cuda_graph,
    }
    _refuse("Several processes cannot train with {}: start one.", reasons)
    if options.shard == "fsdp":
        unsharded = {
            "compile": bool(options.compile),
            "precision='fp16'": options.precision == "fp16",
            "gram='local'": options.gram == "local",
        }
        _refuse("shard='fsdp' cannot be combined with {}.", unsharded)


def _is_legacy(model: Any) -> bool:
    """Whether the strategy is written for LibMTL, with a ``backward`` of its own."""
    return model.backward.__func__ is not AbsWeighting.backward


def _spelled(options: StepOptions, name: str, known: tuple[str, ...]) -> StepOptions:
    """Return the options with the word of one of them as it is known, where it may be in any case."""
    words: State = {name: resolve_name(getattr(options, name), {each: each for each in known}, name)}
    return replace(options, **words)


def _refuse(sentence: str, reasons: Mapping[str, bool]) -> None:
    """Raise the sentence with the first reason that holds."""
    for reason, holds in reasons.items():
        if holds:
            raise UsageError(sentence.format(reason))


def _sampled(model: Any, weighting: str, options: StepOptions) -> int | None:
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
        f"{weighting}, which is written for all tasks": _is_legacy(model),
    }
    _refuse("tasks_per_step cannot be combined with {}.", reasons)
    return given
