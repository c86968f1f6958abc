"""GO4Align and the clustering behind it."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.weighting.GO4Align import GO4Align, cluster_means
from tests.trainer.toy import make_trainer


def _least_cost(values: Tensor, clusters: int) -> float:
    ordered = values.sort().values
    size = len(ordered)
    costs = []
    for cuts in combinations(range(1, size), min(clusters, size) - 1):
        parts = [ordered[start:end] for start, end in zip((0, *cuts), (*cuts, size), strict=True)]
        costs.append(sum(float(((part - part.mean()) ** 2).sum()) for part in parts))
    return min(costs)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("clusters", [1, 2, 3, 9])
def test_clusters_are_the_best_ones(size: int, clusters: int) -> None:
    for seed in range(5):
        values = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        means = cluster_means(values, clusters)
        assert len(means.unique()) <= clusters
        assert float(((values - means) ** 2).sum()) == pytest.approx(_least_cost(values, clusters), abs=1e-12)


def test_equal_numbers_share_a_cluster() -> None:
    assert torch.equal(cluster_means(torch.tensor([2.0, 2.0, 2.0]), 2), torch.full((3,), 2.0, dtype=torch.float64))


def _strategy(size: int) -> GO4Align:
    strategy = GO4Align()
    strategy.task_num = size
    strategy.init_param()
    return strategy


def test_one_group_weighs_all_tasks_alike_and_as_many_groups_as_tasks_bring_all_losses_to_one_scale() -> None:
    losses = torch.tensor([0.1, 1.0, 10.0])
    alike = _strategy(3).weigh(losses, None, GO4Align_groups=1).shared
    assert len(alike.unique()) == 1
    apart = _strategy(3).weigh(losses, None, GO4Align_groups=3, GO4Align_step_size=0.0).shared
    torch.testing.assert_close(apart * losses, torch.full((3,), float(losses.sum() / 3)))


def test_probabilities_remember_the_risks() -> None:
    strategy = _strategy(2)
    for _ in range(3):
        strategy.weigh(torch.tensor([0.0 + 1e-3, 1.0]), None, GO4Align_step_size=0.5)
    expected = torch.softmax(-0.5 * 3 * torch.tensor([1e-3, 1.0]), 0)
    torch.testing.assert_close(strategy.probabilities, expected)


def test_no_groups_are_refused() -> None:
    with pytest.raises(UsageError, match="GO4Align_groups of GO4Align must be at least 1, got 0"):
        make_trainer("GO4Align", count=3, weight_args={"GO4Align_groups": 0})
