"""`fastmtl compare`, `report`, `published` and `analyze`: experiments, their reports, rows to compare with."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import typer
from typer.core import TyperCommand

from fastmtl.cli.spelling import Command

__all__ = ["add_commands", "compare_command"]

_COMPARE_HELP = """Compare strategies and architectures: a grid of runs, single-task baselines with it, and a report.

The same command again goes on where it was stopped. Every flag of [bold]fastmtl train[/bold] may be given, and is the
same for all runs. Results: [bold]report.html[/bold], results.csv, results.md and table.tex in the experiment's folder.
"""
_PANEL = "Experiment"
_Last = Annotated[int, typer.Option(help="Report the mean of this many last epochs.")]
_Best = Annotated[bool, typer.Option("--best", help="Report the best epoch by the validation split instead.")]
_Published = Annotated[
    str | None, typer.Option(help="Put published rows of this data set beside the runs.", metavar="NAME")
]


def _option(name: str, kind: Any, about: str, default: Any = None, *flags: str) -> inspect.Parameter:
    info = typer.Option(
        *(flags or (f"--{name.replace('_', '-')}",)),
        help=about,
        rich_help_panel=_PANEL,
        show_default=default is not None,
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _own_parameters() -> Iterator[inspect.Parameter]:
    """Yield the options that `fastmtl train` does not have, or has in another form."""
    text, folder = str | None, Path | None
    yield _option("config", folder, "YAML file with settings; arch, weighting, seeds and tune may be lists there.")
    yield _option("recipe", text, "Recipe to start from, as `fastmtl recipes` lists them, or a YAML file of one.")
    yield _option("scale", text, "Reduction of the recipe, such as small.")
    yield _option("arch", text, r"Architectures, in any case. [dim]\[HPS][/dim]")
    yield _option("weighting", text, r"Weighting strategies, in any case. [dim]\[EW][/dim]")
    yield _option("seeds", text, r"A number of seeds, or several seeds. [dim]\[3][/dim]")
    yield _option("stl", bool | None, "Run the single-task baseline too. [dim]\\[on][/dim]", None, "--stl/--no-stl")
    yield _option(
        "tune",
        text,
        "Choose settings on the validation split, with as many runs for every method: NAME=VALUE,VALUE,...",
    )
    yield _option("out", folder, "The experiment's folder; its name is made of the settings if not given.")
    yield _option(
        "jobs",
        int | None,
        "Runs at a time; a GPU each, or on the CPU up to 4, if not given. 0 runs them in this process.",
    )
    yield _option(
        "devices", text, "Devices to share out, such as cuda:0 cuda:1; all GPUs, or else the CPU, if not given."
    )
    yield _option(
        "ray", text, "Run on a Ray cluster: its address, auto for the one this machine is in, local for a new one here."
    )
    yield _option(
        "last", int | None, r"Report the mean of this many last epochs. [dim]\[10, or as of the recipe][/dim]"
    )
    yield _option("best", bool, "Report the best epoch by the validation split instead.", False, "--best")
    yield _option("retry", bool, "Try failed runs again whatever the reason.", False, "--retry")
    yield _option("published", text, "Put published rows of this data set beside the runs.")


def compare_command() -> TyperCommand:
    """Return the whole `compare` command, with an option for every setting and hyper-parameter of a run."""
    from fastmtl.cli.compare import compare
    from fastmtl.cli.options import own_hyper_options, train_parameters
    from fastmtl.experiments.grid import DECIDED

    own = list(_own_parameters())
    taken = {parameter.name for parameter in own} | DECIDED | {"config", "recipe", "scale", "run_dir", "resume"}
    parameters = [*own, *(parameter for parameter in train_parameters() if parameter.name not in taken)]

    def run(**values: Any) -> None:
        compare(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}

    class CompareCommand(Command):
        optional_values: ClassVar = {"--compile": "on"}
        list_options: ClassVar = frozenset(
            {
                *(hyper.option for hyper in own_hyper_options() if hyper.spec.many),
                *("--arch", "--weighting", "--seeds", "--devices", "--tune"),
            }
        )

    alone = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    alone.command("compare", cls=CompareCommand, help=_COMPARE_HELP)(run)
    return cast(TyperCommand, typer.main.get_command(alone))


def add_commands(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("compare", help=_COMPARE_HELP.partition("\n")[0])(_compare_stub)
    app.command("report", cls=Command)(_report)
    app.command("published", cls=Command)(_published)
    app.command("analyze", cls=Command)(_analyze)


def _compare_stub() -> None:
    raise AssertionError("replaced by compare_command before it is called")


def _report(
    runs: Annotated[list[Path], typer.Argument(help="An experiment's folder, or run folders.", metavar="DIR...")],
    out: Annotated[Path | None, typer.Option(help="Where to write it; the experiment's folder, or report/.")] = None,
    last: _Last = 10,
    best: _Best = False,
    published: _Published = None,
) -> None:
    """Write the report of an experiment, or of any runs: a page, tables as CSV, Markdown and LaTeX."""
    from fastmtl.cli.compare import report

    report(runs, out=out, last=last, best=best, published=published)


def _published(
    name: Annotated[str | None, typer.Argument(help="Data set; all are named if not given.", metavar="NAME")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the numbers as CSV, with their sources.")] = False,
) -> None:
    """Print published results of a data set, with delta-m and mean rank computed from their own numbers."""
    from fastmtl.cli.compare import published

    with contextlib.suppress(BrokenPipeError):
        published(name, as_csv=as_csv)
        sys.stdout.flush()


def _analyze(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", metavar="RUN...")],
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("analysis"),
    batches: Annotated[int, typer.Option(help="Training batches for cosines by layer; 0 for none.")] = 4,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; the run's own if not given.")] = None,
) -> None:
    """Show which tasks help or hurt each other: cosines over time and layers, conflicts, a suggested grouping."""
    from fastmtl.cli.analyze import analyze

    analyze(runs, out=out, batches=batches, device=device)
