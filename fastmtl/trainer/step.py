"""One training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmtl.distributed import Peers
from fastmtl.distributed.comm import Exchange
from fastmtl.engine.buffers import keeping_buffers
from fastmtl.engine.gradients import summed
from fastmtl.engine.lookahead import LookAhead
from fastmtl.engine.losses import Problem
from fastmtl.engine.methods.routes import Pass, forward
from fastmtl.errors import UsageError
from fastmtl.trainer.compile.capture import CudaGraph, StepCapture, reason_against
from fastmtl.trainer.compile.methods import routes_to_try
from fastmtl.trainer.compile.trial import Trial
from fastmtl.trainer.guard import FiniteGuard
from fastmtl.trainer.log.profiling import part
from fastmtl.trainer.log.records import StepBuffer, StepSignals
from fastmtl.trainer.optimizer import MaskedOptimizer
from fastmtl.trainer.precision import LossScaler
from fastmtl.trainer.setup.options import StepOptions
from fastmtl.trainer.tasks import OWN, TaskSampler, keeping, only, spread
from fastmtl.trainer.weight_state import Balancer
from fastmtl.weighting import AbsWeighting, Weights

if TYPE_CHECKING:
    from fastmtl.distributed.sharded import ShardedModel

__all__ = ["TrainingStep"]

Batches = Sequence[tuple[Any, Any]]
# Losses, predictions by task of each batch, weights and Gram matrix.
Shown = tuple[Tensor, list[dict[str, Any]], Tensor | None, Tensor | None]


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
        self._shares: list[Tensor | None] = []
        self.sampler = TaskSampler(len(problem.tasks), options.tasks_per_step) if options.tasks_per_step else None
        self.exchange: Exchange | None = None
        if peers is not None:
            # Rows of representations are small: they are summed as they are.
            exact = options.gram == "exact" and rule.needs in ("gram", "rows") and not rule.rep_grad
            params = problem.shared_params, problem.own_params
            if sharded is None:
                self.exchange = Exchange(peers, *params, exact, problem.strategy_params)
            else:
                from fastmtl.distributed.sharded_comm import ShardedExchange

                self.exchange = ShardedExchange(sharded, *params, exact, problem.strategy_params)
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
        self, batches: Batches, buffer: StepBuffer, present: Sequence[int] | None = None
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
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
        if self.trial is not None:
            self.route = self.trial.next_route()
            self.warmth = 0
            if self.trial.chosen is not None:
                self._chosen, self.trial = self.trial.chosen, None
        self.warmth += 1
        self.optimizer.optimizer.zero_grad(set_to_none=not self.legacy)
        tasks = self._tasks(present)
        if tasks is not None or len(batches) < self.batches:
            self._leave_out()
        if self.exchange is not None or len(batches) > 1:
            batches = [self._completed(batch, tasks) for batch in batches]
        if tasks is not None:
            return self._some_tasks(tasks, batches, buffer)
        captured = self._body if self.capture is None else partial(self.capture, self._body)
        losses, preds, weights, gram = captured(batches)
        self._note(buffer, losses, weights, gram)
        return dict(zip(self.problem.tasks, losses, strict=True)), preds

    def _leave_out(self) -> None:
        """Tell the trial that this step says nothing about how long a full one takes."""
        if self.trial is not None:
            self.trial.leave_out()

    def _note(self, buffer: StepBuffer, losses: Tensor, weights: Tensor | None, gram: Tensor | None) -> None:
        self.latest = StepSignals(losses=losses, weights=weights, gram=gram)
        buffer.add(losses, weights, gram)

    def _body(self, batches: Batches) -> Shown:
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
        """Return a batch with None for the labels that only other processes or batches of the step have."""
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

    def _gradients(self, batches: Batches) -> Shown:
        """Fill all ``.grad``; return losses, predictions, weights and Gram matrix."""
        if self.legacy:
            return self._legacy(*batches[0])
        self._shares = self._weigh(batches)
        self.problem.factor = None if self.scaler is None else self.scaler.scale
        with self._unlearning():
            found = self._differentiate(batches)
            if self.scaler is not None:
                self.scaler.unscale([param.grad for param in self.model.parameters() if param.grad is not None])
        return found

    @contextmanager
    def _unlearning(self) -> Iterator[None]:
        """Take back what a strategy learns in the block if the gradients of this step overflow in float16."""
        if self.scaler is None:
            yield
            return
        names = self.model.remembered()
        before, learned = [getattr(self.model, name).clone() for name in names], self.balancer.learned()
        yield
        bad = self.scaler.found_inf != 0
        for name, old in zip(names, before, strict=True):
            setattr(self.model, name, torch.where(bad, old, getattr(self.model, name)))
        self.balancer.take_back(learned, bad)

    def _some_tasks(
        self, tasks: list[int], batches: Batches, buffer: StepBuffer
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Run the rest of a step of some tasks; the parameters and the state of the others stay as they are."""
        count, names = len(self.problem.tasks), self.problem.tasks
        if not tasks:
            nothing = torch.zeros(count, device=self.guard.found_inf.device)
            self.guard.watch(nothing, None, None)
            self._note(buffer, nothing / 0, None, None)
            return {}, []
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

    def _look_back(self, batches: Batches) -> None:
        if not self.model.looks_back or self.legacy:
            return
        with torch.no_grad(), self._unlearning():
            self.model.after_step(self._mean_losses(batches), **self.hyper)

    def _mean_losses(self, batches: Batches) -> Tensor:
        """Return the losses (T,) of a forward pass of each batch, averaged; it leaves no trace in the buffers."""
        if self.exchange is not None:
            self.exchange.gather()
        found = []
        with keeping_buffers(self.model):
            for batch, share in zip(batches, self._shares, strict=True):
                losses, _ = forward(self.problem, self.route.regions, *batch)
                found.append(self._part(torch.stack(list(losses)), share))
        return self._over_batches(torch.stack(found), batches)

    def _over_batches(self, losses: Tensor, batches: Batches) -> Tensor:
        """Return the mean (T,) of losses (n, T) of a step's batches; accumulated ones carry their share already."""
        if self.model.samples == 1:
            return losses.sum(0)
        return self.problem.mean_losses(losses, [labels for _, labels in batches], self.exchange)

    def _weigh(self, batches: Batches) -> list[Tensor | None]:
        """Return for each batch its share (T,), and this process's in it, in the losses of a step."""
        if self.exchange is None and (len(batches) == 1 or self.model.samples > 1):
            return [None] * len(batches)
        labels = [each for _, each in batches]
        # Each sample has rows of its own; accumulated batches make one together.
        of_rows = [[each] for each in labels] if self.model.samples > 1 else [labels]
        shares = [self.problem.shares(each, self.exchange) for each in of_rows]
        if self.exchange is not None:
            self.exchange.share = torch.cat([each.sum(0) for each in shares])
        return list(torch.cat(shares))

    def _pass(
        self, batch: tuple[Any, Any], share: Tensor | None, differentiate: Callable[..., Pass] | None = None
    ) -> Pass:
        """Run forward pass and VJPs of a batch, by the route unless another way is given; losses carry its share."""
        if self.exchange is not None:
            self.exchange.gather()
        self.problem.share = share
        done = (self.route if differentiate is None else differentiate)(*batch)
        done.losses = self._part(done.losses, share)
        return done

    def _part(self, losses: Tensor, share: Tensor | None) -> Tensor:
        """Return the part of a batch, in all processes, in the losses of a step."""
        if share is None:
            return losses
        return self.exchange.mean(losses, share) if self.exchange is not None else (losses * share).to(losses.dtype)

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

    def _differentiate(self, batches: Batches) -> Shown:
        held, samples = self.balancer.weights_in_force(), self.model.samples
        # Groups of parameters have no sum of the losses in common, and samples each have a part of the weights.
        if held is not None and held.shared.dim() == 1 and samples == 1:
            self._leave_out()
            return *self._frozen(batches, held), held.reported, None
        if self.model.needs == "lookahead":
            return self._look_ahead(batches)
        if self.model.needs == "losses" and len(batches) > 1:
            return self._accumulate_losses(batches)
        if self.exchange is not None and self.balancer.sends:
            # Rows that will be added up are sent when they are, see Balancer.
            self.route.send = self.exchange.send if len(batches) == 1 or samples > 1 else None
        passes: list[Pass] = []
        losses, preds = [], []
        for batch, share in zip(batches, self._shares, strict=True):
            done = self._pass(batch, share)
            losses.append(done.losses)
            preds.append(done.preds)
            if not passes or samples > 1:
                passes.append(done)
            else:
                passes[0].absorb(done)
        of_batches = torch.stack(losses)
        mean = self._over_batches(of_batches, batches)
        shown = of_batches if samples > 1 else mean
        weights, gram = self.balancer.solve(passes, shown, self.route.send is not None, held)
        logged = None if weights is None else weights.reported
        return mean, preds[-1:] if samples > 1 else preds, logged, gram

    def _frozen(self, batches: Batches, held: Weights) -> tuple[Tensor, list[dict[str, Any]]]:
        """Fill all ``.grad`` with weights known beforehand."""
        params = [*self.problem.shared_params, *self.problem.own_params]
        losses, preds = [], []
        for batch, share in zip(batches, self._shares, strict=True):
            before = [param.grad for param in params]
            for param in params:
                param.grad = None
            done = self._pass(batch, share, partial(self.route.frozen, shared=held.shared, heads=held.heads))
            losses.append(done.losses)
            preds.append(done.preds)
            for param, (grad,) in zip(params, summed([[g] for g in before], [[p.grad] for p in params]), strict=True):
                param.grad = grad
        if self.exchange is not None:
            self.exchange.reduce()
        if held.max_norm is not None:
            limit: Any = held.max_norm if self.scaler is None else held.max_norm * self.scaler.scale
            self._clip(self.problem.shared_params, limit)
        return torch.stack(losses).sum(0), preds

    def _accumulate_losses(self, batches: Batches) -> Shown:
        """Accumulate the weighted losses' gradients, so that no more than one batch's graph is kept.

        Where the weights depend on the mean losses, a forward pass of all batches comes first.
        """
        known: Tensor | None = None
        if self.model.reads_losses:
            with torch.no_grad():
                known = self._mean_losses(batches)
        weights: Weights | None = None
        losses, preds = [], []
        for batch, share in zip(batches, self._shares, strict=True):
            done = self._pass(batch, share)
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
        return self._over_batches(torch.stack(losses), batches), preds, weights.reported, None

    def _look_ahead(self, batches: Batches) -> Shown:
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
            losses, preds = ahead.seen()
            return losses, [preds], weights.logged, None
        if self.options.weight_momentum:
            self.balancer.smooth(weights)
        done = self._pass(batches[-1], self._shares[-1])
        done.write_shared(weights.shared)
        if self.exchange is not None:
            self.exchange.reduce()
        return done.losses, [done.preds], weights.shared, None

    def _legacy(self, inputs: Any, labels: Any) -> Shown:
        losses, preds = forward(self.problem, self.route.regions, inputs, labels)
        stacked = torch.stack(list(losses))
        with part("VJPs"):
            weights = self.model.backward(stacked, **self.hyper)
        if self.warmth == 1 and self.model.rep_grad and all(p.grad is None for p in self.problem.shared_params):
            raise UsageError(
                f"{self._rule_name} leaves the shared parameters without gradients if rep_grad is True: its backward "
                "must send those of the representation on, as _backward_new_grads does."
            )
        return stacked.detach(), [preds], None if weights is None else torch.as_tensor(weights).to(stacked), None
