"""The trainer: LibMTL's constructor, methods and log lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from fastmtl.architecture import AbsArchitecture
from fastmtl.distributed import join
from fastmtl.distributed.norm import synchronize
from fastmtl.engine.losses import Problem
from fastmtl.engine.regions import CompileReport
from fastmtl.errors import UsageError
from fastmtl.support.memory import keep_freed_memory
from fastmtl.trainer.checkpoint.files import load_model_state, read_checkpoint, set_rng_state
from fastmtl.trainer.checkpoint.state import BEGINNING, resume_run
from fastmtl.trainer.checkpoint.writer import Checkpoints
from fastmtl.trainer.epoch import TrainingEpoch
from fastmtl.trainer.guard import FiniteGuard
from fastmtl.trainer.log.logger import Logger, RunInfo, as_logger
from fastmtl.trainer.log.meter import PerformanceMeter
from fastmtl.trainer.log.profiling import StepProfiler
from fastmtl.trainer.log.records import StepSignals
from fastmtl.trainer.optimizer import make_optimizer, make_scheduler
from fastmtl.trainer.precision import PRECISIONS, set_tf32
from fastmtl.trainer.run.interrupt import DeferredInterrupt
from fastmtl.trainer.setup.checks import (
    check_arguments,
    check_counts,
    check_methods,
    check_tasks,
    check_weighting,
    find_device,
    make_folder,
)
from fastmtl.trainer.setup.loaders import (
    check_loaders,
    count_batches,
    eval_batches,
    generators,
    to_channels_last,
    to_device,
)
from fastmtl.trainer.setup.model import make_model
from fastmtl.trainer.setup.options import StepOptions, check_distributed, check_options
from fastmtl.trainer.step import TrainingStep
from fastmtl.utils import count_parameters
from fastmtl.weighting import AbsWeighting

if TYPE_CHECKING:
    from fastmtl.distributed.sharded import ShardedModel

__all__ = ["Trainer"]


class Trainer(nn.Module):
    """Trains one network on several tasks.

    Args:
        task_dict: For each task a dictionary with ``metrics`` (names), ``metrics_fn`` (an ``AbsMetric``), ``loss_fn``
            (an ``AbsLoss``) and ``weight`` (for each metric 1 if higher is better, else 0). Losses and metrics keep
            sums: an object that several tasks have in common is copied for all but the first.
        weighting: A strategy of ``fastmtl.weighting``, as a class or by name in any case.
        architecture: An architecture of ``fastmtl.architecture``, as a class or by name in any case.
        encoder_class: Called without arguments, returns the encoder.
        decoders: One module per task.
        rep_grad: Balance the gradients of the representation instead of the shared parameters.
        multi_input: Every task has its own inputs, and its own loader.
        optim_param: ``{"optim": "sgd" | "adam" | "adamw" | "adagrad" | "rmsprop", ...}`` with the optimizer's
            arguments.
        scheduler_param: ``{"scheduler": "step" | "cos" | "exp" | "reduce", ...}`` with the scheduler's arguments, or
            None.
        save_path: Folder for ``best.pt`` (the ``state_dict`` of the best epoch) and ``last.pt`` (everything, to go on
            from).
        load_path: A ``best.pt``, or the folder it is in, to start from.
        device: Where to train; the first GPU if there is one, else the CPU.
        compile: Compile the forward and backward passes with ``torch.compile``. ``"auto"`` trains the first steps
            both ways, keeps the faster and says which.
        cuda_graph: Capture the step as a CUDA graph and replay it; where that cannot be, it runs eagerly and says why.
        vjps: How the tasks' gradients go through the shared network: ``"sequential"``, one after the other;
            ``"batched"``, together, by torch's batching rules; ``"compressed"``, for linear layers only as far as the
            Gram matrix needs them; ``"traced"``, compiled in one graph with the forward pass. Where a way cannot be
            gone, they come one after the other. ``"auto"`` trains the first steps each way from 8 tasks on, keeps the
            fastest and says which; below, it is sequential, or traced if the step is compiled, the network not too
            large and without convolutions. Batched and compressed ones leave the trunk eager if ``compile`` is on.
        logger: A `Logger`, or several.
        resume: A ``last.pt``, or the folder it is in, to go on from.
        precision: ``"fp32"``; ``"bf16"`` or ``"fp16"`` compute the network in that dtype where it is safe (autocast),
            with losses, Gram matrix and update in float32; fp16 scales the losses and skips steps that overflow.
        tf32: On CUDA, let float32 products and convolutions round to TF32, or forbid it; torch's settings if None.
        channels_last: Keep images and convolutions in channels-last memory format, which GPUs prefer.
        accumulate: Batches of a step: their gradients, task by task, are averaged over the labels of all of them before
            the strategy sees them. Losses must be means over the entries that `AbsLoss.labelled` tells, and finite
            where there are none.
        clip_grad_norm: Greatest norm of the update's gradients together; applied last.
        update_weights_every: Steps between two solves of a strategy that balances gradients; in between its last
            weights hold, and a step costs one backward pass in place of one per task. Where weights are those of groups
            of parameters or of several batches (GradVac, MoDo, SDMGrad), only the solve is saved.
        weight_momentum: Decay of a moving average of the task weights, which then takes their place (CR-MOGM: Zhou et
            al., "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond", NeurIPS 2022).
        tasks_per_step: Train this many tasks in a step, dealt out so that all come up equally often; the parameters and
            the state of the others stay as they are. All if None.
        gram: With several processes, ``"exact"``: the Gram matrix of the whole batch's gradients, which makes training
            what it is in one process; ``"local"``: the mean of the Gram matrices of the processes' parts, which is less
            traffic and another matrix.
        sync_batch_norm: With several processes, let batch norms take the statistics of the whole batch.
        checkpoint_every: Write ``last.pt`` after this many steps of an epoch too, not only at its end.
        peer_timeout: With several processes, seconds one waits for another before it ends with an error; torch's
            default if None, or what the processes met with if they already have.
        shard: With several processes, ``"fsdp"``: each has a shard of the parameters, gradients and optimizer's state
            (``torch.distributed.fsdp.fully_shard``); ``"none"``: all have all of them.
        log_every: Steps between two reads of the device for the loggers.
        limit_batches: Steps per pass at most.
        profile: File for a Chrome trace of a few warm steps; where they went is printed too.
        kwargs: ``weight_args`` and ``arch_args``, the hyper-parameters of strategy and architecture.

    Raises:
        UsageError: An argument cannot be used as given.
        BackendError: The device is not there.
        CheckpointError: A checkpoint is missing or of another model.

    Example::

        trainer = Trainer(task_dict, "MGDA", "HPS", Encoder, decoders, rep_grad=False, multi_input=False,
                          optim_param={"optim": "adam", "lr": 1e-3}, scheduler_param=None)
        trainer.train(train_loader, test_loader, epochs=10)
    """

    def __init__(
        self,
        task_dict: dict[str, dict[str, Any]],
        weighting: str | type[AbsWeighting],
        architecture: str | type[AbsArchitecture],
        encoder_class: Callable[[], nn.Module],
        decoders: nn.ModuleDict | Mapping[str, nn.Module],
        rep_grad: bool,
        multi_input: bool,
        optim_param: Mapping[str, Any],
        scheduler_param: Mapping[str, Any] | None,
        save_path: str | None = None,
        load_path: str | None = None,
        *,
        device: str | torch.device | None = None,
        compile: bool | Literal["auto"] = False,
        cuda_graph: bool = False,
        vjps: str = "auto",
        logger: Logger | Sequence[Logger] | None = None,
        resume: str | None = None,
        precision: str = "fp32",
        tf32: bool | None = None,
        channels_last: bool = False,
        accumulate: int = 1,
        clip_grad_norm: float | None = None,
        update_weights_every: int = 1,
        weight_momentum: float = 0.0,
        tasks_per_step: int | None = None,
        gram: str = "exact",
        sync_batch_norm: bool = False,
        checkpoint_every: int | None = None,
        peer_timeout: float | None = None,
        shard: str = "none",
        log_every: int = 50,
        limit_batches: int | None = None,
        profile: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_methods(self)
        if type(self).__init__ is Trainer.__init__:
            # A subclass may read further ones from ``self.kwargs``.
            check_arguments(kwargs, Trainer.__init__)
        check_counts(log_every=log_every)
        check_counts(optional=True, checkpoint_every=checkpoint_every, limit_batches=limit_batches)
        self.peers = join(peer_timeout)
        self.device = find_device(device, self.peers)
        if self.device.type == "cpu":
            keep_freed_memory()
        self._leads = self.peers is None or self.peers.leads
        self.sharded: ShardedModel | None = None
        if tf32 is not None:
            set_tf32(tf32, self.device)
        self.task_dict = task_dict
        self.task_name = check_tasks(task_dict, decoders)
        self.task_num = len(self.task_name)
        self.rep_grad = rep_grad
        self.multi_input = multi_input
        self.scheduler_param = scheduler_param
        self.save_path = None if save_path is None else make_folder(save_path)
        self.load_path = load_path
        self.channels_last = channels_last
        self._sync_batch_norm = sync_batch_norm
        self.checkpoint_every = checkpoint_every
        self.log_every = log_every
        self.limit_batches = limit_batches
        self.logger = as_logger(logger if self._leads else None)
        self.kwargs = {"weight_args": {}, "arch_args": {}} | kwargs
        self.batch_weight: np.ndarray = np.zeros((self.task_num, 0, 0))

        with self._one_voice():
            self._prepare_model(weighting, architecture, encoder_class, decoders)
            self.meter = PerformanceMeter(task_dict, peers=self.peers)
            self.meter.display_format()
        self.guard = FiniteGuard(self.device, self.task_name)
        options = StepOptions(
            compile=compile,
            cuda_graph=cuda_graph,
            vjps=vjps,
            precision=precision,
            accumulate=accumulate,
            clip_grad_norm=clip_grad_norm,
            update_weights_every=update_weights_every,
            weight_momentum=weight_momentum,
            tasks_per_step=tasks_per_step,
            gram=gram,
            shard=shard,
        )
        options = check_options(self.model, self.weighting, self.kwargs["weight_args"], options)
        if self.peers is not None:
            check_distributed(self.model, self.weighting, options)
            if sync_batch_norm and compile:
                raise UsageError("sync_batch_norm cannot be combined with compile: its messages cannot be compiled.")
            self.peers.from_leader([*self.model.parameters(), *self.model.buffers()])
            if options.shard == "fsdp":
                from fastmtl.distributed.sharded import ShardedModel

                self.sharded = ShardedModel(self.model, self.peers, self._strategy_params)
        self._prepare_optimizer(optim_param, scheduler_param)
        self.step = self._make_step(options)
        self.compile_report: CompileReport | None = None
        self.skipped = 0
        self.profiler = None if profile is None else StepProfiler(Path(profile), self.device)
        self._start = BEGINNING
        self.checkpoints = Checkpoints(self)
        if resume is not None:
            self._start = resume_run(self, Path(resume))
        if self.peers is not None:
            params = self.model.parameters() if self.sharded is None else self.sharded.kept
            self.peers.from_leader([*params, *self._common_buffers()])
            self.checkpoints.agree(self.peers)

    def _common_buffers(self) -> list[torch.Tensor]:
        """Return the buffers that every process has whole."""
        spread = self.model.row_states if self.step.spread else ()
        return [buffer for name, buffer in self.model.named_buffers() if name not in spread]

    def _one_voice(self) -> AbstractContextManager[None]:
        return nullcontext() if self.peers is None else self.peers.one_voice()

    def _prepare_model(
        self,
        weighting: str | type[AbsWeighting],
        architecture: str | type[AbsArchitecture],
        encoder_class: Callable[[], nn.Module],
        decoders: nn.ModuleDict | Mapping[str, nn.Module],
    ) -> None:
        made = make_model(
            weighting,
            architecture,
            task_name=self.task_name,
            encoder_class=encoder_class,
            decoders=decoders,
            rep_grad=self.rep_grad,
            multi_input=self.multi_input,
            device=self.device,
            given=self.kwargs,
        )
        self.model, rule = made.model, made.rule
        self.weighting, self.architecture = rule.__name__, made.network.__name__
        self._strategy_params = made.strategy_params
        self.model.to(self.device)
        if self._sync_batch_norm and self.peers is not None:
            synchronize(self.model, self.peers)
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if rule.backward is AbsWeighting.backward:
            check_weighting(self.model, rule, self.architecture, self.rep_grad)
        if rule.needs == "losses" and rule.backward is AbsWeighting.backward:
            # Only the losses count, so the graph stays in one piece: cut at the representation, the encoder would get
            # no gradient.
            self.model.rep_grad = False
        if self.load_path is not None:
            path = Path(self.load_path)
            path = path / "best.pt" if path.is_dir() else path
            load_model_state(self.model, read_checkpoint(path, self.device), path)
            print(f"Load Model from - {path}")
        count_parameters(self.model)

    def _make_step(self, options: StepOptions) -> TrainingStep:
        self._trained = {name for name, param in self.model.named_parameters() if param.requires_grad}
        low_precision = PRECISIONS[options.precision]
        problem = Problem(self.model, self.meter.losses, self.process_preds, low_precision, self._strategy_params)
        hyper, tell = self.kwargs["weight_args"], self.logger.on_compile
        return TrainingStep(problem, self.optimizer, self.guard, tell, hyper, options, self.peers, self.sharded)

    def follow_freezing(self) -> None:
        """Train from now on the parameters that require gradients now.

        Raises:
            UsageError: Shared parameters are among them that were not, and something is kept for each of those that
                were.
        """
        params = dict(self.model.named_parameters())
        for param in params.values():
            if not param.requires_grad:
                # An optimizer moves what has a gradient of zeros, by its momentum.
                param.grad = None
        added = {name for name, param in params.items() if param.requires_grad} - self._trained
        if not added:
            return
        shared, kept = set(self.model.get_share_params()), None
        if self.sharded is not None:
            kept = "shards are made"
        elif any(params[name] in shared for name in added):
            if self.model.row_states:
                kept = f"{self.weighting} remembers gradients"
            elif self.model.groups(**self.kwargs["weight_args"]) is not None:
                kept = f"{self.weighting} makes groups"
        if kept is not None:
            raise UsageError(
                f"Parameters require gradients that did not before, and {kept} of those that did: make a new Trainer."
            )
        state = self.step.state_dict()
        self.step = self._make_step(self.step.options)
        self.step.load_state_dict(state)

    def _prepare_optimizer(self, optim_param: Mapping[str, Any], scheduler_param: Mapping[str, Any] | None) -> None:
        params = self.model.parameters() if self.sharded is None else self.sharded.trained
        sparse = any(getattr(module, "sparse", False) for module in self.model.modules())
        self.optimizer = make_optimizer(params, optim_param, self.device, sparse)
        self.scheduler = make_scheduler(self.optimizer, scheduler_param)

    @property
    def latest(self) -> StepSignals | None:
        """Losses, task weights and Gram matrix of the last step, with its norms, cosines and conflict rate; tensors."""
        return self.step.latest

    def process_preds(self, preds: Any, task_name: str | None = None) -> Any:
        """Change the predictions before losses and metrics see them; override it, it does nothing here.

        Args:
            preds: Predictions by task, or, if multi-input, the prediction of ``task_name``.
            task_name: The task, if multi-input.
        """
        return preds

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
        with self._one_voice():
            return self._train(train_dataloaders, test_dataloaders, epochs, val_dataloaders, return_weight)

    def _train(
        self, train_dataloaders: Any, test_dataloaders: Any, epochs: int, val_dataloaders: Any, return_weight: bool
    ) -> Any:
        check_counts(epochs=epochs)
        given = {"train_dataloaders": train_dataloaders, "test_dataloaders": test_dataloaders}
        if val_dataloaders is not None:
            given["val_dataloaders"] = val_dataloaders
        for what, loaders in given.items():
            check_loaders(loaders, self.task_name, self.multi_input, what)
        self.meter.has_val = val_dataloaders is not None
        batches = count_batches(train_dataloaders, self.multi_input, self.limit_batches)
        if self.peers is not None and len(counts := set(self.peers.gather(batches))) > 1:
            raise UsageError(f"train_dataloaders must have the same length in all processes, got {sorted(counts)}.")
        steps = -(-batches // self.step.options.accumulate)
        self.batch_weight = np.zeros((self.task_num, epochs, steps))
        self.model.train_loss_buffer = np.zeros((self.task_num, epochs))
        info = self._run_info(epochs, steps)
        if epochs <= info.start_epoch:
            print(f"Nothing is left to train: {info.start_epoch} of {epochs} epochs are done; raise epochs to go on.")
        # Where a checkpoint left off; a further call begins anew, from the parameters of now.
        start, self._start = self._start, BEGINNING
        self.checkpoints.generators = generators(train_dataloaders, self.multi_input)
        if "rng" in start:
            set_rng_state(start["rng"], self.checkpoints.generators)
        known = np.array(start["train_losses"]).reshape(self.task_num, -1)[:, :epochs]
        self.model.train_loss_buffer[:, : known.shape[1]] = known
        self.model.epochs = epochs
        try:
            self.logger.on_start(info)
            with DeferredInterrupt(tells=self._leads) as interrupt:
                for epoch in range(start["epoch"], epochs):
                    if start["batch"] < steps:
                        TrainingEpoch(self, train_dataloaders, epoch, steps, interrupt).run(start)
                    start = BEGINNING
                    self._evaluate_epoch(val_dataloaders, test_dataloaders, epoch)
                    interrupt.check()
        finally:
            if self.profiler is not None:
                self.profiler.stop()
            self.logger.on_end(self.meter.best_result["epoch"], self.meter.best_result["result"] or {})
        self.meter.display_best_result()
        return self.batch_weight if return_weight else None

    def prepared(self, batch: tuple[Any, Any]) -> tuple[Any, Any]:
        """Return a batch on the trainer's device, its images in the memory format asked for."""
        inputs, labels = to_device(batch, self.device)
        return (to_channels_last(inputs) if self.channels_last else inputs), labels

    def _evaluate_epoch(self, val: Any, test: Any, epoch: int) -> None:
        if val is not None:
            self._evaluate(val, "val", epoch)
        self._evaluate(test, "test", epoch)
        if self.scheduler is not None:
            if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(self.meter.improvement or 0.0)
            else:
                self.scheduler.step()
        self.checkpoints.save_best(epoch)
        self.checkpoints.save_last(epoch + 1, 0, None)

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
        with self._one_voice():
            self._evaluate(test_dataloaders, mode, epoch)
        return self.meter.improvement if return_improvement else None

    @torch.no_grad()
    def _evaluate(self, loaders: Any, mode: str, epoch: int | None) -> None:
        self.model.eval()
        if self.step.exchange is not None:
            self.step.exchange.gather()
        if self.peers is not None:
            # Batch statistics are each process's own; what is saved is the leader's.
            self.peers.from_leader(self._common_buffers())
        self.meter.begin()
        batches = eval_batches(
            loaders, self.task_name, self.multi_input, self.limit_batches, what=f"{mode}_dataloaders"
        )
        for task, inputs, labels in batches:
            inputs, labels = self.prepared((inputs, labels))
            problem = self.step.problem
            if task is None:
                losses, preds = problem.whole(inputs, labels)
                self.meter.update(
                    dict(zip(filter(labels.__contains__, self.task_name), losses, strict=True)), preds, labels
                )
            else:
                loss, pred = problem.single(inputs, labels, task)
                self.meter.update({task: loss}, {task: pred}, {task: labels})
        self.meter.end()
        self.report(mode, epoch)

    def report(self, mode: str, epoch: int | None) -> None:
        """Print and log the scores of the pass that the meter has just ended."""
        self.meter.display(mode, epoch)
        losses = dict(zip(self.task_name, map(float, self.meter.loss_item), strict=True))
        self.logger.on_epoch(epoch or 0, mode, losses, self.meter.results, self.meter.seconds)

    def _run_info(self, epochs: int, steps: int) -> RunInfo:
        return RunInfo(
            task_names=self.task_name,
            metric_names={task: list(self.task_dict[task]["metrics"]) for task in self.task_name},
            epochs=epochs,
            batches_per_epoch=steps,
            weighting=self.weighting,
            architecture=self.architecture,
            device=str(self.device),
            start_epoch=self._start["epoch"],
            start_batch=self._start["batch"],
            save_path=self.save_path,
        )
