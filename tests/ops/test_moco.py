"""moco_rates_ and moco_step_ against their formulas in float64, on every backend that is here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.errors import UsageError
from tests.ops.gram_solver import DEVICES
from tests.ops.rows import backend_kernel

SIZES = (1, 2, 7, 33, 300)


@pytest.fixture(params=DEVICES)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def numbers(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, one of them negative by rounding, weights and a Gram matrix with a row of zeros."""
    generator = torch.Generator().manual_seed(size)
    jacobian = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    losses, weights = (torch.rand(2, size, generator=generator) + 0.1).to(dtype).unbind()
    if size > 2:
        losses[1], jacobian[2] = -1e-9, 0
    return losses.clone(), weights.clone(), jacobian @ jacobian.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_rates(backend: str, size: int, dtype: torch.dtype) -> None:
    losses, _, gram = numbers(size, dtype)
    steps = torch.tensor(6.0, dtype=dtype, device=DEVICES[backend])
    moved = [tensor.to(DEVICES[backend]) for tensor in (losses, gram)]
    keep, gains = backend_kernel("moco_rates_", backend)(steps, *moved, 0.5, 0.3).cpu()
    rate = 0.5 / 7**0.3
    assert steps.item() == 7
    torch.testing.assert_close(keep, torch.full((size,), 1 - rate, dtype=torch.float64))
    torch.testing.assert_close(gains, rate * losses.double().clamp(min=0) / (gram.diagonal().sqrt() + 1e-8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_step(backend: str, size: int, dtype: torch.dtype) -> None:
    _, weights, gram = numbers(size, dtype)
    device = DEVICES[backend]
    steps, place = torch.tensor(7.0, dtype=dtype, device=device), weights.clone().to(device)
    copy = backend_kernel("moco_step_", backend)(place, gram.to(device), steps, 0.1, 0.5, 0.2)
    wide = weights.double()
    want = torch.softmax(wide - 0.1 / 7**0.5 * (gram @ wide + 0.2 * wide), 0)
    torch.testing.assert_close(place.cpu().double(), want, rtol=4 * torch.finfo(dtype).eps + size * 2e-16, atol=0)
    assert copy.data_ptr() != place.data_ptr()
    assert torch.equal(copy.to(dtype), place)
    assert steps.item() == 7


def test_opcheck_and_graphs() -> None:
    losses, weights, gram = numbers(3, torch.float32)
    torch.library.opcheck(torch.ops.fastmtl.moco_rates_.default, (torch.ones(()), losses, gram, 0.5, 0.5))
    torch.library.opcheck(torch.ops.fastmtl.moco_step_.default, (weights, gram, torch.ones(()), 0.1, 0.5, 0.0))

    def run(weights: Tensor) -> tuple[Tensor, ...]:
        steps = torch.zeros(())
        keep, gains = ops.moco_rates_(steps, losses, gram, 0.5, 0.5)
        return keep, gains, ops.moco_step_(weights, gram, steps, 0.1, 0.5, 0.0)

    want, got = (make(weights.clone()) for make in (run, torch.compile(run, fullgraph=True, backend="aot_eager")))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_what_does_not_fit_is_refused() -> None:
    steps, gram = torch.zeros(()), torch.eye(2)
    with pytest.raises(UsageError, match="losses must hold 2 floats"):
        ops.moco_rates_(steps, torch.ones(3), gram, 0.5, 0.5)
    with pytest.raises(UsageError, match="steps must be one float"):
        ops.moco_rates_(torch.zeros(2), torch.ones(2), gram, 0.5, 0.5)
    with pytest.raises(UsageError, match="weights must hold 2 floats"):
        ops.moco_step_(torch.ones(3), gram, steps, 0.1, 0.5, 0.0)
    with pytest.raises(UsageError, match=r"gram must be a \(T, T\) matrix"):
        ops.moco_step_(torch.ones(3), torch.ones(3), steps, 0.1, 0.5, 0.0)
