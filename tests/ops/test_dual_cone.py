"""dual_cone against its specification, on every backend that is here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops import dual_cone, implementation
from tests.ops.rows import backend_kernel
from tests.ops.zoo import Case, each, poisoned, zoo

Solver = Callable[[Tensor, Tensor], Tensor]
DEVICES = {"reference": "cpu", "cpp": "cpu"} | ({"cuda": "cuda"} if torch.cuda.is_available() else {})
# NumPy's widest float, 80 bits on x86: the check must round less than what it checks.
Wide = np.longdouble


@pytest.fixture(params=DEVICES, scope="module")
def solver(request: pytest.FixtureRequest) -> Solver:
    kernel = backend_kernel("dual_cone", request.param)
    device = DEVICES[request.param]

    def solve(gram: Tensor, targets: Tensor) -> Tensor:
        weights = kernel(gram.to(device), targets.to(device))
        assert weights.device.type == device
        return weights.cpu()

    return solve


def upgrad(size: int) -> Tensor:
    """Each task's share of the mean; of many tasks, four."""
    return (torch.eye(size, dtype=torch.float64) / size)[:: max(1, size // 4)]


def mixed(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.stack(
        [torch.ones(size, dtype=torch.float64), torch.randn(size, 1, generator=generator).double()[:, 0]]
    )


def check_bound(gram: Tensor, targets: Tensor, weights: Tensor) -> None:
    """v >= u and |min(G v, v - u)| within 1e-12 s_i, s_i = sqrt(G_ii) sum_j sqrt(G_jj) (|u_j| + v_j - u_j)."""
    assert weights.shape == targets.shape
    assert weights.dtype == torch.float64
    assert weights.isfinite().all()
    matrix = gram.numpy().astype(Wide)
    length = np.sqrt(np.diag(matrix))
    for u, v in zip(targets.numpy().astype(Wide), weights.numpy().astype(Wide), strict=True):
        image = matrix @ v
        allowed = Wide(1e-12) * length * (length @ (abs(u) + v - u))
        # Rounding of v to float64 moves G v as well.
        allowed += Wide(2.0**-53) * (abs(matrix) @ abs(v))
        assert (v >= u).all()
        assert (image >= -allowed).all()
        assert (image <= allowed)[v > u].all()


def square(gram: Tensor, weights: Tensor) -> np.ndarray:
    matrix = gram.numpy().astype(Wide)
    return np.array([v @ matrix @ v for v in weights.numpy().astype(Wide)])


def slack(case: Case, targets: Tensor) -> np.ndarray:
    """What the bound leaves open of the squared lengths."""
    return 1e-11 * (targets.abs() @ case.jacobian.norm(dim=1)).square().numpy().astype(Wide)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("targets", [upgrad, mixed])
@each(zoo())
def test_bound(solver: Solver, case: Case, targets: Callable[[int], Tensor]) -> None:
    wanted = targets(len(case.gram))
    check_bound(case.gram, wanted, solver(case.gram, wanted))


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(st.data())
def test_bound_fuzz(solver: Solver, data: st.DataObject) -> None:
    size, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    entry = st.integers(-4, 4) | st.floats(-1, 1).filter(lambda x: x == 0 or abs(x) > 1e-9)
    rows = data.draw(st.lists(st.lists(entry, min_size=columns, max_size=columns), min_size=size, max_size=size))
    exponents = data.draw(st.lists(st.integers(-12, 12), min_size=size, max_size=size))
    targets = data.draw(st.lists(st.lists(entry, min_size=size, max_size=size), min_size=1, max_size=2))
    jacobian = torch.tensor(rows, dtype=torch.float64) * 10.0 ** torch.tensor(exponents, dtype=torch.float64)[:, None]
    gram, wanted = jacobian @ jacobian.T, torch.tensor(targets, dtype=torch.float64)
    check_bound(gram, wanted, solver(gram, wanted))


@each(zoo((2, 3, 16)))
def test_matches_reference_projection(solver: Solver, case: Case) -> None:
    wanted = mixed(len(case.gram))
    ours, reference = solver(case.gram, wanted), implementation("dual_cone", "reference")(case.gram, wanted)
    scale = (wanted.abs() @ case.jacobian.norm(dim=1))[:, None]
    torch.testing.assert_close(
        ours @ case.jacobian / scale.clamp(min=1e-300),
        reference @ case.jacobian / scale.clamp(min=1e-300),
        rtol=0,
        atol=2e-6,
    )


@pytest.mark.slow
@each(zoo((2, 3, 8, 40)))
def test_no_longer_than_quadprogs(solver: Solver, case: Case) -> None:
    """The objective is at most quadprog's, which solves the same problem on a G that is made definite."""
    quadprog = pytest.importorskip("quadprog")
    size = len(case.gram)
    gram = case.gram / case.gram.diagonal().max().clamp(min=1e-300) + 1e-8 * torch.eye(size, dtype=torch.float64)
    wanted = torch.cat([upgrad(size), mixed(size)])
    ours = square(gram, solver(gram, wanted))
    check_bound(gram, wanted, solver(gram, wanted))
    for mine, u in zip(ours, wanted.numpy(), strict=True):
        theirs = quadprog.solve_qp(gram.numpy(), np.zeros(size), np.eye(size), u)[0]
        v = np.maximum(theirs, u).astype(Wide)
        assert mine <= v @ gram.numpy().astype(Wide) @ v * (1 + 1e-6)


@each(zoo((3, 40)))
def test_projection_of_a_projection_is_itself(solver: Solver, case: Case) -> None:
    wanted = upgrad(len(case.gram))
    once = solver(case.gram, wanted)
    twice = solver(case.gram, once)
    difference = abs(square(case.gram, twice - once))
    assert (difference <= slack(case, once)).all()


@each(zoo((3, 16)))
def test_permutation_equivariant(solver: Solver, case: Case) -> None:
    size = len(case.gram)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    wanted = mixed(size)
    weights = solver(case.gram[order][:, order], wanted[:, order])
    check_bound(case.gram[order][:, order], wanted[:, order], weights)
    back = torch.empty_like(weights)
    back[:, order] = weights
    assert (abs(square(case.gram, back - solver(case.gram, wanted))) <= slack(case, wanted)).all()


@pytest.mark.parametrize("scale", [2.0**-60, 1e-30, 1e-8, 3.0, 1e30])
@pytest.mark.parametrize("size", [2, 3, 16, 40])
def test_scaling(solver: Solver, size: int, scale: float) -> None:
    gram, wanted = next(zoo((size,))).gram, mixed(size)
    weights = solver(gram, wanted)
    torch.testing.assert_close(solver(scale * gram, wanted), weights, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(solver(gram, scale * wanted) / scale, weights, rtol=1e-9, atol=1e-11)


def test_rows_are_independent(solver: Solver) -> None:
    case = next(case for case in zoo((8,)) if case.name.startswith("conflicting"))
    wanted = upgrad(8)
    one_by_one = torch.stack([solver(case.gram, target) for target in wanted])
    assert torch.equal(solver(case.gram, wanted), one_by_one)
    assert solver(case.gram, wanted[0]).shape == (8,)
    assert solver(case.gram, wanted[:0]).shape == (0, 8)


@pytest.mark.parametrize("length", [1e-12, 0.5, 1.0, 3.0, 1e12])
@pytest.mark.parametrize("cosine", [-0.99, -0.6, 0.0, 0.3, 1.0])
def test_two_tasks_closed_form(solver: Solver, cosine: float, length: float) -> None:
    gram = torch.tensor([[1.0, cosine * length], [cosine * length, length**2]], dtype=torch.float64)
    cross = max(-cosine, 0.0)
    expected = torch.tensor([[1.0, cross / length], [cross * length, 1.0]], dtype=torch.float64)
    weights = solver(gram, torch.eye(2, dtype=torch.float64))
    scale = torch.tensor([[1.0, 1 / length], [length, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(weights / scale, expected / scale, rtol=0, atol=1e-11)


def test_without_conflict_nothing_changes(solver: Solver) -> None:
    jacobian = next(zoo((16,))).jacobian.abs()
    for wanted in (torch.eye(16, dtype=torch.float64), torch.zeros(1, 16, dtype=torch.float64)):
        assert torch.equal(solver(jacobian @ jacobian.T, wanted), wanted)
    orthogonal = torch.logspace(-12, 12, 16, dtype=torch.float64).diag()
    assert torch.equal(solver(orthogonal, torch.eye(16, dtype=torch.float64)), torch.eye(16, dtype=torch.float64))


def test_negative_targets_are_lifted(solver: Solver) -> None:
    gram = torch.diag(torch.tensor([0.0, 4.0, 1.0], dtype=torch.float64))
    weights = solver(gram, torch.tensor([-1.0, -2.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(weights, torch.tensor([-1.0, 0.0, 3.0], dtype=torch.float64), rtol=0, atol=1e-11)


@pytest.mark.slow
@each(zoo((3, 40)))
def test_coarse_rounding_stays_finite(solver: Solver, case: Case) -> None:
    size = len(case.gram)
    gram = (case.gram / case.gram.diagonal().max().clamp(min=1e-300)).float().double()
    wanted = upgrad(size)
    weights = solver(gram, wanted)
    assert weights.isfinite().all()
    assert (weights >= wanted).all()


@each(poisoned((1, 2, 3, 8, 40)))
def test_non_finite_gram_gives_nan(solver: Solver, case: Case) -> None:
    assert solver(case.gram, upgrad(len(case.gram))).isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_target_gives_nan_in_its_row(solver: Solver, value: float) -> None:
    gram, wanted = next(zoo((5,))).gram, torch.eye(5, dtype=torch.float64)
    clean = solver(gram, wanted)
    wanted[2, 4] = value
    weights = solver(gram, wanted)
    assert weights[2].isnan().all()
    assert torch.equal(weights[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_solved_in_float64(solver: Solver, dtype: torch.dtype) -> None:
    gram, wanted = next(zoo((5,))).gram.to(dtype), upgrad(5).to(dtype)
    assert torch.equal(solver(gram, wanted), solver(gram.double(), wanted.double()))


def test_strided_inputs(solver: Solver) -> None:
    gram, wanted = next(zoo((8,))).gram, mixed(8)
    wide = torch.full((8, 3, 8, 2), torch.nan, dtype=torch.float64)
    wide[:, 1, :, 0] = gram
    strided = solver(wide[:, 1, :, 0], wanted.T.contiguous().T)
    assert torch.equal(strided, solver(gram, wanted))
    assert strided.is_contiguous()


def test_inputs_are_left_alone(solver: Solver) -> None:
    gram, wanted = next(zoo((8,))).gram, mixed(8)
    before = gram.clone(), wanted.clone()
    solver(gram, wanted)
    assert torch.equal(gram, before[0])
    assert torch.equal(wanted, before[1])


def test_deterministic(solver: Solver) -> None:
    gram, wanted = next(zoo((40,))).gram, mixed(40)
    assert torch.equal(solver(gram, wanted), solver(gram, wanted))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 0), (2, 2, 3), (0, 2, 2), (1, 2, 2, 2)])
def test_gram_must_be_square(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        UsageError, match=r"gram must be a \(T, T\) matrix or \(L, T, T\) matrices of floats with L, T >= 1, got shape"
    ):
        dual_cone(torch.zeros(shape, dtype=torch.float64), torch.ones(3))


@pytest.mark.parametrize("targets", [torch.ones(2), torch.ones(3, 1), torch.ones(1, 1, 3), torch.ones(3).long()])
def test_targets_must_fit(targets: Tensor) -> None:
    with pytest.raises(UsageError, match=r"targets must be a \(3,\) or \(M, 3\) tensor of floats, one column per row"):
        dual_cone(torch.eye(3), targets)


def test_targets_must_be_on_the_device() -> None:
    with pytest.raises(UsageError, match="targets must be on gram's device cpu, got meta"):
        dual_cone(torch.eye(3), torch.ones(3, device="meta"))


@pytest.mark.parametrize("targets", [torch.eye(3), torch.ones(3, dtype=torch.float64)])
def test_opcheck(targets: Tensor) -> None:
    torch.library.opcheck(torch.ops.fastmtl.dual_cone.default, (next(zoo((3,))).gram, targets))


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    jacobian = next(zoo((5,))).jacobian

    def update(jacobian: Tensor) -> Tensor:
        targets = torch.eye(5, dtype=torch.float64) / 5
        return dual_cone(jacobian @ jacobian.T, targets).sum(dim=0) @ jacobian

    compiled = torch.compile(update, fullgraph=True)
    torch.testing.assert_close(compiled(jacobian), update(jacobian))
    torch.testing.assert_close(compiled(2 * jacobian), 2 * update(jacobian))
