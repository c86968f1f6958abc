"""Optimizers by name, class or function, and groups of parameters by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.support.kinds import Settings, State
from fastmtl.support.names import resolve_name
from fastmtl.trainer.optim.recipe import as_number
from fastmtl.trainer.optim.tables import TABLE_OPTIMIZERS, SparseAdam, check_table_group

__all__ = [
    "OPTIMIZERS",
    "MakesOptimizer",
    "Parameters",
    "check_group_settings",
    "check_optimized",
    "group_names",
    "learning_rates",
    "make_optimizer",
    "refuse_optimizer",
    "set_mode",
]

_USUAL = ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop")
_REFUSED = {
    "lbfgs": "it computes the loss several times in a step, of which the trainer has the gradients only once",
}
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): kind
    for name in dict.fromkeys((*_USUAL, *sorted(dir(torch.optim))))
    if isinstance(kind := getattr(torch.optim, name, None), type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
    and name.lower() not in _REFUSED
}
# Torch's class of this name takes no dense gradients, which a network with tables has too.
OPTIMIZERS["sparseadam"] = SparseAdam
_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
# They look at every number by itself, so that a part of a parameter is updated as the whole would be.
_BY_NUMBER = tuple(OPTIMIZERS[name] for name in OPTIMIZERS if name not in ("adafactor", "muon"))


class Parameters(list[nn.Parameter]):
    """What an optimizer is to update, as ``model.parameters()`` of one process would be.

    Args:
        named: The parameters by name.

    Attributes:
        named: The same, for groups made by name.
    """

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        super().__init__(named.values())
        self.named = dict(named)


# Returns an optimizer of parameters.
MakesOptimizer: TypeAlias = Callable[[Parameters], torch.optim.Optimizer]


def make_optimizer(
    named: Mapping[str, nn.Parameter],
    optim_param: Settings | None,
    device: torch.device,
    *,
    make: MakesOptimizer | None = None,
    sparse: Collection[str] = (),
    sharded: bool = False,
) -> torch.optim.Optimizer:
    """Return the optimizer that ``{"optim": name or class, ...}`` describes; fused where torch has that.

    Args:
        named: What it updates, by name.
        optim_param: Its name or class, and arguments; ``params`` has those of groups, by the beginning of the names of
            their parameters, of which the longest counts.
        device: The device of the parameters.
        make: Makes the optimizer, in place of ``optim_param``.
        sparse: The names of those that may have sparse gradients.
        sharded: The parameters are parts of those of the model.

    Raises:
        UsageError: No or an unknown name, an argument the optimizer does not take, parameters in no group or in
            several, or an optimizer that cannot be used here.
    """
    if make is not None:
        if optim_param is not None:
            raise UsageError("optimizer and optim_param say the same: give one of them, and None for the other.")
        optimizer, name = _called(make, named), "optimizer"
    else:
        optimizer, name = _described(named, optim_param, device, bool(sparse)), "optim_param"
    _check_kind(optimizer, {id(named[key]): key for key in sparse}, sharded)
    _check_groups(optimizer, named, name)
    return optimizer


def refuse_optimizer(optim: object) -> None:
    """Refuse an optimizer, by name or class, that no step of the trainer can run, and say why."""
    kinds = optim.__mro__ if isinstance(optim, type) else ()
    names = [optim.lower()] if isinstance(optim, str) else [kind.__name__.lower() for kind in kinds]
    for name in names:
        if name in _REFUSED:
            raise UsageError(f"The optimizer {getattr(optim, '__name__', optim)} cannot be used: {_REFUSED[name]}.")
    if torch.optim.SparseAdam in kinds:
        raise UsageError(
            "The class torch.optim.SparseAdam cannot be used: it takes sparse gradients only. The name 'sparseadam' "
            "stands for an Adam that takes both kinds, fastmtl.trainer.optim.tables.SparseAdam."
        )


def _described(
    named: Mapping[str, nn.Parameter], optim_param: Settings | None, device: torch.device, sparse: bool
) -> torch.optim.Optimizer:
    if not isinstance(optim_param, Mapping) or "optim" not in optim_param:
        raise UsageError(f"optim_param must name the optim as {{'optim': ...}}, got {optim_param!r}.")
    optim = optim_param["optim"]
    refuse_optimizer(optim)
    kind: Any = optim if callable(optim) else resolve_name(optim, OPTIMIZERS, "optimizer")
    args = {name: _plain(value) for name, value in optim_param.items() if name not in ("optim", "params")}
    settings = optim_param.get("params", {})
    groups = _groups(named, settings)
    check_group_settings(kind, args, settings)
    fused = (
        kind in _FUSED
        and device.type in ("cpu", "cuda")
        and not (kind is torch.optim.Adagrad and device.type != "cpu")
        and not (sparse or any(param.is_complex() for param in named.values()))
        and not args.keys() & {"fused", "foreach", "differentiable", "capturable"}
    )
    try:
        optimizer = kind(groups, **(args | ({"fused": True} if fused else {})))
    except (TypeError, ValueError) as cause:
        shown = {**optim_param, "optim": getattr(optim, "__name__", optim)}
        raise UsageError(f"optim_param {shown} cannot be used: {cause}.") from cause
    return _checked(optimizer)


def check_group_settings(kind: Any, args: Settings, settings: Any) -> None:
    """Refuse settings of groups that the class of an optimizer refuses where they are all parameters'.

    Torch looks at no value that is a group's: a text fails in the first step, a negative rate ascends.

    Args:
        kind: The class, or a function, of which nothing is known.
        args: Its arguments for all parameters.
        settings: Those of groups, by the beginning of the names of their parameters.

    Raises:
        UsageError: The settings are no mapping of mappings, or one of them cannot be.
    """
    _check_form(settings)
    params = [nn.Parameter(torch.zeros(1, 1))]
    try:
        made = kind(params, **args) if isinstance(kind, type) else None
    except (TypeError, ValueError):
        return
    if not isinstance(made, torch.optim.Optimizer):
        return
    named = inspect.signature(kind).parameters
    for prefix, of_group in settings.items():
        values = {key: _plain(value) for key, value in of_group.items()}
        for key, value in values.items():
            if kind in OPTIMIZERS.values() and key not in made.defaults:
                raise UsageError(f"params of optim_param has {key!r}, which {kind.__name__} does not take.")
            if isinstance(made.defaults.get(key), bool | int | float) and not _is_finite(value):
                raise UsageError(
                    f"{key} of the group {prefix!r} in params of optim_param must be a number, got {value!r}."
                )
        try:
            kind(params, **{**args, **{key: value for key, value in values.items() if key in named}})
        except (TypeError, ValueError) as cause:
            raise UsageError(
                f"The group {prefix!r} in params of optim_param, {values}, cannot be used: {cause}."
            ) from cause


def _check_form(settings: Any) -> None:
    if not isinstance(settings, Mapping) or not all(isinstance(of_group, Mapping) for of_group in settings.values()):
        raise UsageError(
            f"params of optim_param must be {{beginning of names: settings}}, as {{'encoder': {{'lr': 1e-4}}}}, got "
            f"{settings!r}."
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, int | float) and math.isfinite(value))


def _called(make: MakesOptimizer, named: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    if not callable(make) or isinstance(make, torch.optim.Optimizer):
        raise UsageError(
            f"optimizer must be a function of the parameters that returns an optimizer, got {type(make).__name__}."
        )
    try:
        optimizer = make(Parameters(named))
    except (TypeError, ValueError) as cause:
        raise UsageError(
            f"optimizer cannot be called with the parameters, a list with them by name in named: {cause}."
        ) from cause
    return _checked(optimizer)


def _checked(optimizer: object) -> torch.optim.Optimizer:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"An optimizer must derive from torch.optim.Optimizer, got a {type(optimizer).__name__}.")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UsageError(
            f"The optimizer {type(optimizer).__name__} cannot be used: its step needs a closure, and gradients are "
            "computed only once in a step."
        )
    return optimizer


def _check_kind(optimizer: torch.optim.Optimizer, sparse: Mapping[int, str], sharded: bool) -> None:
    """Refuse an optimizer that cannot update parameters with sparse gradients, names by identity, or parts of them."""
    kind = type(optimizer)
    refuse_optimizer(kind)
    if sparse and kind in OPTIMIZERS.values() and kind not in TABLE_OPTIMIZERS:
        raise UsageError(
            f"{kind.__name__.lower()} takes no sparse gradients, which an embedding has: use sgd, adagrad or "
            "sparseadam, or sparse=False."
        )
    for group in optimizer.param_groups:
        for param in group["params"]:
            if id(param) in sparse:
                check_table_group(kind, group, sparse[id(param)])
    if sharded and kind not in _BY_NUMBER:
        raise UsageError(
            f"shard='fsdp' cuts parameters, of which {kind.__name__} may need the whole: use one of "
            f"{', '.join(known.__name__ for known in _BY_NUMBER)}."
        )


def _check_groups(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], name: str) -> None:
    """Refuse an optimizer that does not have every trained parameter once, and no others."""
    known = {id(param): key for key, param in named.items()}
    seen: set[int] = set()
    for param in (param for group in optimizer.param_groups for param in group["params"]):
        if id(param) in seen or id(param) not in known:
            what = (
                f"{known[id(param)]} twice" if id(param) in seen else f"{tuple(param.shape)}, which is not the model's"
            )
            raise UsageError(f"The optimizer of {name} has a parameter {what}: it must have those it was called with.")
        seen.add(id(param))
    check_optimized(optimizer, named, f"The optimizer of {name}")


def check_optimized(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], what: str) -> None:
    """Refuse an optimizer that lacks parameters that require gradients."""
    seen = {id(param) for group in optimizer.param_groups for param in group["params"]}
    absent = [key for key, param in named.items() if param.requires_grad and id(param) not in seen]
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise UsageError(
            f"{what} lacks {', '.join(absent[:3])}{more}, which would not be trained: add them, or "
            "let them not require gradients."
        )


def group_names(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """Return the names of the parameters of each group."""
    names = {id(param): name for name, param in named.items()}
    return [[names[id(param)] for param in group["params"]] for group in optimizer.param_groups]


def _groups(named: Mapping[str, nn.Parameter], settings: Any) -> list[nn.Parameter] | list[State]:
    """Return groups of parameters with settings of their own, those without any first."""
    _check_form(settings)
    if not settings:
        return list(named.values())
    members: dict[str | None, list[nn.Parameter]] = {None: [], **{prefix: [] for prefix in settings}}
    for name, param in named.items():
        fitting = [prefix for prefix in settings if name == prefix or name.startswith(f"{prefix}.")]
        members[max(fitting, key=len, default=None)].append(param)
    for prefix in settings:
        if not any(name == prefix or name.startswith(f"{prefix}.") for name in named):
            parts = dict.fromkeys(".".join(name.split(".")[:depth]) for name in named for depth in (1, 2))
            shown = [part for part in parts if part in named or any(name.startswith(f"{part}.") for name in named)]
            raise UsageError(
                f"params of optim_param has {prefix!r}, with which no parameter's name begins: there are "
                f"{', '.join(shown[:12])}{', ...' if len(shown) > 12 else ''}."
            )
    chosen = {
        None: {},
        **{prefix: {key: _plain(value) for key, value in of_group.items()} for prefix, of_group in settings.items()},
    }
    return [{"params": params, **chosen[prefix]} for prefix, params in members.items() if params]


def _plain(value: Any) -> Any:
    """Return numpy's numbers, and those in a text, as Python's, which a checkpoint can hold.

    A tensor is copied, as a scheduler changes it in its place.
    """
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value
    if isinstance(value, Tensor):
        return value.clone()
    return value.item() if isinstance(value, np.generic) else as_number(value)


def learning_rates(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[float]:
    """Return the learning rate of each parameter; of one that the optimizer has not, 0.

    Raises:
        UsageError: The optimizer has no ``lr``.
    """
    if any("lr" not in group for group in optimizer.param_groups):
        raise UsageError(f"{type(optimizer).__name__} has no learning rate 'lr', with which the strategy looks ahead.")
    rates = {id(param): float(group["lr"]) for group in optimizer.param_groups for param in group["params"]}
    return [rates.get(id(param), 0.0) for param in params]


def set_mode(optimizer: torch.optim.Optimizer, training: bool) -> None:
    """Tell an optimizer that keeps other parameters for evaluation, as schedule-free ones do, which are needed now."""
    change = getattr(optimizer, "train" if training else "eval", None)
    if callable(change):
        change()
