"""Balanced gradients in one call, in place of ``sum(losses).backward()``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmtl.errors import UsageError

if TYPE_CHECKING:
    from fastmtl.aggregation import Aggregator
    from fastmtl.aggregation.params import Params
    from fastmtl.engine.comm import Comm
    from fastmtl.engine.groups import Groups, Wanted
    from fastmtl.engine.vjp import Cotangents
    from fastmtl.engine.weights import Rows
    from fastmtl.layerwise import Layerwise

__all__ = ["balance", "balanced"]

Losses = Sequence[Tensor] | Mapping[str, Tensor]
Shared = nn.Module | Iterable[Tensor]


def balance(
    losses: Losses,
    *,
    shared: Shared | None = None,
    weighting: str | Aggregator = "mgda",
    vjps: Layerwise | None = None,
    groups: str | Mapping[str, str] = "all",
    **hyper: Any,
) -> Tensor | None:
    """Differentiate the losses and add balanced gradients to ``.grad``.

    The shared parameters get the T gradients combined by the weighting, all others the gradient of the sum of the
    losses. Each loss is differentiated once.

    In a process group of ``torch.distributed`` all processes call this with their parts of a batch, and all get the
    same gradients: those of the means of the losses over the processes. A ``DistributedDataParallel`` around the model
    is not needed, and has nothing left to average where it is used with :func:`balanced`.

    Args:
        losses: T scalar losses of one forward pass, as a list or by task.
        shared: The shared parameters, or the module that has them; those that several losses depend on if None. With
            parameters that ``fully_shard`` has sharded, the whole model, of which all parameters are then shared.
        weighting: An aggregator of :mod:`fastmtl.aggregation`, or the name, in any case, of one without state.
        vjps: A :class:`fastmtl.Layerwise` or :class:`fastmtl.Sketch`, kept over the calls, that computes the Gram
            matrix without most of the gradients; None for one VJP per loss.
        groups: ``"module"``, ``"layer"``, or regular expressions of parameter names with the groups' names, where each
            group of parameters of the module ``shared`` gets weights from a Gram matrix of its own, as in the trainer
            (docs/groups.md); ``"all"`` for one group.
        hyper: Arguments of the named aggregator, such as ``c=0.4`` for ``"cagrad"``.

    Returns:
        The (T,) weights, None from an aggregator that has none; with L groups (L, T), in the order in which the
        module's parameters first name them.

    Raises:
        UsageError: No losses, one that is no scalar, no shared parameter among their leaves, an unknown weighting, or
            ``vjps``, groups or sharded parameters with a weighting that needs more than the Gram matrix, or groups with
            ``vjps``, with sharded parameters, or without a module.

    Example:
        >>> shared = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> balance([shared[0] ** 2, shared[1] ** 2], weighting="mgda")
        tensor([0.8000, 0.2000])
        >>> shared.grad
        tensor([1.6000, 0.8000])
    """
    work = _Balance(losses, shared, weighting, vjps, groups, hyper)
    if not work.is_sharded:
        return work(None)
    weights = work.weights(None)
    torch.autograd.backward(work.losses, [weight.to(loss) for weight, loss in zip(weights, work.losses, strict=True)])
    return weights


def balanced(
    losses: Losses,
    *,
    shared: Shared | None = None,
    weighting: str | Aggregator = "mgda",
    vjps: Layerwise | None = None,
    groups: str | Mapping[str, str] = "all",
    **hyper: Any,
) -> Tensor:
    """Return the sum of the losses as a scalar whose ``backward()`` does what :func:`balance` does.

    A trainer that calls ``backward()`` by itself, divides the loss for accumulated batches or scales it for float16
    needs nothing else: return this as the loss. The parameters are the leaves of the scalar's graph, so that hooks on
    their gradients, such as those of ``DistributedDataParallel``, are called with the balanced ones.

    Arguments and errors are those of :func:`balance`.
    """
    work = _Balance(losses, shared, weighting, vjps, groups, hyper)
    total = torch.stack([loss.detach() for loss in work.losses]).sum()
    if not torch.is_grad_enabled():
        return total
    if work.is_sharded:
        weighted: Tensor = _Weighted.apply(work, *work.losses)
        return weighted
    return _Deferred.apply(total, work, *work.params.shared, *work.params.others)


class _Deferred(torch.autograd.Function):
    """A scalar function of the parameters whose gradient is the balanced one."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, work: _Balance, *params: Tensor) -> Tensor:
        ctx.work, ctx.params = work, params
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor | None, ...]:
        kept = [param.grad for param in ctx.params]
        for param in ctx.params:
            param.grad = None
        try:
            with torch.enable_grad():
                ctx.work(scales[0])
            return None, None, *(param.grad for param in ctx.params)
        finally:
            for param, grad in zip(ctx.params, kept, strict=True):
                param.grad = grad


class _Weighted(torch.autograd.Function):
    """The sum of the losses, whose backward pass goes on with weights: FSDP reduces what reaches its parameters."""

    @staticmethod
    def forward(ctx: Any, work: _Balance, *losses: Tensor) -> Tensor:
        ctx.work = work
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            weights = ctx.work.weights(scales[0])
        return None, *((weight * scales[0]).to(loss) for weight, loss in zip(weights, ctx.work.losses, strict=True))


@contextmanager
def _added_to_grads(params: Sequence[Tensor]) -> Iterator[None]:
    """Let ``.grad`` be None in the block, and add it to what was there before at the end."""
    before = [param.grad for param in params]
    for param in params:
        param.grad = None
    try:
        yield
    finally:
        for param, grad in zip(params, before, strict=True):
            if grad is not None:
                param.grad = grad if param.grad is None else grad + param.grad


def _divisor(scale: Tensor) -> Tensor:
    """Return a loss scale, 1 if it is 0."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


class _Balance:
    """The losses, the parameters they depend on, and the aggregator."""

    def __init__(
        self,
        losses: Losses,
        shared: Shared | None,
        weighting: str | Aggregator,
        vjps: Layerwise | None,
        groups: Wanted,
        hyper: Mapping[str, Any],
    ) -> None:
        from fastmtl.aggregation.by_name import aggregator_of
        from fastmtl.aggregation.params import is_sharded
        from fastmtl.engine.groups import settled_groups

        self.losses = list(losses.values() if isinstance(losses, Mapping) else losses)
        for index, loss in enumerate(self.losses):
            if loss.dim():
                raise UsageError(f"losses[{index}] must be a scalar, got shape {tuple(loss.shape)}.")
        if not self.losses:
            raise UsageError("losses must hold at least one loss, got none.")
        self.shared = shared
        self.aggregator = aggregator_of(weighting, hyper) if isinstance(weighting, str) else weighting
        if hyper and not isinstance(weighting, str):
            raise UsageError(f"weighting must be a name to take {', '.join(hyper)}, got {weighting}.")
        self.vjps = vjps
        if vjps is not None:
            self._check_layers(vjps)
        self.is_sharded = is_sharded(shared)
        self.wanted_groups = settled_groups(groups)
        if self.is_sharded and (vjps is not None or not self.aggregator.works_on_gram()):
            raise UsageError(
                f"weighting must need the Gram matrix only, and vjps be None, with sharded parameters, got {weighting}."
            )
        self._check_groups()

    def __call__(self, scale: Tensor | None) -> Tensor | None:
        """Add the gradients of the losses times ``scale``, those of all processes, to ``.grad``."""
        from fastmtl.aggregation.params import refuse_freed
        from fastmtl.autojac.fields import check_writable
        from fastmtl.distributed.storage import comm_of_loop
        from fastmtl.engine.hidden import refusing_inner_backward

        shared, task_params = self.params.shared, self.params.others
        params = [*shared, *task_params]
        check_writable(params, ".grad")
        refuse_freed(params)
        comm = comm_of_loop(shared)
        comm.check_alike(params)
        comm.find_tables(params, self.params.sparse, self.params.dense)
        aggregate = self._by_gram if self.aggregator.works_on_gram() else self._by_rows
        if self.vjps is not None:
            aggregate = partial(self._by_layers, self.vjps)
        with refusing_inner_backward(self.params.closed):
            if not comm.shares_batches and self.vjps is None:
                weights = aggregate(scale, comm)
            else:
                with _added_to_grads(params):
                    weights = aggregate(scale, comm)
                    comm.all_reduce_others(task_params)
        # Before the backward pass those of the outermost module were there.
        refuse_freed(params)
        return weights

    def weights(self, scale: Tensor | None) -> Tensor:
        """Return the weights of the losses times ``scale``; the graph is kept, and no ``.grad`` is written."""
        from fastmtl.distributed.storage import comm_of_loop
        from fastmtl.engine.hidden import refusing_inner_backward

        comm = comm_of_loop(self.params.shared)
        with refusing_inner_backward(self.params.closed):
            return self._weighted_rows(scale, comm, keep_graph=True)[1]

    def _seeds(self, scale: Tensor | None, size: int) -> Cotangents:
        """Return the cotangents of the losses, ``scale / size``; None for 1.

        What is differentiated are the means of the losses over the processes.
        """
        if scale is None:
            return [None if size == 1 else torch.full_like(loss, 1 / size) for loss in self.losses]
        return [scale.to(loss) / size for loss in self.losses]

    def _weights_of(self, gram: Tensor, scale: Tensor | None) -> Tensor:
        """Return the weights from the Gram matrix of the gradients times ``scale``, which does not change them."""
        if scale is not None:
            gram = gram / _divisor(scale).to(gram.dtype) ** 2
        return self.aggregator.weights_of_gram(gram, self.params.shared[0].dtype)

    def _by_gram(self, scale: Tensor | None, comm: Comm) -> Tensor:
        """Leave the rows where autograd left them; with several processes each may have a part of every row.

        The Gram matrix is all that the aggregator needs.
        """
        from fastmtl.aggregation.rows import add_combined_rows

        shared, groups = self.params.shared, None if self.groups is None else self.groups.of
        rows, weights = self._weighted_rows(scale, comm)
        if comm.shares_batches:
            comm.write_shared(rows, weights, groups, ())
        else:
            add_combined_rows(shared, rows, weights.to(shared[0].device), groups)
        return weights.to(torch.promote_types(shared[0].dtype, shared[-1].dtype))

    def _weighted_rows(self, scale: Tensor | None, comm: Comm, keep_graph: bool = False) -> tuple[Rows, Tensor]:
        """Return the collected rows and their weights; add the gradients of the other parameters."""
        from fastmtl.engine.gradients import add_grads
        from fastmtl.engine.groups import padded

        rows, seeds, last = [], self._seeds(scale, comm.size), len(self.losses) - 1
        for t, (loss, seed, own) in enumerate(zip(self.losses, seeds, self.params.by_loss, strict=True)):
            places = self.params.places[t]
            row, own_grads = comm.row([loss], [seed], own, keep_graph or t < last, final=True, reached=places)
            rows.append(row)
            add_grads(own, own_grads)
        rows = comm.collect(rows, final=True)
        groups = self.groups
        with torch.no_grad():
            gram = comm.gram(rows, None if groups is None else groups.of, None)
            gram = gram if groups is None else padded(gram, len(groups.names))
            weights = self._weights_of(gram, scale)
        comm.broadcast([weights])
        return rows, weights

    def _by_layers(self, vjps: Layerwise, scale: Tensor | None, comm: Comm) -> Tensor:
        """Leave out the gradients that the Gram matrix of some layers does not need."""
        from fastmtl.engine.gradients import add_grads
        from fastmtl.engine.weights import Weights
        from fastmtl.layerwise import differentiated, note_error

        shared = self.params.shared
        cotangents = [
            torch.ones_like(loss) if seed is None else seed
            for loss, seed in zip(self.losses, self._seeds(scale, comm.size), strict=True)
        ]
        update = differentiated(vjps, self.losses, cotangents, shared, comm, self.params.by_loss, add_grads)
        if update is None:
            return self._by_gram(scale, comm)
        with torch.no_grad():
            update.rows = update.collect(update.rows, comm, final=True)
            gram = update.gram(update.rows, None, comm, None)
            weights = self._weights_of(gram, scale)
        note_error(vjps, update.gram_error)
        comm.broadcast([weights])
        update.write(Weights(shared=weights.to(shared[0].device)), update, comm, ())
        return weights.to(torch.promote_types(shared[0].dtype, shared[-1].dtype))

    def _check_layers(self, vjps: object) -> None:
        from fastmtl.layerwise import Layerwise

        if not isinstance(vjps, Layerwise):
            raise UsageError(f"vjps must be a fastmtl.Layerwise, a fastmtl.Sketch or None, got {vjps!r}.")
        if not self.aggregator.works_on_gram():
            raise UsageError(f"vjps must be None for {self.aggregator}, which needs more than the Gram matrix.")

    def _check_groups(self) -> None:
        if self.wanted_groups == "all":
            return
        reasons = {
            f"{self.aggregator}, which does not take a Gram matrix for each": not self.aggregator.takes_groups(),
            "shared parameters without names: give their module as shared": not isinstance(self.shared, nn.Module),
            "parameters that fully_shard has sharded, whose update is one weighted sum of the losses": self.is_sharded,
            "vjps, which have one Gram matrix": self.vjps is not None,
        }
        for reason, holds in reasons.items():
            if holds:
                raise UsageError(f"groups must be all for {reason}.")

    def _by_rows(self, scale: Tensor | None, comm: Comm) -> Tensor | None:
        """Let each process have the whole Jacobian."""
        from fastmtl.engine.gradients import add_grads, coalesced, numbers_of
        from fastmtl.engine.vjp import jacobians

        shared = self.params.shared
        seeds = self._seeds(scale, comm.size)
        rows = [([loss], [seed]) for loss, seed in zip(self.losses, seeds, strict=True)]
        matrices = jacobians(rows, len(rows), shared, False, self.params.by_loss, add_grads)
        with torch.no_grad():
            matrices = comm.all_reduce_jacobians(matrices, shared)
            if scale is None:
                weights = self.aggregator.write(matrices, shared)
            else:
                divisor = _divisor(scale)
                weights = self.aggregator.write([matrix / divisor.to(matrix) for matrix in matrices], shared)
                # Under a scale no gradient was there before.
                for param in shared:
                    param.grad = None if param.grad is None else param.grad * scale.to(param.grad)
        comm.broadcast([weights])
        if comm.shares_batches:
            for param in shared:
                param.grad = None if param.grad is None else coalesced(param.grad)
            comm.broadcast([None if param.grad is None else numbers_of(param.grad) for param in shared])
        return weights

    @cached_property
    def params(self) -> Params:
        """What the losses depend on; looked up once, as the graph stays the same."""
        from fastmtl.aggregation.params import find_params

        return find_params(self.losses, self.shared)

    @cached_property
    def groups(self) -> Groups | None:
        """The groups of the shared parameters; None for one of all."""
        from fastmtl.engine.groups import ALL, groups_of

        if self.wanted_groups == ALL:
            return None
        assert isinstance(self.shared, nn.Module)
        return groups_of(self.shared, self.wanted_groups, self.params.shared)
