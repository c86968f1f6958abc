"""Learning-rate schedulers by name, class or function, with a warm-up, and as long as the run if they need a length."""

from __future__ import annotations

import contextlib
import inspect
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler
from typing_extensions import override

from fastmtl.errors import UsageError
from fastmtl.support.kinds import Settings, State
from fastmtl.support.names import resolve_name

__all__ = ["PERIODS", "SCHEDULERS", "Recipe", "as_number"]

PERIODS = ("epoch", "step")
SCHEDULERS: State = {
    "exp": lr_scheduler.ExponentialLR,
    "step": lr_scheduler.StepLR,
    "cos": lr_scheduler.CosineAnnealingLR,
    "reduce": lr_scheduler.ReduceLROnPlateau,
    "onecycle": lr_scheduler.OneCycleLR,
    "poly": lr_scheduler.PolynomialLR,
    "warmup": lr_scheduler.LinearLR,
}
_OF_SCHEDULERS = ("chainedscheduler", "sequentiallr")
_CLASSES: State = {
    name: kind
    for name in sorted(dir(lr_scheduler))
    if isinstance(kind := getattr(lr_scheduler, name), type)
    and issubclass(kind, lr_scheduler.LRScheduler)
    and name not in ("LRScheduler", "_LRScheduler")
    and name.lower() not in _OF_SCHEDULERS
}
_PER_STEP = (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR)
# Arguments that stand for the length of a run; of these classes, where it is not asked for, too.
_LENGTHS = ("T_max", "total_steps", "total_iters", "num_training_steps", "max_steps", "max_iters", "max_epochs")
_AS_LONG = (lr_scheduler.OneCycleLR, lr_scheduler.PolynomialLR)


@dataclass(kw_only=True)
class Recipe:
    """How the scheduler of an optimizer is made.

    Attributes:
        function: Makes it of the optimizer and the arguments.
        args: The arguments.
        per: ``"step"`` or ``"epoch"``; None if the scheduler decides.
        warmup: Periods of a linear warm-up before it.
        length: The argument that is the number of periods of the run; None if there is none, or it was given.
        what: Where it was given, for errors.
    """

    function: Callable[..., Any]
    args: State = field(default_factory=dict)
    per: str | None = None
    warmup: int = 0
    length: str | None = None
    what: str = "scheduler_param"

    @classmethod
    def of(cls, scheduler_param: Settings) -> Recipe:
        """Return what ``{"scheduler": name, class or function, ...}`` describes.

        Raises:
            UsageError: No or an unknown name, or values that cannot be.
        """
        if not isinstance(scheduler_param, Mapping) or "scheduler" not in scheduler_param:
            raise UsageError(
                f"scheduler_param must name the scheduler as {{'scheduler': ...}}, got {scheduler_param!r}."
            )
        args = dict(scheduler_param)
        kind, per, warmup = args.pop("scheduler"), args.pop("per", None), as_number(args.pop("warmup", 0))
        if per is not None:
            per = resolve_name(per, {period: period for period in PERIODS}, "per of scheduler_param")
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise UsageError(f"warmup of scheduler_param must be a whole number of at least 0, got {warmup!r}.")
        args = {name: as_number(value) for name, value in args.items() if not (name in _LENGTHS and value is None)}
        for period in ("step_size", "T_max"):
            value = args.get(period, 1)
            # Torch divides by it after the first epoch, when that epoch would be lost.
            if not isinstance(value, int | float) or not value > 0:
                raise UsageError(f"{period} of scheduler_param must be at least 1, got {value!r}.")
        if isinstance(kind, str) and kind.lower() == "warmup":
            if not warmup:
                raise UsageError("The scheduler warmup needs warmup, the number of epochs or steps it takes.")
            return cls(function=lr_scheduler.LinearLR, args=_ramp(warmup) | args, per=per)
        if isinstance(kind, str) and kind.lower() in _OF_SCHEDULERS:
            raise UsageError(
                f"{kind} is made of schedulers of the optimizer: give Trainer scheduler, a function of the optimizer "
                "that returns it."
            )
        function = kind if callable(kind) else resolve_name(kind, SCHEDULERS | _CLASSES, "scheduler")
        return cls.from_function(function, args, per, warmup)

    @classmethod
    def from_function(
        cls,
        function: Callable[..., Any],
        args: Settings | None = None,
        per: str | None = None,
        warmup: int = 0,
        what: str = "scheduler_param",
    ) -> Recipe:
        """Return the recipe of a class or function that takes the optimizer.

        Raises:
            UsageError: It cannot be called, or does not go with a warm-up or with steps.
        """
        if not callable(function):
            raise UsageError(
                f"scheduler must be a function of the optimizer that returns a scheduler, got {function!r}."
            )
        if isinstance(function, partial) and not function.args:
            return cls.from_function(function.func, {**function.keywords, **(args or {})}, per, warmup, what)
        named: Settings = {}
        # A builtin tells nothing of its arguments.
        with contextlib.suppress(TypeError, ValueError):
            named = inspect.signature(function).parameters
        args = dict(args or {})
        reduces = isinstance(function, type) and issubclass(function, lr_scheduler.ReduceLROnPlateau)
        if warmup and (reduces or function in _PER_STEP):
            raise UsageError(f"{_name(function)} cannot have a warmup: it goes by scores, or in cycles of its own.")
        if reduces and per == "step":
            raise UsageError(f"per must be 'epoch' for {_name(function)}: there are scores after an epoch.")
        length = _length(function, named, args)
        if per is None and (function in _PER_STEP or named.keys() & {"total_steps", "num_training_steps"}):
            per = "step"
        elif per is None and length is not None:
            per = "epoch"
        return cls(function=function, args=args, per=per, warmup=warmup, length=length, what=what)

    def make(self, optimizer: torch.optim.Optimizer, total: int | None) -> Any:
        """Return the scheduler of an optimizer.

        Args:
            optimizer: The optimizer, with the learning rates that the schedule starts from.
            total: Periods of the run, where ``length`` is not None.

        Raises:
            UsageError: The arguments do not fit, or no scheduler comes out.
        """
        args = self._defaults(optimizer) | self.args
        if self.length is not None:
            assert total is not None
            if total <= self.warmup:
                raise UsageError(f"warmup of {self.what} must be shorter than the run, {total}, got {self.warmup}.")
            args[self.length] = total - self.warmup
        try:
            scheduler = self.function(optimizer, **args)
            if self.warmup:
                ramp = lr_scheduler.LinearLR(optimizer, **_ramp(self.warmup))
                scheduler = SequentialLR(optimizer, [ramp, scheduler], [self.warmup])
        except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as cause:
            shown = ", ".join(f"{name}={value!r}" for name, value in self.args.items())
            why = cause if not isinstance(cause, ZeroDivisionError) else "one of its phases has no length"
            if isinstance(cause, ZeroDivisionError) and total is not None:
                why = f"{why} in a run of {total}, in steps or epochs"
            raise UsageError(f"{self.what}, {_name(self.function)}({shown}), cannot be used: {why}.") from cause
        _check(scheduler, optimizer, self.what)
        return scheduler

    def per_of(self, scheduler: Any) -> str:
        """Return what a scheduler of this recipe is stepped by."""
        return self.per or ("step" if _goes_by_steps(scheduler) else "epoch")

    def _defaults(self, optimizer: torch.optim.Optimizer) -> State:
        if self.function is lr_scheduler.ReduceLROnPlateau:
            return {"mode": "max"}
        if self.function not in _PER_STEP:
            return {}
        cycles: State = {} if optimizer.defaults.keys() & {"momentum", "betas"} else {"cycle_momentum": False}
        if self.function is lr_scheduler.OneCycleLR:
            cycles["max_lr"] = [float(group["lr"]) for group in optimizer.param_groups]
        return cycles


class SequentialLR(lr_scheduler.SequentialLR):
    """Torch's, whose next scheduler begins with the optimizer's rates.

    Torch's lets one without a closed form go on from the rates where the one before it ended.
    """

    @override
    def step(self) -> None:  # type: ignore[override]
        if self.last_epoch + 1 not in self._milestones:
            super().step()
            return
        for group in self.optimizer.param_groups:
            initial = group["initial_lr"]
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(initial)
            else:
                group["lr"] = initial
        scheduler: Any = self._schedulers[bisect_right(self._milestones, self.last_epoch + 1)]
        scheduler._is_initial = True
        super().step()
        scheduler._is_initial = False


def as_number(value: Any) -> Any:
    """Return the number that a text is, as YAML reads ``1e-4``; anything else as it is."""
    if isinstance(value, str):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
    return value


def _goes_by_steps(scheduler: Any) -> bool:
    return isinstance(scheduler, _PER_STEP) or any(map(_goes_by_steps, getattr(scheduler, "_schedulers", ())))


def _ramp(warmup: int) -> State:
    """Return arguments of a linear scheduler whose period i of the warm-up, from 1, has the share i / (warmup + 1)."""
    return {"start_factor": 1 / (warmup + 1), "total_iters": warmup}


def _length(function: Any, named: Settings, args: Settings) -> str | None:
    if function is lr_scheduler.OneCycleLR and args.keys() & {"epochs", "steps_per_epoch"}:
        return None
    for name in _LENGTHS:
        required = name in named and (named[name].default is inspect.Parameter.empty or function in _AS_LONG)
        if required and name not in args:
            return name
    return None


def _check(scheduler: Any, optimizer: torch.optim.Optimizer, what: str) -> None:
    if not callable(getattr(scheduler, "step", None)):
        raise UsageError(f"{what} must give a scheduler with a method step, got a {type(scheduler).__name__}.")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise UsageError(f"{what} gives a scheduler of another optimizer: make it of the one it is called with.")
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) and scheduler.mode != "max":
        raise UsageError(
            f"{what} gives a {type(scheduler).__name__} of mode {scheduler.mode!r}, but is told the improvement over "
            "the tasks, of which more is better: give mode='max'."
        )
    of_step = inspect.signature(scheduler.step).parameters.values()
    needed = [
        parameter.name
        for parameter in of_step
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed and not isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        raise UsageError(f"step of {type(scheduler).__name__} needs {', '.join(needed)}, and is called without.")


def _name(function: object) -> str:
    return getattr(function, "__name__", type(function).__name__)
