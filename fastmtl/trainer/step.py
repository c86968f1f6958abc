"""One training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastmtl.engine.comm import Comm
from fastmtl.engine.context import StepContext, step_losses
from fastmtl.engine.losses import Problem
from fastmtl.engine.methods.base import mean_of_forwards
from fastmtl.engine.model import Labels, keeping_buffers
from fastmtl.errors import UsageError
from fastmtl.support.profiling import part
from fastmtl.trainer.compile.capture import make_capture
from fastmtl.trainer.compile.engines import engines_to_try
from fastmtl.trainer.compile.trial import Trial
from fastmtl.trainer.guard import FiniteGuard
from fastmtl.trainer.log.records import StepBuffer, StepSignals
from fastmtl.trainer.optimizer import MaskedOptimizer
from fastmtl.trainer.precision import make_scaler
from fastmtl.trainer.setup.options import StepOptions
from fastmtl.trainer.solve import make_solver
from fastmtl.trainer.tasks import StepTasks, TaskSampler, step_tasks
from fastmtl.trainer.weight_state import WeightState
from fastmtl.weighting import AbsWeighting

__all__ = ["Predictions", "TrainingStep"]

Batches: TypeAlias = Sequence[tuple[object, Labels]]
Predictions: TypeAlias = list[Mapping[str, object]]
# Losses, predictions by task of each batch, weights and Gram matrix.
Shown: TypeAlias = tuple[Tensor, Predictions, Tensor | None, Tensor | None]


class TrainingStep:
    """Forward, task gradients, weights, update. Nothing in it waits for the device.

    Args:
        strategy: Network and strategy in one.
        problem: The same model with its losses.
        optimizer: Over all parameters.
        guard: Watches for NaN.
        on_compile: Told of every compilation.
        hyper: Hyper-parameters of the strategy.
        options: Checked options.
        comm: The processes that each have a part of every batch.

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
        on_compile: Callable[[str], None],
        hyper: Mapping[str, Any],
        options: StepOptions,
        comm: Comm,
    ) -> None:
        self.strategy = strategy
        self.problem = problem
        self.guard = guard
        self.hyper = hyper
        self.options = options
        self.comm = comm
        self.runs_backward = strategy.needs_of_step() == "backward"
        self.samples = 1 if self.runs_backward else strategy.samples
        self.batches = max(self.samples, options.accumulate)
        self.scaler = make_scaler(options.precision, guard.found_inf)
        self.optimizer = MaskedOptimizer(optimizer, self.scaler.masked)
        self.sampler = TaskSampler(len(problem.tasks), options.tasks_per_step)
        strategy.sum_parts = comm.cut_states(strategy.row_states.values())
        self.weights = WeightState(strategy, hyper, options, comm)
        self.solve = make_solver(strategy, hyper, comm)
        self.trial = Trial(engines_to_try(strategy, problem, hyper, options, on_compile, comm), on_compile)
        self.engine = self.trial.engine
        self.latest: StepSignals | None = None
        self.capture = make_capture(strategy, optimizer, options, guard.found_inf.device, on_compile)

    @property
    def warmth(self) -> int:
        """Return how many steps have run with this engine."""
        return self.trial.warmth

    def __call__(
        self, batches: Batches, buffer: StepBuffer, present: Sequence[int] | None = None
    ) -> tuple[dict[str, Tensor], Predictions]:
        """Run one step.

        Args:
            batches: As many as the strategy takes samples, or as are accumulated, each the inputs and the labels by
                task; if multi-input the inputs are by task too.
            buffer: Where losses, weights and Gram matrix are kept for the log.
            present: The tasks that have labels, in order; all if None.

        Returns:
            The losses by task, averaged over the batches, and predictions by task: of the last sample, or of each
            accumulated batch.
        """
        self.engine = self.trial.next_engine()
        self.optimizer.optimizer.zero_grad(set_to_none=not self.engine.keeps_grads)
        tasks = self._tasks(present)
        if not tasks.are_all or len(batches) < self.batches:
            self.trial.leave_out()
        run = partial(self._run, tasks)
        losses, preds, weights, gram = self.capture(run, batches) if tasks.are_all else run(batches)
        self.latest = StepSignals(losses=losses, weights=weights, gram=gram)
        buffer.add(losses, weights, gram)
        by_task = losses.unbind()
        return {task: by_task[place] for task, place in zip(tasks.names, tasks.places, strict=True)}, preds

    def _run(self, tasks: StepTasks, batches: Batches) -> Shown:
        """Run what happens on the device: the whole of a step."""
        if not tasks.places:
            return self._skip()
        ctx = self._context(batches, tasks)
        with self.weights.restricted(tasks) as state, self.scaler.undoing(state):
            losses, preds, weights, gram = self._gradients(ctx, state)
            self.scaler.unscale(self.strategy.parameters())
        self._update(tasks, losses, gram, weights)
        if self.strategy.looks_back and not self.runs_backward:
            with torch.no_grad(), tasks.alone(self.strategy), self.scaler.undoing(state):
                self.strategy.after_step(self._losses_after(ctx), **self.hyper)
        shown = self._spread(tasks, losses, torch.nan)
        return shown, preds, tasks.spread(weights, torch.nan), tasks.spread(gram, torch.nan)

    def _context(self, batches: Batches, tasks: StepTasks) -> StepContext:
        """Return the facts of this step."""
        lr = self.optimizer.optimizer.param_groups[0]["lr"]
        return StepContext.of(batches, tasks.names, self.problem, self.comm, self.samples, self.scaler, lr)

    def _gradients(self, ctx: StepContext, state: WeightState) -> Shown:
        """Fill all ``.grad``; return losses, predictions, weights and Gram matrix."""
        held = state.held()
        # Groups of parameters have no sum of the losses in common, and samples each have a part of the weights.
        known = held if held is not None and held.shared.dim() == 1 and self.samples == 1 else None
        if known is not None:
            self.trial.leave_out()
        found = self.engine.differentiate(ctx, known)
        weights = state.accept(self.solve(found), ctx.scaling) if held is None else held
        found.write_grads(weights)
        return found.losses, found.preds, weights.reported, weights.gram

    def _update(self, tasks: StepTasks, losses: Tensor, gram: Tensor | None, weights: Tensor | None) -> None:
        """Let the optimizer use the gradients, unless something was not finite."""
        with part("optimizer"), tasks.keeping(self.optimizer.optimizer, self.strategy):
            self.comm.reshard()
            gram, weights = self.scaler.watched(gram, weights)
            self.guard.watch(self._spread(tasks, losses, 0.0), tasks.spread(gram, 0.0), tasks.spread(weights, 0.0))
            if self.options.clip_grad_norm is not None:
                self.comm.clip(self.options.clip_grad_norm, shared_only=False)
            self.scaler.settle(self.guard.found_inf)
            self.optimizer.step()

    def _losses_after(self, ctx: StepContext) -> Tensor:
        """Return the losses (T,) of a forward pass of each batch, averaged; it leaves no trace in the buffers."""
        with keeping_buffers(self.strategy):
            losses = mean_of_forwards(self.engine.regions, ctx.batches, self.comm)
        return step_losses(self.problem, ctx, losses, self.comm)

    def _tasks(self, present: Sequence[int] | None) -> StepTasks:
        """Return the tasks of this step."""
        names = self.problem.tasks
        if present is not None and self.runs_backward:
            raise UsageError(
                f"A batch has no labels for some tasks, but {self.strategy.strategy_name} is written for all tasks in "
                "every batch."
            )
        return step_tasks(self.comm.agree_on_tasks(present, self.sampler.draw(), len(names)), names)

    def _skip(self) -> Shown:
        """Count a step without any labels, which changes nothing."""
        nothing = torch.zeros(len(self.problem.tasks), device=self.guard.found_inf.device)
        self.guard.watch(nothing, None, None)
        return nothing / 0, [], None, None

    @staticmethod
    def _spread(tasks: StepTasks, losses: Tensor, fill: float) -> Tensor:
        spread = tasks.spread(losses, fill)
        assert spread is not None
        return spread

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        own = {"tasks_left": self.sampler.left, "route": self.trial.chosen}
        return self.weights.state_dict() | own | self.scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.weights.load_state_dict(state)
        # Engines round differently.
        self.trial.settle(state.get("route"))
        self.engine = self.trial.engine
        self.sampler.left = list(state["tasks_left"])
        self.scaler.load_state_dict(state)
