"""Recipes: data, network, optimizer, schedule and selection of published experiments, each in a YAML file.

A file has ``title``, ``paper``, ``about`` and ``settings``, which are keys of a run's ``config.yaml``; ``published``
names rows of ``fastmtl published``, ``selection`` is ``best`` or a number of last epochs, ``differs`` says what is not
as in the paper, and ``scales`` has reductions by name, each with ``about`` and ``settings`` of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastmtl.errors import UsageError
from fastmtl.support.names import resolve_name

__all__ = ["Recipe", "Scale", "find_recipe", "names_of_recipes"]

_FOLDER = Path(__file__).parent
_KEYS = ("title", "paper", "about", "settings", "published", "selection", "differs", "scales")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A reduction of a recipe: what it is, and the settings that differ."""

    about: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A published experiment as settings of a run.

    Attributes:
        file: Where it is written.
        title, paper, about: What it is, and whose.
        settings: Keys of ``config.yaml``.
        published: The data set of the published rows; None for none.
        selection: ``"best"`` for the best epoch by the validation split, or the number of last epochs of a mean.
        differs: What is not as in the paper.
        scales: Reductions by name.
    """

    file: Path
    title: str
    paper: str
    about: str
    settings: Mapping[str, Any]
    published: str | None = None
    selection: str | int = 10
    differs: tuple[str, ...] = ()
    scales: Mapping[str, Scale] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the file, without its ending."""
        return self.file.stem

    def at(self, scale: str | None) -> dict[str, Any]:
        """Return the settings, at a scale.

        Raises:
            UsageError: There is no such scale.
        """
        if scale is None or scale == "full":
            return dict(self.settings)
        if not self.scales:
            raise UsageError(f"The recipe {self.name} has no scales: leave out --scale.")
        return {**self.settings, **resolve_name(scale, self.scales, f"scale of {self.name}").settings}


def names_of_recipes() -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def find_recipe(name: str) -> Recipe:
    """Return the recipe of a name, or of a YAML file.

    Raises:
        UsageError: There is no such recipe, or the file is none.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        return _read(Path(name))
    return _read(resolve_name(name, {known: _FOLDER / f"{known}.yaml" for known in names_of_recipes()}, "recipe"))


def _read(path: Path) -> Recipe:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise UsageError(f"The recipe {path} cannot be read: {cause.strerror or cause}.") from cause
    except (UnicodeDecodeError, yaml.YAMLError) as cause:
        raise UsageError(f"The recipe {path} is not valid YAML: {' '.join(str(cause).split())}.") from cause
    if not isinstance(content, Mapping) or not isinstance(content.get("settings"), Mapping):
        raise UsageError(f"The recipe {path} must have `settings:`, with keys as in a run's config.yaml.")
    unknown = [str(key) for key in content if key not in _KEYS]
    if unknown:
        raise UsageError(f"The recipe {path} has the key {unknown[0]!r}; a recipe has {', '.join(_KEYS)}.")
    scales = content.get("scales") or {}
    if not isinstance(scales, Mapping) or not all(
        isinstance(scale, Mapping) and isinstance(scale.get("settings"), Mapping) for scale in scales.values()
    ):
        raise UsageError(f"scales of the recipe {path} must be names, each with `settings:` of its own.")
    selection = content.get("selection", 10)
    if selection != "best" and (isinstance(selection, bool) or not isinstance(selection, int) or selection < 1):
        raise UsageError(f"selection of the recipe {path} must be best or a number of last epochs, got {selection!r}.")
    return Recipe(
        file=path,
        title=str(content.get("title", path.stem)),
        paper=str(content.get("paper", "")),
        about=str(content.get("about", "")),
        settings=_keys(content["settings"]),
        published=content.get("published"),
        selection=selection,
        differs=tuple(map(str, content.get("differs") or ())),
        scales={
            str(name): Scale(about=str(scale.get("about", "")), settings=_keys(scale["settings"]))
            for name, scale in scales.items()
        },
    )


def _keys(settings: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key).replace("-", "_"): value for key, value in settings.items()}
