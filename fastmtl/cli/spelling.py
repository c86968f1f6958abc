"""How options may be spelled: ``--mgda-gn`` or ``--mgda_gn``, in any case; ``--compile`` with or without a value."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import typer
from typer.core import TyperCommand
from typing_extensions import override

from fastmtl.errors import UsageError
from fastmtl.support.names import resolve_name

__all__ = ["Command", "spell"]


class Command(TyperCommand):
    """A command whose options may be written LibMTL's way, and that names the nearest option on a typo."""

    optional_values: ClassVar[Mapping[str, str]] = {}
    list_options: ClassVar[Collection[str]] = ()

    @override
    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        known = {"--help"}
        for parameter in self.get_params(ctx):
            known.update(option for option in (*parameter.opts, *parameter.secondary_opts) if option.startswith("--"))
        return super().parse_args(ctx, spell(args, known, self.optional_values, self.list_options))


def spell(
    words: Sequence[str],
    known: Collection[str],
    optional_values: Mapping[str, str] | None = None,
    list_options: Collection[str] = (),
) -> list[str]:
    """Return the command line in the one spelling the parser knows, which has the ``known`` options, as ``--mgda-gn``.

    Those of ``optional_values`` may stand alone, and then have the value there; ``list_options`` take several values,
    given as ``--x 3,1``, ``--x 3 1`` or ``--x 3 --x 1``.

    Raises:
        UsageError: An unknown option; the message gives the nearest known one.
    """
    optional_values = optional_values or {}
    spelled: list[str] = []
    lists: dict[str, list[str]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*spelled, *_joined(lists), word, *rest]
        if not word.startswith("--"):
            spelled.append(word)
            continue
        name, equals, value = word.partition("=")
        option = name.lower().replace("_", "-")
        if option not in known:
            raise _unknown(name, known)
        if option in list_options:
            values = [value] if equals else []
            while rest and not equals and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            lists.setdefault(option, []).extend(values)
        elif option in optional_values and not equals:
            alone = not rest or rest[0].startswith("-")
            spelled.append(f"{option}={optional_values[option] if alone else rest.pop(0)}")
        else:
            spelled.append(option + equals + value)
    return [*spelled, *_joined(lists)]


def _joined(lists: Mapping[str, list[str]]) -> list[str]:
    return [f"{option}={','.join(values)}" for option, values in lists.items()]


def _unknown(name: str, known: Collection[str]) -> UsageError:
    try:
        resolve_name(name.lower(), {option: option for option in sorted(known)}, "option")
    except UsageError as error:
        # A command has too many options to list them all.
        sentence = str(error).partition(" Known:")[0]
        return UsageError(f"{sentence} `--help` lists them all." if "Did you mean" not in sentence else sentence)
    return UsageError(f"Unknown option {name!r}.")
