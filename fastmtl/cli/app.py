"""The commands: what they are called, what they take, and where their work is done."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import typer
from typer.core import TyperCommand, TyperGroup
from typing_extensions import override

from fastmtl.cli.bench_commands import bench
from fastmtl.cli.compare_commands import add_commands, compare_command
from fastmtl.cli.data_commands import data
from fastmtl.cli.deploy_commands import add_commands as add_deploy_commands
from fastmtl.cli.new_command import new
from fastmtl.cli.recipe_command import recipes
from fastmtl.cli.spelling import Command

__all__ = ["app"]

_TRAIN_HELP = """Train a multi-task model.

Settings come from the YAML file of [bold]--config[/bold], and flags win over it. All results go to one folder, the run
directory, under [bold]runs/[/bold]. The same run again: [bold]fastmtl train --config RUN/config.yaml[/bold]
"""


class _Commands(TyperGroup):
    """Gives `train` and `compare` their options only when called: they are made from classes that need torch."""

    @override
    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        if args and args[0] == "train":
            self.commands["train"] = _train_command(args[1:])
        if args and args[0] == "compare":
            self.commands["compare"] = compare_command()
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands,
    help="A fast trainer for multi-task learning on PyTorch.",
    epilog="With [bold]--traceback[/bold], or FASTMTL_TRACEBACK=1, an error shows where it was raised.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(data, name="data")
app.add_typer(bench, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        from fastmtl import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("train", help=_TRAIN_HELP.partition("\n")[0])
def _train_stub() -> None:
    raise AssertionError("replaced by _train_command before it is called")


def _train_command(words: list[str]) -> TyperCommand:
    """Return the whole `train` command, with an option for every setting and hyper-parameter.

    Those of classes of the user's that its ``words`` name are among them.
    """
    from fastmtl.cli.options import named_classes, own_hyper_options, train_parameters
    from fastmtl.cli.train import train

    def run(**values: Any) -> None:
        train(**values)

    others = named_classes(words)
    parameters = list(train_parameters(others))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}

    class TrainCommand(Command):
        optional_values: ClassVar = {"--compile": "on"}
        list_options: ClassVar = frozenset(hyper.option for hyper in own_hyper_options(others) if hyper.spec.many)

    alone = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    alone.command("train", cls=TrainCommand, help=_TRAIN_HELP)(run)
    return cast(TyperCommand, typer.main.get_command(alone))


add_commands(app)
add_deploy_commands(app)
app.command("new", cls=Command)(new)
app.command("recipes", cls=Command)(recipes)


@app.command("eval", cls=Command)
def _eval(
    run: Annotated[Path, typer.Argument(help="Run directory.", metavar="RUN")],
    checkpoint: Annotated[str, typer.Option(help="best, last, or the path of a checkpoint.")] = "best",
    split: Annotated[str, typer.Option(help="test or val.")] = "test",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; the run's own if not given.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Run to give the improvement over, as one with STL.", metavar="RUN")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Evaluate a checkpoint of a run."""
    from fastmtl.cli.evaluate import evaluate

    evaluate(run, checkpoint=checkpoint, split=split, device=device, as_json=as_json, baseline=baseline)


@app.command("doctor", cls=Command)
def _doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False) -> None:
    """Show versions, devices, the backend each op would use and why, and the memory bandwidth."""
    from fastmtl.cli.doctor import render, report

    facts = report()
    print(json.dumps(facts) if as_json else render(facts))
