"""One pass over the training data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from fastmtl.engine.labels import are_complete, present_tasks
from fastmtl.engine.losses import LabelError
from fastmtl.errors import FastmtlError, UsageError
from fastmtl.support.profiling import part
from fastmtl.trainer.checkpoint.data import TrainingData
from fastmtl.trainer.checkpoint.writer import Checkpoints
from fastmtl.trainer.compile.report import measure_compiled
from fastmtl.trainer.evaluation import report
from fastmtl.trainer.faults import check_labels, of_data_set, unfit_inputs
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.trainer.optim.optimizer import check_optimized, set_mode
from fastmtl.trainer.run.interrupt import DeferredInterrupt
from fastmtl.trainer.setup.loaders import count_batches
from fastmtl.trainer.state import TrainerState
from fastmtl.trainer.step import Predictions

__all__ = ["TrainingEpoch", "follow_freezing"]


# An error of an estimated Gram matrix above this is told.
_COARSE = 0.1


class TrainingEpoch:
    """The steps of an epoch, with their records, checkpoints and interrupts.

    Args:
        trainer: The trainer.
        checkpoints: Its checkpoints.
        data: Its training data.
        index: The epoch, from 0.
        steps: Steps of an epoch.
        interrupt: Holds Ctrl-C back until a step is done.
    """

    def __init__(
        self,
        trainer: TrainerState,
        checkpoints: Checkpoints,
        data: TrainingData,
        index: int,
        steps: int,
        interrupt: DeferredInterrupt,
    ) -> None:
        self._trainer = trainer
        self._checkpoints = checkpoints
        self._data = data
        self._index = index
        self._steps = steps
        self._interrupt = interrupt
        self._buffer = StepBuffer()
        self._last: tuple[Any, Any] | None = None

    def run(self, start: Mapping[str, Any]) -> None:
        """Train from step ``start["batch"]`` on, which is where a checkpoint left off."""
        trainer, steps = self._trainer, self._steps
        follow_freezing(trainer)
        step = trainer.step
        model, meter, profiler = trainer.model, trainer.meter, trainer.profiler
        model.epoch = self._index
        model.train()
        set_mode(trainer.optimizer, training=True)
        if not step.is_foreign:
            model.start_epoch(**trainer.kwargs["weight_args"])
        skip = start["batch"]
        batches = self._batches(start)
        trainer.guard.start(self._index * steps + skip)
        meter.begin()
        meter.go_on(*self._data.loss_sums(start))
        for index in range(skip, steps):
            if profiler is not None and step.trial.settled:
                profiler.before_step(step.warmth)
            with part("step"):
                with part("loader"):
                    fetched = list(islice(batches, step.batches))
                    # Before the copy: on the device, finding out would wait for it.
                    labels = [of_batch for _, of_batch in fetched]
                    complete = all(are_complete(meter.losses, of_batch) for of_batch in labels)
                    present = None if complete else present_tasks(meter.losses, labels)
                    ready = [trainer.prepared(batch) for batch in fetched]
                try:
                    if index == skip:
                        check_labels(meter.losses, labels[0])
                    losses, preds = self._step(ready, present, complete)
                except LabelError as error:
                    raise of_data_set(error, meter.losses, self._data.loaders) from error
                except (RuntimeError, TypeError, ValueError) as error:
                    told = self._told(error, ready[0][0])
                    if told is None:
                        raise
                    raise told from error
                self._last = None if trainer.probe is None else ready[-1]
                trainer.schedule.after_step()
                self._score(losses, preds, ready, fetched)
            if profiler is not None:
                profiler.after_step()
            done = index + 1
            saves = trainer.checkpoint_every is not None and done % trainer.checkpoint_every == 0
            if len(self._buffer) == trainer.log_every or done == steps or saves:
                self._log(done)
            if done < steps:
                if saves:
                    self._checkpoints.save_last(self._index, done)
                self._check_interrupt(done)
        if profiler is not None:
            profiler.finish()
        meter.end()
        refuse_unknown(trainer)
        if self._index == 0:
            _tell_unlabelled(trainer)
        report(trainer, "train", self._index)
        self._keep_losses()
        self._check_interrupt(steps)

    def _batches(self, start: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
        """Return the epoch's batches from step ``start["batch"]`` on."""
        trainer, step = self._trainer, self._trainer.step
        # An epoch's last step accumulates what is left of it.
        total = self._steps * step.batches
        if step.options.accumulate > 1:
            total = count_batches(self._data.loaders, trainer.multi_input, trainer.limit_batches)
        return trainer.stopping.trained(self._data.batches(start, start["batch"] * step.batches, total))

    def _step(
        self, batches: list[tuple[Any, Any]], present: list[int] | None, complete: bool
    ) -> tuple[Mapping[str, Tensor], Predictions]:
        """Run one step; once, when it is compiled and warm, also tell how much of it was."""
        trainer, step = self._trainer, self._trainer.step
        if not step.engine.regions.compiled or trainer.compile_report is not None or step.warmth < 2:
            return step(batches, self._buffer, present, complete)
        results: list[tuple[Mapping[str, Tensor], Predictions]] = []
        report = measure_compiled(
            lambda: results.append(step(batches, self._buffer, present, complete)), step.engine.regions
        )
        trainer.compile_report = report
        trainer.logger.on_compile(str(report))
        return results[0]

    def _score(
        self,
        losses: Mapping[str, Tensor],
        preds: Predictions,
        batches: Sequence[tuple[Any, Any]],
        fetched: Sequence[tuple[Any, Any]],
    ) -> None:
        """Show the meter a step: its batches, also as they were on the host, and what came of them."""
        trainer = self._trainer
        # Of several samples the predictions are those of the last one.
        count = len(batches) if trainer.step.options.accumulate > 1 else 1
        others: Sequence[Any] = [labels for _, labels in batches[:-count]]
        if getattr(trainer.model, "needs", None) == "lookahead":
            # The losses are not those of a batch that was looked ahead on.
            others = []
        scored = zip(batches[-count:], fetched[-count:], strict=True)
        # A step without any label has no predictions.
        for ((_, labels), (_, on_host)), pred in zip(scored, preds or [{}] * count, strict=True):
            trainer.meter.update(losses, pred, labels, on_host, others)

    def _told(self, error: Exception, inputs: Any) -> UsageError | None:
        """Return a sentence on inputs that the encoder cannot read; None for what is told already or is another."""
        if isinstance(error, FastmtlError):
            return None
        return unfit_inputs(self._trainer, inputs, self._data.loaders, error)

    def _keep_losses(self) -> None:
        """Keep the epoch's losses for strategies; a task without any label in it keeps that of the one before."""
        trainer, index = self._trainer, self._index
        losses, seen = trainer.meter.loss_item, trainer.model.train_loss_buffer
        before = seen[:, index - 1] if index else np.ones(trainer.task_num)
        seen[:, index] = np.where(np.isnan(losses), before, losses)

    def _check_interrupt(self, done: int) -> None:
        """Leave a checkpoint of where training was if it was interrupted after ``done`` steps."""
        try:
            self._interrupt.check()
        except KeyboardInterrupt:
            if len(self._buffer):
                self._log(done)
            # Processes are interrupted at different steps, so what they would have to collect is not one state.
            if not self._checkpoints.gathers:
                self._checkpoints.save_last(self._index, done, gather=False)
            raise

    def _log(self, done: int) -> None:
        """Read the records of the steps since the last call, ``done`` of the epoch being done."""
        trainer, index = self._trainer, self._index
        next_step = index * self._steps + done
        records = self._buffer.flush(index, next_step, trainer.step.scaler.logged())
        if trainer.probe is not None and self._last is not None and records.gram is None:
            records.gram = trainer.probe.of_steps(records.count, *self._last)
        if records.weights is not None:
            first = records.first_step - index * self._steps
            trainer.batch_weight[:, index, first : first + records.count] = records.weights.T
        trainer.logger.on_steps(records)
        if records.skipped and records.skipped > trainer.skipped and done == self._steps:
            trainer.skipped = records.skipped
            print(
                f"fp16: {records.skipped} of {next_step} steps so far were skipped, as gradients overflowed; the loss "
                f"scale is {records.loss_scale:g}"
            )
        errors = [] if records.gram_errors is None else records.gram_errors[np.isfinite(records.gram_errors)]
        if len(errors) and max(errors) > _COARSE and not trainer.told_of_error:
            trainer.told_of_error = True
            print(
                f"sketch: the Gram matrix was {100 * max(errors):.0f} % of the gradients' norms off in a step before "
                f"{next_step}; a larger sketch_width makes it more exact"
            )
        trainer.guard.check(self._checkpoints.last_one())


def _tell_unlabelled(trainer: TrainerState) -> None:
    """Name the tasks that had no label in the first epoch, which may be meant or not."""
    # Of tasks that are drawn, some may not have had their turn.
    if not trainer.meter.unlabelled or trainer.step.options.tasks_per_step:
        return
    names = [task for task in trainer.task_name if task in trainer.meter.unlabelled]
    one = len(names) == 1
    print(
        f"No label of {', '.join(names)} was seen in the first epoch: {'the task is' if one else 'the tasks are'} not "
        f"trained, and - stands for {'its' if one else 'their'} losses and scores"
    )


def refuse_unknown(trainer: TrainerState) -> None:
    """Refuse parameters that were not there when the optimizer was made, which would never be trained."""
    # Pruning gives parameters other names, FSDP puts others in their place.
    known, same = trainer.known_names, set(trainer.storage.trained)
    unknown = [name for name, param in trainer.model.named_parameters() if name not in known and param not in same]
    if unknown:
        raise UsageError(
            f"The network has parameters that are not trained, as they were made later than the optimizer: "
            f"{', '.join(unknown[:3])}. Where its first pass makes them, give Trainer example_inputs."
        )


def follow_freezing(trainer: TrainerState) -> None:
    """Train from now on the parameters that require gradients now.

    Raises:
        UsageError: The optimizer lacks some of them; or shared parameters are among them that were not, and something
            is kept for each of those that were.
    """
    params = dict(trainer.model.named_parameters())
    refuse_unknown(trainer)
    for param in params.values():
        if not param.requires_grad:
            # An optimizer moves what has a gradient of zeros, by its momentum.
            param.grad = None
    added = {name for name, param in params.items() if param.requires_grad} - trainer.trained_names
    if not added:
        return
    shared, kept = set(trainer.model.get_share_params()), None
    if trainer.storage.is_sharded:
        kept = "shards are made"
    elif any(params[name] in shared for name in added):
        if trainer.model.row_states:
            kept = f"{trainer.weighting} remembers gradients"
        elif trainer.model.grouping is None and trainer.model.groups(**trainer.kwargs["weight_args"]) is not None:
            kept = f"{trainer.weighting} makes groups"
    if kept is not None:
        raise UsageError(
            f"Parameters require gradients that did not before, and {kept} of those that did: make a new Trainer."
        )
    check_optimized(trainer.optimizer, {name: params[name] for name in sorted(added)}, "The optimizer")
    state = trainer.step.state_dict()
    trainer.step = trainer.make_step(trainer.step.options)
    trainer.step.load_state_dict(state)
