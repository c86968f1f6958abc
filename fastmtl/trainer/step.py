"""One training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.trainer.guard import FiniteGuard
from fastmtl.trainer.optimizer import MaskedOptimizer
from fastmtl.trainer.problem import Problem
from fastmtl.trainer.records import StepBuffer
from fastmtl.trainer.regions import Regions
from fastmtl.trainer.routes import choose_route, forward
from fastmtl.trainer.trial import Trial
from fastmtl.weighting import AbsWeighting

__all__ = ["TrainingStep"]


class TrainingStep:
    """Forward, task gradients, weights, update. Nothing in it waits for the device.

    Args:
        problem: The model and its losses.
        optimizer: Over all parameters.
        guard: Watches for NaN.
        compile: Compile the forward and backward passes; ``"auto"`` finds out whether to.
        on_compile: Told of every compilation.
        hyper: Hyper-parameters of the strategy.

    Attributes:
        route: How the gradients are had, compiled or not.
        warmth: Steps run on this route so far.
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: torch.optim.Optimizer,
        guard: FiniteGuard,
        compile: bool | Literal["auto"],
        on_compile: Callable[[str], None],
        hyper: Mapping[str, Any],
    ) -> None:
        self.model: Any = problem.model
        self.optimizer = MaskedOptimizer(optimizer, guard.found_inf)
        self.guard = guard
        self.hyper = hyper
        self.problem = problem
        # A strategy written for LibMTL runs its own backward passes.
        self.legacy = cast(Any, problem.model).backward.__func__ is not AbsWeighting.backward
        self.warmth = 0
        needs_gradients = self.model.needs != "losses"
        routes = [
            choose_route(problem, Regions(problem, compiled, on_compile), needs_gradients)
            for compiled in ((False, True) if compile == "auto" else (bool(compile),))
        ]
        self.trial = Trial(routes, on_compile) if len(routes) > 1 else None
        self.route = routes[0]

    @property
    def compiled(self) -> bool:
        """Whether the route is compiled."""
        return self.route.regions.compiled

    def __call__(self, inputs: Any, labels: Any, buffer: StepBuffer) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Run one step on a batch; return the losses and predictions by task.

        Args:
            inputs: The batch, or one by task if multi-input.
            labels: Labels by task.
            buffer: Where losses, weights and Gram matrix are kept for the log.
        """
        if self.trial is not None:
            self.route = self.trial.next_route()
            self.warmth = 0
            if self.trial.decided:
                self.trial = None
        self.warmth += 1
        self.optimizer.optimizer.zero_grad(set_to_none=not self.legacy)
        losses, preds, weights, gram = (self._legacy if self.legacy else self._differentiate)(inputs, labels)
        self.guard.watch(losses, gram)
        self.optimizer.step()
        buffer.add(losses, weights, gram)
        return dict(zip(self.problem.tasks, losses, strict=True)), preds

    def _differentiate(self, inputs: Any, labels: Any) -> tuple[Tensor, dict[str, Any], Tensor, Tensor | None]:
        done = self.route(inputs, labels)
        gram = None if done.rows is None else ops.gram(done.rows)
        weights = self.model.weigh(done.losses, gram, **self.hyper)
        done.apply(weights.shared)
        logged = weights.shared if weights.logged is None else weights.logged
        return done.losses, done.preds, logged, gram

    def _legacy(self, inputs: Any, labels: Any) -> tuple[Tensor, dict[str, Any], Tensor | None, None]:
        losses, preds = forward(self.problem, self.route.regions, inputs, labels)
        stacked = torch.stack(list(losses))
        weights = self.model.backward(stacked, **self.hyper)
        return stacked.detach(), preds, None if weights is None else torch.as_tensor(weights).to(stacked), None
