"""nash: the case alpha = 1 of fairgrad, whose tests cover the solver, and what is true of it alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops import implementation, nash
from tests.ops.rows import backend_kernel
from tests.ops.zoo import SIZES, poisoned, zoo

Solver = Callable[..., Tensor]
DEVICES = {"reference": "cpu", "cpp": "cpu"} | ({"cuda": "cuda"} if torch.cuda.is_available() else {})
Wide = np.longdouble


@pytest.fixture(params=DEVICES, scope="module")
def backend(request: pytest.FixtureRequest) -> str:
    backend_kernel("nash", request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def solver(backend: str) -> Solver:
    kernel, device = implementation("nash", backend), DEVICES[backend]

    def solve(gram: Tensor, warm_start: Tensor | None = None) -> Tensor:
        return kernel(gram.to(device), None if warm_start is None else warm_start.to(device)).cpu()

    return solve


def check_bound(gram: Tensor, weights: Tensor) -> None:
    """|(G' w)_i w_i - 1| <= 1e-10 + 1e-14 w_i sum_j |G'_ij| w_j, G' = G + 1e-10 diag(G); w_i <= 1e5 sqrt(T / G_ii)."""
    zero = gram.diagonal().numpy() <= 0
    assert (weights.numpy()[zero] == 0).all()
    assert (weights.numpy()[~zero] > 0).all()
    matrix, w = gram.numpy()[~zero][:, ~zero].astype(Wide), weights.numpy()[~zero].astype(Wide)
    diagonal = np.diag(matrix)
    matrix = matrix + Wide(1e-10) * np.diag(diagonal)
    residual = np.abs((matrix @ w) * w - 1)
    assert (residual <= Wide(1e-10) + Wide(1e-14) * (np.abs(matrix) @ w) * w).all()
    assert (w <= Wide(1.01e5) * np.sqrt(len(gram) / diagonal)).all()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("size", SIZES)
def test_bound(solver: Solver, backend: str, size: int) -> None:
    if backend == "reference" and size > 16:
        pytest.skip("the reference takes seconds")
    for case in zoo((size,)):
        check_bound(case.gram, solver(case.gram))


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_is_fairgrad_with_alpha_one(solver: Solver, backend: str, size: int) -> None:
    fairgrad = implementation("fairgrad", backend)
    for case in zoo((size,)):
        gram = case.gram.to(DEVICES[backend])
        assert torch.equal(solver(case.gram), fairgrad(gram, 1.0).cpu())


def test_lengths_cancel(solver: Solver) -> None:
    jacobian = torch.randn(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    length = torch.logspace(-12, 12, 6, dtype=torch.float64)
    scaled = length[:, None] * jacobian
    torch.testing.assert_close(solver(scaled @ scaled.T), solver(jacobian @ jacobian.T) / length, rtol=1e-9, atol=0)


@pytest.mark.parametrize("cosine", [-0.9, -0.5, 0.0, 0.7])
def test_two_tasks_closed_form(solver: Solver, cosine: float) -> None:
    gram = torch.tensor([[1.0, 3 * cosine], [3 * cosine, 9.0]], dtype=torch.float64)
    expected = (1 + cosine) ** -0.5 * torch.tensor([1.0, 1 / 3], dtype=torch.float64)
    torch.testing.assert_close(solver(gram), expected, rtol=1e-9, atol=0)


def test_non_finite_gives_nan(solver: Solver) -> None:
    for case in poisoned((1, 3, 8)):
        assert solver(case.gram).isnan().all()


@pytest.mark.parametrize("size", [1, 5])
def test_warm_start_keeps_the_bound(solver: Solver, size: int) -> None:
    for case in zoo((size,)):
        cold = solver(case.gram)
        for warm_start in (cold, 1e8 * cold, 1.1 * cold + 0.1 * cold.mean(), 0 * cold, torch.nan * cold):
            check_bound(case.gram, solver(case.gram, warm_start))


def test_gram_must_be_square() -> None:
    with pytest.raises(
        UsageError, match=r"gram must be a \(T, T\) matrix or \(L, T, T\) matrices of floats with L, T >= 1, got shape"
    ):
        nash(torch.zeros(2, 3))


def test_warm_start_must_fit() -> None:
    with pytest.raises(UsageError, match="warm_start must hold 3 floats, one per row of gram"):
        nash(torch.eye(3), torch.ones(2))


@pytest.mark.parametrize("warm_start", [None, torch.ones(3, dtype=torch.float64)])
def test_opcheck(warm_start: Tensor | None) -> None:
    torch.library.opcheck(torch.ops.fastmtl.nash.default, (next(zoo((3,))).gram, warm_start))


def test_compiles_without_graph_breaks() -> None:
    def weigh(gram: Tensor) -> Tensor:
        return 2 * nash(gram)

    gram = next(zoo((5,))).gram
    torch.testing.assert_close(torch.compile(weigh, fullgraph=True)(gram), weigh(gram))
