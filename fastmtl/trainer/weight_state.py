"""What the strategy makes of the passes of a step: weights, and with them all ``.grad``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.distributed.comm import Exchange
from fastmtl.engine.methods.representation import RepPass
from fastmtl.engine.methods.routes import Pass
from fastmtl.trainer.log.profiling import part
from fastmtl.trainer.precision import LossScaler
from fastmtl.trainer.setup.options import StepOptions
from fastmtl.trainer.tasks import narrowed, write_back
from fastmtl.weighting import Weights

__all__ = ["Balancer"]


class Balancer:
    """Shows losses and gradients to the strategy, writes ``.grad``, and keeps what holds from step to step.

    Args:
        model: Network and strategy.
        hyper: Hyper-parameters of the strategy.
        options: Checked options.
        scaler: The loss scale, which all gradients carry.
        exchange: The other processes, if there are any.

    Attributes:
        held: The weights of the last solve, where they hold for several steps.
        average: The moving averages of the weights, of the shared parameters and the heads.
    """

    def __init__(
        self,
        model: Any,
        hyper: Mapping[str, Any],
        options: StepOptions,
        scaler: LossScaler | None,
        exchange: Exchange | None,
    ) -> None:
        self.model = model
        self.hyper = hyper
        self.options = options
        self.scaler = scaler
        self.exchange = exchange
        self.sends = exchange is not None and exchange.exact
        self.held: Weights | None = None
        self.average: tuple[Tensor, Tensor | None] | None = None
        self._since_solved = 0
        # Weights of steps of some tasks, as long as no step of all tasks has been.
        self._partial: tuple[list[int], Weights, int] | None = None

    def weights_in_force(self) -> Weights | None:
        """Return the weights that hold for this step without a solve, None if it is time for one."""
        if self.held is None or self._since_solved >= self.options.update_weights_every:
            return None
        self._since_solved += 1
        return self.held

    def solve(
        self, passes: Sequence[Pass], losses: Tensor, sent: bool = False, held: Weights | None = None
    ) -> tuple[Weights | None, Tensor | None]:
        """Let the strategy decide and fill all ``.grad``.

        Args:
            passes: One per sample of the strategy.
            losses: What the strategy is shown: (T,), or (samples, T).
            sent: The rows have been handed to the other processes.
            held: Weights that hold in place of a decision.

        Returns:
            The weights, and a (T, T) Gram matrix for the log.
        """
        weights, gram = self._weigh(passes, losses, sent, held)
        if weights is not None and held is None:
            self.write_own(weights)
            if self.options.update_weights_every > 1:
                self.held, self._since_solved = weights, 1
        return weights, gram

    def _weigh(
        self, passes: Sequence[Pass], losses: Tensor, sent: bool, held: Weights | None
    ) -> tuple[Weights | None, Tensor | None]:
        model, done = self.model, passes[-1]
        scale = None if self.scaler is None else self.scaler.scale
        if isinstance(done, RepPass) and model.needs == "reps":
            done.write_heads(None)
            # Masks depend on signs and shares only: the scale of the gradients does not matter.
            mask = partial(model.mask_reps, **self.hyper)
            with part("solver"):
                if self.exchange is None:
                    masked = mask(losses, done.reps, done.grads)
                else:
                    masked = self.exchange.mask(mask, losses, done.reps, done.grads)
            done.send(masked)
            if self.exchange is not None:
                self.exchange.reduce()
            return None, None
        rows = self._rows(passes, sent)
        gram, groups = None, None
        if model.needs == "rows":
            given = rows if scale is None else _divided(rows, scale)
            with part("solver"):
                weights = model.weigh_rows(losses, given, **self.hyper)
            gram = weights.gram
            if scale is not None:
                weights.rows, weights.shared = weights.rows or given, weights.shared * scale
        elif held is not None:
            weights, groups = held, model.groups(**self.hyper)
        elif model.needs == "gram":
            groups = model.groups(**self.hyper)
            with part("gram"):
                if self.exchange is None or isinstance(done, RepPass):
                    gram = ops.gram(rows, groups)
                else:
                    gram = self.exchange.gram(rows, groups)
                if scale is not None:
                    gram = gram / scale.to(gram.dtype) ** 2
            with part("solver"):
                weights = model.weigh(losses, gram, **self.hyper)
            gram = gram.sum(0) if groups is not None else _mean_block(gram, len(passes))
        else:
            with part("solver"):
                weights = model.weigh(losses, None, **self.hyper)
        if self.exchange is not None and held is None:
            self.exchange.agree(weights)
        if self.options.weight_momentum and held is None:
            self.smooth(weights)
        heads = [None] * len(passes) if weights.heads is None else weights.heads.chunk(len(passes))
        with part("combine"):
            for each, own in zip(passes, heads, strict=True):
                each.write_heads(own)
        shared = weights.shared
        if weights.max_norm is not None and gram is not None:
            shared = shared * _cap(shared, gram, weights.max_norm)
        if self.exchange is not None and self.sends:
            self.exchange.write_shared(rows if weights.rows is None else weights.rows, shared, groups)
            return weights, gram
        done.write_shared(shared, rows if weights.rows is None else weights.rows, groups)
        if self.exchange is not None:
            self.exchange.reduce()
        return weights, gram

    def _rows(self, passes: Sequence[Pass], sent: bool) -> list[list[Tensor | None]]:
        """Return the rows of all passes; with several processes, this one's pieces of them."""
        rows = [row for each in passes for row in each.rows or []]
        if self.exchange is None or not rows:
            return rows
        if isinstance(passes[0], RepPass):
            return self.exchange.whole_rows(rows)
        if self.sends:
            rows = rows if sent else [self.exchange.send(row) for row in rows]
            self.exchange.wait()
        return rows

    def smooth(self, weights: Weights) -> None:
        """Put moving averages in the place of the weights."""
        if self.average is None:
            self.average = weights.shared, weights.heads
        shared, heads = self.average
        weights.shared = self._follow(weights.shared, shared)
        if weights.heads is not None and heads is not None:
            weights.heads = self._follow(weights.heads, heads)
        weights.logged = None
        self.average = weights.shared, weights.heads

    def _follow(self, new: Tensor, average: Tensor) -> Tensor:
        # A first step that was taken back leaves no average.
        return torch.lerp(new, torch.where(average.isnan(), new, average), self.options.weight_momentum)

    def learned(self) -> tuple[Weights | None, tuple[Tensor, Tensor | None] | None]:
        """Return what `take_back` goes back to."""
        return self.held, self.average

    def take_back(self, before: tuple[Weights | None, tuple[Tensor, Tensor | None] | None], bad: Tensor) -> None:
        """Forget what a step has decided since ``before`` if the scalar ``bad`` is true."""
        held, average = before
        if self.average is not None and self.average is not average:
            olds = (None, None) if average is None else average
            shared, heads = (_unless(bad, new, old, torch.nan) for new, old in zip(self.average, olds, strict=True))
            assert shared is not None
            self.average = shared, heads
        if self.held is not None and self.held is not held:
            # Without a decision all tasks count alike until the next.
            shared, heads, logged = (
                _unless(bad, getattr(self.held, name), None if held is None else getattr(held, name), 1.0)
                for name in ("shared", "heads", "logged")
            )
            assert shared is not None
            self.held = replace(self.held, shared=shared, heads=heads, logged=logged)

    def write_own(self, weights: Weights) -> None:
        """Write the gradients of the strategy's own parameters."""
        for param, grad in weights.own_grads.items():
            factor = None if self.scaler is None else self.scaler.scale
            self.model.get_parameter(param).grad = grad if factor is None else grad * factor

    @contextmanager
    def narrowed(self, tasks: list[int]) -> Iterator[None]:
        """Let what is held between steps be of some tasks.

        A solve of those alone is not held for steps of all; where no such step has been, it is for steps of the same
        tasks.
        """
        held, average, since = self.held, self.average, self._since_solved
        if held is not None:
            shared, heads = (self._narrowed(each, tasks) for each in (held.shared, held.heads))
            assert shared is not None
            self.held = replace(held, shared=shared, heads=heads, logged=narrowed(held.logged, tasks))
        elif self._partial is not None and self._partial[0] == tasks:
            _, self.held, self._since_solved = self._partial
        if average is not None:
            shared, heads = (narrowed(each, tasks) for each in average)
            assert shared is not None
            self.average = shared, heads
        solves = held is None or since >= self.options.update_weights_every
        try:
            yield
        finally:
            found, part, self.held, self.average = self.held, self.average, held, average
            if held is None and found is not None:
                self._partial = list(tasks), found, self._since_solved
            if solves:
                self._since_solved = since
            if part is not None and average is None:
                # What is not known yet follows the first weights that are.
                shared, heads = (None if each is None else self._spread(each, tasks) for each in part)
                assert shared is not None
                self.average = shared, heads
            elif part is not None and average is not None:
                shared, heads = (self._written(whole, some, tasks) for whole, some in zip(average, part, strict=True))
                assert shared is not None
                self.average = shared, heads

    def _spread(self, weights: Tensor, tasks: list[int]) -> Tensor:
        """Return weights of some tasks, NaN for the others."""
        whole = weights.new_full((*weights.shape[:-1], len(self.model.task_name)), torch.nan)
        write_back(whole, weights, tasks)
        return whole

    def _written(self, whole: Tensor | None, some: Tensor | None, tasks: list[int]) -> Tensor | None:
        """Return weights with other ones of some tasks; the old ones may not be logged yet."""
        if whole is None or some is None:
            return whole
        whole = whole.clone()
        write_back(whole, some, tasks)
        return whole

    def _narrowed(self, weights: Tensor | None, tasks: list[int]) -> Tensor | None:
        """Return the entries of some tasks, sample by sample."""
        if weights is None:
            return None
        found = narrowed(weights.unflatten(-1, (self.model.samples, -1)), tasks)
        assert found is not None
        return found.flatten(-2)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs of the weights held between two solves."""
        kept = None if self.held is None else _kept(self.held)
        partial = None if self._partial is None else (self._partial[0], _kept(self._partial[1]), self._partial[2])
        return {"since_solved": self._since_solved, "held": kept, "average": self.average, "partial": partial}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._since_solved = state["since_solved"]
        self.held = None if state["held"] is None else Weights(**state["held"])
        self.average = state["average"]
        partial = state.get("partial")
        self._partial = None if partial is None else (partial[0], Weights(**partial[1]), partial[2])


def _kept(weights: Weights) -> dict[str, Any]:
    return {name: getattr(weights, name) for name in ("shared", "heads", "logged", "max_norm")}


def _unless(bad: Tensor, new: Tensor | None, old: Tensor | None, start: float) -> Tensor | None:
    """Return ``old`` where ``bad``, ``start`` if there is none, else ``new``."""
    return None if new is None else torch.where(bad, start if old is None else old.to(new), new)


def _divided(rows: Sequence[Sequence[Tensor | None]], scale: Tensor) -> list[list[Tensor | None]]:
    """Return rows that carry the loss scale without it."""
    inverse = scale.reciprocal()
    return [[None if grad is None else grad * inverse.to(grad.dtype) for grad in row] for row in rows]


def _cap(weights: Tensor, gram: Tensor, max_norm: float) -> Tensor:
    """Return the factor, at most 1, that brings the norm of ``sum_t w_t g_t`` down to ``max_norm``."""
    norm = (weights @ gram @ weights).clamp(min=0).sqrt()
    return (max_norm / (norm + 1e-6)).clamp(max=1)


def _mean_block(gram: Tensor, samples: int) -> Tensor:
    """Return the mean of the samples' own (T, T) Gram matrices."""
    size = len(gram) // samples
    return torch.stack([gram[at : at + size, at : at + size] for at in range(0, len(gram), size)]).mean(0)
