"""`fastmtl bench`: how fast the operators and training steps are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastmtl.cli.spelling import Command
from fastmtl.errors import UsageError

__all__ = ["bench"]

bench = typer.Typer(help="Measure the operators, each behind a correctness gate.", no_args_is_help=True)


def _use_threads(count: int | None) -> None:
    if count is not None:
        import torch

        torch.set_num_threads(count)


def _end(right: bool) -> None:
    """Exit with code 1 if something of ours is wrong."""
    if not right:
        raise typer.Exit(1)


@bench.command("kernels", cls=Command)
def _kernels(
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
    from fastmtl.benchmarks.runner import run_kernels

    _use_threads(threads)
    rows = run_kernels(op, device, csv, plot, quick)
    _end(all(row["variant"] != "fastmtl" or row["error"] <= row["allowed_error"] for row in rows))


@bench.command("solvers", cls=Command)
def _solvers(
    libmtl: Annotated[
        Path | None, typer.Option(help="Folder of a LibMTL checkout, to measure its solvers too.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="File to write the rows to.")] = None,
) -> None:
    """Time the weighting strategies from one Gram matrix beside LibMTL's and TorchJD's solvers of the same problem."""
    from fastmtl.benchmarks.solvers import run_solvers

    rows = run_solvers(libmtl, csv)
    _end(all(row["library"] != "fastmtl" or "median_us" in row for row in rows))


@bench.command("step", cls=Command)
def _step(
    weighting: Annotated[list[str], typer.Option(help="Strategy to measure; may be repeated.")] = ["MGDA"],  # noqa: B006
    peer: Annotated[list[str] | None, typer.Option(help="libmtl or torchjd; may be repeated.")] = None,
    libmtl: Annotated[Path | None, typer.Option(help="Folder of a LibMTL checkout, for the peer libmtl.")] = None,
    arch: Annotated[str, typer.Option(help="Architecture.")] = "HPS",
    tasks: Annotated[list[int], typer.Option("--tasks", "--t", "-T", help="Number of tasks; may be repeated.")] = [3],  # noqa: B006
    net: Annotated[
        str,
        typer.Option(
            help="resnet18, resnet50 (dilated), mlp (128-512-512-512), tiny (16-32-32), transformer, or nnconv (QM9's)."
        ),
    ] = "resnet18",
    batch: Annotated[int | None, typer.Option(help="Rows of the batch; 32, or the recipe's, if not given.")] = None,
    size: Annotated[str, typer.Option(help="Height and width of the images, as 64 or 288x384.")] = "64",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16, of our step alone.")] = "fp32",
    compile: Annotated[bool, typer.Option("--compile", help="Measure our step compiled too.")] = False,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Measure our step captured too.")] = False,
    vjps: Annotated[
        list[str] | None, typer.Option(help="Measure our step with this way too, as layerwise; may be repeated.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="File to write the rows to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to draw, time over the number of tasks.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each strategy and number of tasks.")] = 20.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice if not given.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Measure the network and batch of this recipe, in place of --net and its shape.")
    ] = None,
    scale: Annotated[str | None, typer.Option(help="Reduction of the recipe, such as small.")] = None,
    dataset_path: Annotated[str | None, typer.Option(help="Folder of the recipe's data set.")] = None,
    script: Annotated[
        list[Path] | None,
        typer.Option(help="Checkout (of LibMTL, FAMO, ParetoMTL or ConFIG) with a script of the recipe to time."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="H100, H200 or A100: print what a step must cost there, and measure nothing.")
    ] = None,
) -> None:
    """Time whole training steps beside their floor, the sum of the losses, LibMTL and TorchJD, all in turn.

    With --recipe qm9 the batch is of noise in the recipe's shape. The other recipes' step stands beside plain torch's,
    on the first batch of their data, and beside their authors' scripts, with a network of their own.

    Those beside ours compute in fp32 whatever --precision says. A step of ours whose update is wrong is not timed; a
    peer whose update is more than 1 % from ours is marked ANOTHER UPDATE.
    """
    if model is not None:
        from fastmtl.benchmarks.model import print_model

        print_model(model, net, tasks, batch or 32, size, precision)
        return
    from fastmtl.benchmarks.recipe import SHAPES, run_recipe_step
    from fastmtl.benchmarks.step import run_step

    _use_threads(threads)
    if script and (recipe is None or recipe in SHAPES):
        raise UsageError(f"--script needs --recipe with a recipe other than {', '.join(SHAPES)}, got {recipe}.")
    if recipe in SHAPES:
        net, tasks, rows_of_recipe = SHAPES[recipe]
        batch = batch or rows_of_recipe
    elif recipe is not None:
        run_recipe_step(
            recipe, weighting, scripts=script or [], scale=scale, batch=batch, dataset_path=dataset_path,
            device=device, csv_path=csv, seconds=seconds,
        )  # fmt: skip
        return
    rows = run_step(
        weighting, peers=peer or [], libmtl=libmtl, arch=arch, tasks=tasks, net=net, batch=batch or 32, size=size,
        device=device, precision=precision, compile=compile, cuda_graph=cuda_graph, vjps=vjps or [], csv_path=csv,
        plot_path=plot, seconds=seconds,
    )  # fmt: skip
    _end(all(not row["library"].startswith("fastmtl") or "median_ms" in row for row in rows))


@bench.command("layers", cls=Command)
def _layers(
    net: Annotated[str, typer.Option(help="resnet18, resnet50 (dilated), mlp, tiny or transformer.")] = "resnet18",
    arch: Annotated[str, typer.Option(help="Architecture.")] = "HPS",
    tasks: Annotated[int, typer.Option("--tasks", "--t", "-T", help="Number of tasks.")] = 3,
    batch: Annotated[int, typer.Option(help="Rows of the batch.")] = 32,
    size: Annotated[str, typer.Option(help="Height and width of the images, as 64 or 288x384.")] = "64",
    width: Annotated[int, typer.Option(min=2, help="Width of the sketches.")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice if not given.")] = None,
) -> None:
    """Hold the costs that choose each layer's way to the Gram matrix against measured times."""
    from fastmtl.benchmarks.layers import run_layers

    _use_threads(threads)
    run_layers(net, arch, tasks, batch, size, width, device)


@bench.command("sketch", cls=Command)
def _sketch(
    net: Annotated[list[str], typer.Option(help="Network; may be repeated.")] = ["resnet18"],  # noqa: B006
    arch: Annotated[str, typer.Option(help="Architecture.")] = "HPS",
    tasks: Annotated[list[int], typer.Option("--tasks", "--t", "-T", help="Number of tasks; may be repeated.")] = [3],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Rows of the batch; may be repeated.")] = [32],  # noqa: B006
    width: Annotated[list[int], typer.Option(min=2, help="Width of the sketches; may be repeated.")] = [32],  # noqa: B006
    size: Annotated[str, typer.Option(help="Height and width of the images, as 64 or 288x384.")] = "64",
    steps: Annotated[int, typer.Option(min=1, help="Steps of training that count.")] = 20,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    csv: Annotated[Path | None, typer.Option(help="File to write the rows to.")] = None,
) -> None:
    """Measure how far Gram matrices from sketches are from the exact ones."""
    from fastmtl.benchmarks.layers import run_sketch

    run_sketch(net, arch, tasks, batch, width, size, steps, device, csv)


@bench.command("overhead", cls=Command)
def _overhead(
    weighting: Annotated[
        list[str] | None, typer.Option(help="Strategy to measure; may be repeated, eight if not given.")
    ] = None,
    peer: Annotated[list[str] | None, typer.Option(help="libmtl or torchjd; may be repeated.")] = None,
    libmtl: Annotated[Path | None, typer.Option(help="Folder of a LibMTL checkout, for the peer libmtl.")] = None,
    tasks: Annotated[list[int], typer.Option("--tasks", "--t", "-T", help="Number of tasks; may be repeated.")] = [  # noqa: B006
        1,
        3,
        8,
        40,
    ],
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    compile: Annotated[bool, typer.Option("--compile", help="Measure our step compiled too.")] = False,
    csv: Annotated[Path | None, typer.Option(help="File to write the rows to.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each strategy and number of tasks.")] = 5.0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Time steps of a tiny network, where the host is what takes time, and count what they launch.

    Beside our step stand plain loops with balance and mtl_backward, a loop that adds the losses up, the floor (the
    forward passes, VJPs and the optimizer in plain torch), LibMTL and TorchJD.
    """
    from fastmtl.benchmarks.overhead import STRATEGIES, run_overhead

    _use_threads(threads)
    rows = run_overhead(
        weighting or STRATEGIES, peers=peer or [], libmtl=libmtl, tasks=tasks, device=device, compile=compile,
        csv_path=csv, seconds=seconds,
    )  # fmt: skip
    _end(all("wrong" not in row for row in rows))


@bench.command("autojac", cls=Command)
def _autojac(
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
    from fastmtl.benchmarks.autojac import run_autojac

    _use_threads(threads)
    rows = run_autojac(
        tasks=tasks,
        net=net,
        aggregator=aggregator,
        batch=batch,
        size=size,
        device=device,
        csv_path=csv,
        seconds=seconds,
    )
    _end(all("median_ms" in row for row in rows))


@bench.command("engine", cls=Command)
def _engine(
    tasks: Annotated[list[int], typer.Option("--tasks", "--t", "-T", help="Number of tasks; may be repeated.")] = [16],  # noqa: B006
    net: Annotated[str, typer.Option(help="resnet18, or mlp (128-512-512-512).")] = "mlp",
    batch: Annotated[int, typer.Option(help="Rows of the batch.")] = 256,
    size: Annotated[int, typer.Option(help="Height and width of the images.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    csv: Annotated[Path | None, typer.Option(help="File to write the rows to.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each number of tasks.")] = 20.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice if not given.")] = None,
) -> None:
    """Time Gram matrices of autogram.Engine beside those of the Jacobian's rows, in turn."""
    from fastmtl.benchmarks.engine import run_engine

    _use_threads(threads)
    rows = run_engine(tasks, net, batch, size, device=device, csv_path=csv, seconds=seconds)
    _end(all("median_ms" in row for row in rows))


@bench.command("sparse", cls=Command)
def _sparse(
    rows: Annotated[list[int], typer.Option(min=1, help="Rows of the table; may be repeated.")] = [1_000_000],  # noqa: B006
    optim: Annotated[
        list[str] | None, typer.Option(help="sgd or sparseadam; may be repeated, both if not given.")
    ] = None,
    weighting: Annotated[
        list[str] | None, typer.Option(help="Strategy to measure; may be repeated, four if not given.")
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="A table with dense gradients, and sgd.")] = False,
    tasks: Annotated[int, typer.Option("--tasks", "--t", "-T", min=1, help="Number of tasks.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Bags of a batch.")] = 512,
    ids: Annotated[int, typer.Option(min=1, help="Ids of a bag.")] = 20,
    dim: Annotated[int, typer.Option(min=1, help="Width of the table.")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    csv: Annotated[Path | None, typer.Option(help="File to write the rows to.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each size and optimizer.")] = 10.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice if not given.")] = None,
) -> None:
    """Time steps of a network with one large embedding table, beside a plain loop and the floor."""
    from fastmtl.benchmarks.sparse import OPTIMIZERS, STRATEGIES, run_sparse

    _use_threads(threads)
    found = run_sparse(
        rows, optim or (("sgd",) if dense else OPTIMIZERS), weighting or STRATEGIES, dense=dense, tasks=tasks,
        batch=batch, ids=ids, dim=dim, device=device, csv_path=csv, seconds=seconds,
    )  # fmt: skip
    _end(all("median_ms" in row for row in found))


@bench.command("list", cls=Command)
def _list() -> None:
    """List the operators that can be measured."""
    from fastmtl.benchmarks.registry import BENCHES

    print("\n".join(BENCHES))
