"""`fastmtl data list` and `fastmtl doctor`: what there is, as text or JSON."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

__all__ = ["doctor", "list_data"]


def list_data(*, as_json: bool) -> None:
    """Print the data sets."""
    from fastmtl.data import describe_all

    rows = describe_all()
    if as_json:
        print(json.dumps(rows))
        return
    console = Console()
    for row in rows:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), title=row["name"], title_justify="left")
        for name, value in row.items():
            if name != "name":
                table.add_row(name, value)
        console.print(table)
        console.print()


def doctor(*, as_json: bool) -> None:
    """Print what the machine, the installation and the backends are like."""
    from fastmtl.doctor import render, report

    facts = report()
    print(json.dumps(facts) if as_json else render(facts))
