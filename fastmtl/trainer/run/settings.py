"""What the command line and LibMTL's arguments have in common: hyper-parameters, optimizer, scheduler, print-out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastmtl.architecture import ARCHITECTURES, AbsArchitecture
from fastmtl.support.hyper import Hyper
from fastmtl.support.names import resolve_name
from fastmtl.weighting import WEIGHTINGS, AbsWeighting

__all__ = [
    "Arguments",
    "HyperOption",
    "hyper_options",
    "optimizer_param",
    "print_settings",
    "scheduler_param",
    "spelled_as",
]

# Arguments by name, for a call that knows their types.
Arguments = dict[str, Any]


@dataclass(kw_only=True, slots=True, frozen=True)
class HyperOption:
    """A hyper-parameter on the command line.

    Attributes:
        name: As its classes declare it.
        owners: Names of the classes that have it, in order.
        spec: As the first of them declares it.
    """

    name: str
    owners: tuple[str, ...]
    spec: Hyper

    @property
    def option(self) -> str:
        """The long option, ``"--mgda-gn"``."""
        return "--" + self.name.lower().replace("_", "-")


def hyper_options() -> dict[str, HyperOption]:
    """Return the hyper-parameters of all weightings and architectures, by name; several may share one."""
    owners: dict[str, tuple[str, ...]] = {}
    specs: dict[str, Hyper] = {}
    classes: dict[str, type[AbsWeighting] | type[AbsArchitecture]] = {**WEIGHTINGS, **ARCHITECTURES}
    for owner, kind in classes.items():
        for name, spec in kind.hyper.items():
            specs.setdefault(name, spec)
            owners[name] = (*owners.get(name, ()), owner)
    return {name: HyperOption(name=name, owners=owners[name], spec=spec) for name, spec in specs.items()}


def spelled_as(name: str, names: Iterable[str], what: str) -> str:
    """Return the one of ``names`` that ``name`` is in any case; ``what`` is named, for the message.

    Raises:
        UsageError: It is none of them.
    """
    return resolve_name(name, {each: each for each in names}, what)


def optimizer_param(optim: str, *, lr: float, weight_decay: float, momentum: float) -> Arguments:
    """Return the optimizer in the form the trainer takes."""
    param: Arguments = {"optim": optim, "lr": lr, "weight_decay": weight_decay}
    return {**param, "momentum": momentum} if optim == "sgd" else param


def scheduler_param(
    scheduler: str, *, step_size: int, gamma: float, epochs: int | None, eta_min: float, patience: int
) -> Arguments:
    """Return the learning-rate scheduler in the form the trainer takes."""
    own: dict[str, Arguments] = {
        "step": {"step_size": step_size, "gamma": gamma},
        "exp": {"gamma": gamma},
        "cos": {"T_max": epochs, "eta_min": eta_min},
        # The trainer steps it with the improvement over the first epoch, which is better when larger.
        "reduce": {"mode": "max", "factor": gamma, "patience": patience},
    }
    return {"scheduler": scheduler, **own[scheduler]}


def print_settings(parts: Iterable[tuple[str, Mapping[str, object] | None]]) -> None:
    """Print settings below the title of their part, in the form LibMTL's users know; no part without any."""
    print("=" * 40)
    for title, values in parts:
        if values:
            print(f"{title} Configuration:")
            for name, value in values.items():
                print(f"\t{name}: {value}")
