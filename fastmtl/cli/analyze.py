"""`fastmtl analyze`: which tasks of a run help or hurt each other."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastmtl.cli.build import build_trainer, load_data
from fastmtl.data import find_dataset
from fastmtl.errors import UsageError
from fastmtl.experiments.analysis import Look, look_at, section_of
from fastmtl.experiments.reading import read_run
from fastmtl.experiments.report import page
from fastmtl.trainer.run.config import read_config
from fastmtl.trainer.run.directory import RunDirectory, write_atomically

__all__ = ["analyze"]


def analyze(runs: Sequence[Path], *, out: Path, batches: int, device: str | None) -> None:
    """Run the command, whose options ``fastmtl analyze --help`` describes.

    Raises:
        FastmtlError: No such run, or nothing that could be said of it.
    """
    if batches < 0:
        raise UsageError(f"batches must be at least 0, got {batches}.")
    sections = []
    for path in runs:
        run = read_run(path)
        if run.is_baseline:
            raise UsageError(f"{path} is of STL, which shares nothing between tasks: there is nothing to analyze.")
        section = section_of(run, _look(path, batches, device))
        sections.append(section)
        print(f"{section.title}:")
        for row in section.tables[0].rows:
            print(
                "  "
                + ", ".join(f"{head} {text}".strip() for head, text in zip(section.tables[0].heads, row, strict=True))
            )
        for text in section.text:
            print(f"  {text}")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "analysis.html", page("Which tasks help or hurt each other", sections))
    print(f"Report: {out / 'analysis.html'}")


def _look(path: Path, batches: int, device: str | None) -> Look | None:
    """Return what the checkpoint of a run shows; None without one, or for data that the command cannot load."""
    run = RunDirectory.open(path)
    if not batches or not run.best.exists():
        return None
    config = read_config(run.config)
    try:
        find_dataset(config.dataset)
    except UsageError:
        print(f"{path}: {config.dataset!r} is no data set of the command, so only the log is read.")
        return None
    config = replace(
        config.resolved(),
        load_path=str(run.best),
        compile=False,
        pretrained=False,
        cosines=False,
        precision="fp32",
        device=config.device if device is None else device,
    )
    # The trainer prints its own lines about what it loads.
    with contextlib.redirect_stdout(io.StringIO()):
        config, bundle = load_data(config)
        trainer = build_trainer(config, bundle)
        return look_at(trainer, bundle.train, batches)
