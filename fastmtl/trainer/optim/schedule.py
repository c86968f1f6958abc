"""The learning rates of a run: what steps its scheduler, how far it is, and how another run goes on from there."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import lr_scheduler

from fastmtl.errors import UsageError
from fastmtl.support.kinds import State
from fastmtl.support.names import resolve_name
from fastmtl.trainer.optim.recipe import Recipe

__all__ = ["RESUMED", "Place", "Schedule", "make_schedule", "storable"]

RESUMED = ("new", "stored")
# How an optimizer does its work, and what it or a scheduler notes in its groups beside settings.
_NO_SETTINGS = ("params", "param_names", "fused", "foreach", "capturable", "initial_lr")
_NOTED = ("max_lr", "min_lr")
# What scores have made of a scheduler.
_SCORED = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr", "_step_count")
# What schedulers set in an optimizer's groups.
_SCHEDULED = ("lr", "momentum", "betas")

Settings = list[State]


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a run a `Schedule` begins.

    Attributes:
        epochs: Epochs of the run.
        steps: Steps of an epoch.
        epoch: Epochs that are done.
        batch: Steps of the next one that are done.
    """

    epochs: int
    steps: int
    epoch: int = 0
    batch: int = 0


class Schedule:
    """Steps the scheduler of an optimizer, each epoch or each step; without one it only counts.

    Args:
        optimizer: The optimizer.
        recipe: How the scheduler is made, None without one.
        resumed: Where a run goes on with other settings than it had: ``"new"``, the schedule and settings are those of
            this run, at the place where it goes on; ``"stored"``, they are those of the checkpoint.
        tell: Told if they differ, in a sentence.

    Attributes:
        scheduler: The scheduler; None until the length of the run is known, if it depends on that.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe | None,
        resumed: str = "new",
        tell: Callable[[str], None] = print,
    ) -> None:
        self.optimizer = optimizer
        self.recipe = recipe
        self.resumed = resolve_name(resumed, {word: word for word in RESUMED}, "resume_schedule")
        self.scheduler: Any = None
        self._tell = tell
        self._has_advanced = False
        self._first = _settings(optimizer)
        self._begin: State | None = None
        self._taken = {"epoch": 0, "step": 0}
        self._stored: Mapping[str, Any] | None = None
        if recipe is not None and recipe.length is None:
            self._make(None)

    @property
    def per(self) -> str:
        """Return what the scheduler is stepped by."""
        return "epoch" if self.recipe is None else self.recipe.per_of(self.scheduler)

    def begin(self, place: Place) -> None:
        """Get ready for a run, now that its length is known.

        Raises:
            UsageError: The schedule is shorter than the run, or does not fit the optimizer.
        """
        if self.recipe is not None and len(self.optimizer.param_groups) != len(self._first):
            raise UsageError(
                "The optimizer has got other groups since its scheduler was made: give Trainer all of them at once."
            )
        kept = self._stored is not None and self.resumed == "stored"
        if self._stored is not None:
            stored, self._stored = self._stored, None
            self._go_on(stored, place)
        elif self.recipe is not None and self.recipe.length is not None:
            if self.scheduler is not None:
                # A further run of the same trainer is scheduled from its own beginning.
                _restore(self.optimizer, self._first, _SCHEDULED)
                self._taken = {"epoch": 0, "step": 0}
            self._make(self._total(place))
        end = getattr(self.scheduler, "total_steps", None)
        left = self._total(place) - (place.epoch * place.steps + place.batch if self.per == "step" else place.epoch)
        if isinstance(end, int) and self._taken[self.per] + left > end:
            advice = "it is the checkpoint's, by resume_schedule='stored'; give 'new'"
            advice = advice if kept else "without total_steps it is as long as the run"
            raise UsageError(
                f"The scheduler {type(self.scheduler).__name__} has {end} {self.per}s, total_steps, and the run "
                f"{self._taken[self.per] + left}: {advice}."
            )

    def after_step(self) -> None:
        """Count a step, and step a scheduler that goes by steps."""
        self._taken["step"] += 1
        if self.scheduler is not None and self.per == "step":
            self._advance(1)

    def after_epoch(self, improvement: float) -> None:
        """Count an epoch, and step a scheduler that goes by epochs; one that goes by scores gets the improvement."""
        self._taken["epoch"] += 1
        if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            # NaN would count as an epoch that was no better.
            if not math.isnan(improvement):
                self.scheduler.step(improvement)
        elif self.scheduler is not None and self.per == "epoch":
            self._advance(1)

    def state_dict(self) -> State:
        """Return where the schedule is, what it began with, and the scheduler's state."""
        return {
            "taken": dict(self._taken),
            "first": self._first,
            "begin": self._begin,
            "state": _state_of(self.scheduler),
        }

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Go on where another schedule was; the optimizer has its settings of then. May wait for :meth:`begin`.

        Args:
            stored: What :meth:`state_dict` returned; ``taken``, ``first`` and ``begin`` are missing in older files.
        """
        needs_place = self.recipe is not None and (self.recipe.length is not None or "taken" not in stored)
        if needs_place:
            self._stored = stored
        else:
            self._go_on(stored, None)

    def _go_on(self, stored: Mapping[str, Any], place: Place | None) -> None:
        loaded = [dict(group) for group in self.optimizer.param_groups]
        first = stored.get("first") or _first_of(self.optimizer)
        is_known, state = "begin" in stored, stored.get("state")
        if place is not None:
            # Of this run, whose epochs may have other numbers of steps.
            self._taken = {"epoch": place.epoch, "step": place.epoch * place.steps + place.batch}
        else:
            self._taken = dict(stored.get("taken", {"epoch": stored.get("epoch", 0), "step": 0}))
        changed = _changes(first, self._first)
        is_scheduled = self.recipe is not None or state is not None
        _restore(self.optimizer, self._first, [*changed, *(_SCHEDULED if is_scheduled else ())])
        if self.recipe is not None:
            self._make(None if place is None else self._total(place))
        if is_known:
            changed |= _changes(stored["begin"] or {"scheduler": None}, self._begin or {"scheduler": None})
        if changed:
            self._tell(_told(changed, kept=self.resumed == "stored"))
        if self.resumed == "stored" or (is_known and not changed and not _is_opaque(self.scheduler)):
            self._take(stored, loaded)
        elif isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self._follow_scores(state or {}, loaded, first if is_known else self._first)
        elif self.scheduler is not None:
            self._advance(self._taken[self.per])

    def _take(self, stored: Mapping[str, Any], loaded: Settings) -> None:
        """Take the stored state as it is, if it can be stored."""
        before, now = (begin.get("scheduler") for begin in (stored.get("begin") or {}, self._begin or {}))
        if "begin" in stored and before != now:
            raise UsageError(
                f"resume_schedule='stored' goes on with the checkpoint's scheduler, {before}, but this run's is {now}: "
                "give the same, or resume_schedule='new'."
            )
        if self.scheduler is not None and stored.get("state") is None:
            self._advance(self._taken[self.per])
            return
        if self.scheduler is not None:
            self.scheduler.load_state_dict(stored["state"])
        for group, values in zip(self.optimizer.param_groups, loaded, strict=True):
            group.update(values)

    def _follow_scores(self, state: Mapping[str, Any], loaded: Settings, first: Settings) -> None:
        """Keep what the scores of the run so far have made of the scheduler and of the rates, if it went by scores."""
        if "num_bad_epochs" not in state:
            self.scheduler.last_epoch = self._taken["epoch"]
            return
        self.scheduler.__dict__.update({name: state[name] for name in _SCORED if name in state})
        for group, now, before in zip(self.optimizer.param_groups, loaded, first, strict=True):
            if before.get("lr"):
                group["lr"] = group["lr"] * (now["lr"] / before["lr"])

    def _total(self, place: Place) -> int:
        return place.epochs * place.steps if self.per == "step" else place.epochs

    def _make(self, total: int | None) -> None:
        assert self.recipe is not None
        self.scheduler = self.recipe.make(self.optimizer, total)
        self._begin = {"scheduler": type(self.scheduler).__name__, "per": self.per, **(_state_of(self.scheduler) or {})}

    def _advance(self, periods: int) -> None:
        try:
            quiet: AbstractContextManager[object] = nullcontext() if self._has_advanced else warnings.catch_warnings()
            with quiet:
                if not self._has_advanced:
                    # The optimizer's first steps may have been skipped by float16, or be those of an earlier process.
                    warnings.filterwarnings("ignore", ".*lr_scheduler.step", UserWarning)
                for _ in range(periods):
                    self.scheduler.step()
        except ValueError as cause:
            raise UsageError(f"The scheduler {type(self.scheduler).__name__} goes no further: {cause}.") from cause
        self._has_advanced = True


def make_schedule(
    optimizer: torch.optim.Optimizer,
    scheduler_param: Mapping[str, Any] | None,
    scheduler: Callable[..., Any] | None = None,
    resumed: str = "new",
    tell: Callable[[str], None] = print,
) -> Schedule:
    """Return the schedule of what a trainer is given.

    Raises:
        UsageError: Two schedulers, an unknown name, or arguments that do not fit.
    """
    if scheduler is not None and scheduler_param is not None:
        raise UsageError("scheduler and scheduler_param say the same: give one of them, and None for the other.")
    recipe = None
    if scheduler is not None:
        recipe = Recipe.from_function(scheduler, what="scheduler")
    elif scheduler_param is not None:
        recipe = Recipe.of(scheduler_param)
    return Schedule(optimizer, recipe, resumed, tell)


def storable(value: Any) -> Any:
    """Return a value as a checkpoint can hold it, numpy's numbers as Python's.

    Raises:
        TypeError: It cannot hold it.
    """
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return value
    if isinstance(value, Mapping):
        plain = {storable(key): storable(entry) for key, entry in value.items()}
        return Counter(plain) if isinstance(value, Counter) else plain
    if isinstance(value, list | tuple):
        return [storable(entry) for entry in value] if isinstance(value, list) else tuple(map(storable, value))
    raise TypeError(type(value).__name__)


def _state_of(scheduler: Any) -> State | None:
    """Return the state of a scheduler, None if it has none that a checkpoint can hold."""
    try:
        state: State = storable(scheduler.state_dict())
    except (AttributeError, TypeError):
        return None
    return state


def _is_opaque(scheduler: Any) -> bool:
    """Return whether what a scheduler does shows in nothing that is stored, as with a function."""
    parts = getattr(scheduler, "_schedulers", ())
    return hasattr(scheduler, "lr_lambdas") or any(map(_is_opaque, parts))


def _settings(optimizer: torch.optim.Optimizer, without: Sequence[str] = _NO_SETTINGS) -> Settings:
    """Return the settings of an optimizer's groups, as far as a checkpoint can hold them."""
    of_groups = []
    for group in optimizer.param_groups:
        settings: State = {}
        for name, value in group.items():
            if name not in without:
                try:
                    settings[name] = storable(value.clone() if isinstance(value, Tensor) else value)
                except TypeError:
                    continue
        of_groups.append(settings)
    return of_groups


def _first_of(optimizer: torch.optim.Optimizer) -> Settings:
    """Return the settings that an optimizer had, as far as it shows, before a scheduler changed them."""
    groups = zip(_settings(optimizer, (*_NO_SETTINGS, *_NOTED)), optimizer.param_groups, strict=True)
    return [{**settings, "lr": group.get("initial_lr", settings.get("lr"))} for settings, group in groups]


def _restore(optimizer: torch.optim.Optimizer, settings: Settings, names: Iterable[str]) -> None:
    """Give an optimizer the settings of some names that it had before a scheduler changed them."""
    names = set(names)
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        for name in ("initial_lr", *_NOTED):
            if name not in values:
                group.pop(name, None)
        # An optimizer may have settings of these names too.
        for name in (names | set(_NOTED)) & values.keys():
            group[name] = values[name].clone() if isinstance(values[name], Tensor) else values[name]


def _changes(before: Any, now: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Return what differs, by name: the values before and now."""
    if isinstance(before, Mapping) and isinstance(now, Mapping) and all(isinstance(key, str) for key in before):
        differences: dict[str, tuple[Any, Any]] = {}
        # Another version of torch may have further ones.
        for key in before.keys() & now.keys():
            differences |= _changes(before[key], now[key], str(key))
        return dict(sorted(differences.items()))
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        differences = {}
        for old, new in zip(before, now, strict=True):
            differences |= _changes(old, new, name)
        return differences
    if isinstance(before, Tensor) and isinstance(now, Tensor):
        return {} if torch.equal(before.cpu(), now.cpu()) else {name: (before, now)}
    return {} if before == now else {name: (before, now)}


def _told(changes: Mapping[str, tuple[Any, Any]], kept: bool) -> str:
    hidden = ("base_lrs", "end_step", "_last_lr", "", "last_epoch", "_step_count")
    shown = [f"{name} {now} in place of {before}" for name, (before, now) in changes.items() if name not in hidden]
    what = f" ({'; '.join(shown[:4])})" if shown else ""
    if kept:
        return (
            f"resume: this run's learning rates or optimizer differ from the checkpoint's{what}, whose are kept; with "
            "resume_schedule='new' the run's are taken."
        )
    what = f"resume: learning rates and the optimizer's settings are this run's from here on{what}"
    return f"{what}; with resume_schedule='stored' they stay the checkpoint's."
