"""min_norm against its specification, on every backend that is here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops import implementation, min_norm
from tests.ops.rows import backend_kernel
from tests.ops.zoo import Case, each, poisoned, zoo

Solver = Callable[..., Tensor]
DEVICES = {"reference": "cpu", "cpp": "cpu"} | ({"cuda": "cuda"} if torch.cuda.is_available() else {})
# NumPy's widest float, 80 bits on x86: the check must round less than what it checks.
Wide = np.longdouble


@pytest.fixture(params=DEVICES, scope="module")
def solver(request: pytest.FixtureRequest) -> Solver:
    kernel = backend_kernel("min_norm", request.param)
    device = DEVICES[request.param]

    def solve(gram: Tensor, warm_start: Tensor | None = None) -> Tensor:
        weights = kernel(gram.to(device), None if warm_start is None else warm_start.to(device))
        assert weights.device.type == device
        return weights.cpu()

    return solve


def check_simplex(weights: Tensor, size: int) -> None:
    assert weights.shape == (size,)
    assert weights.dtype == torch.float64
    assert (weights >= 0).all()
    assert abs(weights.numpy().astype(Wide).sum() - 1) < 1e-14


def check_bound(gram: Tensor, weights: Tensor) -> None:
    """(G w)_i >= (1 - 1e-6) w^T G w - 1e-12 s_i, s_i = sqrt(G_ii) sum_j w_j sqrt(G_jj)."""
    check_simplex(weights, len(gram))
    matrix, w = gram.numpy().astype(Wide), weights.numpy().astype(Wide)
    image = matrix @ w
    length = np.sqrt(np.diag(matrix))
    allowed = Wide(1e-12) * length * (length @ w)
    assert (image >= (1 - Wide(1e-6)) * (w @ image) - allowed).all()


def norm(case: Case, weights: Tensor) -> float:
    return float((weights @ case.jacobian).norm())


@pytest.mark.usefixtures("poisoned_memory")
@each(zoo())
def test_bound(solver: Solver, case: Case) -> None:
    check_bound(case.gram, solver(case.gram))


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(st.data())
def test_bound_fuzz(solver: Solver, data: st.DataObject) -> None:
    size, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    entry = st.integers(-4, 4) | st.floats(-1, 1).filter(lambda x: x == 0 or abs(x) > 1e-9)
    rows = data.draw(st.lists(st.lists(entry, min_size=columns, max_size=columns), min_size=size, max_size=size))
    exponents = data.draw(st.lists(st.integers(-12, 12), min_size=size, max_size=size))
    jacobian = torch.tensor(rows, dtype=torch.float64) * 10.0 ** torch.tensor(exponents, dtype=torch.float64)[:, None]
    gram = jacobian @ jacobian.T
    check_bound(gram, solver(gram))


@each(zoo((3, 16)))
def test_matches_reference_norm(solver: Solver, case: Case) -> None:
    reference = implementation("min_norm", "reference")
    tolerance = 1e-6 * float(case.jacobian.norm(dim=1).max())
    assert norm(case, solver(case.gram)) == pytest.approx(norm(case, reference(case.gram)), rel=1e-6, abs=tolerance)


@each(zoo((3, 16)))
def test_permutation_equivariant(solver: Solver, case: Case) -> None:
    order = torch.randperm(len(case.jacobian), generator=torch.Generator().manual_seed(0))
    permuted = Case(case.name, case.jacobian[order])
    weights = solver(permuted.gram)
    check_bound(permuted.gram, weights)
    tolerance = 1e-6 * float(case.jacobian.norm(dim=1).max())
    assert norm(permuted, weights) == pytest.approx(norm(case, solver(case.gram)), rel=1e-6, abs=tolerance)


@pytest.mark.parametrize("size", [2, 3, 16, 40])
def test_permutation_equivariant_weights(solver: Solver, size: int) -> None:
    case = next(zoo((size,)))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        solver(case.gram[order][:, order]), solver(case.gram)[order], rtol=1e-9, atol=1e-11, msg=str(case)
    )


@pytest.mark.parametrize("scale", [2.0**-60, 1e-30, 1e-8, 3.0, 1e30])
@pytest.mark.parametrize("size", [2, 3, 16, 40])
def test_scaling_invariant(solver: Solver, size: int, scale: float) -> None:
    gram = next(zoo((size,))).gram
    torch.testing.assert_close(solver(scale * gram), solver(gram), rtol=1e-9, atol=1e-11)


@each(zoo((2, 40)))
def test_non_conflicting(solver: Solver, case: Case) -> None:
    update = solver(case.gram) @ case.jacobian
    slack = 1e-6 * case.jacobian.norm(dim=1) * case.jacobian.norm(dim=1).max()
    assert (case.jacobian @ update >= -slack).all()


@pytest.mark.parametrize("size", [2, 3, 8, 40, 128])
def test_stationary_point_has_norm_zero(solver: Solver, size: int) -> None:
    case = next(case for case in zoo((size,)) if case.name.startswith("stationary"))
    assert norm(case, solver(case.gram)) < 1e-6 * float(case.jacobian.norm(dim=1).max())


@pytest.mark.parametrize("length", [1e-12, 0.5, 1.0, 3.0, 1e12])
@pytest.mark.parametrize("cosine", [-1.0, -0.6, 0.0, 0.3, 0.9])
def test_two_tasks_closed_form(solver: Solver, cosine: float, length: float) -> None:
    gram = torch.tensor([[1.0, cosine * length], [cosine * length, length**2]], dtype=torch.float64)
    first = (length**2 - cosine * length) / (1 + length**2 - 2 * cosine * length)
    first = min(max(first, 0.0), 1.0)
    torch.testing.assert_close(solver(gram), torch.tensor([first, 1 - first], dtype=torch.float64), rtol=0, atol=1e-10)


def test_orthogonal_tasks_closed_form(solver: Solver) -> None:
    square = torch.logspace(-3, 3, 24, dtype=torch.float64)
    torch.testing.assert_close(solver(square.diag()), (1 / square) / (1 / square).sum(), rtol=1e-11, atol=0)


def test_shortest_row_inside_the_cone_takes_all(solver: Solver) -> None:
    jacobian = torch.tensor([[1.0, 0.0], [2.0, 1.0], [3.0, -1.0]], dtype=torch.float64)
    assert solver(jacobian @ jacobian.T).tolist() == [1, 0, 0]


@pytest.mark.parametrize("size", [1, 3, 20])
def test_duplicated_rows_change_nothing(solver: Solver, size: int) -> None:
    case = next(zoo((size,)))
    twice = Case("twice", case.jacobian.repeat(2, 1))
    weights = solver(twice.gram)
    torch.testing.assert_close(weights[:size] + weights[size:], solver(case.gram), rtol=1e-9, atol=1e-10)


def test_zero_rows_share_all_weight(solver: Solver) -> None:
    assert solver(torch.diag(torch.tensor([0.0, 4.0, 0.0, 1.0], dtype=torch.float64))).tolist() == [0.5, 0, 0.5, 0]


@each(poisoned((1, 2, 3, 8, 40)))
def test_non_finite_gives_nan(solver: Solver, case: Case) -> None:
    assert solver(case.gram).isnan().all()


@each(zoo((1, 8)))
def test_warm_start_keeps_the_bound(solver: Solver, case: Case) -> None:
    size = len(case.gram)
    cold = solver(case.gram)
    corner = torch.zeros(size, dtype=torch.float64)
    corner[-1] = 1
    for warm_start in (cold, corner, torch.full_like(corner, 1 / size), torch.zeros_like(corner), corner * torch.nan):
        weights = solver(case.gram, warm_start)
        check_bound(case.gram, weights)
        tolerance = 1e-6 * float(case.jacobian.norm(dim=1).max())
        assert norm(case, weights) == pytest.approx(norm(case, cold), rel=1e-6, abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_solved_in_float64(solver: Solver, dtype: torch.dtype) -> None:
    gram = next(zoo((5,))).gram.to(dtype)
    weights = solver(gram)
    assert torch.equal(weights, solver(gram.double()))
    check_simplex(weights, 5)


def test_strided_inputs(solver: Solver) -> None:
    gram = next(zoo((8,))).gram
    wide = torch.full((8, 3, 8, 2), torch.nan, dtype=torch.float64)
    strided = wide[:, 1, :, 0]
    strided.copy_(gram)
    warm_start = torch.full((16,), 1 / 8, dtype=torch.float64)[::2]
    assert torch.equal(solver(strided, warm_start), solver(gram, warm_start.contiguous()))


def test_inputs_are_left_alone(solver: Solver) -> None:
    gram = next(zoo((8,))).gram
    before = gram.clone()
    warm_start = solver(gram)
    kept = warm_start.clone()
    solver(gram, warm_start)
    assert torch.equal(gram, before)
    assert torch.equal(warm_start, kept)


def test_deterministic(solver: Solver) -> None:
    gram = next(zoo((40,))).gram
    assert torch.equal(solver(gram), solver(gram))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 0), (2, 2, 3), (0, 2, 2), (1, 2, 2, 2)])
def test_gram_must_be_square(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        UsageError, match=r"gram must be a \(T, T\) matrix or \(L, T, T\) matrices of floats with L, T >= 1, got shape"
    ):
        min_norm(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex128])
def test_gram_must_be_floats(dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match=r"gram must be a .* of floats"):
        min_norm(torch.eye(3).to(dtype))


@pytest.mark.parametrize("warm_start", [torch.ones(2), torch.ones(3, 1), torch.ones(3, dtype=torch.int64)])
def test_warm_start_must_fit(warm_start: Tensor) -> None:
    with pytest.raises(UsageError, match="warm_start must hold 3 floats, one per row of gram"):
        min_norm(torch.eye(3), warm_start)


def test_warm_start_must_be_on_the_device() -> None:
    with pytest.raises(UsageError, match="warm_start must be on gram's device cpu, got meta"):
        min_norm(torch.eye(3), torch.ones(3, device="meta"))


@pytest.mark.parametrize("warm_start", [None, torch.full((3,), 1 / 3, dtype=torch.float64)])
def test_opcheck(warm_start: Tensor | None) -> None:
    torch.library.opcheck(torch.ops.fastmtl.min_norm.default, (next(zoo((3,))).gram, warm_start))


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    jacobian = next(zoo((5,))).jacobian

    def norm_of(jacobian: Tensor) -> Tensor:
        return (min_norm(jacobian @ jacobian.T) @ jacobian).norm()

    compiled = torch.compile(norm_of, fullgraph=True)
    torch.testing.assert_close(compiled(jacobian), norm_of(jacobian))
    torch.testing.assert_close(compiled(2 * jacobian), 2 * norm_of(jacobian))
