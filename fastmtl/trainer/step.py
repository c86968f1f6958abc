"""One training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmtl import ops
from fastmtl.distributed import Peers
from fastmtl.distributed.exchange import Exchange
from fastmtl.errors import UsageError
from fastmtl.trainer.batches import joined
from fastmtl.trainer.capture import CudaGraph, StepCapture, reason_against
from fastmtl.trainer.guard import FiniteGuard
from fastmtl.trainer.lookahead import LookAhead
from fastmtl.trainer.optimizer import MaskedOptimizer
from fastmtl.trainer.options import StepOptions
from fastmtl.trainer.own import summed
from fastmtl.trainer.precision import LossScaler
from fastmtl.trainer.problem import Problem
from fastmtl.trainer.profiling import part
from fastmtl.trainer.records import StepBuffer, StepSignals
from fastmtl.trainer.regions import Regions
from fastmtl.trainer.routes import Pass, RepPass, choose_route, forward
from fastmtl.trainer.sampling import OWN, TaskSampler, keeping, narrowed, only, spread, write_back
from fastmtl.trainer.trial import Trial
from fastmtl.weighting import AbsWeighting, Weights

if TYPE_CHECKING:
    from fastmtl.distributed.sharded import ShardedModel

__all__ = ["TrainingStep"]


class TrainingStep:
    """Forward, task gradients, weights, update. Nothing in it waits for the device.

    Args:
        problem: The model and its losses.
        optimizer: Over all parameters.
        guard: Watches for NaN.
        on_compile: Told of every compilation.
        hyper: Hyper-parameters of the strategy.
        options: Checked options.
        peers: The processes that each have a part of every batch.
        sharded: The parameters, if each process has a shard of them.

    Attributes:
        route: How the gradients are had, compiled or not.
        warmth: Steps run on this route so far.
        scaler: The loss scale of float16 steps.
        latest: What the last step showed.
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: torch.optim.Optimizer,
        guard: FiniteGuard,
        on_compile: Callable[[str], None],
        hyper: Mapping[str, Any],
        options: StepOptions,
        peers: Peers | None = None,
        sharded: ShardedModel | None = None,
    ) -> None:
        rule: Any = problem.model
        self.model = rule
        self.problem = problem
        self.guard = guard
        self.hyper = hyper
        self.options = options
        self.scaler = LossScaler(guard.found_inf.device) if options.precision == "fp16" else None
        self._masked = guard.found_inf if self.scaler is None else torch.zeros_like(guard.found_inf)
        self.optimizer = MaskedOptimizer(optimizer, self._masked)
        # A strategy written for LibMTL runs its own backward passes.
        self.legacy = rule.backward.__func__ is not AbsWeighting.backward
        self.warmth = 0
        self.latest: StepSignals | None = None
        # Batches that a step takes: the strategy's samples, or what is accumulated.
        self.batches: int = options.accumulate if self.legacy else max(rule.samples, options.accumulate)
        self.sampler = TaskSampler(len(problem.tasks), options.tasks_per_step) if options.tasks_per_step else None
        self._average: tuple[Tensor, Tensor | None] | None = None
        self._since_solved = 0
        self._held: Weights | None = None
        needs_gradients = rule.needs not in ("losses", "lookahead")
        routes = [
            choose_route(problem, Regions(problem, compiled, on_compile), needs_gradients, rule.weighs_heads)
            for compiled in ((False, True) if options.compile == "auto" else (bool(options.compile),))
        ]
        self.exchange: Exchange | None = None
        if peers is not None:
            # Rows of representations are small: they are summed as they are.
            exact = options.gram == "exact" and rule.needs in ("gram", "rows") and not rule.rep_grad
            if sharded is None:
                self.exchange = Exchange(peers, problem.shared_params, problem.own_params, exact)
            else:
                from fastmtl.distributed.sharded_exchange import ShardedExchange

                self.exchange = ShardedExchange(sharded, problem.shared_params, problem.own_params, exact)
                routes[0].stream = self.exchange.stream if exact else None
            self.exchange.cut_states(rule)
        self._sends = self.exchange is not None and self.exchange.exact
        self.trial = Trial(routes, on_compile) if len(routes) > 1 else None
        self.route = routes[0]
        self.capture: StepCapture | None = None
        if options.cuda_graph:
            device = guard.found_inf.device
            reason = reason_against(rule, optimizer, options, self.legacy, device)
            if reason is None:
                self.capture = StepCapture(rule, optimizer, CudaGraph(device), on_compile)
            else:
                on_compile(f"cuda_graph: the step runs eagerly, as {reason}")

    @property
    def compiled(self) -> bool:
        """Whether the route is compiled."""
        return self.route.regions.compiled

    @property
    def spread(self) -> bool:
        """Whether each process keeps a part of what the strategy remembers."""
        return self._sends and bool(self.model.row_states)

    def __call__(
        self, batches: Sequence[tuple[Any, Any]], buffer: StepBuffer, present: Sequence[int] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Run one step.

        Args:
            batches: As many as the strategy takes samples, or as are accumulated, each the inputs and the labels by
                task; if multi-input the inputs are by task too.
            buffer: Where losses, weights and Gram matrix are kept for the log.
            present: The tasks that have labels, in order; all if None.

        Returns:
            By task the losses, averaged over the batches, and the predictions: of the last sample, or of all
            accumulated batches.
        """
        if self.trial is not None:
            self.route = self.trial.next_route()
            self.warmth = 0
            if self.trial.decided:
                self.trial = None
        self.warmth += 1
        self.optimizer.optimizer.zero_grad(set_to_none=not self.legacy)
        tasks = self._tasks(present)
        if tasks is not None:
            return self._some_tasks(tasks, batches, buffer)
        if self.capture is None:
            losses, preds, weights, gram = self._body(batches)
        else:
            losses, preds, *logged = self.capture(self._body, batches)
            # The next replay writes where these are.
            losses = losses.clone()
            weights, gram = (None if each is None else each.clone() for each in logged)
        self._note(buffer, losses, weights, gram)
        return dict(zip(self.problem.tasks, losses, strict=True)), preds

    def _note(self, buffer: StepBuffer, losses: Tensor, weights: Tensor | None, gram: Tensor | None) -> None:
        self.latest = StepSignals(losses=losses, weights=weights, gram=gram)
        buffer.add(losses, weights, gram)

    def _body(self, batches: Sequence[tuple[Any, Any]]) -> tuple[Tensor, dict[str, Any], Tensor | None, Tensor | None]:
        """Run what happens on the device in a step of all tasks."""
        losses, preds, weights, gram = self._gradients(batches)
        self._update(losses, gram, weights)
        self._look_back(batches)
        return losses, preds, weights, gram

    def _tasks(self, present: Sequence[int] | None) -> list[int] | None:
        """Return the tasks of this step if they are not all."""
        drawn = None if self.sampler is None else self.sampler.draw()
        if present is None:
            return drawn
        if self.legacy:
            raise UsageError(
                f"A batch has no labels for some tasks, but {type(self.model).__bases__[1].__name__} is written for all "
                "tasks in every batch."
            )
        return [task for task in present if drawn is None or task in drawn]

    def _update(self, losses: Tensor, gram: Tensor | None, weights: Tensor | None) -> None:
        """Let the optimizer use the gradients, unless something was not finite."""
        # A float16 gradient that overflows is no error: the step is skipped, and the scale falls.
        with part("optimizer"):
            if self.exchange is not None:
                self.exchange.free()
            self.guard.watch(losses, *((gram, weights) if self.scaler is None else (None, None)))
            if self.options.clip_grad_norm is not None:
                self._clip(None, self.options.clip_grad_norm)
            if self.scaler is not None:
                torch.maximum(self.guard.found_inf, self.scaler.found_inf, out=self._masked)
                self.scaler.update()
            self.optimizer.step()

    def _clip(self, params: Sequence[nn.Parameter] | None, max_norm: Any) -> None:
        """Bring the norm of the gradients, of all parameters if None is given, down to ``max_norm``."""
        if self.exchange is not None:
            self.exchange.clip(params, max_norm)
        else:
            nn.utils.clip_grad_norm_(self.model.parameters() if params is None else params, max_norm)

    def _gradients(
        self, batches: Sequence[tuple[Any, Any]]
    ) -> tuple[Tensor, dict[str, Any], Tensor | None, Tensor | None]:
        """Fill all ``.grad``; return losses, predictions, weights and Gram matrix."""
        if self.legacy:
            return self._legacy(*batches[0])
        accumulated = self.model.samples == 1 and len(batches) > 1
        factor = None if self.scaler is None else self.scaler.scale
        if accumulated:
            factor = (torch.ones_like(self.guard.found_inf) if factor is None else factor) / len(batches)
        self.problem.factor = factor
        if self.scaler is None:
            return self._differentiate(batches)
        names = self.model.remembered()
        before = [getattr(self.model, name).clone() for name in names]
        found = self._differentiate(batches)
        self.scaler.unscale([param.grad for param in self.model.parameters() if param.grad is not None])
        # What a strategy learned from an overflow is taken back.
        bad = self.scaler.found_inf != 0
        for name, old in zip(names, before, strict=True):
            setattr(self.model, name, torch.where(bad, old, getattr(self.model, name)))
        return found

    def _some_tasks(
        self, tasks: list[int], batches: Sequence[tuple[Any, Any]], buffer: StepBuffer
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Run the rest of a step of some tasks; the parameters and the state of the others stay as they are."""
        count, names = len(self.problem.tasks), self.problem.tasks
        if not tasks:
            nothing = torch.zeros(count, device=self.guard.found_inf.device)
            self.guard.watch(nothing, None, None)
            self._note(buffer, nothing / 0, None, None)
            return {}, {}
        with self._narrowed(tasks), only(self.problem, tasks):
            losses, preds, weights, gram = self._gradients(batches)
        scale = getattr(self.model, OWN, None)
        watched = [None if each is None else spread(each, tasks, count, 0.0) for each in (losses, gram, weights)]
        assert watched[0] is not None
        with nullcontext() if scale is None else keeping(self.optimizer.optimizer, scale, tasks):
            self._update(watched[0], watched[1], watched[2])
        if self.model.looks_back:
            with only(self.problem, tasks):
                self._look_back(batches)
        seen = [None if each is None else spread(each, tasks, count, torch.nan) for each in (losses, weights, gram)]
        assert seen[0] is not None
        self._note(buffer, seen[0], seen[1], seen[2])
        return dict(zip([names[task] for task in tasks], losses, strict=True)), preds

    @contextmanager
    def _narrowed(self, tasks: list[int]) -> Iterator[None]:
        """Let what is held between steps be of some tasks; a solve of those alone is not held for steps of all."""
        held, average, since = self._held, self._average, self._since_solved
        if held is not None:
            shared, heads = narrowed(held.shared, tasks), narrowed(held.heads, tasks)
            assert shared is not None
            self._held = replace(held, shared=shared, heads=heads)
        if average is not None:
            shared, heads = (narrowed(each, tasks) for each in average)
            assert shared is not None
            self._average = shared, heads
        solves = held is None or since >= self.options.update_weights_every
        try:
            yield
        finally:
            part, self._held, self._average = self._average, held, average
            if solves:
                self._since_solved = since
            if average is not None and part is not None:
                for whole, some in zip(average, part, strict=True):
                    if whole is not None and some is not None:
                        write_back(whole, some, tasks)

    def _look_back(self, batches: Sequence[tuple[Any, Any]]) -> None:
        if not self.model.looks_back or self.legacy:
            return
        with torch.no_grad():
            self.model.after_step(self._mean_losses(batches), **self.hyper)

    def _mean_losses(self, batches: Sequence[tuple[Any, Any]]) -> Tensor:
        """Return the losses (T,) of a forward pass of each batch, averaged."""
        scored = []
        for batch in batches:
            self._weigh_batch(batch)
            losses = torch.stack(list(forward(self.problem, self.route.regions, *batch)[0]))
            scored.append(losses if self.exchange is None else self.exchange.mean(losses))
        return torch.stack(scored).mean(0)

    def _weigh_batch(self, batch: tuple[Any, Any]) -> None:
        """Find this process's share in a batch and have the whole parameters, if there are others."""
        if self.exchange is not None:
            self.exchange.gather()
            self.problem.share = self.exchange.weigh_batch(batch[1], self.problem.tasks, self.model.device)

    def _pass(self, batch: tuple[Any, Any], differentiate: Callable[..., Pass] | None = None) -> Pass:
        """Run forward pass and VJPs of a batch, by the route unless another way is given; the losses are all parts'."""
        self._weigh_batch(batch)
        done = (self.route if differentiate is None else differentiate)(*batch)
        if self.exchange is not None:
            done.losses = self.exchange.mean(done.losses)
        return done

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs of the weights held between two solves."""
        held = self._held
        kept = None if held is None else {"shared": held.shared, "heads": held.heads, "max_norm": held.max_norm}
        left = [] if self.sampler is None else self.sampler.left
        state = {"since_solved": self._since_solved, "held": kept, "average": self._average, "tasks_left": left}
        return state if self.scaler is None else state | {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._since_solved = state["since_solved"]
        self._held = None if state["held"] is None else Weights(**state["held"])
        self._average = state["average"]
        if self.sampler is not None:
            self.sampler.left = list(state["tasks_left"])
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])

    def _differentiate(
        self, batches: Sequence[tuple[Any, Any]]
    ) -> tuple[Tensor, dict[str, Any], Tensor | None, Tensor | None]:
        if self._held is not None and self._since_solved < self.options.update_weights_every:
            self._since_solved += 1
            return *self._frozen(batches, self._held), self._held.shared, None
        if self.model.needs == "lookahead":
            return self._look_ahead(batches)
        if self.model.needs == "losses" and len(batches) > 1:
            return self._accumulate_losses(batches)
        if self.exchange is not None and self._sends:
            # Rows that will be added up are sent when they are, see _rows.
            self.route.send = self.exchange.send if len(batches) == 1 or self.model.samples > 1 else None
        passes = [self._pass(batches[0])]
        all_losses, preds = [passes[0].losses], [passes[0].preds]
        for batch in batches[1:]:
            each = self._pass(batch)
            all_losses.append(each.losses)
            preds.append(each.preds)
            if self.model.samples > 1:
                passes.append(each)
            else:
                passes[0].absorb(each)
        losses = torch.stack(all_losses)
        weights, gram = self._weigh(passes, losses if self.model.samples > 1 else losses.mean(0))
        if weights is not None:
            self._write_own(weights)
            if self.options.update_weights_every > 1:
                self._held, self._since_solved = weights, 1
        logged = None if weights is None else weights.reported
        return losses.mean(0), preds[-1] if self.model.samples > 1 else joined(preds), logged, gram

    def _write_own(self, weights: Weights) -> None:
        """Write the gradients of the strategy's own parameters."""
        for param, grad in weights.own_grads.items():
            factor = None if self.scaler is None else self.scaler.scale
            self.model.get_parameter(param).grad = grad if factor is None else grad * factor

    def _frozen(self, batches: Sequence[tuple[Any, Any]], held: Weights) -> tuple[Tensor, dict[str, Any]]:
        """Fill all ``.grad`` with weights known beforehand."""
        params = [*self.problem.shared_params, *self.problem.own_params]
        losses, preds = [], []
        for batch in batches:
            before = [param.grad for param in params]
            for param in params:
                param.grad = None
            done = self._pass(batch, partial(self.route.frozen, shared=held.shared, heads=held.heads))
            losses.append(done.losses)
            preds.append(done.preds)
            for param, (grad,) in zip(params, summed([[g] for g in before], [[p.grad] for p in params]), strict=True):
                param.grad = grad
        if self.exchange is not None:
            self.exchange.reduce()
        if held.max_norm is not None:
            limit: Any = held.max_norm if self.scaler is None else held.max_norm * self.scaler.scale
            self._clip(self.problem.shared_params, limit)
        return torch.stack(losses).mean(0), joined(preds)

    def _accumulate_losses(
        self, batches: Sequence[tuple[Any, Any]]
    ) -> tuple[Tensor, dict[str, Any], Tensor | None, Tensor | None]:
        """Accumulate the weighted losses' gradients, so that no more than one batch's graph is kept.

        Where the weights depend on the mean losses, a forward pass of all batches comes first.
        """
        known: Tensor | None = None
        if self.model.reads_losses:
            buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
            with torch.no_grad():
                known = self._mean_losses(batches)
                for buffer, value in buffers:
                    buffer.copy_(value)
        weights: Weights | None = None
        losses, preds = [], []
        for batch in batches:
            done = self._pass(batch)
            if weights is None:
                weights = self.model.weigh(done.losses if known is None else known, None, **self.hyper)
                if self.exchange is not None:
                    self.exchange.agree(weights)
                if self.options.weight_momentum:
                    self._smooth(weights)
            done.write_shared(weights.shared)
            losses.append(done.losses)
            preds.append(done.preds)
        assert weights is not None
        if self.exchange is not None:
            self.exchange.reduce()
        self._write_own(weights)
        return torch.stack(losses).mean(0), joined(preds), weights.reported, None

    def _look_ahead(self, batches: Sequence[tuple[Any, Any]]) -> tuple[Tensor, dict[str, Any], Tensor | None, None]:
        """Let a bilevel strategy look ahead on the first batch; it decides the update or weights for the last batch."""
        lr = self.optimizer.optimizer.param_groups[0]["lr"]
        ahead = LookAhead(self.problem, self.route.regions, batches[0], lr)
        weights = self.model.look_ahead(ahead, **self.hyper)
        if weights.rows is not None:
            for param, grad in zip(ahead.params, ahead.weighted(weights.rows, weights.shared), strict=True):
                param.grad = grad
            return *ahead.seen(), weights.logged, None
        if self.options.weight_momentum:
            self._smooth(weights)
        done = self.route(*batches[-1])
        done.write_shared(weights.shared)
        return done.losses, done.preds, weights.shared, None

    def _weigh(self, passes: Sequence[Pass], losses: Tensor) -> tuple[Weights | None, Tensor | None]:
        """Let the strategy decide and fill all ``.grad``; return the weights and a (T, T) Gram matrix for the log."""
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
        rows = self._rows(passes)
        gram, groups = None, None
        if model.needs == "rows":
            given = rows if scale is None else _divided(rows, scale)
            with part("solver"):
                weights = model.weigh_rows(losses, given, **self.hyper)
            gram = weights.gram
            if scale is not None:
                weights.rows, weights.shared = weights.rows or given, weights.shared * scale
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
        if self.exchange is not None:
            self.exchange.agree(weights)
        if self.options.weight_momentum:
            self._smooth(weights)
        heads = [None] * len(passes) if weights.heads is None else weights.heads.chunk(len(passes))
        with part("combine"):
            for each, own in zip(passes, heads, strict=True):
                each.write_heads(own)
        shared = weights.shared
        if weights.max_norm is not None and gram is not None:
            shared = shared * _cap(shared, gram, weights.max_norm)
        if self.exchange is not None and self._sends:
            self.exchange.write_shared(rows if weights.rows is None else weights.rows, shared, groups)
            return weights, gram
        done.write_shared(shared, rows if weights.rows is None else weights.rows, groups)
        if self.exchange is not None:
            self.exchange.reduce()
        return weights, gram

    def _rows(self, passes: Sequence[Pass]) -> list[list[Tensor | None]]:
        """Return the rows of all passes; with several processes, this one's pieces of them."""
        rows = [row for each in passes for row in each.rows or []]
        if self.exchange is None or not rows:
            return rows
        if isinstance(passes[0], RepPass):
            return self.exchange.whole_rows(rows)
        if self._sends:
            rows = rows if self.route.send is not None else [self.exchange.send(row) for row in rows]
            self.exchange.wait()
        return rows

    def _smooth(self, weights: Weights) -> None:
        """Put moving averages in the place of the weights."""
        if self._average is None:
            self._average = weights.shared, weights.heads
        shared, heads = self._average
        weights.shared = torch.lerp(weights.shared, shared, self.options.weight_momentum)
        if weights.heads is not None and heads is not None:
            weights.heads = torch.lerp(weights.heads, heads, self.options.weight_momentum)
        weights.logged = None
        self._average = weights.shared, weights.heads

    def _legacy(self, inputs: Any, labels: Any) -> tuple[Tensor, dict[str, Any], Tensor | None, None]:
        losses, preds = forward(self.problem, self.route.regions, inputs, labels)
        stacked = torch.stack(list(losses))
        with part("VJPs"):
            weights = self.model.backward(stacked, **self.hyper)
        if self.warmth == 1 and self.model.rep_grad and all(p.grad is None for p in self.problem.shared_params):
            raise UsageError(
                f"{type(self.model).__bases__[1].__name__} leaves the shared parameters without gradients if rep_grad is "
                "True: its backward must send those of the representation on, as _backward_new_grads does."
            )
        return stacked.detach(), preds, None if weights is None else torch.as_tensor(weights).to(stacked), None


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
