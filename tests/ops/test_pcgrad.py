"""pcgrad against the algorithm on the gradients themselves, on every backend that is here."""

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
from fastmtl.ops import implementation, pcgrad
from tests.ops.orders import others, permutations
from tests.ops.rows import backend_kernel, row_kernel
from tests.ops.zoo import Case, each, poisoned, zoo

Solver = Callable[[Tensor, Tensor], Tensor]
DEVICES = {"reference": "cpu", "cpp": "cpu"} | ({"cuda": "cuda"} if torch.cuda.is_available() else {})
# NumPy's widest float, 80 bits on x86: the check must round less than what it checks.
Wide = np.longdouble


@pytest.fixture(params=DEVICES, scope="module")
def solver(request: pytest.FixtureRequest) -> Solver:
    kernel = backend_kernel("pcgrad", request.param)
    device = DEVICES[request.param]

    def solve(gram: Tensor, orders: Tensor) -> Tensor:
        weights = kernel(gram.to(device), orders.to(device))
        assert weights.device.type == device
        assert weights.shape == gram.shape[:1]
        assert weights.dtype == torch.float64
        return weights.cpu()

    return solve


def project(jacobian: Tensor, orders: Tensor) -> npt.NDArray[Wide]:
    """Return the projected gradients, computed on the gradients as the paper has it."""
    rows = jacobian.numpy().astype(Wide)
    projected = rows.copy()
    for i, order in enumerate(orders.tolist()):
        for j in order:
            product = projected[i] @ rows[j]
            if product < 0:
                projected[i] -= product / (rows[j] @ rows[j]) * rows[j]
    return projected


def check_update(case: Case, orders: Tensor, weights: Tensor) -> None:
    """The update is off by at most 1e-12 sum_i |g_i|."""
    update = weights.numpy().astype(Wide) @ case.jacobian.numpy().astype(Wide)
    error = np.sqrt(((update - project(case.jacobian, orders).sum(axis=0)) ** 2).sum())
    assert error <= 1e-12 * float(case.jacobian.norm(dim=1).sum())


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@each(zoo((1, 2, 3, 5, 8, 16, 40)))
def test_update(solver: Solver, case: Case) -> None:
    for make in (permutations, others):
        orders = make(len(case.gram))
        check_update(case, orders, solver(case.gram, orders))


@pytest.mark.parametrize("name", ["random-T128", "narrow-T128", "opposite-T128", "conflicting-T128"])
def test_update_of_many_tasks(solver: Solver, name: str) -> None:
    case = next(case for case in zoo((128,)) if case.name == name)
    orders = permutations(128)
    check_update(case, orders, solver(case.gram, orders))


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(st.data())
def test_update_fuzz(solver: Solver, data: st.DataObject) -> None:
    size, columns, steps = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6)), data.draw(st.integers(0, 9))
    entry = st.integers(-4, 4) | st.floats(-1, 1).filter(lambda x: x == 0 or abs(x) > 1e-9)
    rows = data.draw(st.lists(st.lists(entry, min_size=columns, max_size=columns), min_size=size, max_size=size))
    exponents = data.draw(st.lists(st.integers(-12, 12), min_size=size, max_size=size))
    visit = st.lists(st.integers(0, size - 1), min_size=steps, max_size=steps)
    orders = torch.tensor(data.draw(st.lists(visit, min_size=size, max_size=size)), dtype=torch.int64)
    jacobian = torch.tensor(rows, dtype=torch.float64) * 10.0 ** torch.tensor(exponents, dtype=torch.float64)[:, None]
    case = Case("fuzz", jacobian)
    orders = orders.view(size, steps)
    check_update(case, orders, solver(case.gram, orders))


@each(zoo((2, 3, 8)))
def test_does_not_conflict_with_the_last_task(solver: Solver, case: Case) -> None:
    size = len(case.gram)
    own = torch.arange(size)[:, None]
    length = case.jacobian.norm(dim=1)
    # What is left of one task's coefficients when 1 is taken off the others' weights.
    rounding = 4 * torch.finfo(torch.float64).eps * float(length.sum())
    for i in range(size):
        orders = own.repeat(1, size)
        orders[i] = permutations(size)[i]
        coefficients = solver(case.gram, orders) - 1
        coefficients[i] += 1
        last = int(orders[i, -1])
        product = float(coefficients @ case.jacobian @ case.jacobian[last])
        assert product >= -float(length[last]) * (1e-12 * float(length[i]) + rounding)


@each(zoo((3, 16)))
def test_matches_reference(solver: Solver, case: Case) -> None:
    orders = permutations(len(case.gram))
    difference = solver(case.gram, orders) - implementation("pcgrad", "reference")(case.gram, orders)
    assert float((difference @ case.jacobian).norm()) <= 2e-12 * float(case.jacobian.norm(dim=1).sum())


@pytest.mark.parametrize("length", [1e-12, 0.5, 1.0, 3.0, 1e12])
@pytest.mark.parametrize("cosine", [-1.0, -0.6, 0.0, 0.3, 0.9])
def test_two_tasks_closed_form(solver: Solver, cosine: float, length: float) -> None:
    gram = torch.tensor([[1.0, cosine * length], [cosine * length, length**2]], dtype=torch.float64)
    conflict = max(-cosine, 0)
    expected = torch.tensor([1 + conflict * length, 1 + conflict / length], dtype=torch.float64)
    for orders in ([[1], [0]], [[0, 1], [1, 0]], [[1, 0], [1, 0]]):
        torch.testing.assert_close(solver(gram, torch.tensor(orders)), expected, rtol=1e-15, atol=0)


def test_order_matters(solver: Solver) -> None:
    """Task 0 meets two conflicting tasks; the one that it meets last has no product left with it."""
    jacobian = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [-2.0, -1.0]], dtype=torch.float64)
    gram = jacobian @ jacobian.T
    assert solver(gram, torch.tensor([[1, 2], [1, 1], [2, 2]])).tolist() == pytest.approx([1, 1.5, 1.3])
    assert solver(gram, torch.tensor([[2, 1], [1, 1], [2, 2]])).tolist() == pytest.approx([1, 1.3, 1.4])


@pytest.mark.parametrize("size", [1, 2, 3, 8, 40])
def test_without_conflicts_all_weights_are_one(solver: Solver, size: int) -> None:
    jacobian = next(zoo((size,))).jacobian.abs()
    assert (solver(jacobian @ jacobian.T, permutations(size)) == 1).all()


def test_without_visits_all_weights_are_one(solver: Solver) -> None:
    assert solver(next(zoo((5,))).gram, torch.empty(5, 0, dtype=torch.int64)).tolist() == [1] * 5


def test_rows_of_length_zero_change_nothing(solver: Solver) -> None:
    case = next(zoo((3,)))
    padded = torch.zeros(5, 5, dtype=torch.float64)
    padded[:3, :3] = case.gram
    orders = torch.tensor([[3, 1, 4, 2], [4, 4, 2, 0], [0, 3, 3, 1], [0, 1, 2, 4], [3, 2, 1, 0]])
    bare = torch.tensor([[1, 2], [2, 0], [0, 1]])
    assert solver(padded, orders).tolist() == [*solver(case.gram, bare).tolist(), 1, 1]


def test_squares_of_zero_take_no_projection(solver: Solver) -> None:
    """As a G may have them that was rounded to zero on its diagonal alone."""
    gram = torch.tensor([[1.0, -1e-200], [-1e-200, 0.0]], dtype=torch.float64)
    assert solver(gram, torch.tensor([[1], [0]])).tolist() == [1 + 1e-200, 1]


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [-200, -60, 8, 200])
@each(zoo((3, 16)))
def test_scaling_by_powers_of_two_changes_no_bit(solver: Solver, case: Case, exponent: int) -> None:
    orders = permutations(len(case.gram))
    assert torch.equal(solver(2.0**exponent * case.gram, orders), solver(case.gram, orders))


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 3.0, 1e30])
@pytest.mark.parametrize("size", [2, 3, 16, 40])
def test_scaling_invariant(solver: Solver, size: int, scale: float) -> None:
    gram, orders = next(zoo((size,))).gram, permutations(size)
    torch.testing.assert_close(solver(scale * gram, orders), solver(gram, orders), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 16, 40])
def test_permutation_equivariant(solver: Solver, size: int) -> None:
    gram, orders = next(zoo((size,))).gram, permutations(size)
    moved = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    weights = solver(gram[moved][:, moved], moved.argsort()[orders[moved]])
    torch.testing.assert_close(weights, solver(gram, orders)[moved], rtol=1e-12, atol=1e-12)


@each(poisoned((1, 2, 3, 8, 40)))
def test_non_finite_gives_nan(solver: Solver, case: Case) -> None:
    assert solver(case.gram, permutations(len(case.gram))).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_solved_in_float64(solver: Solver, dtype: torch.dtype) -> None:
    gram, orders = next(zoo((5,))).gram.to(dtype), permutations(5)
    assert torch.equal(solver(gram, orders), solver(gram.double(), orders))


def test_strided_inputs(solver: Solver) -> None:
    gram, orders = next(zoo((8,))).gram, permutations(8)
    wide = torch.full((8, 3, 8, 2), torch.nan, dtype=torch.float64)
    strided = wide[:, 1, :, 0]
    strided.copy_(gram)
    assert torch.equal(solver(strided, orders.T.contiguous().T), solver(gram, orders))
    assert torch.equal(solver(gram, orders[:1].expand(8, 8)), solver(gram, orders[:1].repeat(8, 1)))


def test_inputs_are_left_alone(solver: Solver) -> None:
    gram, orders = next(zoo((8,))).gram, permutations(8)
    before = gram.clone(), orders.clone()
    solver(gram, orders)
    assert torch.equal(gram, before[0])
    assert torch.equal(orders, before[1])


def test_deterministic(solver: Solver) -> None:
    gram, orders = next(zoo((40,))).gram, permutations(40)
    assert torch.equal(solver(gram, orders), solver(gram, orders))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 0), (2, 2, 3), (0, 2, 2), (1, 2, 2, 2)])
def test_gram_must_be_square(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        UsageError, match=r"gram must be a \(T, T\) matrix or \(L, T, T\) matrices of floats with L, T >= 1, got shape"
    ):
        pcgrad(torch.zeros(shape, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex128])
def test_gram_must_be_floats(dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match=r"gram must be a .* of floats"):
        pcgrad(torch.eye(3).to(dtype), permutations(3))


@pytest.mark.parametrize("orders", [torch.zeros(3), torch.zeros(3, 2), torch.zeros(2, 3).long(), torch.zeros(3).long()])
def test_orders_must_fit(orders: Tensor) -> None:
    with pytest.raises(UsageError, match="orders must be int64 with 3 rows, one per task"):
        pcgrad(torch.eye(3), orders)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("entry", [-1, 3, 2**40])
def test_orders_must_hold_tasks(entry: int, backend: str | None) -> None:
    orders = permutations(3)
    orders[1, 2] = entry
    call = implementation("pcgrad", backend) if backend else pcgrad
    with pytest.raises(UsageError, match=r"orders must hold tasks 0 .. 2, got"):
        call(torch.eye(3), orders)


def test_orders_must_be_on_the_device() -> None:
    with pytest.raises(UsageError, match="orders must be on gram's device cpu, got meta"):
        pcgrad(torch.eye(3), permutations(3).to("meta"))


@pytest.mark.parametrize("steps", [0, 3])
def test_opcheck(steps: int) -> None:
    torch.library.opcheck(torch.ops.fastmtl.pcgrad.default, (next(zoo((3,))).gram, permutations(3)[:, :steps]))


def test_compiles_without_graph_breaks() -> None:
    jacobian, orders = next(zoo((5,))).jacobian, permutations(5)

    def update(jacobian: Tensor, orders: Tensor) -> Tensor:
        return pcgrad(jacobian @ jacobian.T, orders) @ jacobian

    compiled = torch.compile(update, fullgraph=True)
    torch.testing.assert_close(compiled(jacobian, orders), update(jacobian, orders))
    torch.testing.assert_close(compiled(2 * jacobian, orders.flip(1)), update(2 * jacobian, orders.flip(1)))


@pytest.mark.parametrize("backend", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_keys_are_orders_by_rising_key(backend: str, dtype: torch.dtype) -> None:
    kernel = row_kernel("pcgrad", backend)
    for size in (1, 2, 5, 17):
        generator = torch.Generator().manual_seed(size)
        jacobian = torch.randn(size, 3, dtype=torch.float64, generator=generator)
        keys = torch.rand(size, size, dtype=dtype, generator=generator)
        keys[:, 0] = torch.nan
        keys[:, -1] = keys[:, size // 2]
        gram = jacobian @ jacobian.T
        assert torch.equal(kernel(gram, keys), kernel(gram, keys.argsort(dim=1, stable=True)))
    with pytest.raises(UsageError, match=r"float keys"):
        pcgrad(torch.eye(3), torch.rand(3, 2))
