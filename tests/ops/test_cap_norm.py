"""cap_norm against its formula, on every backend that is here."""

from __future__ import annotations

import pytest
import torch

from fastmtl import ops
from fastmtl.errors import UsageError
from tests.ops.gram_solver import DEVICES
from tests.ops.rows import backend_kernel
from tests.ops.zoo import BETWEEN, Case, each, zoo


@pytest.fixture(params=DEVICES)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@each(zoo((1, 3, 40)), BETWEEN)
def test_norm_is_limited(backend: str, case: Case) -> None:
    size = len(case.gram)
    weights = torch.linspace(-1, 2, size, dtype=torch.float64)
    norm = (weights @ case.jacobian).norm()
    for most in (1e-3, 1.0, 1e6):
        capped = backend_kernel("cap_norm", backend)(case.gram.to(DEVICES[backend]), weights.to(DEVICES[backend]), most)
        scale = (most / (norm + 1e-6)).clamp(max=1)
        # Rounding of G moves the norm of what nearly cancels.
        slack = 1e-7 * float((weights.abs() @ case.gram.diagonal().sqrt()) / norm.clamp(min=1e-300))
        assert ((capped.cpu() - weights * scale).abs() <= (1e-9 + min(slack, 1.0)) * weights.abs() * scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_other_dtypes(backend: str, dtype: torch.dtype) -> None:
    capped = backend_kernel("cap_norm", backend)(
        torch.eye(2, dtype=torch.float64, device=DEVICES[backend]),
        torch.tensor([3.0, 4.0], dtype=dtype, device=DEVICES[backend]),
        1.0,
    )
    torch.testing.assert_close(capped.cpu(), torch.tensor([0.6, 0.8], dtype=torch.float64), rtol=1e-6, atol=0)


def test_nan_shows(backend: str) -> None:
    gram = torch.full((2, 2), torch.nan, dtype=torch.float64, device=DEVICES[backend])
    assert backend_kernel("cap_norm", backend)(gram, gram[0].nan_to_num(1.0), 1.0).isnan().all()


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.fastmtl.cap_norm.default, (torch.eye(3).double(), torch.ones(3), 1.0))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="weights must hold 2 floats"):
        ops.cap_norm(torch.eye(2), torch.ones(3), 1.0)
    with pytest.raises(UsageError, match="max_norm must be above 0, got 0"):
        ops.cap_norm(torch.eye(2), torch.ones(2), 0.0)
