"""`fastmtl export` and `fastmtl predict`: what is trained, outside of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastmtl.cli.spelling import Command

__all__ = ["add_commands"]

_Run = Annotated[Path, typer.Argument(help="Run directory.", metavar="RUN")]
_Checkpoint = Annotated[str, typer.Option(help="best, last, or the path of a checkpoint.")]
_Tasks = Annotated[str, typer.Option(help="Tasks, such as left,right; all if not given.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("export", cls=Command)(_export)
    app.command("predict", cls=Command)(_predict)


def _export(
    run: _Run,
    format: Annotated[str, typer.Option(help="pt2, onnx or safetensors.")] = "pt2",
    out: Annotated[Path | None, typer.Option(help="Folder to write to; RUN/export if not given.")] = None,
    tasks: _Tasks = "",
    parts: Annotated[str, typer.Option(help="whole, or apart: the backbone and each head as a program.")] = "whole",
    checkpoint: _Checkpoint = "best",
) -> None:
    """Export a run's model, with any batch size, and check it against the model's own outputs."""
    from fastmtl.deploy.export import export
    from fastmtl.deploy.model import load

    folder = run / "export" if out is None else out
    model = load(run, checkpoint=checkpoint)
    written = export(model, folder, format=format, tasks=_names(tasks), parts=parts)
    for name, difference in written.items():
        size = (folder / name).stat().st_size
        print(f"{folder / name}: {size / 1e6:.1f} MB, greatest difference from the model {difference:.1g}")


def _predict(
    run: _Run,
    inputs: Annotated[
        Path, typer.Argument(help="Folder of images, an image, a .parquet or a .jsonl file.", metavar="INPUTS")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to write to; RUN/predictions if not given.")] = None,
    tasks: _Tasks = "",
    batch_size: Annotated[int, typer.Option(help="Examples at a time.")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    pictures: Annotated[bool, typer.Option(help="Draw pictures of maps.")] = True,
    checkpoint: _Checkpoint = "best",
) -> None:
    """Predict with a run's model: a line of predictions per example, and pictures of maps."""
    from fastmtl.deploy.model import load
    from fastmtl.deploy.predict import PREDICTIONS, predict

    folder = run / "predictions" if out is None else out
    model = load(run, checkpoint=checkpoint, device=device)
    count, drawn = predict(model, inputs, folder, batch_size=batch_size, tasks=_names(tasks), pictures=pictures)
    if (sampled := model.facts.data.get("negatives")) is not None:
        print(
            f"The probabilities are those of the training data, with a share {sampled['rate']:.4g} of the negatives of "
            f"{sampled['task']}: fastmtl.data.unsampled makes them those of all rows."
        )
    shown = f", {drawn} pictures beside it" if drawn else ""
    print(f"{folder / PREDICTIONS}: predictions for {count} inputs{shown}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
