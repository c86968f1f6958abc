"""The grid of an experiment: which methods, seeds and settings, and the cells that they make."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from fastmtl.architecture import ARCHITECTURES, AbsArchitecture, find_architecture
from fastmtl.errors import UsageError
from fastmtl.support.hyper import declared
from fastmtl.support.named import Found, short_name
from fastmtl.trainer.run.config import TrainConfig
from fastmtl.trainer.run.settings import Arguments, hyper_options, spelled_as
from fastmtl.weighting import WEIGHTINGS, AbsWeighting, find_weighting

__all__ = ["Cell", "Grid", "Method", "read_seeds", "read_tuned"]

BASELINE = ("STL", "EW")
# What the grid decides itself, cell by cell or for all of them.
DECIDED = frozenset(("arch", "weighting", "seed", "device", "threads"))
# An experiment draws one report; what each run would draw takes seconds of every cell.
_QUIET = {"tensorboard": False, "plot": False}


@dataclass(frozen=True, kw_only=True)
class Method:
    """An architecture and a strategy, with the hyper-parameters that were given for this method alone.

    Attributes:
        arch: Name of the architecture; ``place:name`` of a class that is not one of `fastmtl.architecture`.
        weighting: Name of the strategy, likewise.
        args: Hyper-parameters by name.
        arch_class: The class, where it is not one of `fastmtl.architecture`.
        weighting_class: The class, where it is not one of `fastmtl.weighting`.
    """

    arch: str
    weighting: str
    args: Mapping[str, Any] = field(default_factory=dict)
    arch_class: type[AbsArchitecture] | None = None
    weighting_class: type[AbsWeighting] | None = None

    @property
    def name(self) -> str:
        """Architecture, strategy and hyper-parameters, as the name of a folder; no two methods have the same."""
        parts = [
            _folder_name(self.arch),
            _folder_name(self.weighting),
            *(f"{name}={value}" for name, value in self.args.items()),
        ]
        return _slug("-".join(parts))

    @classmethod
    def named(cls, arch: Any, weighting: Any) -> Method:
        """Return the method of an architecture and a strategy, each a name in any case, a class, or a mapping.

        A mapping has the name or class as ``name`` and hyper-parameters besides.

        Raises:
            UsageError: An unknown name or hyper-parameter.
        """
        arch_name, arch_class, arch_args = _taken(arch, ARCHITECTURES, find_architecture)
        weighting_name, weighting_class, weight_args = _taken(weighting, WEIGHTINGS, find_weighting)
        return cls(
            arch=arch_name,
            weighting=weighting_name,
            args={**arch_args, **weight_args},
            arch_class=arch_class,
            weighting_class=weighting_class,
        )

    def hyper(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Return the hyper-parameters that the architecture and the strategy declare."""
        arch = self.arch_class or find_architecture(self.arch).value
        weighting = self.weighting_class or find_weighting(self.weighting).value
        return arch.hyper, weighting.hyper


def _taken(entry: Any, known: Mapping[str, type], find: Callable[[str], Found[Any]]) -> tuple[str, Any, Arguments]:
    args: Arguments = {}
    if isinstance(entry, Mapping):
        args = {str(name): value for name, value in entry.items() if name != "name"}
        entry = entry.get("name")
    if isinstance(entry, type):
        built_in = known.get(entry.__name__) is entry
        return (entry.__name__, None, args) if built_in else (_spec_of(entry), entry, args)
    return find(entry).name, None, args


def _spec_of(kind: type) -> str:
    """Return ``module:name`` of a class, or ``file.py:name`` where the module is the running script."""
    main = sys.modules.get(kind.__module__) if kind.__module__ == "__main__" else None
    file = getattr(main, "__file__", None)
    return f"{kind.__module__ if file is None else Path(file).resolve()}:{kind.__name__}"


def _folder_name(name: str) -> str:
    """Return the short name; with a few digits that tell it from the same name of another module or file."""
    short = short_name(name)
    return short if short == name else f"{short}.{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.=_-]+", "_", text.lower())


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of an experiment.

    Attributes:
        name: Name of its folder.
        method: What it trains.
        config: How.
        folder: The experiment's folder.
        kind: ``"cells"``, or ``"tune"`` for a run that helps to choose settings.
        tried: The settings that a run of kind ``"tune"`` tries.
    """

    name: str
    method: Method
    config: TrainConfig
    folder: Path
    kind: str = "cells"
    tried: Mapping[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / self.kind / self.name

    @property
    def asked(self) -> Path:
        """The configuration that it is started with."""
        return self.folder / "configs" / f"{self.kind}-{self.name}.yaml"

    @property
    def failure(self) -> Path:
        """The file that says why it has failed, where it has."""
        return self.folder / "failed" / f"{self.kind}-{self.name}.json"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """An experiment: methods x seeds, each with the same settings.

    Attributes:
        methods: The methods, the single-task baseline among them.
        seeds: The seeds.
        base: The settings of all cells.
        hyper: Hyper-parameters by name, for the methods that have them.
        tune: Settings to choose on the validation split, by name, with the values to try.
    """

    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    base: TrainConfig
    hyper: Mapping[str, Any] = field(default_factory=dict)
    tune: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [method.name for method in self.methods]
        for method in self.methods:
            if names.count(method.name) > 1:
                arch, weighting = short_name(method.arch), short_name(method.weighting)
                raise UsageError(f"{arch} with {weighting} is in the grid twice with the same settings.")
        owned = {name for method in self.methods for specs in method.hyper() for name in specs}
        own = any(method.arch_class or method.weighting_class for method in self.methods)
        for name in self.hyper:
            if name not in owned and not own:
                owners = " and ".join(hyper_options()[name].owners) if name in hyper_options() else "nothing"
                raise UsageError(f"{name} is a hyper-parameter of {owners}, which is not in the grid.")
        for method in self.methods:
            self.config_of(method, self.seeds[0], {})

    @classmethod
    def of(
        cls,
        *,
        archs: Sequence[Any],
        weightings: Sequence[Any],
        seeds: Sequence[int],
        settings: Mapping[str, Any],
        hyper: Mapping[str, Any] | None = None,
        tune: Mapping[str, Sequence[Any]] | None = None,
        baseline: bool = True,
    ) -> Grid:
        """Return the grid of all architectures with all strategies, and the single-task baseline.

        Raises:
            UsageError: An unknown name or setting, or a value that cannot be.
        """
        methods = [Method.named(arch, weighting) for arch in archs for weighting in weightings]
        if not methods:
            raise UsageError("There is nothing to compare: give at least one architecture and one weighting.")
        if baseline and not any(method.arch == "STL" for method in methods):
            methods.insert(0, Method(arch=BASELINE[0], weighting=BASELINE[1]))
        refused = sorted(DECIDED.intersection(settings))
        if refused:
            raise UsageError(f"{', '.join(refused)} cannot be a setting of all cells: the grid decides it.")
        settings = dict(settings)
        given = {**settings.pop("weight_args", {}), **settings.pop("arch_args", {}), **(hyper or {})}
        names = {entry.name for entry in fields(TrainConfig)}
        base = TrainConfig(**{**_QUIET, **{spelled_as(name, names, "setting"): v for name, v in settings.items()}})
        return cls(
            methods=tuple(methods),
            seeds=tuple(seeds),
            base=base,
            hyper=given,
            tune=_checked_tune(tune or {}, base),
        )

    def config_of(self, method: Method, seed: int, chosen: Mapping[str, Any]) -> TrainConfig:
        """Return the configuration of a cell, with settings ``chosen`` by a tuning.

        Raises:
            UsageError: A hyper-parameter that neither the architecture nor the strategy has, or a wrong value.
        """
        config = replace(self.base, arch=method.arch, weighting=method.weighting, seed=seed, **chosen)
        if method.arch == "STL":
            # Nothing is shared, so there is no representation of all tasks.
            config = replace(config, rep_grad=False)
        of_arch, of_weighting = method.hyper()
        args = {name: v for name, v in self.hyper.items() if name in of_arch or name in of_weighting} | dict(
            method.args
        )
        if method.arch_class is None and method.weighting_class is None:
            return config.with_hyper(args)
        for name in args:
            if of_arch and of_weighting and name not in of_arch and name not in of_weighting:
                raise UsageError(
                    f"{name} is no hyper-parameter of {short_name(method.weighting)} or {short_name(method.arch)}."
                )
        return replace(
            config,
            arch_args={name: value for name, value in args.items() if name in of_arch},
            weight_args={name: value for name, value in args.items() if name not in of_arch},
        )

    def cells(self, folder: Path, chosen: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
        """Return the cells of all methods with ``chosen`` settings, by the method's name; seed by seed."""
        return [
            Cell(
                name=f"{method.name}-s{seed}",
                method=method,
                config=self.config_of(method, seed, chosen[method.name]),
                folder=folder,
            )
            for seed in self.seeds
            for method in self.methods
            if method.name in chosen
        ]

    def tuning_cells(self, folder: Path) -> list[Cell]:
        """Return the runs that choose the settings: for every method the same number, with a seed of their own."""
        names = list(self.tune)
        combinations = [dict(zip(names, values, strict=True)) for values in itertools.product(*self.tune.values())]
        return [
            Cell(
                name=_slug(f"{method.name}-{'-'.join(f'{name}{value}' for name, value in tried.items())}"),
                method=method,
                config=self.config_of(method, self.tuning_seed, tried),
                folder=folder,
                kind="tune",
                tried=tried,
            )
            for method in self.methods
            for tried in combinations
        ]

    @property
    def tuning_seed(self) -> int:
        """The seed of the runs that choose settings: one that is not compared afterwards."""
        return max(self.seeds) + 1

    def settings(self) -> dict[str, Any]:
        """Return what may not change when an experiment goes on, as plain data."""
        base = {name: value for name, value in asdict(self.base).items() if name not in DECIDED}
        return {
            "base": {name: value for name, value in base.items() if not _is_logging(name)},
            "hyper": dict(self.hyper),
            "tune": {name: list(values) for name, values in self.tune.items()},
        }

    def default_folder(self) -> Path:
        """Return ``runs/compare-<data set>-<digest>``: the same for the same grid."""
        about = {**self.settings(), "methods": [method.name for method in self.methods], "seeds": list(self.seeds)}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:8]
        return Path("runs") / _slug(f"compare-{self.base.dataset}-{digest}")


def _is_logging(name: str) -> bool:
    return declared(TrainConfig)[name].panel == "Logging" and name != "validate"


def _checked_tune(tune: Mapping[str, Sequence[Any]], base: TrainConfig) -> dict[str, list[Any]]:
    checked: dict[str, list[Any]] = {}
    for name, values in tune.items():
        name = name.replace("-", "_")
        if name in hyper_options() and name not in declared(TrainConfig):
            owners = ", ".join(hyper_options()[name].owners)
            raise UsageError(
                f"tune must be of settings that all methods have, as every method gets the same tuning budget, but "
                f"{name} is of {owners} alone."
            )
        name = spelled_as(
            name, [option for option in declared(TrainConfig) if option not in DECIDED], "setting to tune"
        )
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) < 2:
            raise UsageError(f"tune needs at least two values of {name} to choose from, got {values!r}.")
        checked[name] = [getattr(replace(base, **{name: value}), name) for value in values]
    if checked and not base.validate:
        raise UsageError("tune chooses by the validation split: leave validate on.")
    return checked


def read_tuned(text: str) -> dict[str, list[Any]]:
    """Return the settings to tune of a command line, ``"lr=1e-4,1e-3,weight_decay=0,1e-5"``.

    Raises:
        UsageError: Not of that form.
    """
    tune: dict[str, list[Any]] = {}
    name = ""
    for word in text.replace(",", " ").split():
        before, equals, value = word.rpartition("=")
        name = before if equals else name
        if not name or not value:
            raise UsageError(f"tune must be NAME=VALUE,VALUE,..., got {text!r}.")
        tune.setdefault(name, []).append(yaml.safe_load(value))
    return tune


def read_seeds(seeds: Any) -> tuple[int, ...]:
    """Return the seeds: a number n means 0 to n - 1, several numbers are themselves.

    Raises:
        UsageError: Not whole numbers, none, or one twice.
    """
    given = [seeds] if isinstance(seeds, int | str) else list(seeds)
    try:
        numbers = [int(seed) for seed in given]
    except (TypeError, ValueError):
        raise UsageError(f"seeds must be a number, or a list of seeds, got {seeds!r}.") from None
    if len(numbers) == 1 and not isinstance(seeds, list | tuple):
        numbers = list(range(numbers[0]))
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise UsageError(f"seeds must be at least one, all different and none negative, got {seeds!r}.")
    return tuple(numbers)
