"""Exact k-means of numbers on a line."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cluster_means"]


def cluster_means(values: Tensor, clusters: int) -> Tensor:
    """Return for each number the mean of its cluster, for the clusters with the least sum of squared distances.

    Optimal clusters are intervals of the sorted numbers, so a dynamic program over their ends finds them, without
    reading a number on the host.

    Args:
        values: (T,) numbers.
        clusters: At most as many clusters.

    Returns:
        (T,) float64 means.

    Source: Wang and Song, "Ckmeans.1d.dp: Optimal k-means Clustering in One Dimension by Dynamic Programming", 2011.
    """
    size = len(values)
    ordered, order = values.double().sort()
    centred = ordered - ordered.mean()
    place = torch.arange(size, device=values.device)

    def interval_sums(terms: Tensor) -> Tensor:
        total = torch.cat([terms.new_zeros(1), terms.cumsum(0)])
        return total[None, 1:] - total[:-1, None]

    count = (place[None, :] - place[:, None] + 1).clamp(min=1)
    cost = interval_sums(centred * centred) - interval_sums(centred) ** 2 / count
    cost = torch.where(place[:, None] <= place[None, :], cost.clamp(min=0), torch.inf)

    least, starts = cost[0], []
    for _ in range(min(clusters, size) - 1):
        before = torch.cat([torch.full_like(least[:1], torch.inf), least[:-1]])
        # A cluster more never costs more, so the first number may also start a cluster of fewer.
        candidates = torch.minimum(before[:, None] + cost, torch.where(place[:, None] == 0, cost, torch.inf))
        least, start = candidates.min(0)
        starts.append(start)
    label, end = torch.zeros_like(place), torch.full_like(place[:1], size - 1)
    for start in reversed(starts):
        first = start.index_select(0, end)
        label = label + (place >= first)
        end = (first - 1).clamp(min=0)
    member = (label[:, None] == label[None, :]).double()
    # Taken from the cluster's first member, so that rounding does not tell its members apart.
    means = (member @ ordered / member.sum(1)).index_select(0, member.argmax(1))
    return torch.empty_like(means).index_copy(0, order, means)
