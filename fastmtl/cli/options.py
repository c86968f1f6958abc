"""The options of `fastmtl train`, made from `TrainConfig` and the hyper-parameter tables of the strategies."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from fastmtl.architecture import ARCHITECTURES
from fastmtl.trainer.run.config import TrainConfig
from fastmtl.trainer.run.settings import Arguments, HyperOption, hyper_options
from fastmtl.weighting import WEIGHTINGS

__all__ = ["own_hyper_options", "split_values", "train_parameters"]

_PREFIX = "hyper_"
_NAMES: dict[str, Collection[str]] = {"arch": ARCHITECTURES, "weighting": WEIGHTINGS}
_PATHS = {
    "config": ("YAML file with any of the settings below.", "FILE"),
    "run_dir": (r"Run directory to make. [dim]\[runs/<data set>-<arch>-<weighting>-<time>][/dim]", "DIR"),
    "resume": ("Go on with the run in this directory; --epochs may be raised.", "RUN"),
}


def own_hyper_options() -> list[HyperOption]:
    """Return the hyper-parameters of all architectures and weightings, without those that are settings too."""
    settings = {each.name for each in fields(TrainConfig)}
    return [each for each in hyper_options().values() if each.name not in settings]


def train_parameters() -> Iterator[inspect.Parameter]:
    """Yield the parameters of the command: its paths, one per setting of `TrainConfig`, then one per hyper-parameter.

    All default to None, which means that neither the flag nor its negation was given.
    """
    for name, (about, kept) in _PATHS.items():
        yield _parameter(name, "--" + name.replace("_", "-"), Path, about, "Run", kept)
    kinds = typing.get_type_hints(TrainConfig)
    for each in fields(TrainConfig):
        if each.name in ("weight_args", "arch_args", "group_args"):
            continue
        option = "--" + each.name.replace("_", "-")
        kind = kinds[each.name]
        text, metavar = each.metadata["help"], "|".join(each.metadata["choices"]) or None
        if each.name in _NAMES:
            text, metavar = f"{text} {', '.join(_NAMES[each.name])}.", "NAME"
        if each.name == "compile":
            kind, metavar = str, "[on|auto|off]"
        yield _parameter(each.name, option, kind, f"{text}{_default(each.default)}", each.metadata["panel"], metavar)
    for hyper in own_hyper_options():
        yield _hyper_parameter(hyper)


def split_values(values: Mapping[str, object]) -> tuple[Arguments, Arguments]:
    """Return the settings and the hyper-parameters among the command's values, without those that were not given."""
    given = {name: value for name, value in values.items() if value is not None}
    hyper = {name.removeprefix(_PREFIX): value for name, value in given.items() if name.startswith(_PREFIX)}
    return {name: value for name, value in given.items() if not name.startswith(_PREFIX)}, hyper


def _hyper_parameter(hyper: HyperOption) -> inspect.Parameter:
    spec, text = hyper.spec, hyper.spec.help
    kind = str if spec.many else spec.type
    metavar = "|".join(map(str, spec.choices or ())) or None
    if spec.many:
        metavar = f"{spec.type.__name__.upper()}..."
    if len(hyper.owners) > 1:
        text += f" Also of {', '.join(hyper.owners[1:])}."
    panel = f"Hyper-parameters of {hyper.owners[0]}"
    return _parameter(_PREFIX + hyper.name, hyper.option, kind, f"{text}{_default(spec.default)}", panel, metavar)


def _parameter(name: str, option: str, kind: object, text: str, panel: str, metavar: str | None) -> inspect.Parameter:
    members = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    declared = f"{option}/--no-{option[2:]}" if bool in members else option
    about = typer.Option(declared, help=text, rich_help_panel=panel, show_default=False, metavar=metavar)
    annotation = Annotated[members[0] | None, about]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _default(value: object) -> str:
    if value is None or value is False or value in ("", ()):
        return ""
    shown = "on" if value is True else " ".join(map(str, value)) if isinstance(value, tuple) else value
    return f" [dim]\\[{shown}][/dim]"
