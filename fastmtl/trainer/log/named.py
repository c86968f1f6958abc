"""Loggers by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastmtl.errors import UsageError
from fastmtl.support.named import Kind, place_of, short_name
from fastmtl.trainer.log.logger import Logger

__all__ = ["LOGGERS", "named_logger"]


def _csv(folder: Path | None) -> Logger:
    from fastmtl.trainer.log.csv_log import CsvLogger

    return CsvLogger((folder or Path()) / "metrics.csv")


def _jsonl(folder: Path | None) -> Logger:
    from fastmtl.trainer.log.jsonl import JsonlLogger

    return JsonlLogger((folder or Path()) / "metrics.jsonl")


def _tensorboard(folder: Path | None) -> Logger:
    from fastmtl.trainer.log.tensorboard import TensorBoardLogger

    return TensorBoardLogger((folder or Path()) / "tensorboard")


def _wandb(folder: Path | None) -> Logger:
    from fastmtl.trainer.log.services import WandbLogger

    return WandbLogger(folder)


def _mlflow(folder: Path | None) -> Logger:
    from fastmtl.trainer.log.services import MlflowLogger

    return MlflowLogger(folder)


# Each is made with the folder of the run, or None without one.
LOGGERS: dict[str, Callable[[Path | None], Logger]] = {
    "csv": _csv,
    "jsonl": _jsonl,
    "mlflow": _mlflow,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}


def named_logger(name: str, folder: Path | None) -> Logger:
    """Return the logger of a name.

    Args:
        name: One of ``LOGGERS``, of an entry point of the group ``fastmtl.loggers``, or ``module:name`` or
            ``file.py:name`` of what is called with the folder of the run and returns a `Logger`.
        folder: The folder of the run.

    Raises:
        UsageError: There is no such logger, it is none, or its package is not installed.
    """
    found = Kind("logger", "fastmtl.loggers").find(name, LOGGERS)
    made = found.value(folder) if callable(found.value) else found.value
    if not isinstance(made, Logger):
        raise UsageError(
            f"{place_of(found.value, found.name)}: the logger {short_name(found.name)} must make a Logger of "
            f"fastmtl.trainer.log.logger, it makes a {type(made).__name__}."
        )
    return made
