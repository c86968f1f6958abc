"""Which options go together, and with which strategies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fastmtl.engine.groups import ALL
from fastmtl.engine.tables import sparse_tables
from fastmtl.errors import UsageError
from fastmtl.support.kinds import Settings
from fastmtl.trainer.setup.options import StepOptions
from fastmtl.weighting import AbsWeighting

__all__ = ["check_distributed", "check_options", "check_steered", "check_stopping"]


def check_options(model: Any, weighting: str, hyper: Settings, options: StepOptions) -> StepOptions:
    """Return the options as the step takes them, for a model, and a strategy's name and hyper-parameters.

    Raises:
        UsageError: Options that do not go together.
    """
    legacy = _is_legacy(model)
    if options.weight_momentum and (legacy or model.samples > 1 or model.needs in ("reps", "lookahead")):
        raise UsageError(f"weight_momentum must be 0 for {weighting}, which has no weights of one step to average.")
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
    if model.needs == "rows" and (tables := _shared_tables(model)):
        raise UsageError(
            f"{weighting} keeps numbers of the size of all shared parameters for each task, which change in every row "
            f"of a table in every step: it needs sparse=False for {', '.join(tables[:3])}, or choose a strategy that "
            "keeps none, such as UPGrad or EW."
        )
    if options.groups != ALL:
        reasons = {
            "runs backward passes of its own": legacy,
            "needs no Gram matrix": model.needs != "gram",
            f"cannot weigh them apart: {model.against_groups}": bool(model.against_groups),
            "weighs gradients of the representation with rep_grad": model.rep_grad,
        }
        _refuse(f"groups must be {ALL} for {weighting}, which {{}}.", reasons)
    if model.steers_adam and options.clip_grad_norm is not None:
        raise UsageError(
            f"{weighting} decides what Adam's first moment becomes, which clip_grad_norm would change: leave it out."
        )
    if options.vjps == "traced" and not options.compile:
        raise UsageError("vjps='traced' is a way to compile a step: it needs compile=True or 'auto'.")
    return replace(options, tasks_per_step=_sampled(model, weighting, options))


def check_distributed(model: Any, weighting: str, options: StepOptions) -> StepOptions:
    """Return the options as several processes take them.

    Raises:
        UsageError: A strategy or an option that works in one process only.
    """
    from torch.distributed.tensor import DTensor

    on_mesh = [name for name, param in model.named_parameters() if isinstance(param, DTensor)]
    reasons = {
        f"parameters on a mesh, such as those of tensor parallelism ({', '.join(on_mesh[:2])})": bool(on_mesh),
        f"{weighting}, which runs backward passes of its own": _is_legacy(model),
        f"gram='local' and {weighting}, which remembers gradients": model.needs == "rows" and options.gram == "local",
        "cuda_graph": options.cuda_graph is True,
    }
    _refuse("Several processes cannot train with {}: start one.", reasons)
    if options.shard == "fsdp":
        tables = sparse_tables(model)
        unsharded = {
            "gram='local'": options.gram == "local",
            f"sparse gradients, which FSDP2 cannot shard (sparse=False for {', '.join(tables[:3])})": bool(tables),
        }
        _refuse("shard='fsdp' cannot be combined with {}.", unsharded)
    return replace(options, cuda_graph=False)


def check_stopping(model: Any, weighting: str, options: StepOptions, of_tasks: Mapping[str, int] | None) -> None:
    """Refuse to stop tasks where a step cannot be without them.

    Raises:
        UsageError: A strategy that is written for all tasks, or one or an option that deals the tasks out to steps.
    """
    reasons = {
        f"{weighting}, which is written for all tasks": _is_legacy(model),
        "steps of some tasks, of which some would have none left (tasks_per_step)": options.tasks_per_step is not None,
    }
    if of_tasks:
        _refuse("task_patience cannot be combined with {}.", reasons)


def check_steered(model: Any, weighting: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that does not go with a strategy which decides what Adam's first moment becomes.

    Raises:
        UsageError: It is not Adam or AdamW, or its groups differ in beta1.
    """
    if not model.steers_adam:
        return
    name = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise UsageError(
            f"{weighting} decides what the first moment of Adam becomes: the optimizer must be Adam or AdamW, got "
            f"{name}."
        )
    if len({float(group["betas"][0]) for group in optimizer.param_groups}) > 1:
        raise UsageError(f"{weighting} needs one beta1 for all parameters, but the groups of {name} have several.")


def _shared_tables(model: Any) -> list[str]:
    """Return the names of the shared parameters whose gradients modules let be sparse."""
    shared, named = {id(param) for param in model.get_share_params()}, dict(model.named_parameters())
    return [name for name in sparse_tables(model) if id(named[name]) in shared]


def _is_legacy(model: Any) -> bool:
    """Whether the strategy is written for LibMTL, with a ``backward`` of its own."""
    return model.backward.__func__ is not AbsWeighting.backward


def _refuse(sentence: str, reasons: Mapping[str, bool]) -> None:
    """Raise the sentence with the first reason that holds."""
    for reason, holds in reasons.items():
        if holds:
            raise UsageError(sentence.format(reason))


def _sampled(model: Any, weighting: str, options: StepOptions) -> int | None:
    """Return the tasks of a step if they are not all."""
    given = options.tasks_per_step
    count = model.tasks_per_step if given is None else given
    if count is None or count == model.task_num:
        return None
    if count > model.task_num:
        raise UsageError(f"tasks_per_step must be at most {model.task_num}, the number of tasks, got {count}.")
    reasons = {
        "compile=True, which would compile every choice of tasks": bool(options.compile),
        "weight_momentum": options.weight_momentum > 0,
        "update_weights_every": options.update_weights_every > 1,
        f"{weighting}, which is written for all tasks": _is_legacy(model),
    }
    asked = "tasks_per_step" if given is not None else f"{weighting}, whose steps do not have all tasks,"
    _refuse(f"{asked} cannot be combined with {{}}.", reasons)
    return count
