"""How the gradients of all tasks are had: one route for each kind of network, chosen once.

A route runs the forward pass and the vector-Jacobian products (VJPs) of one batch and returns a `Pass`: losses,
predictions, the rows of the Jacobian where autograd left them, and what to do once the weights are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.trainer.own import OwnGradients, find_owners, set_grads, summed
from fastmtl.trainer.problem import Features, Problem
from fastmtl.trainer.profiling import part
from fastmtl.trainer.regions import Regions
from fastmtl.vjp import vjp

__all__ = ["Pass", "Route", "RowsPass", "SplitRoute", "SumRoute", "WholeRoute", "cut_features", "forward", "weighted"]

Rows = list[list[Tensor | None]]


class Pass:
    """One forward pass and what came of it.

    Attributes:
        losses: (T,) detached.
        preds: Predictions by task.
        rows: T gradients, each a list over tensors; None where no Jacobian was asked for.
    """

    def __init__(self, losses: Tensor | Sequence[Tensor], preds: dict[str, Any], rows: Rows | None = None) -> None:
        self.losses = losses if isinstance(losses, Tensor) else torch.stack([loss.detach() for loss in losses])
        self.preds = preds
        self.rows = rows

    def absorb(self, other: Self) -> None:
        """Take in the gradients of another batch, which together with this one makes one step."""
        raise NotImplementedError

    def write_heads(self, weights: Tensor | None) -> None:
        """Add the gradients of the task-specific parameters, weighted by (T,) if given, to ``.grad``."""
        raise NotImplementedError

    def write_shared(self, weights: Tensor, rows: Rows | None = None, groups: list[int] | None = None) -> None:
        """Fill ``.grad`` of the shared parameters.

        Args:
            weights: One for each row; (L, rows) with groups.
            rows: What to combine in place of the rows of this pass.
            groups: The group of each shared parameter.
        """
        raise NotImplementedError


class Route:
    """Base of all routes.

    Args:
        problem: What to differentiate.
        regions: The problem's functions, compiled or not.
        weighs_heads: Whether the task-specific parameters' gradients will be weighted.

    Attributes:
        send: Takes each row of the shared parameters as soon as it is known, and returns what stands for it.
        stream: Differentiates outputs with cotangents, returns what stands for the row of the shared parameters and the
            gradients of further ones; None where autograd's gradients are the rows.
        possible: False once it has turned out that the route has to do what a plainer one does.
    """

    possible = True

    send: Callable[[list[Tensor | None]], list[Tensor | None]] | None = None
    stream: Callable[..., tuple[list[Tensor | None], list[Tensor | None]]] | None = None

    def __init__(self, problem: Problem, regions: Regions, weighs_heads: bool) -> None:
        self.problem = problem
        self.regions = regions
        self.weighs_heads = weighs_heads
        self._update: list[Tensor] | None = None
        self._owners: list[int] | None = None
        self._owners_known = False

    def __call__(self, inputs: Any, labels: Any) -> Pass:
        """Run the forward pass, and the VJPs of all tasks where the route has them."""
        raise NotImplementedError

    def frozen(self, inputs: Any, labels: Any, shared: Tensor, heads: Tensor | None) -> Pass:
        """Run the forward pass and fill all ``.grad`` with weights known beforehand, without a VJP for every task.

        Args:
            inputs: The batch.
            labels: Its labels by task.
            shared: (T,) weights of the shared parameters' gradients.
            heads: (T,) weights of the task-specific ones, ones if None.
        """
        done = self(inputs, labels)
        done.write_heads(heads)
        done.write_shared(shared)
        return done

    def prepare(self, inputs: Any, labels: Any) -> None:
        """Find out what must be known of the network before it is differentiated."""

    def row(
        self,
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        own: Sequence[Tensor],
        retain: bool,
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return a row of the shared parameters, or what stands for it, and the gradients of ``own``."""
        if self.stream is not None:
            return self.stream(outputs, cotangents, own, retain)
        shared = self.problem.shared_params
        grads = vjp(outputs, cotangents, [*shared, *own], retain=retain)
        return self.sent(grads[: len(shared)]), grads[len(shared) :]

    def sent(self, row: list[Tensor | None]) -> list[Tensor | None]:
        """Return what stands for a row from now on."""
        return row if self.send is None else self.send(row)

    def seeds(self, losses: Sequence[Tensor], weights: Tensor | None = None) -> list[Tensor | None]:
        """Return the cotangents of the losses: their weights, ones if None, times the factor on all losses."""
        factors = self.problem.factors()
        if weights is None and factors is None:
            return [None] * len(losses)
        if weights is None:
            assert factors is not None
            # A gradient may be the seed itself, and be written into.
            weights = factors.expand(len(losses)).clone()
        elif factors is not None:
            weights = weights * factors
        return [weight.to(loss.dtype) for weight, loss in zip(weights, losses, strict=True)]

    def set_shared(self, rows: Rows, weights: Tensor, groups: list[int] | None) -> None:
        """Write ``sum_t w_t row_t`` into ``.grad``; the memory is kept from step to step."""
        params = self.problem.shared_params
        if self._update is None:
            self._update = [torch.empty_like(param) for param in params]
        used = [k for k in range(len(params)) if any(row[k] is not None for row in rows)]
        out = [self._update[k] for k in used]
        some = None if groups is None else [groups[k] for k in used]
        if some is not None:
            weights = weights[: max(some, default=-1) + 1]
        with part("combine"):
            ops.combine_(out, [[row[k] for k in used] for row in rows], weights, some)
        for k, grad in zip(used, out, strict=True):
            params[k].grad = grad

    def own_gradients(
        self, losses: Sequence[Tensor], leaves: Sequence[Sequence[Tensor]]
    ) -> tuple[list[list[Tensor | None]], OwnGradients]:
        """Differentiate the losses down to the cut features and the task-specific parameters.

        Args:
            losses: T losses.
            leaves: For each task the cut features its loss starts from.

        Returns:
            The gradients of each task's leaves, and of the parameters.
        """
        count, own = len(losses), self.problem.own_params
        flat = [leaf for each in leaves for leaf in each]
        if not self.weighs_heads or self._owners is not None:
            grads = vjp(losses, self.seeds(losses), [*flat, *own], retain=False)
            parts = [grads[len(flat) :]]
            found = iter(grads)
            cotangents = [[next(found) for _ in each] for each in leaves]
        else:
            parts, cotangents = [], []
            seeds = self.seeds(losses)
            for t, loss in enumerate(losses):
                grads = vjp([loss], [seeds[t]], [*leaves[t], *own], retain=t + 1 < count)
                cotangents.append(grads[: len(leaves[t])])
                parts.append(grads[len(leaves[t]) :])
        return cotangents, OwnGradients(own, parts, self.places())

    def places(self) -> list[int] | None:
        """Return for each task-specific parameter the place of its task among those of this step."""
        if self._owners is None:
            return None
        model = self.problem.model
        places = {model.task_name.index(task): place for place, task in enumerate(self.problem.tasks)}
        # A parameter of another task has no gradient, so its place does not matter.
        return [places.get(owner, 0) for owner in self._owners]

    def learn_owners(self, inputs: Any, labels: Any) -> None:
        """Find out once, at the first batch with labels of all tasks, whose each task-specific parameter is."""
        if not self._owners_known and all(task in labels for task in self.problem.model.task_name):
            self._owners = find_owners(self.problem, inputs, labels)
            self._owners_known = True


class RowsPass(Pass):
    """A pass whose rows are gradients of the shared parameters."""

    def __init__(
        self, route: Route, losses: Tensor | Sequence[Tensor], preds: dict[str, Any], rows: Rows, own: OwnGradients
    ) -> None:
        super().__init__(losses, preds, rows)
        self.route = route
        self.own = own

    def absorb(self, other: Self) -> None:
        """Add up the rows."""
        assert self.rows is not None
        assert other.rows is not None
        self.rows = summed(self.rows, other.rows)
        self.own.absorb(other.own)

    def write_heads(self, weights: Tensor | None) -> None:
        """Add the gradients kept from the backward passes."""
        self.own.write(weights)

    def write_shared(self, weights: Tensor, rows: Rows | None = None, groups: list[int] | None = None) -> None:
        """Combine the rows."""
        own_rows = self.rows if rows is None else rows
        assert own_rows is not None
        self.route.set_shared(own_rows, weights, groups)


class SumPass(Pass):
    """A pass whose losses are still to be differentiated, as one weighted sum."""

    def __init__(self, route: Route, losses: Sequence[Tensor], preds: dict[str, Any]) -> None:
        super().__init__(losses, preds)
        self.route = route
        self.attached = losses

    def write_heads(self, weights: Tensor | None) -> None:
        """Do nothing: the backward pass of the sum reaches all parameters."""

    def write_shared(self, weights: Tensor, rows: Rows | None = None, groups: list[int] | None = None) -> None:
        """Run the backward pass."""
        with part("VJPs"):
            torch.autograd.backward(self.attached, self.route.seeds(self.attached, weights))


class SumRoute(Route):
    """Loss-only strategies: one backward pass of the weighted sum, once the weights are known."""

    def __call__(self, inputs: Any, labels: Any) -> Pass:
        """Run the forward pass alone."""
        return SumPass(self, *forward(self.problem, self.regions, inputs, labels))


class SplitRoute(Route):
    """One batch for all tasks, a network that splits: heads once for all tasks, one VJP per task through the trunk."""

    def __call__(self, inputs: Any, labels: Any) -> Pass:
        """Run the forward pass and all VJPs."""
        features, losses, preds, cotangents, own = self._heads(self._trunk(inputs, labels), labels)
        with part("VJPs"):
            rows = self.rows_of(features, cotangents)
        return RowsPass(self, losses, preds, rows, own)

    def rows_of(self, features: Features, cotangents: Rows) -> Rows:
        """Return the VJPs through the trunk, one row per cotangent."""
        rows = []
        for t, cotangent in enumerate(cotangents):
            rows.append(self.row(features, cotangent, [], retain=t + 1 < len(cotangents))[0])
        return rows

    def frozen(self, inputs: Any, labels: Any, shared: Tensor, heads: Tensor | None) -> Pass:
        """Send the weighted sum of the tasks' cotangents through the trunk, once."""
        features, losses, preds, cotangents, own = self._heads(self._trunk(inputs, labels), labels)
        total = weighted(shared, cotangents)
        with part("VJPs"):
            rows = [vjp(features, total, self.problem.shared_params, retain=False)]
        done = RowsPass(self, losses, preds, rows, own)
        done.write_heads(heads)
        set_grads(self.problem.shared_params, rows[0])
        return done

    def prepare(self, inputs: Any, labels: Any) -> None:
        """Find out whose each task-specific parameter is, if their gradients will be weighted."""
        if self.weighs_heads:
            self.learn_owners(inputs, labels)

    def _trunk(self, inputs: Any, labels: Any) -> Features:
        # Before there is a graph: it writes the buffers that the graph may keep.
        self.prepare(inputs, labels)
        with part("forward"):
            return cast(Features, self.regions.trunk(inputs))

    def _heads(
        self, features: Features, labels: Any
    ) -> tuple[Features, Sequence[Tensor], dict[str, Any], Rows, OwnGradients]:
        """Run the heads and differentiate them; of the features only the tensors are returned."""
        with part("forward"):
            aliases = [cut_features(features) for _ in self.problem.tasks]
            losses, preds = self.regions.heads(aliases, labels)
        tensors, *leaves = (_tensors(each) for each in (features, *aliases))
        with part("VJPs"):
            cotangents, own = self.own_gradients(losses, leaves)
        return tensors, losses, preds, cotangents, own


class WholeRoute(Route):
    """A network that is one piece: one forward pass, each loss differentiated down to all parameters."""

    def __call__(self, inputs: Any, labels: Any) -> Pass:
        """Run the forward pass and all VJPs."""
        losses, preds = forward(self.problem, self.regions, inputs, labels)
        own = self.problem.own_params
        one_graph = not self.problem.model.multi_input
        rows, parts = [], []
        seeds = self.seeds(losses)
        with part("VJPs"):
            for t, loss in enumerate(losses):
                row, of_own = self.row([loss], [seeds[t]], own, retain=one_graph and t + 1 < len(losses))
                rows.append(row)
                parts.append(of_own)
        return RowsPass(self, losses, preds, rows, OwnGradients(own, parts))

    def frozen(self, inputs: Any, labels: Any, shared: Tensor, heads: Tensor | None) -> Pass:
        """Differentiate one weighted sum of the losses, or two where a parameter serves several tasks, but not all."""
        problem = self.problem
        if not problem.model.multi_input:
            self.learn_owners(inputs, labels)
        losses, preds = forward(problem, self.regions, inputs, labels)
        own_weights = torch.ones_like(shared) if heads is None else heads
        if self._owners is not None and problem.low_precision != torch.float16:
            # Each task's own gradients come out scaled by its shared weight, which is taken back; for that it must not
            # be zero, and 1e-12 of the greatest is as good.
            greatest = shared.abs().max()
            least = 1e-12 * greatest.where(greatest > 0, 1.0)
            weights = shared.where(shared.abs() > least, least)
            grads = vjp(
                losses, self.seeds(losses, weights), [*problem.shared_params, *problem.own_params], retain=False
            )
            count = len(problem.shared_params)
            OwnGradients(problem.own_params, [grads[count:]], self.places()).write(own_weights / weights)
            set_grads(problem.shared_params, grads[:count])
            return SumPass(self, losses, preds)
        for params, weights, retain in (
            (problem.shared_params, shared, bool(problem.own_params)),
            (problem.own_params, own_weights, False),
        ):
            set_grads(params, vjp(losses, self.seeds(losses, weights), params, retain=retain))
        return SumPass(self, losses, preds)


def forward(problem: Problem, regions: Regions, inputs: Any, labels: Any) -> tuple[Sequence[Tensor], dict[str, Any]]:
    """Run the network with the graph in one piece, task by task if each has its own batch."""
    with part("forward"):
        if not problem.model.multi_input:
            return regions.whole(inputs, labels)
        losses, preds = [], {}
        for task in problem.tasks:
            loss, preds[task] = regions.single(inputs[task], labels[task], task)
            losses.append(loss)
        return losses, preds


def weighted(weights: Tensor, cotangents: Rows) -> list[Tensor | None]:
    """Return ``sum_t w_t cotangents_t``, tensor by tensor."""
    with part("combine"):
        return cast(list[Tensor | None], ops.combine(cotangents, weights))


def cut_features(features: Features) -> Features:
    """Return aliases of the features that start a graph of their own, at those that depend on parameters."""
    return tuple(
        feature.detach().requires_grad_(feature.requires_grad) if isinstance(feature, Tensor) else feature
        for feature in features
    )


def _tensors(features: Sequence[Any]) -> Features:
    """Leave out what a trunk hands on that is no tensor, such as inputs in a dictionary."""
    return tuple(feature for feature in features if isinstance(feature, Tensor))
