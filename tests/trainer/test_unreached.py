"""Shared parameters that no loss reaches are named."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.trainer.toy import loaders, make_trainer


class _Spare(nn.Module):
    """Has a layer that it does not use, or uses from some step on."""

    def __init__(self, used_from: int | None = None) -> None:
        super().__init__()
        self.layer, self.spare = nn.Linear(6, 8), nn.Linear(8, 8)
        self.used_from, self.calls = used_from, 0

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x).relu()
        self.calls += self.training
        used = self.used_from is not None and self.calls > self.used_from
        return self.spare(found) if used else found


@pytest.mark.parametrize("name", ["EW", "MGDA", "MoCo", "FORUM"])
def test_they_are_named_once(name: str) -> None:
    trainer = make_trainer(name, encoder_class=_Spare)
    data = loaders(rows=96)
    with pytest.warns(
        UserWarning, match=r"No loss has reached encoder.spare.weight, encoder.spare.bias in the first 1"
    ):
        trainer.train(data, data, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train(data, data, 1)


CASES: dict[str, dict[str, Any]] = {
    "frozen": {"encoder_class": lambda: _frozen(_Spare())},
    "used later": {"encoder_class": lambda: _Spare(used_from=6)},
    "all used": {},
    "drawn tasks": {"tasks_per_step": 1, "count": 4},
}


def _frozen(network: _Spare) -> _Spare:
    network.spare.requires_grad_(False)
    return network


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_said_without_need(case: str) -> None:
    options = dict(CASES[case])
    count = options.pop("count", 2)
    data = loaders(count, rows=96)
    torch.manual_seed(0)
    trainer = make_trainer("MGDA", count=count, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train(data, data, 1)
