"""Balanced gradients in one call, in place of ``sum(losses).backward()``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.support.names import resolve_name

if TYPE_CHECKING:
    from fastmtl.aggregation import Aggregator
    from fastmtl.engine.comm import Comm

__all__ = ["balance", "balanced"]

Losses = Sequence[Tensor] | Mapping[str, Tensor]
Shared = nn.Module | Iterable[Tensor]


def balance(
    losses: Losses, *, shared: Shared | None = None, weighting: str | Aggregator = "mgda", **hyper: Any
) -> Tensor | None:
    """Differentiate the losses and add balanced gradients to ``.grad``.

    The shared parameters get the T gradients combined by the weighting, all others the gradient of the sum of the
    losses. Each loss is differentiated once.

    In a process group of ``torch.distributed`` all processes call this with their parts of a batch, and all get the
    same gradients: those of the means of the losses over the processes. A ``DistributedDataParallel`` around the model
    is not needed, and has nothing left to average where it is used with :func:`balanced`.

    Args:
        losses: T scalar losses of one forward pass, as a list or by task.
        shared: The shared parameters, or the module that has them; those that several losses depend on if None.
        weighting: An aggregator of :mod:`fastmtl.aggregation`, or the name, in any case, of one without state.
        hyper: Arguments of the named aggregator, such as ``c=0.4`` for ``"cagrad"``.

    Returns:
        The (T,) weights, None from an aggregator that has none.

    Raises:
        UsageError: No losses, one that is no scalar, no shared parameter among their leaves, or an unknown weighting.

    Example:
        >>> shared = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> balance([shared[0] ** 2, shared[1] ** 2], weighting="mgda")
        tensor([0.8000, 0.2000])
        >>> shared.grad
        tensor([1.6000, 0.8000])
    """
    return _Balance(losses, shared, weighting, hyper)(None)


def balanced(
    losses: Losses, *, shared: Shared | None = None, weighting: str | Aggregator = "mgda", **hyper: Any
) -> Tensor:
    """Return the sum of the losses as a scalar whose ``backward()`` does what :func:`balance` does.

    A trainer that calls ``backward()`` by itself, divides the loss for accumulated batches or scales it for float16
    needs nothing else: return this as the loss. The parameters are the leaves of the scalar's graph, so that hooks on
    their gradients, such as those of ``DistributedDataParallel``, are called with the balanced ones.

    Arguments and errors are those of :func:`balance`.
    """
    work = _Balance(losses, shared, weighting, hyper)
    total = torch.stack([loss.detach() for loss in work.losses]).sum()
    if not torch.is_grad_enabled():
        return total
    shared_params, task_params = work.parameters()
    return _Deferred.apply(total, work, *shared_params, *task_params)


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


class _Balance:
    """The losses, the parameters they depend on, and the aggregator."""

    def __init__(
        self, losses: Losses, shared: Shared | None, weighting: str | Aggregator, hyper: Mapping[str, Any]
    ) -> None:
        self.losses = list(losses.values() if isinstance(losses, Mapping) else losses)
        for index, loss in enumerate(self.losses):
            if loss.dim():
                raise UsageError(f"losses[{index}] must be a scalar, got shape {tuple(loss.shape)}.")
        if not self.losses:
            raise UsageError("losses must hold at least one loss, got none.")
        self.shared = shared
        self.aggregator = _named(weighting, hyper) if isinstance(weighting, str) else weighting
        if hyper and not isinstance(weighting, str):
            raise UsageError(f"weighting must be a name to take {', '.join(hyper)}, got {weighting}.")

    def __call__(self, scale: Tensor | None) -> Tensor | None:
        """Add the gradients of the losses times ``scale``, those of all processes, to ``.grad``."""
        from fastmtl.autojac.fields import check_writable
        from fastmtl.distributed.storage import comm_of_loop
        from fastmtl.engine.hidden import refusing_inner_backward

        shared, task_params = self.parameters()
        params = [*shared, *task_params]
        check_writable(params, ".grad")
        comm = comm_of_loop(shared)
        ones = [torch.ones_like(loss) if scale is None else scale.to(loss) for loss in self.losses]
        # What is differentiated are the means of the losses over the processes.
        seeds = [seed / comm.size for seed in ones]
        with refusing_inner_backward(self.losses):
            if not comm.shares_batches:
                return self._by_rows(seeds, shared, task_params, comm)
            before = [param.grad for param in params]
            for param in params:
                param.grad = None
            aggregate = self._by_gram if self.aggregator.works_on_gram() else self._by_rows
            try:
                weights = aggregate(seeds, shared, task_params, comm)
                comm.set_grads(task_params, comm.all_reduce_row([param.grad for param in task_params]))
            finally:
                for param, grad in zip(params, before, strict=True):
                    if grad is not None:
                        param.grad = grad if param.grad is None else grad + param.grad
            return weights

    def _by_gram(
        self, seeds: Sequence[Tensor], shared: Sequence[Tensor], task_params: Sequence[Tensor], comm: Comm
    ) -> Tensor:
        """Let each process have a part of every row; the Gram matrix is all that the aggregator needs."""
        from fastmtl.aggregation.base import GramianWeightedAggregator
        from fastmtl.engine.gradients import add_grads

        assert isinstance(self.aggregator, GramianWeightedAggregator)
        rows, last = [], len(self.losses) - 1
        for t, (loss, seed) in enumerate(zip(self.losses, seeds, strict=True)):
            row, task_grads = comm.row([loss], [seed], task_params, t < last, final=True)
            rows.append(row)
            add_grads(task_params, task_grads)
        rows = comm.collect(rows, final=True)
        with torch.no_grad():
            weights = self.aggregator.weights_of_gram(comm.gram(rows, None, None), shared[0].dtype)
        comm.broadcast([weights])
        comm.write_shared(rows, weights, None, ())
        return weights

    def _by_rows(
        self, seeds: Sequence[Tensor], shared: Sequence[Tensor], task_params: Sequence[Tensor], comm: Comm
    ) -> Tensor | None:
        """Let each process have the whole Jacobian."""
        from fastmtl.engine.gradients import add_grads
        from fastmtl.engine.vjp import jacobians

        rows = [([loss], [seed]) for loss, seed in zip(self.losses, seeds, strict=True)]
        matrices = jacobians(rows, len(rows), shared, False, task_params, lambda grads: add_grads(task_params, grads))
        with torch.no_grad():
            weights = self.aggregator.write(comm.all_reduce_coalesced(matrices), shared)
        comm.broadcast([weights])
        if comm.shares_batches:
            comm.broadcast([param.grad for param in shared])
        return weights

    def parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return what the losses depend on: the shared parameters, and the others."""
        from fastmtl.engine.graph import leaf_tensors
        from fastmtl.engine.hidden import refuse_hidden

        refuse_hidden(self.losses, None, "losses")
        reached = [leaf_tensors([loss], "losses") for loss in self.losses]
        count = Counter(leaf for leaves in reached for leaf in leaves)
        if self.shared is None:
            wanted = {leaf for leaf, times in count.items() if times > 1 or len(self.losses) == 1}
        else:
            wanted = set(self.shared.parameters() if isinstance(self.shared, nn.Module) else self.shared)
            refuse_hidden(self.losses, list(wanted), "shared")
        shared = [leaf for leaf in count if leaf in wanted]
        if not shared:
            raise UsageError("shared must hold parameters that the losses depend on, got none of them.")
        return shared, [leaf for leaf in count if leaf not in wanted]


def _named(name: str, hyper: Mapping[str, Any]) -> Aggregator:
    from fastmtl import aggregation
    from fastmtl.support.stateful import Stateful

    bases = (aggregation.Aggregator, aggregation.WeightedAggregator, aggregation.GramianWeightedAggregator)
    public = [getattr(aggregation, public_name) for public_name in aggregation.__all__]
    classes: dict[str, Callable[..., Aggregator]] = {
        cls.__name__: cls
        for cls in public
        if issubclass(cls, aggregation.Aggregator) and cls not in bases and not issubclass(cls, Stateful)
    }
    make = resolve_name(name, {**classes, "Aligned_MTL": classes["AlignedMTL"]}, "weighting")
    try:
        return make(**hyper)
    except TypeError as error:
        raise UsageError(f"weighting {name!r} cannot be made of {dict(hyper)}: {error}.") from None
