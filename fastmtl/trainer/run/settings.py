"""What the command line, the YAML file and LibMTL's arguments have in common: values, hyper-parameters, print-out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, SupportsFloat, SupportsInt

import yaml

from fastmtl.architecture import ARCHITECTURES, AbsArchitecture
from fastmtl.errors import UsageError
from fastmtl.support.hyper import Hyper
from fastmtl.support.names import resolve_name
from fastmtl.trainer.optim.optimizer import OPTIMIZERS
from fastmtl.weighting import WEIGHTINGS, AbsWeighting

__all__ = [
    "Arguments",
    "HyperOption",
    "converted",
    "hyper_options",
    "optimizer_param",
    "print_settings",
    "scheduler_param",
    "spelled_as",
]

# Arguments by name, for a call that knows their types.
Arguments = dict[str, Any]

WORDS: dict[str, bool | str] = {
    **dict.fromkeys(("on", "true", "yes"), True),
    **dict.fromkeys(("off", "false", "no"), False),
    "auto": "auto",
}


class HyperOption(NamedTuple):
    """A hyper-parameter on the command line: the classes that have it, in order, and how the first declares it."""

    name: str
    owners: tuple[str, ...]
    spec: Hyper

    @property
    def option(self) -> str:
        """The long option, ``"--mgda-gn"``."""
        return "--" + self.name.lower().replace("_", "-")


def hyper_options(*others: type[AbsWeighting] | type[AbsArchitecture]) -> dict[str, HyperOption]:
    """Return the hyper-parameters of all weightings and architectures, and others, by name; several may share one."""
    options: dict[str, HyperOption] = {}
    classes: dict[str, type[AbsWeighting] | type[AbsArchitecture]] = {**WEIGHTINGS, **ARCHITECTURES}
    for owner, kind in [*((kind.__name__, kind) for kind in others), *classes.items()]:
        for name, spec in kind.hyper.items():
            first = options.get(name, HyperOption(name, (), spec))
            options[name] = first._replace(owners=(*first.owners, owner))
    return options


def spelled_as(name: str, names: Iterable[str], what: str) -> str:
    """Return the one of ``names`` that ``name`` is in any case, see `resolve_name`; ``what`` is named."""
    return resolve_name(name, {known: known for known in names}, what)


def optimizer_param(optim: str, settings: object) -> Arguments:
    """Return the optimizer in the form the trainer takes, with those of the ``settings`` that it has."""
    names = ["lr", *(["momentum"] if optim == "sgd" else [])]
    if "weight_decay" in inspect.signature(OPTIMIZERS[optim]).parameters:
        names.insert(1, "weight_decay")
    return {"optim": optim, **{name: getattr(settings, name) for name in names}}


def scheduler_param(scheduler: str, settings: Any, length: int | None) -> Arguments:
    """Return the learning-rate scheduler in the form the trainer takes; ``length`` is the trainer's to know if None.

    Its arguments are among the ``settings``, which are attributes.
    """
    of_scheduler: dict[str, Arguments] = {
        "step": {"step_size": settings.step_size, "gamma": settings.gamma},
        "exp": {"gamma": settings.gamma},
        "cos": ({} if length is None else {"T_max": length}) | {"eta_min": settings.eta_min},
        # The trainer steps it with the improvement over the first epoch, which is better when larger.
        "reduce": {
            "mode": "max",
            "factor": settings.gamma,
            "patience": settings.patience,
            "min_lr": settings.eta_min,
        },
        "poly": {"power": settings.power},
    }
    when = {"warmup": settings.warmup, "per": settings.schedule_per}
    when = {name: value for name, value in when.items() if value}
    return {"scheduler": scheduler, **of_scheduler.get(scheduler, {}), **when}


def print_settings(parts: Iterable[tuple[str, Mapping[str, object] | None]]) -> None:
    """Print settings below the title of their part, in the form LibMTL's users know; no part without any."""
    print("=" * 40)
    for title, values in parts:
        if values:
            print(f"{title} Configuration:")
            for name, value in values.items():
                print(f"\t{name}: {value}")


def converted(name: str, value: object, spec: Hyper) -> object:
    """Return what YAML or the command line gives for an option or hyper-parameter in its type; None if it may be that.

    A list may be text, ``"3,1"``.

    Raises:
        UsageError: It is not of the type.
    """
    if value is None and (spec.optional or spec.default is None):
        return value
    if spec.many:
        parts = value.replace(",", " ").split() if isinstance(value, str) else value
        kind = Hyper(type=spec.type, default=0, help="")
        return [converted(name, part, kind) for part in (parts if isinstance(parts, list | tuple) else [parts])]
    word = WORDS.get(str(value).lower())
    if spec.words and word is not None:
        return word
    if isinstance(value, Mapping) and dict in spec.accepts:
        return dict(value)
    try:
        return _CONVERTERS[spec.type](value)
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be {spec.wanted()}, got {value!r}.") from None


def _to_bool(value: object) -> bool:
    word = WORDS.get(str(value).lower())
    if not isinstance(word, bool):
        raise ValueError
    return word


def _to_int(value: object) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    if not isinstance(value, str | SupportsInt):
        raise TypeError
    return int(value)


def _to_float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, str | SupportsFloat):
        raise TypeError
    # YAML reads 1e-4, without a point, as text.
    return float(value)


def _to_str(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    return str(value)


def _to_dict(value: object) -> dict[str, object]:
    if isinstance(value, str) and value.strip():
        # NAME=VALUE,NAME=VALUE, as a flag has it.
        parts = [part.partition("=") for part in value.split(",")]
        if not all(name.strip() and equals for name, equals, _ in parts):
            raise ValueError
        try:
            return {name.strip(): yaml.safe_load(text) for name, _, text in parts}
        except yaml.YAMLError as cause:
            raise ValueError from cause
    if not isinstance(value, Mapping):
        raise TypeError
    return {str(key): item for key, item in value.items()}


_CONVERTERS: dict[type, Callable[[object], object]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
    dict: _to_dict,
}
