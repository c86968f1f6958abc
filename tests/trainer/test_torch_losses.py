"""Losses of torch as losses of tasks: by entries, without broadcasting."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.trainer.setup.losses import as_loss

NAN = math.nan
WEIGHT = [0.1, 1.0, 0.03]


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TORCH_LOSSES = [nn.MSELoss(), nn.SmoothL1Loss(), nn.BCEWithLogitsLoss(), F.l1_loss, partial(F.huber_loss, delta=0.5)]


@pytest.mark.parametrize("given", TORCH_LOSSES, ids=["MSE", "smooth L1", "BCE", "l1_loss", "partial"])
def test_losses_of_torch_do_not_broadcast(given: Any) -> None:
    loss, pred, gt = as_loss(given, "loss_fn"), _draw(4, 1, seed=0), _draw(4, seed=1).sigmoid()
    torch.testing.assert_close(loss.compute_loss(pred, gt), given(pred[:, 0], gt), rtol=1e-14, atol=0)
    with pytest.raises(UsageError, match=r"\(4, 1\) do not match labels of shape \(4, 2\)"):
        loss.compute_loss(pred, gt[:, None].expand(-1, 2))


def test_losses_of_torch_know_what_is_missing() -> None:
    pred, gt = torch.tensor([-98.0, 6.0], dtype=torch.float64), torch.tensor([-100, 5])
    for given, expected in ((nn.MSELoss(), 2.5), (F.l1_loss, 1.5), (partial(F.huber_loss, delta=9.0), 1.25)):
        loss = as_loss(given, "loss_fn")
        assert loss.compute_loss(pred, gt).item() == expected
        assert loss.divisor(gt) == 2
    binary = torch.tensor([-100, 1])
    expected = F.softplus(-pred[1]).item()
    assert as_loss(nn.BCEWithLogitsLoss(), "loss_fn").compute_loss(pred, binary).item() == pytest.approx(expected)
    logits, classes = _draw(3, 3, seed=0), torch.tensor([[0], [2], [1]])
    void = nn.CrossEntropyLoss(ignore_index=0, weight=torch.tensor(WEIGHT, dtype=torch.float64))
    loss = as_loss(void, "loss_fn")
    assert loss.compute_loss(logits, classes).item() == pytest.approx(void(logits, classes[:, 0]).item(), rel=1e-14)
    assert float(loss.divisor(classes)) == pytest.approx(WEIGHT[1] + WEIGHT[2])
    with pytest.raises(UsageError, match=r"CrossEntropyLoss: predictions of shape \(3, 3\) .* \(3, 2\)"):
        loss.compute_loss(logits, classes.expand(-1, 2))
