"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

CREATORS = ("empty", "empty_like", "empty_strided")


def _poisoning(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def created(*args: Any, **kwargs: Any) -> Tensor:
        tensor = create(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return created


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and its kin return with NaN, so that code which forgets to write an element is seen."""
    for name in CREATORS:
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", _poisoning(Tensor.new_empty))
