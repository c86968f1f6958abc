"""upgrad against its specification, on every backend that is here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.errors import UsageError
from fastmtl.ops import implementation
from tests.ops.gram_solver import DEVICES, check_close
from tests.ops.rows import backend_kernel
from tests.ops.zoo import BETWEEN, Case, each, poisoned, zoo


class Solver:
    def __init__(self, backend: str) -> None:
        self.kernel, self.device = backend_kernel("upgrad", backend), DEVICES[backend]

    def __call__(self, gram: Tensor, norm_eps: float = 0.0, reg_eps: float = 0.0) -> Tensor:
        weights: Tensor = self.kernel(gram.to(self.device), norm_eps, reg_eps).cpu()
        return weights


@pytest.fixture(params=DEVICES)
def solver(request: pytest.FixtureRequest) -> Solver:
    return Solver(request.param)


@pytest.mark.usefixtures("poisoned_memory")
@each(zoo((1, 2, 3, 8, 40)), BETWEEN)
def test_no_gradient_is_opposed(solver: Solver, case: Case) -> None:
    """The update has a product of at least -1e-9 of what rounds with every gradient; every weight is at least 1 / T."""
    weights = solver(case.gram)
    length = case.gram.diagonal().clamp(min=0).sqrt()
    scale = length * (weights * length).sum()
    assert (case.gram @ weights >= -1e-9 * scale).all()
    assert (weights >= 1 / len(weights)).all()


@each(zoo((1, 3, 16)), BETWEEN)
@pytest.mark.parametrize("reg_eps", [1e-4, 0.1])
def test_is_the_sum_of_the_projections(solver: Solver, case: Case, reg_eps: float) -> None:
    size = len(case.gram)
    trace = case.gram.trace()
    identity = torch.eye(size, dtype=torch.float64)
    matrix = case.gram * (0 if trace == 0 else 1 / trace) + reg_eps * identity
    expected = implementation("dual_cone", "reference")(matrix, identity / size).sum(0)
    check_close(Case(case.name, case.jacobian), solver(case.gram, 0.0, reg_eps), expected, 1e-7)


@each(zoo((3,)), BETWEEN)
@pytest.mark.parametrize("scale", [2.0**-60, 1e-30, 3.0, 1e30])
def test_scale_invariant_where_nothing_is_dropped(solver: Solver, case: Case, scale: float) -> None:
    check_close(case, solver(scale * case.gram, 0.0, 1e-4), solver(case.gram, 0.0, 1e-4), 1e-8)


def test_small_traces_count_as_zero(solver: Solver) -> None:
    gram = 1e-6 * torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
    assert torch.equal(solver(gram, 1e-4, 1e-4), torch.full((2,), 0.5, dtype=torch.float64))
    assert solver(gram, 1e-7, 1e-4)[0] > 0.5


@pytest.mark.parametrize("norm_eps", [0.0, 1e-4, 1e300])
@each(poisoned((1, 2, 3, 8)), BETWEEN)
def test_non_finite_gives_nan(solver: Solver, case: Case, norm_eps: float) -> None:
    assert solver(case.gram, norm_eps, 1e-4).isnan().all()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(2, 3), 0.0, 0.0), r"gram must be a \(T, T\) matrix"),
        ((torch.eye(2), -1.0, 0.0), "norm_eps must be at least 0, got -1.0"),
        ((torch.eye(2), 0.0, float("nan")), "reg_eps must be at least 0, got nan"),
    ],
    ids=["shape", "norm", "reg"],
)
def test_bad_input_is_refused(args: tuple[Tensor, float, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ops.upgrad(*args)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.fastmtl.upgrad.default, (next(zoo((3,))).gram, 1e-4, 1e-4))


def test_compiles_without_graph_breaks() -> None:
    jacobian = next(zoo((5,))).jacobian

    def update(jacobian: Tensor) -> Tensor:
        return ops.upgrad(jacobian @ jacobian.T) @ jacobian

    torch.testing.assert_close(torch.compile(update, fullgraph=True)(jacobian), update(jacobian))
