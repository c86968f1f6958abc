"""gradvac against the algorithm on the gradients themselves, on every backend that is here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops import gradvac, implementation
from tests.ops.orders import others, permutations
from tests.ops.rows import backend_kernel
from tests.ops.zoo import Case, each, poisoned, zoo

Solver = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
DEVICES = {"reference": "cpu", "cpp": "cpu"} | ({"cuda": "cuda"} if torch.cuda.is_available() else {})
# NumPy's widest float, 80 bits on x86: the check must round less than what it checks.
Wide = np.longdouble
Array = npt.NDArray[Wide]


@pytest.fixture(params=DEVICES, scope="module")
def solver(request: pytest.FixtureRequest) -> Solver:
    kernel = backend_kernel("gradvac", request.param)
    device = DEVICES[request.param]

    def solve(gram: Tensor, orders: Tensor, rho: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        weights, new_rho = kernel(gram.to(device), orders.to(device), rho.to(device), beta)
        assert weights.device.type == new_rho.device.type == device
        assert weights.dtype == new_rho.dtype == torch.float64
        assert weights.shape == gram.shape[:-1]
        assert new_rho.shape == gram.shape
        return weights.cpu(), new_rho.cpu()

    return solve


def averages(*shape: int, seed: int = 0) -> Tensor:
    """Return averages of cosines in [-0.9, 0.9]."""
    return 1.8 * torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 0.9


def vaccinate(
    jacobian: Tensor, orders: Tensor, rho: Tensor, beta: float, exact: float
) -> tuple[Array, Wide, Array, Array]:
    """Return the update, its error allowed, the new averages and theirs, computed on the gradients.

    Vectors p may be off by ``exact`` times the length of their paths, and their squares by 1e-13 of its square.
    """
    rows = jacobian.numpy().astype(Wide)
    average = rho.numpy().astype(Wide)
    doubt = np.full_like(average, 1e-15)
    length = np.sqrt((rows**2).sum(axis=1))
    update = np.zeros_like(rows[0])
    paths = Wide(0)
    for i, order in enumerate(orders.tolist()):
        p, path = rows[i].copy(), length[i]
        for j in order:
            if j == i:
                continue
            norm, cosine, target, unsure = np.sqrt(p @ p), Wide(0), average[i, j], Wide(0)
            if length[j] > 0 and norm > Wide(2) ** -22 * path:
                cosine = np.clip(p @ rows[j] / (norm * length[j]), -1, 1)
                unsure = exact * path / norm + 1e-13 * (path / norm) ** 2
                if cosine < target:
                    sine = np.sqrt(1 - target**2)
                    added = norm * (target * np.sqrt(1 - cosine**2) - cosine * sine) / sine
                    p += added / length[j] * rows[j]
                    path += added
            average[i, j] = (1 - Wide(beta)) * average[i, j] + Wide(beta) * cosine
            doubt[i, j] = (1 - Wide(beta)) * doubt[i, j] + Wide(beta) * unsure + 1e-15
        update += p
        paths += path
    return update, exact * paths, average, doubt


def check(case: Case, orders: Tensor, rho: Tensor, beta: float, solver: Solver, exact: float = 1e-6) -> None:
    weights, new_rho = solver(case.gram, orders, rho, beta)
    update, allowed, expected_rho, doubt = vaccinate(case.jacobian, orders, rho, beta, exact)
    difference = weights.numpy().astype(Wide) @ case.jacobian.numpy().astype(Wide) - update
    assert np.sqrt((difference**2).sum()) <= allowed
    assert (abs(new_rho.numpy().astype(Wide) - expected_rho) <= doubt).all()


@pytest.mark.usefixtures("poisoned_memory")
@each(zoo((1, 2, 3, 5, 8, 16)))
def test_update_and_averages(solver: Solver, case: Case) -> None:
    size = len(case.gram)
    check(case, permutations(size), averages(size, size), 0.5, solver)
    check(case, others(size), torch.zeros(size, size, dtype=torch.float64), 0.1, solver)


@pytest.mark.parametrize("size", [2, 3, 8, 40, 128])
def test_update_is_near_rounding(solver: Solver, size: int) -> None:
    check(next(zoo((size,))), permutations(size), averages(size, size), 0.5, solver, exact=1e-14)


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(st.data())
def test_update_fuzz(solver: Solver, data: st.DataObject) -> None:
    size, columns, steps = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5)), data.draw(st.integers(0, 7))
    row = st.lists(st.integers(-4, 4), min_size=columns, max_size=columns)
    rows = data.draw(st.lists(row, min_size=size, max_size=size))
    exponents = data.draw(st.lists(st.integers(-12, 12), min_size=size, max_size=size))
    visit = st.lists(st.integers(0, size - 1), min_size=steps, max_size=steps)
    orders = torch.tensor(data.draw(st.lists(visit, min_size=size, max_size=size)), dtype=torch.int64)
    jacobian = torch.tensor(rows, dtype=torch.float64) * 10.0 ** torch.tensor(exponents, dtype=torch.float64)[:, None]
    rho = averages(size, size, seed=data.draw(st.integers(0, 99)))
    check(Case("fuzz", jacobian), orders.view(size, steps), rho, data.draw(st.floats(0, 1)), solver)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_cosine_reaches_its_average(solver: Solver, size: int) -> None:
    case, rho = next(zoo((size,))), averages(size, size)
    for i in range(size):
        for j in set(range(size)) - {i}:
            orders = torch.arange(size)[:, None].clone()
            orders[i] = j
            coefficients = solver(case.gram, orders, rho, 0.5)[0] - 1
            coefficients[i] += 1
            vector = coefficients @ case.jacobian
            before = torch.cosine_similarity(case.jacobian[i], case.jacobian[j], dim=0)
            after = torch.cosine_similarity(vector, case.jacobian[j], dim=0)
            assert float(after) == pytest.approx(max(float(before), float(rho[i, j])), abs=1e-12)


def test_averages_follow_the_cosines_before_the_change(solver: Solver) -> None:
    case, rho = next(zoo((3,))), averages(3, 3)
    cosine = case.gram / case.gram.diagonal().sqrt() / case.gram.diagonal().sqrt()[:, None]
    new_rho = solver(case.gram, torch.tensor([[1], [2], [2]]), rho, 0.25)[1]
    expected = rho.clone()
    for i, j in ((0, 1), (1, 2)):
        expected[i, j] = 0.75 * rho[i, j] + 0.25 * cosine[i, j]
    torch.testing.assert_close(new_rho, expected, rtol=0, atol=1e-15)


def test_repeated_visits_move_the_average_each_time(solver: Solver) -> None:
    gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    weights, new_rho = solver(gram, torch.tensor([[1, 1], [0, 0]]), torch.zeros(2, 2, dtype=torch.float64), 0.5)
    assert weights.tolist() == [1, 1]
    assert new_rho.tolist() == [[0, 0.375], [0.375, 0]]


@each(zoo((2, 3, 16)))
def test_with_averages_of_zero_it_is_pcgrad(solver: Solver, case: Case) -> None:
    size = len(case.gram)
    orders, zeros = others(size), torch.zeros(size, size, dtype=torch.float64)
    weights, new_rho = solver(case.gram, orders, zeros, 0.0)
    difference = weights - implementation("pcgrad", "reference")(case.gram, orders)
    assert torch.equal(new_rho, zeros)
    assert float((difference @ case.jacobian).norm()) <= 1e-6 * float(case.jacobian.norm(dim=1).sum())
    if size == 2:
        torch.testing.assert_close(difference, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12 * weights.max())


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("groups", "size"), [(1, 1), (1, 3), (62, 3), (7, 16), (12, 40)])
def test_groups_equal_separate_calls(solver: Solver, groups: int, size: int, beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(groups, size, size + 2, dtype=torch.float64, generator=generator)
    gram, rho, orders = jacobian @ jacobian.mT, averages(groups, size, size), permutations(size)
    weights, new_rho = solver(gram, orders, rho, beta)
    for g in range(groups):
        alone, alone_rho = solver(gram[g], orders, rho[g], beta)
        torch.testing.assert_close(weights[g], alone, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(new_rho[g], alone_rho, rtol=0, atol=1e-13)


def test_threads_change_no_bit(solver: Solver) -> None:
    jacobian = torch.randn(24, 32, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    args = (jacobian @ jacobian.mT, permutations(32), averages(24, 32, 32), 0.5)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(solver(*args))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_rows_of_length_zero_have_cosines_of_zero(solver: Solver) -> None:
    gram = torch.tensor([[4.0, 0, -1], [0, 0, 0], [-1, 0, 1]], dtype=torch.float64)
    rho = torch.full((3, 3), 0.8, dtype=torch.float64)
    weights, new_rho = solver(gram, torch.tensor([[1], [0], [1]]), rho, 0.5)
    assert weights.tolist() == [1, 1, 1]
    assert new_rho.tolist() == [[0.8, 0.4, 0.8], [0.4, 0.8, 0.8], [0.8, 0.4, 0.8]]


def test_vectors_that_vanish_have_cosines_of_zero(solver: Solver) -> None:
    """Task 0 loses all it has to its opposite, whatever is left of it by rounding."""
    row = torch.tensor([0.1, 0.7, -1.3], dtype=torch.float64)
    jacobian = torch.stack([row, -3.3 * row, row + 1])
    rho = torch.zeros(3, 3, dtype=torch.float64)
    weights, new_rho = solver(jacobian @ jacobian.T, torch.tensor([[1, 2], [1, 1], [2, 2]]), rho, 1.0)
    assert weights.tolist() == pytest.approx([1, 1 + 1 / 3.3, 1])
    assert float(new_rho[0, 1]) == pytest.approx(-1)
    assert float(new_rho[0, 2]) == 0


@pytest.mark.parametrize("seed", range(8))
def test_opposite_gradients_are_projected_away_whatever_the_average(solver: Solver, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(7, dtype=torch.float64, generator=generator)
    ratio = torch.rand((), dtype=torch.float64, generator=generator)
    jacobian = torch.stack([row, -ratio * row])
    rho = torch.tensor([[0.0, 0.99], [0.0, 0.0]], dtype=torch.float64)
    weights, _ = solver(jacobian @ jacobian.T, torch.tensor([[1], [1]]), rho, 0.5)
    assert weights.tolist() == pytest.approx([1, 1 + 1 / float(ratio)], rel=1e-13)


@pytest.mark.parametrize("seed", range(8))
def test_vectors_that_return_from_afar_have_cosines_of_zero(solver: Solver, seed: int) -> None:
    """Three targets of one take task 0 far out, and their opposites take it back to where no digit is left."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator)).Q
    jacobian = torch.cat([axes, -axes[1:].flip(0), axes[:1]])
    rho = torch.zeros(8, 8, dtype=torch.float64)
    rho[0, 1:4] = 1
    orders = torch.arange(8)[:, None].repeat(1, 7)
    orders[0] = torch.arange(1, 8)
    _, new_rho = solver(jacobian @ jacobian.T, orders, rho, 1.0)
    assert float(new_rho[0, 4]) == pytest.approx(-1, abs=1e-5)
    assert float(new_rho[0, 7]) == 0


@pytest.mark.parametrize("target", [1.0, 1 - 2.0**-53, 1 - 2.0**-30])
def test_rounding_moves_no_parallel_gradients(solver: Solver, target: float) -> None:
    row = torch.randn(1, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    jacobian = row * torch.tensor([[1.0], [0.3], [1.7e6], [0.9e-9]], dtype=torch.float64)
    rho = torch.full((4, 4), target, dtype=torch.float64)
    assert solver(jacobian @ jacobian.T, permutations(4), rho, 0.5)[0].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("target", [-1.5, -1.0, 1.0, 1.5])
@each(zoo((2, 3, 16)))
def test_extreme_averages_give_finite_weights(solver: Solver, case: Case, target: float) -> None:
    size = len(case.gram)
    rho = torch.full((size, size), target, dtype=torch.float64)
    weights, new_rho = solver(case.gram, permutations(size), rho, 0.5)
    assert weights.isfinite().all()
    assert new_rho.isfinite().all()


def test_chains_of_extreme_targets_end(solver: Solver) -> None:
    gram = next(zoo((128,))).gram
    weights, _ = solver(gram, permutations(128), torch.ones_like(gram), 0.5)
    assert weights.isfinite().all()


def test_targets_near_one_are_brought_to_the_limit(solver: Solver) -> None:
    gram, orders = torch.tensor([[1.0, 0.2], [0.2, 1.0]], dtype=torch.float64), torch.tensor([[1], [1]])
    limit = 1 - 2.0**-20
    sine = (1 - limit**2) ** 0.5
    for target in (limit, 1 - 2.0**-40, 1.0):
        weights, new_rho = solver(gram, orders, torch.full((2, 2), target, dtype=torch.float64), 0.5)
        assert weights.tolist() == pytest.approx([1, 1 + (limit * 0.96**0.5 - 0.2 * sine) / sine], rel=1e-9)
        assert float(new_rho[0, 1]) == pytest.approx(0.5 * target + 0.1, abs=1e-15)


@each(poisoned((1, 2, 3, 8)))
def test_non_finite_gram_gives_nan_to_its_group(solver: Solver, case: Case) -> None:
    size = len(case.gram)
    clean = next(zoo((size,))).gram
    gram, rho, orders = torch.stack([clean, case.gram, clean]), averages(3, size, size), permutations(size)
    weights, new_rho = solver(gram, orders, rho, 0.5)
    assert weights[1].isnan().all()
    assert torch.equal(new_rho[1], rho[1])
    for g in (0, 2):
        alone, alone_rho = solver(clean, orders, rho[g], 0.5)
        torch.testing.assert_close(weights[g], alone, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(new_rho[g], alone_rho, rtol=0, atol=1e-13)


def test_non_finite_averages_give_nan(solver: Solver) -> None:
    for bad in (torch.nan, torch.inf):
        rho = averages(3, 3)
        rho[0, 2] = bad
        weights, new_rho = solver(next(zoo((3,))).gram, others(3), rho, 0.5)
        assert weights.isnan().all()
        torch.testing.assert_close(new_rho, rho, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 3.0, 1e30])
@pytest.mark.parametrize("size", [2, 3, 16])
def test_scaling_invariant(solver: Solver, size: int, scale: float) -> None:
    gram, orders, rho = next(zoo((size,))).gram, permutations(size), averages(size, size)
    expected = solver(gram, orders, rho, 0.5)
    for got, wanted in zip(solver(scale * gram, orders, rho, 0.5), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(solver(4.0**100 * gram, orders, rho, 0.5), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("size", [2, 3, 16])
def test_permutation_equivariant(solver: Solver, size: int) -> None:
    gram, orders, rho = next(zoo((size,))).gram, permutations(size), averages(size, size)
    moved = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    weights, new_rho = solver(gram, orders, rho, 0.5)
    got = solver(gram[moved][:, moved], moved.argsort()[orders[moved]], rho[moved][:, moved], 0.5)
    torch.testing.assert_close(got[0], weights[moved], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1], new_rho[moved][:, moved], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_solved_in_float64(solver: Solver, dtype: torch.dtype) -> None:
    gram, rho, orders = next(zoo((5,))).gram.to(dtype), averages(5, 5).to(dtype), permutations(5)
    for got, wanted in zip(
        solver(gram, orders, rho, 0.5), solver(gram.double(), orders, rho.double(), 0.5), strict=True
    ):
        assert torch.equal(got, wanted)


def test_strided_inputs(solver: Solver) -> None:
    gram, orders, rho = next(zoo((8,))).gram, permutations(8), averages(8, 8)
    wide = torch.full((8, 3, 8, 2), torch.nan, dtype=torch.float64)
    wide[:, 1, :, 0] = gram
    got = solver(wide[:, 1, :, 0], orders.T.contiguous().T, rho.T.contiguous().T, 0.5)
    for result, wanted in zip(got, solver(gram, orders, rho, 0.5), strict=True):
        assert torch.equal(result, wanted)


def test_inputs_are_left_alone(solver: Solver) -> None:
    inputs = next(zoo((8,))).gram, permutations(8), averages(8, 8)
    before = [tensor.clone() for tensor in inputs]
    new_rho = solver(*inputs, 0.5)[1]
    new_rho.zero_()
    for tensor, kept in zip(inputs, before, strict=True):
        assert torch.equal(tensor, kept)


def test_deterministic(solver: Solver) -> None:
    inputs = next(zoo((40,))).gram, permutations(40), averages(40, 40), 0.5
    for first, second in zip(solver(*inputs), solver(*inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 0), (0, 3, 3), (2, 2, 2, 2)])
def test_gram_must_be_square(shape: tuple[int, ...]) -> None:
    gram = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(UsageError, match=r"gram must be a \(T, T\) matrix or \(L, T, T\) matrices of floats"):
        gradvac(gram, torch.zeros(2, 2, dtype=torch.int64), gram, 0.5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex128])
def test_gram_must_be_floats(dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match=r"gram must be a .* of floats"):
        gradvac(torch.eye(3).to(dtype), permutations(3), torch.eye(3), 0.5)


@pytest.mark.parametrize("orders", [torch.zeros(3), torch.zeros(3, 2), torch.zeros(2, 3).long(), torch.zeros(3).long()])
def test_orders_must_fit(orders: Tensor) -> None:
    with pytest.raises(UsageError, match="orders must be int64 with 3 rows, one per task"):
        gradvac(torch.eye(3), orders, torch.eye(3), 0.5)


@pytest.mark.parametrize("entry", [-1, 3, 2**40])
def test_orders_must_hold_tasks(solver: Solver, entry: int) -> None:
    orders = permutations(3)
    orders[1, 2] = entry
    with pytest.raises(UsageError, match=r"orders must hold tasks 0 .. 2, got"):
        gradvac(torch.eye(3), orders, torch.eye(3), 0.5)


@pytest.mark.parametrize("rho", [torch.ones(3), torch.ones(1, 3, 3), torch.ones(3, 3, dtype=torch.int64)])
def test_rho_must_fit(rho: Tensor) -> None:
    with pytest.raises(UsageError, match=r"rho must hold one float per entry of gram, which has shape \(3, 3\)"):
        gradvac(torch.eye(3), permutations(3), rho, 0.5)


def test_inputs_must_be_on_the_device() -> None:
    gram, orders = torch.eye(3), permutations(3)
    with pytest.raises(UsageError, match="rho must be on gram's device cpu, got meta"):
        gradvac(gram, orders, gram.to("meta"), 0.5)
    with pytest.raises(UsageError, match="orders must be on gram's device cpu, got meta"):
        gradvac(gram, orders.to("meta"), gram, 0.5)


@pytest.mark.parametrize("beta", [-0.1, 1.5, float("nan"), float("inf")])
def test_beta_must_be_a_share(beta: float) -> None:
    with pytest.raises(UsageError, match="beta must be between 0 and 1, got"):
        gradvac(torch.eye(3), permutations(3), torch.eye(3), beta)


@pytest.mark.parametrize("shape", [(3, 3), (4, 3, 3)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    gram = next(zoo((3,))).gram.expand(shape)
    torch.library.opcheck(torch.ops.fastmtl.gradvac.default, (gram, permutations(3), averages(*shape), 0.5))


def test_compiles_without_graph_breaks() -> None:
    jacobian, orders, rho = next(zoo((5,))).jacobian, permutations(5), averages(5, 5)

    def update(jacobian: Tensor, orders: Tensor, rho: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        weights, new_rho = gradvac(jacobian @ jacobian.T, orders, rho, beta)
        return weights @ jacobian, new_rho

    compiled = torch.compile(update, fullgraph=True)
    for beta in (0.5, 0.25):
        for got, wanted in zip(compiled(jacobian, orders, rho, beta), update(jacobian, orders, rho, beta), strict=True):
            torch.testing.assert_close(got, wanted)
