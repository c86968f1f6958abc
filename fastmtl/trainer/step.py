"""One training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastmtl._loss.base import Complete
from fastmtl.engine.comm import Comm
from fastmtl.engine.context import LearningRates, StepContext, step_losses
from fastmtl.engine.losses import Problem
from fastmtl.engine.methods.base import mean_of_forwards
from fastmtl.engine.model import Labels, preserving_buffers
from fastmtl.errors import UsageError
from fastmtl.support.kinds import Settings, State
from fastmtl.support.profiling import part
from fastmtl.trainer.compile.capture import make_capture
from fastmtl.trainer.compile.engines import engines_to_try
from fastmtl.trainer.compile.trial import Trial
from fastmtl.trainer.guard import FiniteGuard
from fastmtl.trainer.log.records import StepBuffer, StepLosses, StepSignals
from fastmtl.trainer.optim.masking import MaskedOptimizer
from fastmtl.trainer.precision import make_scaler
from fastmtl.trainer.setup.options import StepOptions
from fastmtl.trainer.solve import make_solver
from fastmtl.trainer.tasks import StepTasks, TaskSampler, step_tasks
from fastmtl.trainer.unreached import UnreachedParameters
from fastmtl.trainer.weight_state import WeightState
from fastmtl.weighting import AbsWeighting
from fastmtl.weighting.checks import own_method

__all__ = ["Predictions", "TrainingStep"]

Batches: TypeAlias = Sequence[tuple[object, Labels]]
Predictions: TypeAlias = list[Mapping[str, object]]


_NOTHING: AbstractContextManager[None] = nullcontext()


class Outcome(NamedTuple):
    """What comes of a step.

    Attributes:
        losses: (T,) losses.
        preds: Predictions by task of each batch.
        weights: (T,) weights.
        gram: (T, T) Gram matrix.
        refused: (T,) booleans: the losses the strategy has no use for; None if it takes any.
        gram_error: The error of a Gram matrix that was estimated, where it was measured.
        by_group: (L, T) weights and (L, T, T) Gram matrices of groups of parameters, where the trainer has made some.
    """

    losses: Tensor
    preds: Predictions
    weights: Tensor | None
    gram: Tensor | None
    refused: Tensor | None = None
    gram_error: Tensor | None = None
    by_group: tuple[Tensor | None, Tensor | None] = (None, None)

    def spread(self, tasks: StepTasks, fill: float) -> Outcome:
        """Return what is of some tasks as of all, ``fill`` for those that are not in the step."""
        if tasks.are_all:
            return self
        losses = tasks.spread(self.losses, fill)
        assert losses is not None
        weights, gram = tasks.spread(self.weights, fill), tasks.spread(self.gram, fill)
        refused = tasks.spread(self.refused, False)
        group_weights, group_grams = (tasks.spread_groups(values, fill) for values in self.by_group)
        return Outcome(losses, self.preds, weights, gram, refused, self.gram_error, (group_weights, group_grams))


class TrainingStep:
    """Runs every step of a run: forward, task gradients, weights, update. Nothing in it waits for the device.

    Args:
        strategy: Network and strategy in one.
        problem: The same model with its losses.
        optimizer: Over all parameters.
        guard: Watches for NaN.
        tell: Told of every compilation.
        hyper: Hyper-parameters of the strategy.
        options: Checked options.
        comm: The processes that each have a part of every batch.
        rates: Returns the learning rates of parameters.

    Attributes:
        engine: What differentiates the losses.
        warmth: Steps run with this engine so far.
        scaler: The loss scale of float16 steps.
        latest: What the last step showed.
        batches: Batches that a step takes: the strategy's samples, or what is accumulated.
    """

    def __init__(
        self,
        strategy: AbsWeighting,
        problem: Problem,
        optimizer: torch.optim.Optimizer,
        guard: FiniteGuard,
        tell: Callable[[str], None],
        hyper: Settings,
        options: StepOptions,
        comm: Comm,
        rates: LearningRates,
    ) -> None:
        self.strategy = strategy
        self.problem = problem
        self.guard = guard
        guard.refusal = strategy.refusal(**hyper)
        guard.weigher = own_method(strategy)
        self.hyper = hyper
        self.options = options
        self.comm = comm
        self.is_foreign = strategy.needs_of_step() == "backward"
        self.samples = 1 if self.is_foreign else strategy.samples
        self.batches = max(self.samples, options.accumulate)
        self.scaler = make_scaler(options.precision, guard.found_inf)
        self.optimizer = MaskedOptimizer(optimizer, self.scaler.masked, skips=options.precision == "fp16")
        self.rates = rates
        self.sampler = TaskSampler(len(problem.tasks), options.tasks_per_step)
        strategy.sum_parts = comm.shard_states(strategy.row_states.values())
        self.weights = WeightState(strategy, hyper, options, comm)
        self.solve = make_solver(strategy, hyper, comm)
        self.trial = Trial(engines_to_try(strategy, problem, hyper, options, tell, comm), tell)
        self.engine = self.trial.engine
        self.unreached = UnreachedParameters(problem, bool(strategy.row_states) or self.engine.keeps_grads)
        self.latest: StepSignals | None = None
        self.capture = make_capture(strategy, optimizer, options, guard.found_inf.device, self.trial, tell)

    @property
    def warmth(self) -> int:
        """Return how many steps have run with this engine."""
        return self.trial.warmth

    def __call__(
        self, batches: Batches, buffer: StepBuffer, present: Sequence[int] | None = None, complete: bool = False
    ) -> tuple[Mapping[str, Tensor], Predictions]:
        """Run one step.

        Args:
            batches: As many as the strategy takes samples, or as are accumulated, each the inputs and the labels by
                task; if multi-input the inputs are by task too.
            buffer: Where losses, weights and Gram matrix are kept for the log.
            present: The tasks that have labels, in order; all if None.
            complete: Whether the labels are known to have no missing entry.

        Returns:
            The losses by task, averaged over the batches, and predictions by task: of the last sample, or of each
            accumulated batch.
        """
        self.engine = self.trial.next_engine()
        self.optimizer.zero_grad(to_none=not self.engine.keeps_grads)
        tasks = self._tasks(present)
        if not tasks.are_all or len(batches) < self.batches:
            self.trial.leave_out()
        losses = self.problem.losses
        known = ((losses[task], gt) for _, labels in batches for task, gt in labels.items() if task in losses)
        with Complete(known) if complete else _NOTHING:
            done = self.capture(partial(self._run, tasks), batches, tasks.are_all)
        self.unreached.look(tasks.names)
        weights, grams = done.by_group
        self.latest = StepSignals(
            losses=done.losses,
            weights=done.weights,
            gram=done.gram,
            gram_error=done.gram_error,
            group_weights=weights,
            group_grams=grams,
        )
        buffer.add(self.latest)
        return StepLosses(tasks.names, tasks.places, done.losses), done.preds

    def _run(self, tasks: StepTasks, batches: Batches) -> Outcome:
        """Run what happens on the device: the whole of a step."""
        if not tasks.places:
            return self._skip()
        ctx = self._context(batches, tasks)
        with self.weights.restricted(tasks) as weights, self.scaler.undoing(weights):
            done = self._gradients(ctx, weights)
            # Finds the overflow that `undoing` goes by.
            self.scaler.unscale(self.optimizer.params(), self.comm.any_shard)
        self._update(tasks, done.spread(tasks, 0.0))
        if self.strategy.looks_back and not self.is_foreign:
            with torch.no_grad(), tasks.alone(self.strategy), self.scaler.undoing(self.weights):
                self.strategy.after_step(self._losses_after(ctx), **self.hyper)
        return done.spread(tasks, torch.nan)

    def _context(self, batches: Batches, tasks: StepTasks) -> StepContext:
        """Return the facts of this step."""
        if self.strategy.steers_adam:
            # A schedule may change it.
            self.strategy.first_decay = float(self.optimizer.optimizer.param_groups[0]["betas"][0])
        return StepContext.of(batches, tasks.names, self.problem, self.comm, self.samples, self.scaler, self.rates)

    def _gradients(self, ctx: StepContext, weights: WeightState) -> Outcome:
        """Fill all ``.grad``."""
        held = weights.held()
        # One VJP is enough, but not where groups of parameters are weighed apart, or several samples.
        known = held if held is not None and held.shared.dim() == 1 and self.samples == 1 else None
        if known is not None:
            self.trial.leave_out()
        jacobian = self.engine.differentiate(ctx, known)
        decided = weights.accept(self.solve(jacobian), ctx.scaling) if held is None else held
        jacobian.write_grads(decided)
        refused = self.strategy.refused(jacobian.losses, **self.hyper)
        shown = decided.reported, decided.gram
        by_group = (None, None) if self.strategy.grouping is None else (decided.by_group, decided.grams)
        return Outcome(jacobian.losses, jacobian.preds, *shown, refused, jacobian.gram_error, by_group)

    def _update(self, tasks: StepTasks, done: Outcome) -> None:
        """Let the optimizer use the gradients, unless something was not finite."""
        with part("optimizer"), tasks.keeping(self.optimizer.optimizer, self.strategy):
            self.comm.reshard()
            self.guard.watch(done.losses, *self.scaler.watched(done.gram, done.weights), done.refused)
            if self.options.clip_grad_norm is not None:
                self.comm.clip_grad_norm(self.options.clip_grad_norm, shared_only=False)
            self.scaler.settle(self.guard.found_inf)
            self.optimizer.step()

    def _losses_after(self, ctx: StepContext) -> Tensor:
        """Return the losses (T,) of a forward pass of each batch, averaged; it leaves no trace in the buffers."""
        with preserving_buffers(self.strategy):
            losses = mean_of_forwards(self.engine.regions, ctx.batches, self.comm)
        return step_losses(self.problem, ctx, losses, self.comm)

    def _tasks(self, present: Sequence[int] | None) -> StepTasks:
        """Return the tasks of this step."""
        names = self.problem.tasks
        if present is not None and self.is_foreign:
            raise UsageError(
                f"A batch has no labels for some tasks, but {self.strategy.strategy_name} is written for all tasks in "
                "every batch."
            )
        return step_tasks(self.comm.agree_on_tasks(present, self.sampler.draw(), len(names)), names)

    def _skip(self) -> Outcome:
        """Count a step without any labels, which changes nothing."""
        nothing = torch.zeros(len(self.problem.tasks), device=self.guard.found_inf.device)
        self.guard.watch(nothing, None, None)
        return Outcome(nothing / 0, [], None, None)

    def state_dict(self) -> State:
        """Return what a resumed run needs."""
        sampling = {"tasks_left": self.sampler.left, "route": self.trial.chosen, "engine": self.engine.state_dict()}
        return self.weights.state_dict() | sampling | self.scaler.state_dict()

    def load_state_dict(self, state: Settings) -> None:
        """Go on where `state_dict` was taken."""
        self.weights.load_state_dict(state)
        # Engines round differently.
        route = state.get("route")
        self.trial.settle("layerwise" if route == "compressed" else route)
        self.engine = self.trial.engine
        self.engine.load_state_dict(state.get("engine", {}))
        self.sampler.left = list(state.get("tasks_left", []))
        self.scaler.load_state_dict(state)
