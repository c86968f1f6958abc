"""The trainer: LibMTL's constructor, methods and log lines."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmtl.distributed import Alone, join
from fastmtl.distributed.batch_norm import synchronize
from fastmtl.distributed.storage import broadcast_model, make_storage
from fastmtl.engine.halving import Halving, check_split_batch
from fastmtl.support.kinds import State
from fastmtl.support.memory import keep_freed_memory
from fastmtl.support.profiling import StepProfiler
from fastmtl.trainer.arguments import TrainerArguments, takes
from fastmtl.trainer.checkpoint.resume import BEGINNING, resume_run
from fastmtl.trainer.checkpoint.start import start_from
from fastmtl.trainer.checkpoint.writer import Checkpoints
from fastmtl.trainer.evaluation import evaluate
from fastmtl.trainer.guard import FiniteGuard
from fastmtl.trainer.log.logger import as_logger
from fastmtl.trainer.log.meter import PerformanceMeter
from fastmtl.trainer.log.named import named_logger
from fastmtl.trainer.log.records import StepSignals
from fastmtl.trainer.loop import run_epochs
from fastmtl.trainer.optim.tables import tables_in_huge_pages
from fastmtl.trainer.precision import set_tf32
from fastmtl.trainer.setup.checks import (
    check_arguments,
    check_methods,
    check_tasks,
    check_weighting,
    find_device,
    make_folder,
)
from fastmtl.trainer.setup.combinations import check_distributed, check_options, check_stopping
from fastmtl.trainer.setup.loaders import check_loaders
from fastmtl.trainer.setup.model import make_model
from fastmtl.trainer.setup.options import StepOptions
from fastmtl.trainer.setup.tasks import check_reductions, hold_losses, loss_params
from fastmtl.trainer.state import TrainerState
from fastmtl.trainer.stopping import EarlyStopping
from fastmtl.trainer.update import prepare_update
from fastmtl.utils import count_parameters
from fastmtl.weighting.checks import check_rule

__all__ = ["Trainer"]


class Trainer(TrainerState):
    """Trains one network on several tasks.

    Args:
        task_dict: For each task a dictionary with ``metrics`` (names), ``metrics_fn`` (an ``AbsMetric``), ``loss_fn``
            (an ``AbsLoss``, a module or a function of predictions and labels) and ``weight`` (for each metric 1 if
            higher is better, else 0). Losses and metrics keep sums: an object that several tasks have in common is
            copied for all but the first. A loss's parameters are trained with the network, see ``docs/training.md``.
        weighting: A strategy of ``fastmtl.weighting``, as a class or by name in any case.
        architecture: An architecture of ``fastmtl.architecture``, as a class or by name in any case.
        encoder_class: Called without arguments, returns the encoder.
        decoders: One module per task.
        rep_grad: Balance the gradients of the representation instead of the shared parameters.
        multi_input: Every task has its own inputs, and its own loader.
        optim_param: ``{"optim": name or class, ...}``, of ``torch.optim`` in any case or a class like those, with the
            optimizer's arguments; ``"params": {"encoder": {"lr": 1e-4}, ...}`` has those of groups of parameters, by
            the beginning of their names, of which the longest counts. None with ``optimizer``.
        scheduler_param: ``{"scheduler": name or class, ...}`` with the scheduler's arguments, or None: ``step``,
            ``cos``, ``exp``, ``reduce``, ``onecycle``, ``poly``, ``warmup``, or a class of
            ``torch.optim.lr_scheduler`` or like those. ``"per": "epoch"`` or ``"step"`` says when it is stepped,
            ``"warmup": n`` puts a linear warm-up before it. A length it needs and is not given is the run's.
        save_path: Folder for ``best.pt`` (the ``state_dict`` of the best epoch) and ``last.pt`` (everything, to go on
            from).
        load_path: A ``best.pt``, or the folder it is in, to start from; any ``state_dict`` of tensors that fits.
        example_inputs: The inputs of a batch, by task if multi-input, or a function that returns them: needed where
            layers are lazy (``nn.LazyLinear``, ...), whose shapes the first inputs decide.
        split_batch: For strategies that look ahead on halves of a batch (MOML, FORUM, AutoLambda), where batches cannot
            be halved row by row: a function that takes inputs and labels and returns two pairs of them, in place of the
            method of that name.
        optimizer: In place of ``optim_param``: a function of the parameters, a list that has them by name in ``named``,
            that returns the optimizer.
        scheduler: In place of ``scheduler_param``: a function of the optimizer that returns the scheduler; an argument
            named ``total_steps`` gets the length of the run.
        logger: A `Logger`, or several; or their names: ``csv``, ``jsonl``, ``tensorboard``, ``wandb``, ``mlflow``;
            files of these go into ``save_path``.
        resume: A ``last.pt``, or the folder it is in, to go on from.
        profile: File for a Chrome trace of a few warm steps; where they went is printed too.
        weight_args: Hyper-parameters of the strategy.
        arch_args: Hyper-parameters of the architecture.

    Further arguments are the options of :class:`fastmtl.trainer.setup.options.TrainerOptions`, such as ``compile``,
    ``precision`` and ``accumulate``; ``help(Trainer.__init__)`` and ``docs/options.md`` describe them.

    Raises:
        UsageError: An argument cannot be used as given.
        BackendError: The device is not there.
        CheckpointError: A checkpoint is missing or of another model.

    Example::

        trainer = Trainer(task_dict, "MGDA", "HPS", Encoder, decoders, rep_grad=False, multi_input=False,
                          optim_param={"optim": "adam", "lr": 1e-3}, scheduler_param=None)
        trainer.train(train_loader, test_loader, epochs=10)
    """

    @takes(TrainerArguments)
    def __init__(self, arguments: TrainerArguments, further: State) -> None:
        super().__init__()
        self.kwargs: State = {
            "weight_args": arguments.weight_args or {},
            "arch_args": arguments.arch_args or {},
        } | further
        self._meet(arguments)
        with self.peers.printing_on_main_process():
            self._prepare_model(arguments)
        self._prepare_step(arguments)
        self._begin(arguments)

    def _meet(self, arguments: TrainerArguments) -> None:
        """Check the arguments, meet the other processes, and keep what the run needs."""
        check_methods(self)
        if type(self).__init__ is Trainer.__init__:
            # A subclass may read further ones from ``self.kwargs``.
            check_arguments(self.kwargs, Trainer.__init__)
        self.peers = join(arguments.peer_timeout) or Alone()
        self.device = find_device(arguments.device, self.peers)
        if self.device.type == "cpu":
            keep_freed_memory()
        if arguments.tf32 is not None:
            set_tf32(arguments.tf32, self.device)
        self.task_dict = arguments.task_dict
        self.task_name = check_tasks(arguments.task_dict, arguments.decoders)
        self.task_num = len(self.task_name)
        self.rep_grad = arguments.rep_grad
        self.multi_input = arguments.multi_input
        self.scheduler_param = arguments.scheduler_param
        self.save_path = None if arguments.save_path is None else make_folder(arguments.save_path)
        self.load_path = arguments.load_path
        self.channels_last = arguments.channels_last
        self.checkpoint_every = arguments.checkpoint_every
        self.log_every = arguments.log_every
        self.limit_batches = arguments.limit_batches
        self._halving = Halving()
        if arguments.split_batch is not None:
            self.split_batch = arguments.split_batch  # type: ignore[method-assign, assignment]
        check_split_batch(self.split_batch)
        self.logger = as_logger(self._loggers(arguments.logger) if self.peers.is_main_process else None)
        self.batch_weight = np.zeros((self.task_num, 0, 0))
        self.stopping = EarlyStopping(self.task_name, arguments.early_stopping, arguments.task_patience, self.peers)

    def _loggers(self, given: Any) -> Any:
        """Return loggers with those in place of names that are named."""
        if isinstance(given, str):
            return named_logger(given, self.save_path)
        if isinstance(given, list | tuple):
            return [self._loggers(entry) if isinstance(entry, str) else entry for entry in given]
        return given

    def _prepare_model(self, arguments: TrainerArguments) -> None:
        made = make_model(
            arguments.weighting,
            arguments.architecture,
            task_name=self.task_name,
            encoder_class=arguments.encoder_class,
            decoders=arguments.decoders,
            rep_grad=self.rep_grad,
            multi_input=self.multi_input,
            device=self.device,
            hyper=self.kwargs,
            example_inputs=arguments.example_inputs,
        )
        self.model, rule = made.model, made.rule
        self.weighting, self.architecture = rule.__name__, made.network.__name__
        self.strategy_params = made.strategy_params
        self.meter = PerformanceMeter(self.task_dict, peers=self.peers)
        hold_losses(self.model, self.meter.losses)
        self.model.to(self.device)
        if arguments.sync_batch_norm:
            synchronize(self.model, self.peers, bool(arguments.compile))
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        check_rule(rule, self.kwargs["weight_args"])
        needs = rule.needs_of_step()
        if needs != "backward":
            check_weighting(self.model, rule, self.architecture, self.rep_grad)
        if needs == "losses":
            # Only the losses count, so the graph stays in one piece: cut at the representation, the encoder would get
            # no gradient.
            self.model.rep_grad = False
        if self.load_path is not None:
            start_from(self.model, self.strategy_params, Path(self.load_path), arguments.load_strict)
        count_parameters(self.model)
        self.meter.display_format()

    def _prepare_step(self, arguments: TrainerArguments) -> None:
        self.guard = FiniteGuard(self.device, self.task_name)
        options = StepOptions(**{field.name: getattr(arguments, field.name) for field in fields(StepOptions)})
        options = check_options(self.model, self.weighting, self.kwargs["weight_args"], options)
        if self.peers.size > 1:
            options = check_distributed(self.model, self.weighting, options)
        check_stopping(self.model, self.weighting, options, arguments.task_patience)
        check_reductions(self.meter.losses, several=options.accumulate > 1 or self.peers.size > 1)
        broadcast_model(self.model, self.peers)
        self.storage = make_storage(
            self.model, self.peers, [*self.strategy_params, *loss_params(self.model)], options.shard
        )
        self.step = self.make_step(prepare_update(self, options, arguments))

    def _begin(self, arguments: TrainerArguments) -> None:
        """Go on from a checkpoint, if there is one, and let all processes begin with the same."""
        self.compile_report = None
        self.skipped = 0
        self.told_of_error = False
        self.profiler = None if arguments.profile is None else StepProfiler(Path(arguments.profile), self.device)
        self.start = BEGINNING
        self.checkpoints = Checkpoints(self)
        if arguments.resume is not None:
            self.start = resume_run(self, Path(arguments.resume))
        if not self.storage.is_sharded:
            tables_in_huge_pages(self.model, self.optimizer)
        self.peers.broadcast([*self.storage.kept, *self.common_buffers()])
        self.checkpoints.agree(self.peers)

    @property
    def latest(self) -> StepSignals | None:
        """Losses, task weights and Gram matrix of the last step, with its norms, cosines and conflict rate; tensors."""
        return self.step.latest

    def train(
        self,
        train_dataloaders: Any = True,
        test_dataloaders: Any = None,
        epochs: int = 1,
        val_dataloaders: Any = None,
        return_weight: bool = False,
    ) -> Any:
        """Train for ``epochs`` epochs, testing after each.

        Args:
            train_dataloaders: A loader of (inputs, labels by task), or, if multi-input, a dictionary of loaders of
                (inputs, labels) by task. Missing labels are NaN, or the loss's ``ignore_index``; a batch may leave
                out tasks.
            test_dataloaders: The same, of test data.
            epochs: Passes over the training data.
            val_dataloaders: The same, of validation data, which then chooses the best epoch.
            return_weight: Return the task weights of all steps.

        Returns:
            ``(T, epochs, steps)`` task weights if ``return_weight``, else None.

        Raises:
            UsageError: A loader is empty or does not fit the tasks.
            NonFiniteError: A loss or gradient became NaN or infinite.
        """
        if isinstance(train_dataloaders, bool):
            return super().train(train_dataloaders)
        with self.peers.printing_on_main_process():
            run_epochs(self, self.checkpoints, train_dataloaders, test_dataloaders, epochs, val_dataloaders)
        return self.batch_weight if return_weight else None

    def test(
        self, test_dataloaders: Any, epoch: int | None = None, mode: str = "test", return_improvement: bool = False
    ) -> float | None:
        """Evaluate on a data split and print the scores; they stay in ``meter.results`` and ``meter.loss_item``.

        Args:
            test_dataloaders: As in :meth:`train`.
            epoch: The current epoch, if within training.
            mode: ``"test"`` or ``"val"``.
            return_improvement: Return the improvement over the first epoch, or over the baseline.
        """
        check_loaders(test_dataloaders, self.task_name, self.multi_input, f"{mode}_dataloaders")
        with self.peers.printing_on_main_process():
            evaluate(self, test_dataloaders, mode, epoch)
        return self.meter.improvement if return_improvement else None
