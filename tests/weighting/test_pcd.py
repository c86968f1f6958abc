"""PCD against the program it solves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.weighting.PCD import PCD, priority_weights
from tests.trainer.toy import loaders, make_trainer


def _rows(size: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(size, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("primary", [0, 2])
@pytest.mark.parametrize(("size", "width"), [(3, 4), (5, 20), (8, 9)])
def test_is_the_closest_direction_that_serves_all(size: int, width: int, primary: int) -> None:
    cvxpy = pytest.importorskip("cvxpy")
    for seed in range(5):
        rows = _rows(size, width, seed)
        weights = priority_weights(rows @ rows.T, 0.1, primary)
        direction = cvxpy.Variable(width)
        others = [t for t in range(size) if t != primary]
        serves = [rows[t].numpy() @ direction >= 0.1 * float(rows[t] @ rows[t]) for t in others]
        cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(direction - rows[primary].numpy())), serves).solve()
        torch.testing.assert_close(weights @ rows, torch.from_numpy(direction.value), rtol=1e-4, atol=1e-4)
        assert weights[primary] == 1
        slack = rows[others] @ (weights @ rows) - 0.1 * (rows[others] ** 2).sum(1)
        assert (slack >= -1e-9).all()


def test_without_a_direction_that_serves_all_the_primary_gradient_is_left() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    assert torch.equal(priority_weights(rows @ rows.T, 0.1), torch.tensor([1.0, 0, 0], dtype=torch.float64))


def test_one_task() -> None:
    assert torch.equal(priority_weights(torch.full((1, 1), 4.0), 0.1), torch.ones(1))


def _strategy(size: int) -> PCD:
    strategy = PCD()
    strategy.task_num = size
    strategy.init_param()
    return strategy


def test_update_is_as_long_as_the_primary_gradient_whatever_the_scale_of_the_others() -> None:
    rows = _rows(4, 10)
    scaled = rows * torch.tensor([1.0, 1e-3, 1e3, 10.0], dtype=torch.float64)[:, None]
    updates = []
    for each in (rows, scaled):
        weights = _strategy(4).weigh(torch.ones(4), each @ each.T, PCD_eps=0.0).shared
        updates.append(weights @ each)
    torch.testing.assert_close(updates[0], updates[1])
    torch.testing.assert_close(updates[0].norm(), rows[0].norm())


def test_zero_gradients_give_finite_weights() -> None:
    rows = _rows(3, 5)
    for zero in ([0], [1], [0, 1, 2]):
        given = rows.clone()
        given[zero] = 0
        weights = _strategy(3).weigh(torch.ones(3), given @ given.T).shared
        assert weights.isfinite().all()
        if 0 in zero:
            assert (weights @ given == 0).all()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PCD_tau", -0.1, "must be at least 0"),
        ("PCD_tau", 1.5, "must be at most 1"),
        ("PCD_beta", 1.0, "must be below 1"),
        ("PCD_primary", 3, "from 0 to 2"),
    ],
)
def test_bad_hyper_parameters_are_refused(name: str, value: float, words: str) -> None:
    data = loaders(3)
    with pytest.raises(UsageError, match=f"{name} .*{words}"):
        make_trainer("PCD", count=3, weight_args={name: value}).train(data, data, 1)
