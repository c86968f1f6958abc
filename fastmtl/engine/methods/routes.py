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
from fastmtl.engine.cut import Structure
from fastmtl.engine.gradients import OwnGradients, set_grads, summed
from fastmtl.engine.losses import Features, Problem, cut_features
from fastmtl.engine.regions import Regions
from fastmtl.engine.trees import leaves, map_tree
from fastmtl.engine.vjp import vjp
from fastmtl.trainer.log.profiling import part

__all__ = ["Pass", "Route", "RowsPass", "SplitRoute", "SumRoute", "WholeRoute", "forward", "weighted"]

Rows = list[list[Tensor | None]]


class Pass:
    """One forward pass and what came of it.

    Attributes:
        losses: (T,) detached.
        preds: Predictions by task, detached: whoever keeps them keeps no activations.
        rows: T gradients, each a list over tensors; None where no Jacobian was asked for.
    """

    def __init__(self, losses: Tensor | Sequence[Tensor], preds: dict[str, Any], rows: Rows | None = None) -> None:
        self.losses = losses if isinstance(losses, Tensor) else torch.stack([loss.detach() for loss in losses])
        self.preds = map_tree(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, preds)
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
        structure: The problem to differentiate, and what is known of its network.
        regions: The problem's functions, compiled or not.
        weighs_heads: Whether the task-specific parameters' gradients will be weighted.

    Attributes:
        problem: What to differentiate.
        send: Takes each row of the shared parameters as soon as it is known, and returns what stands for it.
        stream: Differentiates outputs with cotangents, returns what stands for the row of the shared parameters and the
            gradients of further ones; None where autograd's gradients are the rows.
        possible: False once it has turned out that the route has to do what a plainer one does.
    """

    possible = True

    send: Callable[[list[Tensor | None]], list[Tensor | None]] | None = None
    stream: Callable[..., tuple[list[Tensor | None], list[Tensor | None]]] | None = None

    def __init__(self, structure: Structure, regions: Regions, weighs_heads: bool) -> None:
        self.structure = structure
        self.problem: Problem = structure.problem
        self.regions = regions
        self.weighs_heads = weighs_heads
        self._update: list[Tensor] | None = None

    def __call__(self, inputs: Any, labels: Any) -> Pass:
        """Run the forward pass, and the VJPs of all tasks where the route has them."""
        self.prepare(inputs, labels)
        return self.differentiate(inputs, labels)

    def prepare(self, inputs: Any, labels: Any) -> None:
        """Find out what must be known of the network before it is differentiated."""

    def differentiate(self, inputs: Any, labels: Any) -> Pass:
        """Do what a call does, once the network is prepared."""
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
        return [_seed(weight, loss) for weight, loss in zip(self._factors(weights), losses, strict=True)]

    def _factors(self, weights: Tensor | None = None) -> Sequence[Tensor | None]:
        count, factors = len(self.problem.tasks), self.problem.factors()
        if weights is None and factors is None:
            return [None] * count
        if weights is None:
            assert factors is not None
            # A gradient may be the seed itself, and be written into.
            return factors.expand(count).clone().unbind()
        return (weights if factors is None else weights * factors).unbind()

    def set_shared(self, rows: Rows, weights: Tensor, groups: list[int] | None) -> None:
        """Write ``sum_t w_t row_t`` into ``.grad``; the memory is kept from step to step."""
        params = self.problem.shared_params
        if self._update is None:
            self._update = [torch.empty_like(param) for param in params]
        # What a strategy remembers may be of parameters that have been frozen since.
        used = [k for k, param in enumerate(params) if param.requires_grad and any(row[k] is not None for row in rows)]
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
        if not self.weighs_heads or self.structure.owners is not None:
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
        if self.structure.owners is None:
            return None
        model = self.problem.model
        places = {model.task_name.index(task): place for place, task in enumerate(self.problem.tasks)}
        # A parameter of another task has no gradient, so its place does not matter.
        return [places.get(owner, 0) for owner in self.structure.owners]


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
        """Run the backward pass; a loss that depends on no parameter takes no part."""
        seeds = self.route.seeds(self.attached, weights)
        pairs = [(loss, seed) for loss, seed in zip(self.attached, seeds, strict=True) if loss.requires_grad]
        if pairs:
            with part("VJPs"):
                torch.autograd.backward([loss for loss, _ in pairs], [seed for _, seed in pairs])


class SumRoute(Route):
    """Loss-only strategies: one backward pass of the weighted sum, once the weights are known."""

    def differentiate(self, inputs: Any, labels: Any) -> Pass:
        """Run the forward pass alone."""
        return SumPass(self, *forward(self.problem, self.regions, inputs, labels))


class SplitRoute(Route):
    """One batch for all tasks, a network that splits: heads once for all tasks, one VJP per task through the trunk.

    Where trunk and heads turn out to be joined by more than features the network is differentiated as a whole.
    """

    def __init__(self, structure: Structure, regions: Regions, weighs_heads: bool) -> None:
        super().__init__(structure, regions, weighs_heads)
        self._whole = WholeRoute(structure, regions, weighs_heads)

    def prepare(self, inputs: Any, labels: Any) -> None:
        """Find out whether the network can be cut, and whose its parameters are if their gradients are weighted."""
        if self.structure.learn_cut(inputs, labels):
            self.regions.on_compile(f"each task's backward pass is of all the network, as {self.structure.against_cut}")
        # Ways of taking VJPs through a trunk are then one.
        self.possible = self.possible and (self.structure.against_cut is None or type(self) is SplitRoute)
        if self.weighs_heads:
            self.structure.learn_owners(inputs, labels)

    def differentiate(self, inputs: Any, labels: Any) -> Pass:
        """Run the forward pass and all VJPs."""
        if self.structure.against_cut is None:
            return self.split(inputs, labels)
        if self._whole.send is not self.send or self._whole.stream is not self.stream:
            self._whole.send, self._whole.stream = self.send, self.stream
        return self._whole.differentiate(inputs, labels)

    def split(self, inputs: Any, labels: Any) -> Pass:
        """Run the forward pass and all VJPs of a network that can be cut."""
        features, losses, preds, cotangents, own = self._heads(self._trunk(inputs), labels)
        with part("VJPs"):
            rows = self.rows_of(features, cotangents)
        return RowsPass(self, losses, preds, rows, own)

    def frozen(self, inputs: Any, labels: Any, shared: Tensor, heads: Tensor | None) -> Pass:
        """Send the weighted sum of the tasks' cotangents through the trunk, once."""
        self.prepare(inputs, labels)
        if self.structure.against_cut is not None:
            return self._whole.frozen(inputs, labels, shared, heads)
        features, losses, preds, cotangents, own = self._heads(self._trunk(inputs), labels)
        total = weighted(shared, cotangents)
        with part("VJPs"):
            rows = [vjp(features, total, self.problem.shared_params, retain=False)]
        done = RowsPass(self, losses, preds, rows, own)
        done.write_heads(heads)
        set_grads(self.problem.shared_params, rows[0])
        return done

    def rows_of(self, features: Features, cotangents: Rows) -> Rows:
        """Return the VJPs through the trunk, one row per cotangent."""
        rows = []
        for t, cotangent in enumerate(cotangents):
            rows.append(self.row(features, cotangent, [], retain=t + 1 < len(cotangents))[0])
        return rows

    def _trunk(self, inputs: Any) -> Features:
        with part("forward"):
            return cast(Features, self.regions.trunk(inputs))

    def _heads(
        self, features: Features, labels: Any
    ) -> tuple[Features, Sequence[Tensor], dict[str, Any], Rows, OwnGradients]:
        """Run the heads and differentiate them; of the features only the tensors are returned."""
        with part("forward"):
            aliases = [cut_features(features) for _ in self.problem.tasks]
            losses, preds = self.regions.heads(aliases, labels)
        tensors, *cut = (_tensors(each) for each in (features, *aliases))
        with part("VJPs"):
            cotangents, own = self.own_gradients(losses, cut)
        return tensors, losses, preds, cotangents, own


class WholeRoute(Route):
    """A network that is one piece: each loss is differentiated down to all parameters.

    Inputs for each task are a graph for each, which is gone before the next one's forward pass.
    """

    def differentiate(self, inputs: Any, labels: Any) -> Pass:
        """Run the forward pass and all VJPs."""
        problem, apart = self.problem, self.problem.model.multi_input
        own, factors = problem.own_params, self._factors()
        losses: list[Tensor] = []
        preds: dict[str, Any] = {}
        if not apart:
            found, preds = forward(problem, self.regions, inputs, labels)
            losses += found
        rows, parts = [], []
        for t, task in enumerate(problem.tasks):
            if apart:
                with part("forward"):
                    loss, preds[task] = self.regions.single(inputs[task], labels[task], task)
                losses.append(loss)
            with part("VJPs"):
                retain = not apart and t + 1 < len(problem.tasks)
                row, of_own = self.row([losses[t]], [_seed(factors[t], losses[t])], own, retain)
            rows.append(row)
            parts.append(of_own)
        return RowsPass(self, losses, preds, rows, OwnGradients(own, parts))

    def frozen(self, inputs: Any, labels: Any, shared: Tensor, heads: Tensor | None) -> Pass:
        """Differentiate one weighted sum of the losses, or two where a parameter serves several tasks, but not all."""
        problem = self.problem
        if not problem.model.multi_input:
            self.structure.learn_owners(inputs, labels)
        losses, preds = forward(problem, self.regions, inputs, labels)
        own_weights = torch.ones_like(shared) if heads is None else heads
        if self.structure.owners is not None and problem.low_precision != torch.float16:
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


def _seed(weight: Tensor | None, loss: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(loss.dtype)


def _tensors(features: Sequence[Any]) -> Features:
    """Leave out what a trunk hands on that is no tensor, such as inputs in a dictionary."""
    return tuple(leaf for leaf in leaves(features) if isinstance(leaf, Tensor))
