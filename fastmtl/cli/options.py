"""The options of `fastmtl train`, made from `TrainConfig` and the hyper-parameter tables of the strategies.

``python -m fastmtl.cli.options > docs/options.md`` writes them down.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from fastmtl.architecture import ARCHITECTURES, AbsArchitecture, find_architecture
from fastmtl.errors import UsageError
from fastmtl.recipes import find_recipe
from fastmtl.support.hyper import Hyper, Option, declared
from fastmtl.support.named import own_place
from fastmtl.support.names import known_name
from fastmtl.trainer.arguments import TrainerArguments
from fastmtl.trainer.run.config import TrainConfig
from fastmtl.trainer.run.settings import Arguments, HyperOption, hyper_options
from fastmtl.weighting import WEIGHTINGS, AbsWeighting, find_weighting

__all__ = ["named_classes", "own_hyper_options", "page", "split_values", "train_parameters"]

Classes = Sequence[type[AbsWeighting] | type[AbsArchitecture]]
_PREFIX = "hyper_"
_NAMES: dict[str, Collection[str]] = {"arch": ARCHITECTURES, "weighting": WEIGHTINGS}
# Of more choices, the text tells.
_MOST_IN_PLACE = 3
_PANELS = ("Data", "Model", "Optimisation", "Machine", "Logging")
_PATHS: dict[str, tuple[type, str, str]] = {
    "config": (Path, "YAML file with any of the settings below.", "FILE"),
    "recipe": (str, "Recipe to start from, as `fastmtl recipes` lists them, or a YAML file of one.", "NAME"),
    "scale": (str, "Reduction of the recipe, such as small.", "NAME"),
    "run_dir": (Path, r"Run directory to make. [dim]\[runs/<data set>-<arch>-<weighting>-<time>][/dim]", "DIR"),
    "resume": (Path, "Go on with the run in this directory; --epochs may be raised.", "RUN"),
}


def own_hyper_options(others: Classes = ()) -> list[HyperOption]:
    """Return the hyper-parameters of all architectures and weightings, without those that are settings too."""
    settings = declared(TrainConfig)
    return [hyper for name, hyper in hyper_options(*others).items() if name not in settings]


def named_classes(words: Sequence[str]) -> list[type[AbsWeighting] | type[AbsArchitecture]]:
    """Return the classes that a command line names and that are not fastmtl's: their hyper-parameters are flags too.

    They are named by ``--weighting`` and ``--arch``, or by the YAML file of ``--config``, ``--recipe`` or
    ``--resume``.

    Raises:
        UsageError: There is no such class, or a hyper-parameter of it has the name of an option.
    """
    given = {}
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        following = words[place + 1] if place + 1 < len(words) else ""
        given[name.lower().replace("_", "-")] = value if equals else following
    file = given.get("--config") or (given["--resume"] + "/config.yaml" if given.get("--resume") else "")
    of_file: Any = {}
    if Path(file).is_file():
        # What is wrong with the file is said where it is read.
        with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
            of_file = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    if given.get("--recipe"):
        of_file = find_recipe(given["--recipe"]).settings
    of_file = of_file if isinstance(of_file, Mapping) else {}
    weighting, arch = (given.get(f"--{name}") or str(of_file.get(name, "")) for name in ("weighting", "arch"))
    classes: list[type[AbsWeighting] | type[AbsArchitecture]] = []
    if weighting and known_name(weighting, WEIGHTINGS) is None:
        classes.append(find_weighting(weighting).value)
    if arch and known_name(arch, ARCHITECTURES) is None:
        classes.append(find_architecture(arch).value)
    for kind in classes:
        _check_names(kind)
    return classes


def _check_names(kind: type[AbsWeighting] | type[AbsArchitecture]) -> None:
    """Refuse a hyper-parameter whose flag would set an option of the command."""
    options = {_flag(name): name for name in (*_PATHS, *declared(TrainConfig), "help", "traceback")}
    of_package = hyper_options()
    for name in kind.hyper:
        option = options.get(_flag(name.lower()))
        # Some strategies of the package share one with the trainer.
        if option is not None and name not in of_package:
            raise UsageError(
                f"{own_place(kind)}The hyper-parameter {name} of {kind.__name__} has the name of the option "
                f"{_flag(option)} of `fastmtl train`: give it another, such as {kind.__name__.lower()}_{name}."
            )


def train_parameters(others: Classes = ()) -> Iterator[inspect.Parameter]:
    """Yield the parameters of the command: its paths, one per option of `TrainConfig`, then one per hyper-parameter.

    All default to None, which means that neither the flag nor its negation was given. ``others`` are classes of the
    user's whose hyper-parameters are wanted too.
    """
    for name, (kind, about, kept) in _PATHS.items():
        yield _parameter(name, _flag(name), kind, about, "Run", kept)
    for name, spec in _ordered().items():
        if spec.flag:
            yield _declared(name, _flag(name), spec, spec.help, spec.panel, _NAMES.get(name, spec.choices))
    for hyper in own_hyper_options(others):
        text, (first, *further) = hyper.spec.help, hyper.owners
        text += f" Also of {', '.join(further)}." if further else ""
        panel = f"Hyper-parameters of {first}"
        yield _declared(_PREFIX + hyper.name, hyper.option, hyper.spec, text, panel, hyper.spec.choices)


def split_values(values: Mapping[str, object]) -> tuple[Arguments, Arguments]:
    """Return the settings and the hyper-parameters among the command's values, without those that were not given."""
    present = {name: value for name, value in values.items() if value is not None}
    hyper = {name.removeprefix(_PREFIX): value for name, value in present.items() if name.startswith(_PREFIX)}
    return {name: value for name, value in present.items() if not name.startswith(_PREFIX)}, hyper


def page() -> str:
    """Return the page of the documentation with all options."""
    lines = [
        "# Options",
        "",
        "Every option of a run: a flag of `fastmtl train` (`--weight-momentum 0.9`), a key of its YAML file",
        "(`weight_momentum: 0.9`) and, where the second column says so, an argument of `Trainer`.",
        "An empty default means that the option is not given. The hyper-parameters of strategies (`weight_args` of",
        "`Trainer`) and architectures (`arch_args`) are flags and keys too; they are at the end of the page.",
    ]
    of_trainer = _of_trainer()
    for panel in _PANELS:
        lines += [
            "",
            f"## {panel}",
            "",
            "| Option | `Trainer` | Default | Allowed | What it does |",
            "|---|---|---|---|---|",
        ]
        for name, spec in _ordered().items():
            if spec.panel == panel:
                default = spec.default if spec.otherwise is None else spec.otherwise
                shown = "" if default in (None, {}) else f"`{default}`"
                cells = (f"`{name}`", "yes" if name in of_trainer else "", shown, spec.allowed(), spec.help)
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *_hyper_tables()]) + "\n"


def _hyper_tables() -> Iterator[str]:
    """Yield the tables of the hyper-parameters of strategies and of architectures."""
    known: dict[str, Mapping[str, Any]] = {"strategies": WEIGHTINGS, "architectures": ARCHITECTURES}
    for kind, classes in known.items():
        yield from ("", f"## Hyper-parameters of {kind}", "")
        yield from ("| Name | Of | Default | Allowed | What it does |", "|---|---|---|---|---|")
        for owner, each in classes.items():
            for name, spec in each.hyper.items():
                shown = "" if spec.default in (None, (), "") else f"`{spec.default}`"
                yield f"| `{name}` | {owner} | {shown} | {spec.allowed()} | {spec.help} |"


def _of_trainer() -> set[str]:
    """Return the names of the arguments of `Trainer`, without those that take something else there."""
    return {entry.name for entry in fields(TrainerArguments)} - {"scheduler", "profile"}


def _ordered() -> dict[str, Option]:
    """Return all options by panel, those that only the command has first."""
    specs, of_trainer = declared(TrainConfig), _of_trainer()
    names = sorted(specs, key=lambda name: (_PANELS.index(specs[name].panel), name in of_trainer))
    return {name: specs[name] for name in names}


def _declared(
    name: str, option: str, spec: Hyper, text: str, panel: str, choices: Collection[object] | None
) -> inspect.Parameter:
    kind: type = str if spec.many or spec.words or spec.type is dict else spec.type
    words, metavar = [str(choice) for choice in choices or ()], None
    if spec.many:
        metavar = f"{spec.type.__name__.upper()}..."
    elif spec.words:
        metavar = f"[on|{'|'.join(spec.words)}|off]"
    elif len(words) > _MOST_IN_PLACE:
        text, metavar = f"{text} One of {', '.join(words)}.", "NAME"
    elif words:
        metavar = "|".join(words)
    default = spec.otherwise if isinstance(spec, Option) and spec.default is None else spec.default
    return _parameter(name, option, kind, f"{text}{_default(default)}", panel, metavar)


def _parameter(name: str, option: str, kind: type, text: str, panel: str, metavar: str | None) -> inspect.Parameter:
    flags = f"{option}/--no-{option[2:]}" if kind is bool else option
    about = typer.Option(flags, help=text, rich_help_panel=panel, show_default=False, metavar=metavar)
    annotation = Annotated[kind | None, about]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default(value: object) -> str:
    if value is None or value is False or value in ("", ()):
        return ""
    shown = "on" if value is True else " ".join(map(str, value)) if isinstance(value, tuple) else value
    return f" [dim]\\[{shown}][/dim]"


if __name__ == "__main__":
    print(page(), end="")
