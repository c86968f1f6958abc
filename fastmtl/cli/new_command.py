"""`fastmtl new`: a small working file to begin with, and its test."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from fastmtl.errors import UsageError
from fastmtl.support.names import resolve_name

__all__ = ["new"]

_KINDS = ("dataset", "strategy", "architecture")
_FLAGS = {
    "dataset": "--dataset {file}:make --encoder conv",
    "strategy": "--weighting {file}:{name}",
    "architecture": "--arch {file}:{name}",
}


def new(
    kind: Annotated[str, typer.Argument(help="dataset, strategy or architecture.", metavar="KIND")],
    name: Annotated[str, typer.Argument(help="Its name, of letters, digits and _.", metavar="NAME")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path(),
) -> None:
    """Write a small working data set, strategy or architecture, and its test, to change into your own."""
    kind = resolve_name(kind, {known: known for known in _KINDS}, "kind")
    if not name.isidentifier():
        raise UsageError(f"NAME must be letters, digits and _, and not begin with a digit, got {name!r}.")
    # MyRule is in my_rule.py.
    module = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    title = name if name != module else "".join(part.capitalize() for part in module.split("_"))
    file, test = out / f"{module}.py", out / f"test_{module}.py"
    for path in (file, test):
        if path.exists():
            raise UsageError(f"{path} exists: give another name, or another folder with --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, template in ((file, kind), (test, f"test_{kind}")):
            text = files("fastmtl.cli").joinpath("templates", f"{template}.txt").read_text(encoding="utf-8")
            path.write_text(text.replace("@NAME@", title).replace("@MODULE@", module), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{out} cannot be written to: {error.strerror}.") from error
    shown = file if file.is_absolute() or len(file.parts) > 1 else f"./{file}"
    print(f"{file} and {test} are written.")
    print(f"Test it:  python -m pytest {test}")
    print(f"Train:    fastmtl train {_FLAGS[kind].format(file=shown, name=title)} --epochs 1 --limit-batches 20")
