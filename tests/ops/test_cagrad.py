"""cagrad against its specification, on every backend that is here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops import cagrad, implementation
from tests.ops.rows import backend_kernel, row_kernel
from tests.ops.zoo import SIZES, Case, poisoned, zoo

Solver = Callable[..., Tensor]
DEVICES = {"reference": "cpu", "cpp": "cpu"} | ({"cuda": "cuda"} if torch.cuda.is_available() else {})
# NumPy's widest float, 80 bits on x86: the check must round less than what it checks.
Wide = np.longdouble
WideArray = NDArray[np.longdouble]


@pytest.fixture(params=DEVICES, scope="module")
def backend(request: pytest.FixtureRequest) -> str:
    backend_kernel("cagrad", request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def solver(backend: str) -> Solver:
    kernel, device = implementation("cagrad", backend), DEVICES[backend]

    def solve(gram: Tensor, c: float) -> Tensor:
        weights: Tensor = kernel(gram.to(device), c)
        assert weights.device.type == device
        return weights.cpu()

    return solve


class Problem:
    """F and its scales from the gradients themselves, in the widest float."""

    def __init__(self, jacobian: Tensor, c: float) -> None:
        self.jacobian: WideArray = jacobian.numpy().astype(Wide)
        self.length: WideArray = np.sqrt((self.jacobian**2).sum(axis=1))
        self.mean: WideArray = self.jacobian.mean(axis=0)
        self.c = Wide(c)
        self.norm = np.sqrt(self.mean @ self.mean)
        # Below it, the Gram matrix does not know the mean gradient.
        self.balanced = self.norm <= 3e-7 * self.length.mean()

    def value(self, weights: WideArray) -> Any:
        combined = weights @ self.jacobian
        return combined @ self.mean + self.c * self.norm * np.sqrt(combined @ combined)

    def scale(self, weights: WideArray) -> WideArray:
        scale: WideArray = (1 + self.c) * self.norm * (self.length + weights @ self.length)
        return scale

    def check(self, weights: Tensor, bound: float = 1e-8) -> None:
        """<g_i, d> >= F(w) - bound s_i, d = g_0 + (c |g_0| / |g_w|) g_w."""
        assert weights.shape == self.length.shape
        assert weights.dtype == torch.float64
        assert (weights >= 0).all()
        w = weights.numpy().astype(Wide)
        assert abs(w.sum() - 1) < 1e-14
        combined = w @ self.jacobian
        root = np.sqrt(combined @ combined)
        if self.balanced or root <= 1e-4 * (w @ self.length):
            return
        update = self.mean + self.c * self.norm / root * combined
        assert (self.jacobian @ update >= self.value(w) - Wide(bound) * self.scale(w)).all()

    def check_not_worse(self, weights: Tensor, others: Tensor) -> None:
        """F(w) <= F(v) + 1e-6 s . v."""
        w, v = weights.numpy().astype(Wide), others.numpy().astype(Wide)
        assert self.balanced or self.value(w) <= self.value(v) + Wide(1e-6) * (self.scale(w) @ v)


def slsqp(gram: Tensor, c: float) -> Tensor:
    """Return the minimiser as LibMTL finds it, without the numbers it adds to roots, on G over its largest entry."""
    matrix = (gram / gram.abs().max().clamp(min=1e-300)).numpy()
    mean = matrix.mean(axis=1)
    radius = c * math.sqrt(max(mean.mean(), 0.0))
    size = len(matrix)
    found = scipy.optimize.minimize(
        lambda x: float(x @ mean + radius * np.sqrt(max(x @ matrix @ x, 0.0))),
        np.full(size, 1 / size),
        bounds=[(0, 1)] * size,
        constraints={"type": "eq", "fun": lambda x: 1 - x.sum()},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    weights = np.clip(found.x, 0, None)
    return torch.from_numpy(weights / weights.sum())


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("c", [0.01, 0.99, 1.0, 20.0])
@pytest.mark.parametrize("size", SIZES)
def test_bound(solver: Solver, backend: str, size: int, c: float) -> None:
    if backend == "reference" and size > 3:
        pytest.skip("the reference takes seconds")
    for case in zoo((size,)):
        Problem(case.jacobian, c).check(solver(case.gram, c))


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_bound_fuzz(solver: Solver, data: st.DataObject) -> None:
    size, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    entry = st.integers(-4, 4) | st.floats(-1, 1).filter(lambda x: x == 0 or abs(x) > 1e-3)
    rows = data.draw(st.lists(st.lists(entry, min_size=columns, max_size=columns), min_size=size, max_size=size))
    exponents = data.draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size))
    jacobian = torch.tensor(rows, dtype=torch.float64) * 10.0 ** torch.tensor(exponents, dtype=torch.float64)[:, None]
    c = data.draw(st.sampled_from([0.05, 0.5, 1.0, 3.0]))
    Problem(jacobian, c).check(solver(jacobian @ jacobian.T, c))


def test_a_row_of_zeros_that_is_best_has_all_weight(solver: Solver) -> None:
    jacobian = torch.tensor([[0.0], [1.0], [-10.0]], dtype=torch.float64)
    assert solver(jacobian @ jacobian.T, 3.0).tolist() == [1, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("c", [1e-7, 1e-5, 0.4, 1.0, 5.0])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_not_worse_than_slsqp_and_corners(solver: Solver, backend: str, size: int, c: float) -> None:
    if backend == "reference" and size > 3:
        pytest.skip("the reference takes seconds")
    for case in zoo((size,)):
        problem, weights = Problem(case.jacobian, c), solver(case.gram, c)
        problem.check_not_worse(weights, slsqp(case.gram, c))
        problem.check_not_worse(weights, torch.full((size,), 1 / size, dtype=torch.float64))
        for corner in torch.eye(size, dtype=torch.float64):
            problem.check_not_worse(weights, corner)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "c"), [(2, 0.4), (5, 1.0), (2, 5.0)])
def test_not_worse_than_reference(size: int, c: float) -> None:
    reference, kernel = implementation("cagrad", "reference"), backend_kernel("cagrad", "cpp")
    for case in zoo((size,)):
        problem = Problem(case.jacobian, c)
        problem.check_not_worse(kernel(case.gram, c), reference(case.gram, c))
        problem.check_not_worse(reference(case.gram, c), kernel(case.gram, c))


@pytest.mark.parametrize("c", [0.2, 0.5, 0.9, 2.0])
@pytest.mark.parametrize("name", ["random", "conflicting", "short_row"])
def test_dual_value_is_the_worst_improvement(solver: Solver, name: str, c: float) -> None:
    """No update within c |g_0| of g_0 improves the worst task by more than d does, and that is F(w)."""
    case = next(case for case in zoo((4,)) if case.name.startswith(name))
    jacobian = case.jacobian
    weights = solver(case.gram, c)
    mean, combined = jacobian.mean(dim=0), weights @ jacobian
    radius = c * mean.norm()
    update = mean + radius / combined.norm() * combined
    value = float(Problem(jacobian, c).value(weights.numpy().astype(Wide)))
    scale = float(mean.norm() * jacobian.norm(dim=1).max())
    assert float((update - mean).norm()) == pytest.approx(float(radius), rel=1e-12)
    assert float((jacobian @ update).min()) == pytest.approx(value, rel=1e-7, abs=1e-8 * scale)
    generator = torch.Generator().manual_seed(0)
    for spread in (1e-3, 0.1, 1.0):
        for _ in range(100):
            other = update - mean + spread * radius * torch.randn(mean.shape, dtype=mean.dtype, generator=generator)
            other = mean + other * min(1.0, float(radius / other.norm()))
            assert float((jacobian @ other).min()) <= value + 1e-8 * scale


@pytest.mark.parametrize("size", [2, 3, 5])
def test_permutation_equivariant(solver: Solver, size: int) -> None:
    gram = next(zoo((size,))).gram
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    for c in (0.3, 1.0):
        torch.testing.assert_close(solver(gram[order][:, order], c), solver(gram, c)[order], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("scale", [2.0**-60, 1e-30, 3.0, 1e30])
def test_scaling_invariant(solver: Solver, scale: float) -> None:
    gram = next(zoo((5,))).gram
    for c in (0.3, 1.0):
        torch.testing.assert_close(solver(scale * gram, c), solver(gram, c), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("c", [0.0, 1e-9])
def test_without_a_ball_the_worst_task_takes_all(solver: Solver, c: float) -> None:
    gram = next(zoo((5,))).gram
    expected = torch.zeros(5, dtype=torch.float64)
    expected[gram.mean(dim=1).argmin()] = 1
    assert torch.equal(solver(gram, c), expected)


def test_large_balls_give_the_min_norm_element(solver: Solver) -> None:
    gram = next(zoo((5,))).gram
    expected = implementation("min_norm", "reference")(gram)
    torch.testing.assert_close(solver(gram, 1e9), expected, rtol=0, atol=1e-7)


def test_one_task(solver: Solver) -> None:
    assert solver(torch.tensor([[4.0]], dtype=torch.float64), 0.5).tolist() == [1]


@pytest.mark.parametrize("size", [2, 3, 8])
def test_balanced_tasks_share(solver: Solver, size: int) -> None:
    case = next(case for case in zoo((size,)) if case.name.startswith("stationary-"))
    assert solver(case.gram, 0.5).tolist() == [1 / size] * size
    assert solver(torch.zeros_like(case.gram), 0.5).tolist() == [1 / size] * size


def test_opposite_tasks_with_a_large_ball_vanish(solver: Solver) -> None:
    jacobian = torch.tensor([[1.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    weights = solver(jacobian @ jacobian.T, 2.0)
    torch.testing.assert_close(weights, torch.tensor([2 / 3, 1 / 3], dtype=torch.float64), rtol=0, atol=1e-6)


def test_zero_rows_take_all_where_all_improve(solver: Solver, backend: str) -> None:
    gram = torch.diag(torch.tensor([0.0, 4.0, 0.0, 1.0], dtype=torch.float64))
    weights = solver(gram, 0.5)
    expected = torch.tensor([0.5, 0, 0.5, 0], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6 if backend == "reference" else 0)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in poisoned((1, 2, 3, 8, 40))])
def test_non_finite_gives_nan(solver: Solver, case: Case) -> None:
    for c in (0.0, 0.5):
        assert solver(case.gram, c).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_solved_in_float64(solver: Solver, dtype: torch.dtype) -> None:
    gram = next(zoo((5,))).gram.to(dtype)
    weights = solver(gram, 0.5)
    assert torch.equal(weights, solver(gram.double(), 0.5))
    assert weights.dtype == torch.float64


@pytest.mark.slow
def test_coarse_matrices_end_on_the_simplex(solver: Solver) -> None:
    generator = torch.Generator().manual_seed(0)
    for case in zoo((2, 5)):
        error = 1 + 1e-6 * torch.randn(case.gram.shape, dtype=torch.float64, generator=generator)
        weights = solver(case.gram * (error + error.T) / 2, 0.5)
        assert (weights >= 0).all()
        assert float(weights.sum()) == pytest.approx(1, abs=1e-14)


def test_strided_inputs(solver: Solver) -> None:
    gram = next(zoo((5,))).gram
    wide = torch.full((5, 3, 5, 2), torch.nan, dtype=torch.float64)
    strided = wide[:, 1, :, 0]
    strided.copy_(gram)
    before = strided.clone()
    assert torch.equal(solver(strided, 0.5), solver(gram, 0.5))
    assert torch.equal(strided, before)


def test_deterministic(solver: Solver) -> None:
    gram = next(zoo((8,))).gram
    assert torch.equal(solver(gram, 0.5), solver(gram, 0.5))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 0), (2, 2, 3), (0, 2, 2), (1, 2, 2, 2)])
def test_gram_must_be_square(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        UsageError, match=r"gram must be a \(T, T\) matrix or \(L, T, T\) matrices of floats with L, T >= 1, got shape"
    ):
        cagrad(torch.zeros(shape, dtype=torch.float64), 0.5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex128])
def test_gram_must_be_floats(dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match=r"gram must be a .* of floats"):
        cagrad(torch.eye(3).to(dtype), 0.5)


@pytest.mark.parametrize("c", [-0.1, math.inf, math.nan])
def test_c_must_be_nonnegative(c: float) -> None:
    with pytest.raises(UsageError, match="c must be finite and at least 0, got"):
        cagrad(torch.eye(3), c)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.fastmtl.cagrad.default, (next(zoo((3,))).gram, 0.5))


def test_compiles_without_graph_breaks() -> None:
    def weigh(gram: Tensor) -> Tensor:
        return 2 * cagrad(gram, 0.5)

    gram = next(zoo((5,))).gram
    torch.testing.assert_close(torch.compile(weigh, fullgraph=True)(gram), weigh(gram))


@pytest.mark.parametrize("backend", DEVICES)
@pytest.mark.parametrize("name", ["random-T3", "narrow-T8", "zero_rows-T5", "stationary-T3", "all_zero-T2"])
def test_update_is_that_of_the_weights(backend: str, name: str) -> None:
    gram = next(case for case in zoo((2, 3, 5, 8)) if case.name == name).gram
    weights, update = row_kernel("cagrad_update", backend)(gram, 0.4)
    assert torch.equal(weights, row_kernel("cagrad", backend)(gram, 0.4))
    length = (weights @ gram @ weights).clamp(min=0).sqrt()
    reach = 0.4 * gram.mean().clamp(min=0).sqrt() / length if length > 0 else 0.0
    torch.testing.assert_close(update, 1 / len(gram) + reach * weights, rtol=1e-7, atol=1e-9)


def test_update_opcheck() -> None:
    torch.library.opcheck(torch.ops.fastmtl.cagrad_update.default, (next(zoo((3,))).gram, 0.4))
