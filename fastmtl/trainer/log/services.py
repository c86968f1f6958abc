"""The run in Weights & Biases and in MLflow."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from typing_extensions import override

from fastmtl.errors import UsageError
from fastmtl.support.extras import need
from fastmtl.trainer.log.logger import Logger, RunInfo, StepRecords
from fastmtl.trainer.log.scalars import of_epoch, of_steps

__all__ = ["MlflowLogger", "WandbLogger"]

_PROJECT = "fastmtl"
# MLflow's own limits.
_PARAMS, _VALUE = 100, 500


class _Service(Logger):
    """Sends numbers by tag, which are those of TensorBoard, and the configuration of the run."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = None if folder is None else folder.resolve()
        self._info: RunInfo | None = None

    @override
    def on_start(self, info: RunInfo) -> None:
        self._begin(info, self._config(info))
        self._info = info

    @override
    def on_steps(self, records: StepRecords) -> None:
        if self._info is not None:
            self._send(of_steps(records, self._info), records.first_step + records.count)

    @override
    def on_epoch(
        self, epoch: int, mode: str, losses: dict[str, float], metrics: dict[str, list[float]], seconds: float
    ) -> None:
        if self._info is not None:
            step = (epoch + 1) * self._info.batches_per_epoch
            self._send({**of_epoch(mode, losses, metrics, self._info), "epoch": float(epoch)}, step)

    @override
    def on_end(self, best_epoch: int, best_result: dict[str, list[float]]) -> None:
        if self._info is not None:
            self._end(best_epoch)
            self._info = None

    def _config(self, info: RunInfo) -> dict[str, Any]:
        """Return the settings of the run, where its folder has them."""
        path = None if self.folder is None else self.folder / "config.yaml"
        known = {"weighting": info.weighting, "arch": info.architecture, "epochs": info.epochs, "device": info.device}
        if path is not None and path.is_file():
            known |= yaml.safe_load(path.read_text(encoding="utf-8"))
        return known

    def _name(self, info: RunInfo) -> str:
        return self.folder.name if self.folder is not None else f"{info.architecture}-{info.weighting}"

    def _begin(self, info: RunInfo, config: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _send(self, values: Mapping[str, float], step: int) -> None:
        raise NotImplementedError

    def _end(self, best_epoch: int) -> None:
        raise NotImplementedError


class WandbLogger(_Service):
    """Sends the run to Weights & Biases, as its environment variables say (``WANDB_PROJECT``, ``WANDB_MODE``, ...).

    The project is ``fastmtl`` if none is named. A run that goes on in its folder is the same run there.

    Raises:
        UsageError: wandb is not installed, or refuses the run, as without a login.
    """

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder)
        self._wandb = need("wandb", "loggers", "The logger wandb")
        self._run: Any = None

    @override
    def _begin(self, info: RunInfo, config: Mapping[str, Any]) -> None:
        same = None if self.folder is None else hashlib.sha256(str(self.folder).encode()).hexdigest()[:12]
        try:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=self._name(info),
                id=same,
                resume="allow" if same and info.start_step else None,
                dir=None if self.folder is None else str(self.folder),
                config=dict(config),
                settings=self._wandb.Settings(silent=True, console="off"),
            )
        except self._wandb.errors.Error as error:
            raise UsageError(
                f"wandb refuses the run: {str(error).strip().splitlines()[0]} (WANDB_MODE=offline needs no login)."
            ) from error

    @override
    def _send(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    @override
    def _end(self, best_epoch: int) -> None:
        self._run.summary["best_epoch"] = best_epoch
        self._run.finish()


class MlflowLogger(_Service):
    """Sends the run to MLflow, as its environment variables say (``MLFLOW_TRACKING_URI``, ...).

    Without an address it writes to ``mlruns`` in the folder of the run. The experiment is ``fastmtl`` if none is named.

    Raises:
        UsageError: mlflow is not installed, or its server does not answer.
    """

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder)
        self._mlflow = need("mlflow", "loggers", "The logger mlflow")
        self._client: Any = None
        self._id = ""

    @override
    def _begin(self, info: RunInfo, config: Mapping[str, Any]) -> None:
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if not address:
            # Without this, MLflow refuses folders in favour of a data base that its small package has no driver of.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            address = ((self.folder or Path.cwd()) / "mlruns").resolve().as_uri()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        try:
            self._client = self._mlflow.MlflowClient(tracking_uri=address)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found is not None else self._client.create_experiment(name)
            self._id = self._same_run(experiment) if info.start_step else ""
            if not self._id:
                folder = str(self.folder or "")
                made = self._client.create_run(experiment, run_name=self._name(info), tags={"folder": folder})
                self._id = made.info.run_id
                params = [(key, str(value)[:_VALUE]) for key, value in _flat(config).items()][:_PARAMS]
                kind = self._mlflow.entities.Param
                self._client.log_batch(self._id, params=[kind(key, value) for key, value in params])
        except self._mlflow.exceptions.MlflowException as error:
            raise UsageError(f"mlflow refuses the run: {str(error).strip().splitlines()[0]}") from error

    def _same_run(self, experiment: str) -> str:
        if self.folder is None:
            return ""
        found = self._client.search_runs([experiment], f"tags.folder = '{self.folder}'", max_results=1)
        return found[0].info.run_id if found else ""

    @override
    def _send(self, values: Mapping[str, float], step: int) -> None:
        now, kind = int(time.time() * 1000), self._mlflow.entities.Metric
        metrics = [kind(_allowed(tag), value, now, step) for tag, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    @override
    def _end(self, best_epoch: int) -> None:
        self._client.set_tag(self._id, "best_epoch", best_epoch)
        self._client.set_terminated(self._id)


def _flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return flat


def _allowed(tag: str) -> str:
    """Return a tag in the characters that MLflow allows."""
    return re.sub(r"[^\w/. -]", "_", tag.replace("<", "below ").replace(":", "-"))
