"""The commands: what they are called, what they take, and where their work is done."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperGroup
from typing_extensions import override

from fastmtl.cli.spelling import Command

__all__ = ["app"]

_TRAIN_HELP = """Train a multi-task model.

Settings come from the YAML file of [bold]--config[/bold], and flags win over it. All results go to one folder, the run
directory, under [bold]runs/[/bold]. The same run again: [bold]fastmtl train --config RUN/config.yaml[/bold]
"""


class _Commands(TyperGroup):
    """Gives `train` its options only when it is called: they are made from classes that need torch to import."""

    @override
    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        if args and args[0] == "train":
            self.commands["train"] = _train_command()
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
_data = typer.Typer(help="What data sets there are, and making some.", no_args_is_help=True)
app.add_typer(_data, name="data")
_bench = typer.Typer(help="Measure the operators, each behind a correctness gate.", no_args_is_help=True)
app.add_typer(_bench, name="bench")


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


def _train_command() -> Any:
    """Return the whole `train` command, with an option for every setting and hyper-parameter."""
    from fastmtl.cli.options import hyper_options, train_parameters
    from fastmtl.cli.train import train

    def run(**values: Any) -> None:
        train(**values)

    own = {
        "config": ("YAML file with any of the settings below.", "FILE"),
        "run_dir": (r"Run directory to make. [dim]\[runs/<data set>-<arch>-<weighting>-<time>][/dim]", "DIR"),
        "resume": ("Go on with the run in this directory; --epochs may be raised.", "RUN"),
    }
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Path | None,
                typer.Option("--" + name.replace("_", "-"), help=text, metavar=metavar, rich_help_panel="Run"),
            ],
        )
        for name, (text, metavar) in own.items()
    ]
    parameters += train_parameters()
    _give_signature(run, parameters)

    class TrainCommand(Command):
        optional_values: ClassVar = {"--compile": "on"}
        list_options: ClassVar = frozenset(each.option for each in hyper_options().values() if each.spec.many)

    alone = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    alone.command("train", cls=TrainCommand, help=_TRAIN_HELP)(run)
    return typer.main.get_command(alone)


def _give_signature(function: Callable[..., None], parameters: list[inspect.Parameter]) -> None:
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {each.name: each.annotation for each in parameters}


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
    from fastmtl.cli.listing import doctor

    doctor(as_json=as_json)


@_data.command("list", cls=Command)
def _data_list(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """List the data sets."""
    from fastmtl.cli.listing import list_data

    list_data(as_json=as_json)


@_data.command("make", cls=Command)
def _data_make(
    name: Annotated[str, typer.Argument(help="Data set to make: rooms.", metavar="NAME")],
    path: Annotated[Path | None, typer.Option(help="Folder to write to; fastmtl's cache if not given.")] = None,
    train: Annotated[int | None, typer.Option(help="Scenes to train on.")] = None,
    test: Annotated[int | None, typer.Option(help="Scenes to test on.")] = None,
    size: Annotated[tuple[int, int] | None, typer.Option(help="Height and width in pixels.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the scenes.")] = 0,
) -> None:
    """Make a data set that is drawn by a program, in the folders LibMTL reads; a folder can be extended."""
    from fastmtl.cli.listing import make_data

    make_data(name, path, train=train, test=test, size=size, seed=seed)


@_data.command("prepare", cls=Command)
def _data_prepare(
    name: Annotated[str, typer.Argument(help="Data set to download: reviews.", metavar="NAME")],
    path: Annotated[Path | None, typer.Option(help="Folder to write to; fastmtl's cache if not given.")] = None,
    archive: Annotated[
        Path | None, typer.Option(help="vaderSentiment's source distribution; downloaded with pip if not given.")
    ] = None,
) -> None:
    """Download a data set that is no part of fastmtl, and split it."""
    from fastmtl.cli.listing import prepare_data

    prepare_data(name, path, archive)


@_bench.command("kernels", cls=Command)
def _bench_kernels(
    op: Annotated[
        list[str] | None, typer.Option(help="Operator to measure; may be repeated, all if not given.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    csv: Annotated[Path | None, typer.Option(help="File to write the rows to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to draw of them.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few cases and little time.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice if not given.")] = None,
) -> None:
    """Time each operator against its baselines and the memory bandwidth; a wrong result gets no time."""
    from fastmtl.cli.listing import bench_kernels

    bench_kernels(op, device=device, csv_path=csv, plot_path=plot, quick=quick, threads=threads)


@_bench.command("solvers", cls=Command)
def _bench_solvers(
    libmtl: Annotated[
        Path | None, typer.Option(help="Folder of a LibMTL checkout, to measure its solvers too.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="File to write the rows to.")] = None,
) -> None:
    """Time the weighting strategies from one Gram matrix beside LibMTL's and TorchJD's solvers of the same problem."""
    from fastmtl.cli.listing import bench_solvers

    bench_solvers(libmtl, csv_path=csv)


@_bench.command("step", cls=Command)
def _bench_step(
    weighting: Annotated[list[str], typer.Option(help="Strategy to measure; may be repeated.")] = ["MGDA"],  # noqa: B006
    peer: Annotated[list[str] | None, typer.Option(help="libmtl or torchjd; may be repeated.")] = None,
    libmtl: Annotated[Path | None, typer.Option(help="Folder of a LibMTL checkout, for the peer libmtl.")] = None,
    arch: Annotated[str, typer.Option(help="Architecture.")] = "HPS",
    tasks: Annotated[list[int], typer.Option("--tasks", "--t", "-T", help="Number of tasks; may be repeated.")] = [3],  # noqa: B006
    net: Annotated[str, typer.Option(help="resnet18, resnet50 (dilated), or mlp (128-512-512-512).")] = "resnet18",
    batch: Annotated[int, typer.Option(help="Rows of the batch.")] = 32,
    size: Annotated[str, typer.Option(help="Height and width of the images, as 64 or 288x384.")] = "64",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16, of our step alone.")] = "fp32",
    compile: Annotated[bool, typer.Option("--compile", help="Measure our step compiled too.")] = False,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Measure our step captured too.")] = False,
    csv: Annotated[Path | None, typer.Option(help="File to write the rows to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to draw, time over the number of tasks.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each strategy and number of tasks.")] = 20.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice if not given.")] = None,
    model: Annotated[
        str | None, typer.Option(help="H100, H200 or A100: print what a step must cost there, and measure nothing.")
    ] = None,
) -> None:
    """Time whole training steps beside their floor, the sum of the losses, LibMTL and TorchJD, all in turn.

    Those beside ours compute in fp32 whatever --precision says. A step of ours whose update is wrong is not timed; a
    peer whose update is more than 1 % from ours is marked ANOTHER UPDATE.
    """
    from fastmtl.cli.listing import bench_step, model_step

    if model is not None:
        model_step(model, net=net, tasks=tasks, batch=batch, size=size, precision=precision)
        return
    bench_step(
        weighting, threads=threads, peers=peer or [], libmtl=libmtl, arch=arch, tasks=tasks, net=net, batch=batch,
        size=size, device=device, precision=precision, compile=compile, cuda_graph=cuda_graph, csv_path=csv,
        plot_path=plot, seconds=seconds,
    )  # fmt: skip


@_bench.command("autojac", cls=Command)
def _bench_autojac(
    tasks: Annotated[list[int], typer.Option("--tasks", "--t", "-T", help="Number of tasks; may be repeated.")] = [3],  # noqa: B006
    net: Annotated[str, typer.Option(help="resnet18, or mlp (128-512-512-512).")] = "resnet18",
    aggregator: Annotated[str, typer.Option(help="Aggregator of both packages.")] = "UPGrad",
    batch: Annotated[int, typer.Option(help="Rows of the batch.")] = 32,
    size: Annotated[int, typer.Option(help="Height and width of the images.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    csv: Annotated[Path | None, typer.Option(help="File to write the rows to.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each number of tasks.")] = 20.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice if not given.")] = None,
) -> None:
    """Time mtl_backward and jac_to_grad beside TorchJD's, in turn; a wrong gradient gets no time."""
    from fastmtl.cli.listing import bench_autojac

    bench_autojac(
        threads=threads, tasks=tasks, net=net, aggregator=aggregator, batch=batch, size=size, device=device,
        csv_path=csv, seconds=seconds,
    )  # fmt: skip


@_bench.command("list", cls=Command)
def _bench_list() -> None:
    """List the operators that can be measured."""
    from fastmtl.cli.listing import list_benches

    list_benches()
