"""How the gradients of all tasks are had: one route for each kind of network, chosen once.

A route runs the forward pass and the vector-Jacobian products (VJPs) of one batch and returns a `Pass`: losses,
predictions, the rows of the Jacobian where autograd left them, and what to do once the weights are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl import ops
from fastmtl.errors import UsageError
from fastmtl.trainer.problem import Features, Problem
from fastmtl.trainer.regions import Regions

__all__ = ["Pass", "Route", "choose_route", "forward"]

Grads = Sequence[Tensor | None]


@dataclass(kw_only=True, slots=True)
class Pass:
    """One forward pass and what came of it.

    Attributes:
        losses: (T,) detached.
        preds: Predictions by task.
        rows: T gradients, each a list over tensors; None where no Jacobian was asked for.
        apply: Given (T,) weights, fills ``.grad`` of the shared parameters.
    """

    losses: Tensor
    preds: dict[str, Any]
    rows: list[list[Tensor | None]] | None
    apply: Callable[[Tensor], None]


class Route:
    """Base of all routes.

    Args:
        problem: What to differentiate.
        regions: The problem's functions, compiled or not.
    """

    def __init__(self, problem: Problem, regions: Regions) -> None:
        self.problem = problem
        self.regions = regions
        self._update: list[Tensor] | None = None

    def __call__(self, inputs: Any, labels: Any) -> Pass:
        """Run the forward pass, and the VJPs of all tasks where the route has them."""
        raise NotImplementedError

    def _set_own(self, grads: Grads) -> None:
        """Write the gradients of the task-specific parameters; several calls add up."""
        for param, grad in zip(self.problem.own_params, grads, strict=True):
            if grad is not None:
                param.grad = grad if param.grad is None else param.grad + grad

    def _set_shared(self, rows: list[list[Tensor | None]], weights: Tensor) -> None:
        """Write ``sum_t w_t row_t`` into ``.grad``; the memory is kept from step to step."""
        params = self.problem.shared_params
        if self._update is None:
            self._update = [torch.empty_like(param) for param in params]
        used = [k for k in range(len(params)) if any(row[k] is not None for row in rows)]
        out = [self._update[k] for k in used]
        ops.combine_(out, [[row[k] for k in used] for row in rows], weights)
        for k, grad in zip(used, out, strict=True):
            params[k].grad = grad

    def _rows_of(self, losses: Sequence[Tensor]) -> list[list[Tensor | None]]:
        """Differentiate each loss down to all parameters: a row each, and the task-specific gradients on the way."""
        shared, own = self.problem.shared_params, self.problem.own_params
        rows = []
        for t, loss in enumerate(losses):
            one_graph = not self.problem.model.multi_input
            grads = _vjp([loss], [None], [*shared, *own], retain=one_graph and t + 1 < len(losses))
            rows.append(grads[: len(shared)])
            self._set_own(grads[len(shared) :])
        return rows


class SumRoute(Route):
    """Loss-only strategies: one backward pass of the weighted sum, once the weights are known."""

    def __call__(self, inputs: Any, labels: Any) -> Pass:
        """Run the forward pass alone."""
        losses, preds = forward(self.problem, self.regions, inputs, labels)

        def apply(weights: Tensor) -> None:
            torch.autograd.backward(
                losses, [weight.to(loss.dtype) for weight, loss in zip(weights, losses, strict=True)]
            )

        return Pass(losses=_stack(losses), preds=preds, rows=None, apply=apply)


class SplitRoute(Route):
    """One batch for all tasks, a network that splits: heads once for all tasks, one VJP per task through the trunk."""

    def __call__(self, inputs: Any, labels: Any) -> Pass:
        """Run the forward pass and all VJPs."""
        problem, count = self.problem, len(self.problem.tasks)
        features = self.regions.trunk(inputs)
        aliases = [_cut(features) for _ in range(count)]
        losses, preds = self.regions.heads(aliases, labels)
        leaves = [leaf for alias in aliases for leaf in alias]
        grads = _vjp(losses, [None] * count, [*leaves, *problem.own_params], retain=False)
        self._set_own(grads[len(leaves) :])
        rows = []
        for t in range(count):
            cotangents = grads[t * len(features) : (t + 1) * len(features)]
            rows.append(_vjp(features, cotangents, problem.shared_params, retain=t + 1 < count))
        return Pass(
            losses=_stack(losses), preds=preds, rows=rows, apply=lambda weights: self._set_shared(rows, weights)
        )


class WholeRoute(Route):
    """A network that is one piece: one forward pass, each loss differentiated down to all parameters."""

    def __call__(self, inputs: Any, labels: Any) -> Pass:
        """Run the forward pass and all VJPs."""
        losses, preds = forward(self.problem, self.regions, inputs, labels)
        rows = self._rows_of(losses)
        return Pass(
            losses=_stack(losses), preds=preds, rows=rows, apply=lambda weights: self._set_shared(rows, weights)
        )


class RepRoute(Route):
    """``rep_grad``: the rows are gradients of the representations; one VJP carries their sum to the parameters."""

    def __call__(self, inputs: Any, labels: Any) -> Pass:
        """Run the forward pass and the backward pass of the heads."""
        problem = self.problem
        reps, losses, preds, cuts = self._represent(inputs, labels)
        grads = _vjp(losses, [None] * len(losses), [*cuts, *problem.own_params], retain=False)
        cotangents = [
            grad if grad is not None else torch.zeros_like(cut) for grad, cut in zip(grads, cuts, strict=False)
        ]
        self._set_own(grads[len(cuts) :])
        rows: list[list[Tensor | None]] = [[c.reshape(len(c), -1).sum(0)] for c in cotangents]
        if len({row[0].numel() for row in rows if row[0] is not None}) > 1:
            raise UsageError(
                "rep_grad needs representations of one size for all tasks, got "
                + ", ".join(f"{task}: {tuple(cut.shape)}" for task, cut in zip(problem.tasks, cuts, strict=True))
                + "."
            )

        def apply(weights: Tensor) -> None:
            scaled = [weight.to(c.dtype) * c for weight, c in zip(weights, cotangents, strict=True)]
            torch.autograd.backward(reps, scaled if len(reps) > 1 else [torch.stack(scaled).sum(0)])

        return Pass(losses=_stack(losses), preds=preds, rows=rows, apply=apply)

    def _represent(self, inputs: Any, labels: Any) -> tuple[Features, Sequence[Tensor], dict[str, Any], list[Tensor]]:
        """Return the representations, losses, predictions, and the cut representations the losses start from."""
        problem, tasks = self.problem, self.problem.tasks
        if problem.model.multi_input:
            reps = tuple(self.regions.single_rep(inputs[task], task) for task in tasks)
            cuts = list(_cut(reps))
            losses, preds = [], {}
            for task, cut in zip(tasks, cuts, strict=True):
                loss, preds[task] = self.regions.single_decode(cut, labels[task], task)
                losses.append(loss)
            return reps, losses, preds, cuts
        reps = self.regions.reps(inputs)
        cuts = [_cut(reps)[0] for _ in tasks] if len(reps) == 1 else list(_cut(reps))
        scored, preds = self.regions.decode(cuts, labels)
        return reps, scored, preds, cuts


class ForwardRepRoute(RepRoute):
    """``rep_grad`` for an architecture that overrides ``forward`` as a whole and calls ``_prepare_rep`` in it."""

    def _represent(self, inputs: Any, labels: Any) -> tuple[Features, Sequence[Tensor], dict[str, Any], list[Tensor]]:
        model = self.problem.model
        losses, preds = forward(self.problem, self.regions, inputs, labels)
        rep = model.rep
        reps = tuple(rep[task] for task in self.problem.tasks) if isinstance(rep, dict) else (rep,)
        return reps, losses, preds, [model.rep_tasks[task] for task in self.problem.tasks]


def choose_route(problem: Problem, regions: Regions, needs_gradients: bool) -> Route:
    """Return the route for a model and a strategy.

    Args:
        problem: What to differentiate.
        regions: The problem's functions, compiled or not.
        needs_gradients: The strategy needs the gradients of the tasks, not only their losses.

    Raises:
        UsageError: The combination cannot be compiled.
    """
    model = problem.model
    if not needs_gradients:
        return SumRoute(problem, regions)
    if model.rep_grad:
        if model.splits:
            return RepRoute(problem, regions)
        if regions.compiled:
            raise UsageError(
                f"rep_grad cannot be compiled for {type(model).__mro__[1].__name__}, whose forward is one piece: "
                "give it trunk and branch, or leave compile off."
            )
        return ForwardRepRoute(problem, regions)
    return SplitRoute(problem, regions) if model.splits and not model.multi_input else WholeRoute(problem, regions)


def forward(problem: Problem, regions: Regions, inputs: Any, labels: Any) -> tuple[Sequence[Tensor], dict[str, Any]]:
    """Run the network with the graph in one piece, task by task if each has its own batch."""
    if not problem.model.multi_input:
        return regions.whole(inputs, labels)
    losses, preds = [], {}
    for task in problem.tasks:
        loss, preds[task] = regions.single(inputs[task], labels[task], task)
        losses.append(loss)
    return losses, preds


def _stack(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack([loss.detach() for loss in losses])


def _cut(features: Features) -> Features:
    """Return aliases of the features that start a graph of their own."""
    return tuple(feature.detach().requires_grad_() for feature in features)


def _vjp(
    outputs: Sequence[Tensor], cotangents: Grads, inputs: Sequence[Tensor | nn.Parameter], retain: bool
) -> list[Tensor | None]:
    """Return the gradients of ``sum <output, cotangent>``; None as the cotangent of a scalar loss is 1.

    An output that is no loss and has no cotangent takes no part.
    """
    pairs = [
        (o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad and (c is not None or not o.dim())
    ]
    if not pairs or not inputs:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(
            [o for o, _ in pairs],
            inputs,
            [torch.ones_like(o) if c is None else c for o, c in pairs],
            retain_graph=retain,
            allow_unused=True,
        )
    )
