"""Balanced gradients of several processes in a training loop of one's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.aggregation.base import Aggregator, GramianWeightedAggregator
from fastmtl.autojac.fields import add_grads
from fastmtl.distributed.peers import Peers
from fastmtl.distributed.shards import Shards
from fastmtl.engine.vjp import jacobians, vjp

__all__ = ["write_balanced"]


def write_balanced(
    losses: Sequence[Tensor],
    scale: Tensor | None,
    shared: Sequence[Tensor],
    own: Sequence[Tensor],
    aggregator: Aggregator,
    peers: Peers,
) -> Tensor | None:
    """Fill ``.grad``, empty before, from the means over the processes of every loss's gradients.

    The rows are reduce-scattered and the Gram matrix of their parts all-reduced where that is all the aggregator needs,
    see :class:`Shards`; otherwise the rows are all-reduced.

    Args:
        losses: T scalars of this process's part of the batch.
        scale: What they are multiplied by, the same in all processes; 1 if None.
        shared: Parameters whose gradients are balanced.
        own: Parameters that get the sum of the losses' gradients.
        aggregator: What balances.
        peers: The processes.

    Returns:
        The (T,) weights, None from an aggregator that has none.
    """
    seeds = [torch.ones_like(loss) / peers.size if scale is None else scale.to(loss) / peers.size for loss in losses]
    if isinstance(aggregator, GramianWeightedAggregator) and aggregator.works_on_gram():
        weights: Tensor | None = _by_gram(losses, seeds, shared, own, aggregator, peers)
    else:
        weights = _by_rows(losses, seeds, shared, own, aggregator, peers)
    sums = peers.sums([param.grad for param in own if param.grad is not None])
    for param, grad in zip(own, sums, strict=True):
        param.grad = grad
    return weights


def _by_gram(
    losses: Sequence[Tensor],
    seeds: Sequence[Tensor],
    shared: Sequence[Tensor],
    own: Sequence[Tensor],
    aggregator: GramianWeightedAggregator,
    peers: Peers,
) -> Tensor:
    shards = Shards(shared, peers)
    rows = []
    for t, (loss, seed) in enumerate(zip(losses, seeds, strict=True)):
        grads = vjp([loss], [seed], [*shared, *own], retain=t + 1 < len(losses))
        rows.append(shards.send(grads[: len(shared)]))
        add_grads(own, grads[len(shared) :])
    shards.wait()
    with torch.no_grad():
        weights = aggregator.weights_of_gram(shards.gram(rows, None), shared[0].dtype)
    # Random numbers, and the last bits of solvers, may differ.
    peers.from_leader([weights])
    shards.write(rows, weights, None)
    return weights


def _by_rows(
    losses: Sequence[Tensor],
    seeds: Sequence[Tensor],
    shared: Sequence[Tensor],
    own: Sequence[Tensor],
    aggregator: Aggregator,
    peers: Peers,
) -> Tensor | None:
    rows = [([loss], [seed]) for loss, seed in zip(losses, seeds, strict=True)]
    found = peers.sums(jacobians(rows, len(rows), shared, False, own, lambda grads: add_grads(own, grads)))
    with torch.no_grad():
        weights = aggregator.write(found, shared)
    if weights is not None:
        peers.from_leader([weights])
    peers.from_leader([param.grad for param in shared if param.grad is not None])
    return weights
