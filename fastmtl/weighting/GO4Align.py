"""Group optimization for multi-task alignment."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper, Weights
from fastmtl.weighting.rules import counted

__all__ = ["GO4Align", "cluster_means"]


def cluster_means(values: Tensor, clusters: int, known: Tensor | None = None) -> Tensor:
    """Return for each of (T,) numbers the float64 mean of its cluster, of at most as many as given.

    The clusters are those with the least sum of squared distances. Optimal ones are intervals of the sorted numbers, so
    a dynamic program over their ends finds them, without reading a number on the host. With (T,) booleans ``known`` the
    clusters are those of the numbers that are, and what is returned for the others means nothing.

    Source: Wang and Song, "Ckmeans.1d.dp: Optimal k-means Clustering in One Dimension by Dynamic Programming", 2011.
    """
    size = len(values)
    known = torch.ones_like(values, dtype=torch.bool) if known is None else known
    # The others stand beside a number that is known, without weight.
    first_known = values.index_select(0, known.to(torch.uint8).argmax(0, keepdim=True))
    ordered, order = torch.where(known, values, first_known).double().sort()
    counts = known.double()[order]
    centred = ordered - (counts * ordered).sum() / counts.sum()
    place = torch.arange(size, device=values.device)

    def interval_sums(terms: Tensor) -> Tensor:
        total = torch.cat([terms.new_zeros(1), terms.cumsum(0)])
        return total[None, 1:] - total[:-1, None]

    count = interval_sums(counts).clamp(min=1)
    cost = interval_sums(counts * centred * centred) - interval_sums(counts * centred) ** 2 / count
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
    member = (label[:, None] == label[None, :]).double() * counts
    # Taken from the cluster's first member, so that rounding does not tell its members apart.
    means = (member @ ordered / member.sum(1).clamp(min=1)).index_select(0, member.argmax(1))
    return torch.empty_like(means).index_copy(0, order, means)


class GO4Align(AbsWeighting):
    """GO4Align: tasks at a similar stage form a group and share one weight.

    The indicator of task t is ``q_t sum(L) / L_t``: the ratio brings all losses to one scale, the probabilities
    ``q_t <- q_t exp(-step_size L_t)``, divided by their sum, remember the risks so far. The indicators are clustered
    (k-means), and each task has the mean indicator of its group as its weight. A loss of 0 takes no part in a step.

    Source: Shen et al., "GO4Align: Group Optimization for Multi-Task Alignment", NeurIPS 2024.
    """

    needs_losses = "positive"
    use_of_losses = "it divides by them"
    hyper = {  # noqa: RUF012
        "GO4Align_groups": Hyper(type=int, default=2, least=1, help="Number of groups."),
        "GO4Align_step_size": Hyper(
            type=float, default=1e-4, least=0.0, help="How fast the probabilities follow the losses."
        ),
    }

    probabilities: Tensor

    def init_param(self) -> None:
        """Create the probabilities."""
        self.remember("probabilities", torch.full((self.task_num,), 1 / self.task_num))

    def weigh(
        self, losses: Tensor, gram: None, *, GO4Align_groups: int = 2, GO4Align_step_size: float = 1e-4, **hyper: object
    ) -> Weights:
        """Return each group's mean indicator."""
        known = counted(losses)
        risk = torch.where(known, self.probabilities * torch.exp(-GO4Align_step_size * losses), 0.0)
        self.probabilities.copy_(torch.where(known, risk / risk.sum(), self.probabilities))
        indicator = self.probabilities * losses.sum() / losses
        means = cluster_means(indicator, GO4Align_groups, known).to(losses.dtype)
        return Weights(shared=torch.where(known, means, 0.0), known=known)
