"""What a trainer is made of, as its rooms see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastmtl.distributed import Peers
from fastmtl.distributed.storage import Storage, make_comm
from fastmtl.engine.halving import Halving, Pair
from fastmtl.engine.losses import Problem
from fastmtl.support.profiling import StepProfiler
from fastmtl.trainer.compile.report import CompileReport
from fastmtl.trainer.guard import FiniteGuard
from fastmtl.trainer.log.logger import Logger
from fastmtl.trainer.log.meter import PerformanceMeter
from fastmtl.trainer.optim.optimizer import learning_rates
from fastmtl.trainer.optim.schedule import Schedule, make_schedule
from fastmtl.trainer.precision import PRECISIONS
from fastmtl.trainer.probe import GramProbe
from fastmtl.trainer.setup.groups import use_groups
from fastmtl.trainer.setup.loaders import to_channels_last, to_device
from fastmtl.trainer.setup.model import TrainedModel
from fastmtl.trainer.setup.options import StepOptions
from fastmtl.trainer.step import TrainingStep
from fastmtl.trainer.stopping import EarlyStopping

__all__ = ["TrainerState"]


class TrainerState(nn.Module):
    """The parts of a trainer; see :class:`fastmtl.Trainer` for the arguments they come from.

    Attributes:
        start: Place in the run where training goes on.
        optimizer_groups: Names of the parameters of each group of the optimizer, as they were when it was made.
        trained_names: Parameters that required gradients when the step was made.
        known_names: All parameters when the optimizer was made.
        skipped: Steps that float16 has skipped, as far as they have been told.
        probe: Computes a Gram matrix per log interval where the strategy needs none; None for none.
        stopping: Each task's best epoch, and what is stopped early.
        told_of_error: Whether it has been told that an estimated Gram matrix is far off.
    """

    task_dict: Mapping[str, Mapping[str, Any]]
    task_name: list[str]
    task_num: int
    weighting: str
    architecture: str
    multi_input: bool
    channels_last: bool
    device: torch.device
    kwargs: dict[str, Any]
    save_path: Path | None
    log_every: int
    checkpoint_every: int | None
    limit_batches: int | None
    peers: Peers
    storage: Storage
    model: TrainedModel
    strategy_params: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    optimizer_groups: list[list[str]]
    schedule: Schedule
    meter: PerformanceMeter
    guard: FiniteGuard
    logger: Logger
    profiler: StepProfiler | None
    stopping: EarlyStopping
    step: TrainingStep
    batch_weight: np.ndarray
    compile_report: CompileReport | None
    start: Mapping[str, Any]
    trained_names: set[str]
    known_names: set[str]
    skipped: int
    told_of_error: bool
    probe: GramProbe | None = None
    _halving: Halving

    @property
    def scheduler(self) -> Any:
        """The learning-rate scheduler; None if there is none, or if it waits for the length of the run."""
        return self.schedule.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.schedule = make_schedule(self.optimizer, None, None if scheduler is None else lambda _: scheduler)

    def process_preds(self, preds: Any, task_name: str | None = None) -> Any:
        """Change the predictions before losses and metrics see them; override it, it does nothing here.

        Args:
            preds: Predictions by task, or, if multi-input, the prediction of ``task_name``.
            task_name: The task, if multi-input.
        """
        return preds

    def split_batch(self, inputs: Any, labels: Mapping[str, Any]) -> tuple[Pair, Pair]:
        """Return two halves of a batch, ``((inputs, labels), (inputs, labels))``, for strategies that look ahead.

        Override it, or give `Trainer` a function, where batches cannot be cut row by row.

        Args:
            inputs: The inputs, on the device; by task if multi-input.
            labels: The labels by task.
        """
        return self._halving(inputs, labels, self.multi_input)

    def prepared(self, batch: tuple[object, object]) -> tuple[Any, Any]:
        """Return a batch on the trainer's device, its images in the memory format asked for."""
        inputs, labels = to_device(batch, self.device)
        return (to_channels_last(inputs) if self.channels_last else inputs), labels

    def common_buffers(self) -> list[torch.Tensor]:
        """Return the buffers that every process has whole."""
        in_pieces = self.model.row_states if self.step.comm.shards_rows else ()
        return [buffer for name, buffer in self.model.named_buffers() if name not in in_pieces]

    def make_step(self, options: StepOptions) -> TrainingStep:
        """Return a step that trains the parameters that require gradients now."""
        self.trained_names = {name for name, param in self.model.named_parameters() if param.requires_grad}
        low_precision = PRECISIONS[options.precision]
        normalises = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules())
        self._halving.least = 2 if normalises else 1
        has_hook = getattr(self.process_preds, "__func__", None) is not TrainerState.process_preds
        problem = Problem(
            self.model,
            self.meter.losses,
            self.process_preds,
            low_precision,
            self.strategy_params,
            has_hook,
            self.split_batch,
        )
        use_groups(self.model, problem.shared_params, options.groups)
        # Rows of representations are small: they are summed as they are.
        exact = options.gram == "exact" and self.model.needs in ("gram", "rows") and not self.model.rep_grad
        comm = make_comm(self.peers, problem, self.storage, exact)
        hyper, tell = self.kwargs["weight_args"], self.logger.on_compile
        return TrainingStep(self.model, problem, self.optimizer, self.guard, tell, hyper, options, comm, self._rates)

    def _rates(self, params: Sequence[nn.Parameter]) -> list[float]:
        """Return the learning rates of parameters of the model."""
        return learning_rates(self.optimizer, self.storage.updated(params))
