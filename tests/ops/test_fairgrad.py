"""fairgrad against its specification, on every backend that is here."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops import fairgrad, implementation
from tests.ops.rows import backend_kernel
from tests.ops.zoo import SIZES, Case, each, poisoned, zoo

Solver = Callable[..., Tensor]
DEVICES = {"reference": "cpu", "cpp": "cpu"} | ({"cuda": "cuda"} if torch.cuda.is_available() else {})
ALPHAS = (0.5, 1.0, 2.0, 5.0)
# NumPy's widest float, 80 bits on x86: the check must round less than what it checks.
Wide = np.longdouble


@pytest.fixture(params=DEVICES, scope="module")
def solver(request: pytest.FixtureRequest) -> Solver:
    kernel = backend_kernel("fairgrad", request.param)
    device = DEVICES[request.param]

    def solve(gram: Tensor, alpha: float, warm_start: Tensor | None = None) -> Tensor:
        weights = kernel(gram.to(device), alpha, None if warm_start is None else warm_start.to(device))
        assert weights.device.type == device
        return weights.cpu()

    return solve


def well_posed(size: int, seed: int = 0) -> Tensor:
    jacobian = torch.randn(size, 4 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    jacobian *= torch.logspace(-1, 1, size, dtype=torch.float64)[:, None]
    return jacobian @ jacobian.T


def check_bound(gram: Tensor, alpha: float, weights: Tensor, well: bool = False) -> None:
    """|(G' w)_i w_i^p - 1| <= 1e-10 + 1e-14 w_i^p sum_j |G'_ij| w_j, p = 1 / alpha, G' = G + 1e-10 diag(G)."""
    assert weights.shape == gram.shape[:1]
    assert weights.dtype == torch.float64
    assert weights.isfinite().all()
    zero = gram.diagonal().numpy() <= 0
    assert (weights.numpy()[zero] == 0).all()
    assert (weights.numpy()[~zero] > 0).all()
    matrix, w = gram.numpy()[~zero][:, ~zero].astype(Wide), weights.numpy()[~zero].astype(Wide)
    matrix = matrix + Wide(1e-10) * np.diag(np.diag(matrix))
    inverse = w ** (1 / Wide(alpha))
    residual = np.abs((matrix @ w) * inverse - 1)
    allowed = Wide(1e-10) if well else Wide(1e-10) + Wide(1e-14) * (np.abs(matrix) @ w) * inverse
    assert (residual <= allowed).all()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("size", SIZES)
def test_bound(solver: Solver, request: pytest.FixtureRequest, size: int, alpha: float) -> None:
    reference = "reference" in request.node.name
    if reference and size > 8:
        pytest.skip("the reference takes seconds")
    for case in zoo((size,)):
        # Lengths 1e30 apart are beyond the guarantee; the kernels hold it there too.
        if not (reference and "all_scales" in case.name):
            check_bound(case.gram, alpha, solver(case.gram, alpha))


def test_bound_at_the_least_alpha(solver: Solver) -> None:
    for case in zoo((1, 2, 3, 5)):
        check_bound(case.gram, 0.1, solver(case.gram, 0.1))


@pytest.mark.parametrize("alpha", [1e-3, 1e3])
def test_finite_for_extreme_alpha(alpha: float) -> None:
    for case in zoo((2, 16)):
        assert fairgrad(case.gram, alpha).isfinite().all()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_well_posed_residual_and_ridge(solver: Solver, size: int, alpha: float) -> None:
    gram = well_posed(size)
    weights = solver(gram, alpha)
    check_bound(gram, alpha, weights, well=True)
    # Without the ridge: Newton from there moves the weights by less than 1e-8 of their size.
    power = 1 / alpha
    residual = weights**-power - gram @ weights
    step = torch.linalg.solve(gram + torch.diag(power * weights ** (-power - 1)), residual)
    assert (step.abs() <= 1e-8 * weights).all()


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(st.data())
def test_bound_fuzz(solver: Solver, data: st.DataObject) -> None:
    size, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    entry = st.integers(-4, 4) | st.floats(-1, 1).filter(lambda x: x == 0 or abs(x) > 1e-9)
    rows = data.draw(st.lists(st.lists(entry, min_size=columns, max_size=columns), min_size=size, max_size=size))
    exponents = data.draw(st.lists(st.integers(-6, 6), min_size=size, max_size=size))
    jacobian = torch.tensor(rows, dtype=torch.float64) * 10.0 ** torch.tensor(exponents, dtype=torch.float64)[:, None]
    gram = jacobian @ jacobian.T
    alpha = data.draw(st.sampled_from(ALPHAS))
    check_bound(gram, alpha, solver(gram, alpha))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_least_squares(solver: Solver, seed: int, alpha: float) -> None:
    jacobian = torch.randn(3 + seed, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    gram = jacobian @ jacobian.T
    matrix, start = gram.numpy(), np.full(3 + seed, 1 / (3 + seed))
    found = scipy.optimize.least_squares(
        lambda x: matrix @ x - x ** (-1 / alpha), start, bounds=(0, np.inf), xtol=1e-15, ftol=1e-15, gtol=1e-15
    )
    torch.testing.assert_close(solver(gram, alpha), torch.from_numpy(found.x), rtol=1e-6, atol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_is_the_fair_update(solver: Solver, alpha: float) -> None:
    """Of all updates of its length, d = w^T J has the greatest alpha-fair utility of the inner products <g_t, d>."""
    generator = torch.Generator().manual_seed(3)
    jacobian = torch.randn(3, 10, dtype=torch.float64, generator=generator)

    def utility(update: Tensor) -> Tensor:
        gain = (jacobian @ update).clamp(min=1e-12)
        return (gain.log() if alpha == 1 else gain ** (1 - alpha) / (1 - alpha)).sum()

    update = solver(jacobian @ jacobian.T, alpha) @ jacobian
    assert (jacobian @ update > 0).all()
    for _ in range(200):
        other = update + 0.05 * update.norm() * torch.randn(10, dtype=torch.float64, generator=generator)
        assert utility(other * update.norm() / other.norm()) < utility(update)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("size", [2, 3, 16])
def test_permutation_equivariant(solver: Solver, size: int, alpha: float) -> None:
    gram = well_posed(size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(solver(gram[order][:, order], alpha), solver(gram, alpha)[order], rtol=1e-9, atol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", [2.0**-60, 1e-30, 3.0, 1e30])
def test_scaling_law(solver: Solver, scale: float, alpha: float) -> None:
    gram = well_posed(6)
    expected = scale ** (-1 / (1 + 1 / alpha)) * solver(gram, alpha)
    torch.testing.assert_close(solver(scale * gram, alpha), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_orthogonal_tasks_closed_form(solver: Solver, alpha: float) -> None:
    square = torch.logspace(-12, 12, 24, dtype=torch.float64)
    torch.testing.assert_close(solver(square.diag(), alpha), square ** (-1 / (1 + 1 / alpha)), rtol=2e-10, atol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_duplicated_rows_halve_the_weight(solver: Solver, alpha: float) -> None:
    gram = well_posed(1)
    weights = solver(gram.repeat(2, 2), alpha)
    torch.testing.assert_close(weights, (2 * gram[0]).repeat(2) ** (-1 / (1 + 1 / alpha)), rtol=2e-10, atol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("length", [1e-6, 1.0, 1e6])
def test_opposite_rows_have_capped_weights(solver: Solver, length: float, alpha: float) -> None:
    weights = solver(torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64) * length**2, alpha)
    expected = (1e-10 * length**2) ** (-1 / (1 + 1 / alpha))
    torch.testing.assert_close(weights, torch.full_like(weights, expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_zero_rows_change_nothing(solver: Solver, alpha: float) -> None:
    gram = well_posed(4)
    wider = torch.zeros(6, 6, dtype=torch.float64)
    kept = torch.tensor([0, 2, 3, 5])
    wider[kept[:, None], kept] = gram
    weights = solver(wider, alpha)
    torch.testing.assert_close(weights[kept], solver(gram, alpha), rtol=1e-10, atol=0)
    assert weights[[1, 4]].tolist() == [0, 0]


def test_all_zero(solver: Solver) -> None:
    assert solver(torch.zeros(3, 3, dtype=torch.float64), 2.0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("noise", [1e-7, 1e-3])
def test_coarse_matrices_get_finite_weights(solver: Solver, noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for case in zoo((2, 8)):
        error = 1 + noise * torch.randn(case.gram.shape, dtype=torch.float64, generator=generator)
        weights = solver(case.gram * (error + error.T) / 2, 2.0)
        assert weights.isfinite().all()
        assert (weights >= 0).all()


@each(poisoned((1, 2, 3, 8, 40)))
def test_non_finite_gives_nan(solver: Solver, case: Case) -> None:
    assert solver(case.gram, 2.0).isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("alpha", ALPHAS)
def test_warm_start_keeps_the_bound(solver: Solver, alpha: float) -> None:
    for case in zoo((1, 5)):
        cold = solver(case.gram, alpha)
        ones = torch.ones_like(cold)
        if "all_scales" in case.name:
            continue
        for warm_start in (cold, 1e8 * cold, 1.1 * cold + 0.1 * cold.mean(), ones, 0 * ones, -ones, torch.nan * ones):
            check_bound(case.gram, alpha, solver(case.gram, alpha, warm_start))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_matches_reference(solver: Solver, alpha: float) -> None:
    reference = implementation("fairgrad", "reference")
    for size in (2, 5, 16):
        gram = well_posed(size)
        torch.testing.assert_close(solver(gram, alpha), reference(gram, alpha), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_solved_in_float64(solver: Solver, dtype: torch.dtype) -> None:
    gram = next(zoo((5,))).gram.to(dtype)
    weights = solver(gram, 2.0)
    assert torch.equal(weights, solver(gram.double(), 2.0))
    assert weights.dtype == torch.float64


def test_strided_inputs(solver: Solver) -> None:
    gram = well_posed(8)
    wide = torch.full((8, 3, 8, 2), torch.nan, dtype=torch.float64)
    strided = wide[:, 1, :, 0]
    strided.copy_(gram)
    warm_start = torch.full((16,), 1 / 8, dtype=torch.float64)[::2]
    assert torch.equal(solver(strided, 2.0, warm_start), solver(gram, 2.0, warm_start.contiguous()))


def test_inputs_are_left_alone(solver: Solver) -> None:
    gram = well_posed(8)
    before = gram.clone()
    warm_start = solver(gram, 2.0)
    kept = warm_start.clone()
    solver(gram, 2.0, warm_start)
    assert torch.equal(gram, before)
    assert torch.equal(warm_start, kept)


def test_deterministic(solver: Solver) -> None:
    gram = well_posed(40)
    assert torch.equal(solver(gram, 2.0), solver(gram, 2.0))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 0), (2, 2, 3), (0, 2, 2), (1, 2, 2, 2)])
def test_gram_must_be_square(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        UsageError, match=r"gram must be a \(T, T\) matrix or \(L, T, T\) matrices of floats with L, T >= 1, got shape"
    ):
        fairgrad(torch.zeros(shape, dtype=torch.float64), 1.0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha must be positive and finite, got"):
        fairgrad(torch.eye(3), alpha)


@pytest.mark.parametrize("warm_start", [torch.ones(2), torch.ones(3, 1), torch.ones(3, dtype=torch.int64)])
def test_warm_start_must_fit(warm_start: Tensor) -> None:
    with pytest.raises(UsageError, match="warm_start must hold 3 floats, one per row of gram"):
        fairgrad(torch.eye(3), 1.0, warm_start)


@pytest.mark.parametrize("warm_start", [None, torch.ones(3, dtype=torch.float64)])
def test_opcheck(warm_start: Tensor | None) -> None:
    torch.library.opcheck(torch.ops.fastmtl.fairgrad.default, (well_posed(3), 2.0, warm_start))


def test_compiles_without_graph_breaks() -> None:
    def weigh(gram: Tensor) -> Tensor:
        return 2 * fairgrad(gram, 2.0)

    gram = well_posed(5)
    torch.testing.assert_close(torch.compile(weigh, fullgraph=True)(gram), weigh(gram))
