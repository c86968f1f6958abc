"""nonneg_qp against its specification, on every backend that is here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.errors import UsageError
from tests.ops.gram_solver import DEVICES
from tests.ops.rows import backend_kernel
from tests.ops.zoo import BETWEEN, Case, each, poisoned, zoo


class Solver:
    def __init__(self, backend: str) -> None:
        self.kernel, self.device = backend_kernel("nonneg_qp", backend), DEVICES[backend]

    def __call__(self, gram: Tensor, linear: Tensor) -> Tensor:
        solution: Tensor = self.kernel(gram.to(self.device), linear.to(self.device)).cpu()
        return solution


@pytest.fixture(params=DEVICES)
def solver(request: pytest.FixtureRequest) -> Solver:
    return Solver(request.param)


def _linear(case: Case, kind: str) -> Tensor:
    """A right side that the rows reach, so that there is a minimum."""
    size = len(case.gram)
    generator = torch.Generator().manual_seed(size)
    if kind == "reached":
        length = case.gram.diagonal().sqrt()
        coefficients = torch.randn(size, dtype=torch.float64, generator=generator)
        return case.gram @ torch.where(length > 0, coefficients / length, 0.0)
    return -torch.rand(size, dtype=torch.float64, generator=generator) * case.gram.diagonal().sqrt()


def _excess(gram: Tensor, linear: Tensor, solution: Tensor) -> float:
    """The largest violation of the optimality conditions, relative to s d_i."""
    length = gram.diagonal().clamp(min=0).sqrt()
    moving = length > 0
    if not moving.any():
        return 0.0
    scale = length * ((linear.abs() / length)[moving].max() + (length * solution).sum())
    slope = gram @ solution - linear
    wrong = torch.where(solution > 0, slope.abs(), -slope).clamp(min=0)
    return float((wrong[moving] / scale[moving].clamp(min=1e-300)).max())


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kind", ["reached", "negative"])
@each(zoo(), BETWEEN)
def test_optimal(solver: Solver, case: Case, kind: str) -> None:
    linear = _linear(case, kind)
    solution = solver(case.gram, linear)
    assert (solution >= 0).all()
    assert (solution[case.gram.diagonal() == 0] == 0).all()
    assert _excess(case.gram, linear, solution) <= 1e-12
    if kind == "negative":
        assert (solution == 0).all()


@pytest.mark.parametrize("size", [2, 5, 16])
def test_full_rank_matches_nonnegative_least_squares(solver: Solver, size: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    generator = torch.Generator().manual_seed(size)
    jacobian = torch.randn(size, 3 * size, dtype=torch.float64, generator=generator)
    wanted = torch.randn(3 * size, dtype=torch.float64, generator=generator)
    expected = torch.from_numpy(optimize.nnls(jacobian.T.numpy(), wanted.numpy())[0])
    torch.testing.assert_close(solver(jacobian @ jacobian.T, jacobian @ wanted), expected, rtol=1e-9, atol=1e-9)


def test_without_a_minimum_the_conditions_fail(solver: Solver) -> None:
    """Two opposite rows, and both products shall be positive."""
    gram = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    linear = torch.ones(2, dtype=torch.float64)
    solution = solver(gram, linear)
    assert solution.isfinite().all()
    assert (gram @ solution < 0.5 * linear).any()


@each(poisoned((1, 2, 3, 8)), BETWEEN)
def test_non_finite_gives_nan(solver: Solver, case: Case) -> None:
    assert solver(case.gram, torch.ones(len(case.gram))).isnan().all()
    size = len(case.gram)
    assert solver(torch.eye(size), torch.full((size,), torch.inf)).isnan().all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales(solver: Solver, scale: float) -> None:
    case = next(zoo((8,)))
    linear = _linear(case, "reached")
    torch.testing.assert_close(solver(scale * case.gram, scale * linear), solver(case.gram, linear), rtol=1e-6, atol=0)
    torch.testing.assert_close(solver(case.gram, scale * linear), scale * solver(case.gram, linear), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(2, 3), torch.ones(2)), r"gram must be a \(T, T\) matrix"),
        ((torch.eye(2), torch.ones(3)), "linear must hold 2 floats, one per row of gram"),
        ((torch.eye(2), torch.ones(2, dtype=torch.int64)), "linear must hold 2 floats"),
    ],
    ids=["gram", "size", "dtype"],
)
def test_bad_input_is_refused(args: tuple[Tensor, Tensor], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ops.nonneg_qp(*args)


def test_opcheck() -> None:
    case = next(zoo((3,)))
    torch.library.opcheck(torch.ops.fastmtl.nonneg_qp.default, (case.gram, torch.ones(3)))


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    jacobian = next(zoo((5,))).jacobian

    def update(jacobian: Tensor) -> Tensor:
        return ops.nonneg_qp(jacobian @ jacobian.T, jacobian.sum(1)) @ jacobian

    torch.testing.assert_close(torch.compile(update, fullgraph=True)(jacobian), update(jacobian))
