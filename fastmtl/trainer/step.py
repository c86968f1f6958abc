"""One training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.trainer.guard import FiniteGuard
from fastmtl.trainer.lookahead import LookAhead
from fastmtl.trainer.optimizer import MaskedOptimizer
from fastmtl.trainer.problem import Problem
from fastmtl.trainer.records import StepBuffer
from fastmtl.trainer.regions import Regions
from fastmtl.trainer.routes import Pass, RepPass, choose_route, forward
from fastmtl.trainer.sampling import TaskSampler, only, spread
from fastmtl.trainer.trial import Trial
from fastmtl.weighting import AbsWeighting, Weights

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
        update_weights_every: Steps between two solves of a strategy that needs the gradients; the weights of the last
            one hold in between.
        weight_momentum: Decay of a moving average of the weights.
        tasks_per_step: Tasks of a step; all if None.

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
        update_weights_every: int = 1,
        weight_momentum: float = 0.0,
        tasks_per_step: int | None = None,
    ) -> None:
        self.model: Any = problem.model
        self.optimizer = MaskedOptimizer(optimizer, guard.found_inf)
        self.guard = guard
        self.hyper = hyper
        self.problem = problem
        # A strategy written for LibMTL runs its own backward passes.
        rule: Any = problem.model
        self.legacy = rule.backward.__func__ is not AbsWeighting.backward
        self.warmth = 0
        self.samples: int = 1 if self.legacy else rule.samples
        self.update_weights_every = update_weights_every
        self.weight_momentum = weight_momentum
        self.sampler = TaskSampler(len(problem.tasks), tasks_per_step) if tasks_per_step else None
        self._average: tuple[Tensor, Tensor | None] | None = None
        self._since_solved = 0
        self._held: Weights | None = None
        needs_gradients = rule.needs not in ("losses", "lookahead")
        routes = [
            choose_route(problem, Regions(problem, compiled, on_compile), needs_gradients, rule.weighs_heads)
            for compiled in ((False, True) if compile == "auto" else (bool(compile),))
        ]
        self.trial = Trial(routes, on_compile) if len(routes) > 1 else None
        self.route = routes[0]

    @property
    def compiled(self) -> bool:
        """Whether the route is compiled."""
        return self.route.regions.compiled

    def __call__(
        self, batches: Sequence[tuple[Any, Any]], buffer: StepBuffer
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Run one step; return by task the losses, averaged over the samples, and the last batch's predictions.

        Args:
            batches: As many as the strategy takes samples, each the inputs and the labels by task; if multi-input the
                inputs are by task too.
            buffer: Where losses, weights and Gram matrix are kept for the log.
        """
        if self.trial is not None:
            self.route = self.trial.next_route()
            self.warmth = 0
            if self.trial.decided:
                self.trial = None
        self.warmth += 1
        self.optimizer.optimizer.zero_grad(set_to_none=not self.legacy)
        if self.sampler is not None:
            return self._some_tasks(self.sampler.draw(), batches, buffer)
        losses, preds, weights, gram = self._legacy(*batches[0]) if self.legacy else self._differentiate(batches)
        self.guard.watch(losses, gram)
        self.optimizer.step()
        self._look_back(batches)
        buffer.add(losses, weights, gram)
        return dict(zip(self.problem.tasks, losses, strict=True)), preds

    def _some_tasks(
        self, tasks: list[int], batches: Sequence[tuple[Any, Any]], buffer: StepBuffer
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Run the rest of a step of some tasks; the parameters and the state of the others stay as they are."""
        count = len(self.problem.tasks)
        with only(self.problem, tasks):
            losses, preds, weights, gram = self._differentiate(batches)
            self.guard.watch(
                spread(losses, tasks, count, 0.0), None if gram is None else spread(gram, tasks, count, 0.0)
            )
            self.optimizer.step()
            self._look_back(batches)
            found = dict(zip(self.problem.tasks, losses, strict=True))
        seen = [None if each is None else spread(each, tasks, count, torch.nan) for each in (losses, weights, gram)]
        assert seen[0] is not None
        buffer.add(seen[0], seen[1], seen[2])
        return found, preds

    def _look_back(self, batches: Sequence[tuple[Any, Any]]) -> None:
        if self.model.looks_back and not self.legacy:
            with torch.no_grad():
                after, _ = forward(self.problem, self.route.regions, *batches[-1])
                self.model.after_step(torch.stack(list(after)), **self.hyper)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs of the weights held between two solves."""
        held = self._held
        kept = None if held is None else {"shared": held.shared, "heads": held.heads, "max_norm": held.max_norm}
        left = [] if self.sampler is None else self.sampler.left
        return {"since_solved": self._since_solved, "held": kept, "average": self._average, "tasks_left": left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._since_solved = state["since_solved"]
        self._held = None if state["held"] is None else Weights(**state["held"])
        self._average = state["average"]
        if self.sampler is not None:
            self.sampler.left = list(state["tasks_left"])

    def _differentiate(
        self, batches: Sequence[tuple[Any, Any]]
    ) -> tuple[Tensor, dict[str, Any], Tensor | None, Tensor | None]:
        if self._held is not None and self._since_solved < self.update_weights_every:
            self._since_solved += 1
            done = self.route.frozen(*batches[-1], self._held.shared, self._held.heads)
            if self._held.max_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.problem.shared_params, self._held.max_norm)
            return done.losses, done.preds, self._held.shared, None
        if self.model.needs == "lookahead":
            return self._look_ahead(batches)
        passes = [self.route(*batch) for batch in batches]
        weights, gram = self._weigh(passes)
        if weights is not None:
            for param, grad in weights.own_grads.items():
                self.model.get_parameter(param).grad = grad
            if self.update_weights_every > 1:
                self._held, self._since_solved = weights, 1
        logged = None if weights is None else weights.shared if weights.logged is None else weights.logged
        losses = torch.stack([each.losses for each in passes]).mean(0) if len(passes) > 1 else passes[0].losses
        return losses, passes[-1].preds, logged, gram

    def _look_ahead(self, batches: Sequence[tuple[Any, Any]]) -> tuple[Tensor, dict[str, Any], Tensor | None, None]:
        """Let a bilevel strategy look ahead on the first batch; it decides the update or weights for the last batch."""
        lr = self.optimizer.optimizer.param_groups[0]["lr"]
        ahead = LookAhead(self.problem, self.route.regions, batches[0], lr)
        weights = self.model.look_ahead(ahead, **self.hyper)
        if weights.rows is not None:
            for param, grad in zip(ahead.params, ahead.weighted(weights.rows, weights.shared), strict=True):
                param.grad = grad
            return *ahead.seen(), weights.logged, None
        if self.weight_momentum:
            self._smooth(weights)
        done = self.route(*batches[-1])
        done.write_shared(weights.shared)
        return done.losses, done.preds, weights.shared, None

    def _weigh(self, passes: Sequence[Pass]) -> tuple[Weights | None, Tensor | None]:
        """Let the strategy decide and fill all ``.grad``; return the weights and a (T, T) Gram matrix for the log."""
        model, done = self.model, passes[-1]
        if isinstance(done, RepPass) and model.needs == "reps":
            done.write_heads(None)
            done.send(model.mask_reps(done.losses, done.reps, done.grads, **self.hyper))
            return None, None
        losses = done.losses if len(passes) == 1 else torch.stack([each.losses for each in passes])
        rows = [row for each in passes for row in each.rows or []]
        gram, groups = None, None
        if model.needs == "rows":
            weights = model.weigh_rows(losses, rows, **self.hyper)
            gram = weights.gram
        elif model.needs == "gram":
            groups = model.groups(**self.hyper)
            gram = ops.gram(rows, groups)
            weights = model.weigh(losses, gram, **self.hyper)
            gram = gram.sum(0) if groups is not None else _mean_block(gram, len(passes))
        else:
            weights = model.weigh(losses, None, **self.hyper)
        if self.weight_momentum:
            self._smooth(weights)
        heads = [None] * len(passes) if weights.heads is None else weights.heads.chunk(len(passes))
        for each, own in zip(passes, heads, strict=True):
            each.write_heads(own)
        shared = weights.shared
        if weights.max_norm is not None and gram is not None:
            shared = shared * _cap(shared, gram, weights.max_norm)
        done.write_shared(shared, rows if weights.rows is None else weights.rows, groups)
        return weights, gram

    def _smooth(self, weights: Weights) -> None:
        """Put moving averages in the place of the weights."""
        if self._average is None:
            self._average = weights.shared, weights.heads
        shared, heads = self._average
        weights.shared = torch.lerp(weights.shared, shared, self.weight_momentum)
        if weights.heads is not None and heads is not None:
            weights.heads = torch.lerp(weights.heads, heads, self.weight_momentum)
        weights.logged = None
        self._average = weights.shared, weights.heads

    def _legacy(self, inputs: Any, labels: Any) -> tuple[Tensor, dict[str, Any], Tensor | None, None]:
        losses, preds = forward(self.problem, self.route.regions, inputs, labels)
        stacked = torch.stack(list(losses))
        weights = self.model.backward(stacked, **self.hyper)
        return stacked.detach(), preds, None if weights is None else torch.as_tensor(weights).to(stacked), None


def _cap(weights: Tensor, gram: Tensor, max_norm: float) -> Tensor:
    """Return the factor, at most 1, that brings the norm of ``sum_t w_t g_t`` down to ``max_norm``."""
    norm = (weights @ gram @ weights).clamp(min=0).sqrt()
    return (max_norm / (norm + 1e-6)).clamp(max=1)


def _mean_block(gram: Tensor, samples: int) -> Tensor:
    """Return the mean of the samples' own (T, T) Gram matrices."""
    size = len(gram) // samples
    return torch.stack([gram[at : at + size, at : at + size] for at in range(0, len(gram), size)]).mean(0)
