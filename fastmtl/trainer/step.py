"""One training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmtl.distributed import Peers
from fastmtl.distributed.exchange import Exchange
from fastmtl.errors import UsageError
from fastmtl.trainer.balancer import Balancer
from fastmtl.trainer.batches import joined
from fastmtl.trainer.candidates import routes_to_try
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
from fastmtl.trainer.routes import Pass, forward
from fastmtl.trainer.sampling import OWN, TaskSampler, keeping, only, spread
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
        self.exchange: Exchange | None = None
        if peers is not None:
            # Rows of representations are small: they are summed as they are.
            exact = options.gram == "exact" and rule.needs in ("gram", "rows") and not rule.rep_grad
            if sharded is None:
                self.exchange = Exchange(peers, problem.shared_params, problem.own_params, exact)
            else:
                from fastmtl.distributed.sharded_exchange import ShardedExchange

                self.exchange = ShardedExchange(sharded, problem.shared_params, problem.own_params, exact)
            self.exchange.cut_states(rule)
        self.balancer = Balancer(rule, hyper, options, self.scaler, self.exchange)
        routes = routes_to_try(problem, hyper, options, on_compile, alone=peers is None)
        self.trial = Trial(routes, on_compile) if len(routes) > 1 else None
        self._chosen: str | None = None
        self.route = next(iter(routes.values()))
        if self.exchange is not None and self.exchange.exact:
            self.route.stream = self.exchange.stream
        self.capture: StepCapture | None = None
        if options.cuda_graph:
            device = guard.found_inf.device
            reason = reason_against(rule, optimizer, options, self.legacy, device)
            if reason is None:
                self.capture = StepCapture(rule, optimizer, CudaGraph(device), on_compile)
            else:
                on_compile(f"cuda_graph: the step runs eagerly, as {reason}")

    @property
    def _rule_name(self) -> str:
        return type(self.model).__bases__[1].__name__

    @property
    def compiled(self) -> bool:
        """Whether the route is compiled."""
        return self.route.regions.compiled

    @property
    def spread(self) -> bool:
        """Whether each process keeps a part of what the strategy remembers."""
        return self.balancer.sends and bool(self.model.row_states)

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
            if self.trial.chosen is not None:
                self._chosen, self.trial = self.trial.chosen, None
        self.warmth += 1
        self.optimizer.optimizer.zero_grad(set_to_none=not self.legacy)
        tasks = self._tasks(present)
        if self.exchange is not None:
            batches = [self._completed(batch, tasks) for batch in batches]
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
        if self.exchange is not None:
            return self.exchange.agree_on_tasks(present, drawn, len(self.problem.tasks))
        if present is None:
            return drawn
        if self.legacy:
            raise UsageError(
                f"A batch has no labels for some tasks, but {self._rule_name} is written for all tasks in every batch."
            )
        return [task for task in present if drawn is None or task in drawn]

    def _completed(self, batch: tuple[Any, Any], tasks: Sequence[int] | None) -> tuple[Any, Any]:
        """Return a batch with None for the labels that only other processes have."""
        names = self.problem.tasks if tasks is None else [self.problem.tasks[t] for t in tasks]
        return batch[0], {**dict.fromkeys(names), **batch[1]}

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
        before, learned = [getattr(self.model, name).clone() for name in names], self.balancer.learned()
        found = self._differentiate(batches)
        self.scaler.unscale([param.grad for param in self.model.parameters() if param.grad is not None])
        # What a strategy learned from an overflow is taken back.
        bad = self.scaler.found_inf != 0
        for name, old in zip(names, before, strict=True):
            setattr(self.model, name, torch.where(bad, old, getattr(self.model, name)))
        self.balancer.take_back(learned, bad)
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
        with self.balancer.narrowed(tasks), only(self.problem, tasks):
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
            self.problem.weigh_batch(self.exchange, batch[1])

    def _pass(self, batch: tuple[Any, Any], differentiate: Callable[..., Pass] | None = None) -> Pass:
        """Run forward pass and VJPs of a batch, by the route unless another way is given; the losses are all parts'."""
        self._weigh_batch(batch)
        done = (self.route if differentiate is None else differentiate)(*batch)
        if self.exchange is not None:
            done.losses = self.exchange.mean(done.losses)
        return done

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        state = self.balancer.state_dict() | {"tasks_left": [] if self.sampler is None else self.sampler.left}
        state["route"] = self._chosen
        return state if self.scaler is None else state | {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.balancer.load_state_dict(state)
        # Routes round differently.
        settled = None if self.trial is None or state.get("route") is None else self.trial.settle(state["route"])
        if settled is not None:
            self.route, self._chosen, self.trial = settled, state["route"], None
        if self.sampler is not None:
            self.sampler.left = list(state["tasks_left"])
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])

    def _differentiate(
        self, batches: Sequence[tuple[Any, Any]]
    ) -> tuple[Tensor, dict[str, Any], Tensor | None, Tensor | None]:
        held = self.balancer.weights_in_force()
        # Groups of parameters have no sum of the losses in common, and samples each have a part of the weights.
        if held is not None and held.shared.dim() == 1 and self.model.samples == 1:
            return *self._frozen(batches, held), held.reported, None
        if self.model.needs == "lookahead":
            return self._look_ahead(batches)
        if self.model.needs == "losses" and len(batches) > 1:
            return self._accumulate_losses(batches)
        if self.exchange is not None and self.balancer.sends:
            # Rows that will be added up are sent when they are, see Balancer.
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
        shown = losses if self.model.samples > 1 else losses.mean(0)
        weights, gram = self.balancer.solve(passes, shown, self.route.send is not None, held)
        logged = None if weights is None else weights.reported
        return losses.mean(0), preds[-1] if self.model.samples > 1 else joined(preds), logged, gram

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
                    self.balancer.smooth(weights)
            done.write_shared(weights.shared)
            losses.append(done.losses)
            preds.append(done.preds)
        assert weights is not None
        if self.exchange is not None:
            self.exchange.reduce()
        self.balancer.write_own(weights)
        return torch.stack(losses).mean(0), joined(preds), weights.reported, None

    def _look_ahead(self, batches: Sequence[tuple[Any, Any]]) -> tuple[Tensor, dict[str, Any], Tensor | None, None]:
        """Let a bilevel strategy look ahead on the first batch; it decides the update or weights for the last batch."""
        if self.exchange is not None:
            self.exchange.gather()
        lr = self.optimizer.optimizer.param_groups[0]["lr"]
        ahead = LookAhead(self.problem, self.route.regions, batches[0], lr, self.exchange)
        weights = self.model.look_ahead(ahead, **self.hyper)
        if self.exchange is not None:
            self.exchange.agree(weights)
        if weights.rows is not None:
            update = ahead.weighted(weights.rows, weights.shared)
            if self.exchange is not None:
                self.exchange.put(ahead.params, update)
            else:
                for param, grad in zip(ahead.params, update, strict=True):
                    param.grad = grad
            return *ahead.seen(), weights.logged, None
        if self.options.weight_momentum:
            self.balancer.smooth(weights)
        done = self._pass(batches[-1])
        done.write_shared(weights.shared)
        if self.exchange is not None:
            self.exchange.reduce()
        return done.losses, done.preds, weights.shared, None

    def _legacy(self, inputs: Any, labels: Any) -> tuple[Tensor, dict[str, Any], Tensor | None, None]:
        losses, preds = forward(self.problem, self.route.regions, inputs, labels)
        stacked = torch.stack(list(losses))
        with part("VJPs"):
            weights = self.model.backward(stacked, **self.hyper)
        if self.warmth == 1 and self.model.rep_grad and all(p.grad is None for p in self.problem.shared_params):
            raise UsageError(
                f"{self._rule_name} leaves the shared parameters without gradients if rep_grad is True: its backward "
                "must send those of the representation on, as _backward_new_grads does."
            )
        return stacked.detach(), preds, None if weights is None else torch.as_tensor(weights).to(stacked), None
