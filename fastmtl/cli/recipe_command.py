"""`fastmtl recipes`: published experiments that a run can start from."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["recipes"]


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print the file of this recipe, to copy; all are listed if not given.")
    ] = None,
) -> None:
    """List the recipes, published experiments for `fastmtl train --recipe NAME` and `fastmtl compare --recipe NAME`."""
    from rich.console import Console
    from rich.table import Table

    from fastmtl.recipes import find_recipe, names_of_recipes

    if name is not None:
        print(find_recipe(name).file.read_text(encoding="utf-8"), end="")
        return
    console = Console()
    for known in names_of_recipes():
        recipe = find_recipe(known)
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), title=known, title_justify="left")
        rows = {"what": recipe.title, "paper": recipe.paper, "about": recipe.about}
        rows |= {f"--scale {scale}": about.about for scale, about in recipe.scales.items()}
        if recipe.published is not None:
            rows["published rows"] = f"fastmtl published {recipe.published}"
        for key, value in rows.items():
            table.add_row(key, value)
        console.print(table)
        console.print()
