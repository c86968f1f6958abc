"""ema_gram_ and excess_risk_, the passes that update state beside the rows, on every backend that is here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops import ema_gram_, excess_risk_
from tests.ops.rows import (
    BACKENDS,
    DTYPES,
    LAYOUTS,
    SHAPES,
    TASKS,
    Flat,
    any_rows,
    backend_kernel,
    make_rows,
    relaid,
    row_kernel,
)

Kernel = Callable[..., Tensor]
EPS = torch.finfo(torch.float32).eps
EPSILON = 1e-7


@pytest.fixture(params=BACKENDS)
def ema(request: pytest.FixtureRequest) -> Kernel:
    return row_kernel("ema_gram_", request.param)


@pytest.fixture(params=BACKENDS)
def excess(request: pytest.FixtureRequest) -> Kernel:
    return row_kernel("excess_risk_", request.param)


def factors(num_rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(num_rows, generator=generator), torch.randn(num_rows, generator=generator).double()


def matrix(flat: list[Tensor], num_rows: int) -> Tensor:
    width = len(flat) // num_rows
    rows = [[t.double().flatten() for t in flat[i * width : (i + 1) * width]] for i in range(num_rows)]
    return torch.stack([torch.cat([torch.zeros(0).double(), *row]) for row in rows])


def check_ema(ema: Kernel, state: list[Tensor], flat: Flat, num_rows: int) -> None:
    """Check the new state against float64, and the Gram matrix against that of the state."""
    keep, gains = factors(num_rows)
    width = len(flat) // num_rows
    wants, sizes = [], []
    for index, (own, row) in enumerate(zip(state, flat, strict=True)):
        t = index // width
        gained = torch.zeros_like(own).double() if row is None else row.double() * gains[t]
        wants.append(own.double() * keep[t] + gained)
        sizes.append((own.double() * keep[t]).abs() + gained.abs())
    got = ema(state, flat, num_rows, keep, gains)
    for own, want, size in zip(state, wants, sizes, strict=True):
        info = torch.finfo(own.dtype)
        eps = max(info.eps, EPS if own.dtype != torch.float64 else 0.0)
        assert ((own.double() - want).abs() <= 2 * eps * size + info.smallest_normal * info.eps).all()
    stored = matrix(state, num_rows)
    gram = stored @ stored.T
    scale = gram.diagonal().sqrt().clamp(min=1e-300)
    assert ((got - gram) / scale[:, None] / scale).abs().max() <= 4 * EPS
    assert torch.equal(got, got.T)


def check_excess(excess: Kernel, sums: list[Tensor], flat: Flat, num_rows: int) -> None:
    width = len(flat) // num_rows
    before = [own.double().clone() for own in sums]
    got = excess(sums, flat, num_rows, EPSILON)
    for t in range(num_rows):
        want = 0.0
        for k in range(t * width, (t + 1) * width):
            info = torch.finfo(sums[k].dtype)
            square = torch.zeros(()).double() if flat[k] is None else flat[k].double() ** 2
            new = before[k] + square
            bound = 2 * max(info.eps, EPS) * new + info.smallest_normal * info.eps
            assert ((sums[k].double() - new).abs() <= bound).all()
            if flat[k] is not None:
                want += (square / (sums[k].double() + EPSILON).sqrt()).sum().item()
        assert abs(got[t].item() - want) <= 8 * EPS * want


@pytest.mark.parametrize("num_rows", TASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_average_and_its_gram_matrix(ema: Kernel, num_rows: int, dtype: torch.dtype) -> None:
    shapes = SHAPES if num_rows <= 8 else ((1,), (63,), (1031,), (0,))
    check_ema(ema, make_rows(num_rows, shapes, seed=1), make_rows(num_rows, shapes, dtype), num_rows)


@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_sums_and_risks(excess: Kernel, num_rows: int, dtype: torch.dtype) -> None:
    sums = [t.square() for t in make_rows(num_rows, seed=1)]
    check_excess(excess, sums, make_rows(num_rows, SHAPES, dtype), num_rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_of_any_dtype(ema: Kernel, excess: Kernel, dtype: torch.dtype) -> None:
    shapes = ((63,), (4099,), (3, 5))
    check_ema(ema, make_rows(3, shapes, dtype, seed=1), make_rows(3, shapes), 3)
    check_excess(excess, [t.square() for t in make_rows(3, shapes, dtype, seed=1)], make_rows(3, shapes), 3)


def test_missing_gradients_are_zero(ema: Kernel, excess: Kernel) -> None:
    shapes = ((63,), (129,), (5,), (70,))
    flat = make_rows(4, shapes)
    for gap in (0, 2, 5, 6, 10, 14, 3, 7, 11, 15):
        flat[gap] = None
    check_ema(ema, make_rows(4, shapes, seed=1), flat, 4)
    check_excess(excess, [t.square() for t in make_rows(4, shapes, seed=1)], flat, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("state_layout", ["contiguous", "channels_last", "offset"])
def test_memory_layout_does_not_matter(ema: Kernel, excess: Kernel, layout: str, state_layout: str) -> None:
    shapes = ((8, 3, 5, 5), (33, 7), (64,), (1, 4, 1, 9))
    flat = [relaid(t, layout) for t in make_rows(4, shapes)]
    check_ema(ema, [relaid(t, state_layout) for t in make_rows(4, shapes, seed=1)], flat, 4)
    check_excess(excess, [relaid(t.square(), state_layout) for t in make_rows(4, shapes, seed=1)], flat, 4)


@settings(max_examples=100, deadline=None)
@given(drawn=any_rows())
def test_any_rows(drawn: tuple[Flat, int]) -> None:
    flat, num_rows = drawn
    width = len(flat) // num_rows
    shapes = [next((row.shape for row in flat[k::width] if row is not None), torch.Size([3])) for k in range(width)]
    for backend in BACKENDS:
        state = make_rows(num_rows, tuple(shapes), seed=3)
        check_ema(row_kernel("ema_gram_", backend), state, flat, num_rows)
        sums = [t.square() for t in make_rows(num_rows, tuple(shapes), seed=3)]
        check_excess(row_kernel("excess_risk_", backend), sums, flat, num_rows)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(ema: Kernel, excess: Kernel, threads: int) -> None:
    shapes = ((100_003,), (64,), (30_011,))
    flat = make_rows(3, shapes)

    def results() -> list[Any]:
        state = make_rows(3, shapes, seed=1)
        sums = [t.square() for t in state]
        return [ema(state, flat, 3, *factors(3)), excess(sums, flat, 3, EPSILON), *state, *sums]

    before = torch.get_num_threads()
    first = results()
    try:
        torch.set_num_threads(threads)
        again = results()
    finally:
        torch.set_num_threads(before)
    for one, other in zip(first, again, strict=True):
        assert torch.allclose(one, other, rtol=1e-12)
    kernels = (ema, "ema_gram_"), (excess, "excess_risk_")
    if all(kernel is not backend_kernel(op, "reference") for kernel, op in kernels):
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_bits_do_not_depend_on_where_the_state_lies() -> None:
    """The state may lie right behind the kernel's scratch memory, as chance has it now and then."""
    state, rows = torch.rand(2, 64), torch.randn(2, 64)
    want = state.clone()
    risks = excess_risk_(want, rows, EPSILON)
    kept = []
    for call in range(20_000):
        got = state.clone()
        assert torch.equal(excess_risk_(got, rows, EPSILON), risks)
        assert torch.equal(got, want)
        kept.append(torch.empty(call % 97))
        del kept[:-50]


def test_a_matrix_is_updated_in_place() -> None:
    state, rows = torch.ones(2, 5), torch.arange(10.0).view(2, 5)
    got = ema_gram_(state, rows, torch.tensor(0.5), torch.tensor([1.0, 2.0]))
    want = 0.5 + rows * torch.tensor([[1.0], [2.0]])
    assert torch.equal(state, want)
    assert torch.allclose(got, want.double() @ want.double().T)
    sums = torch.zeros(2, 5)
    risks = excess_risk_(sums, rows)
    assert torch.equal(sums, rows**2)
    assert torch.allclose(risks.float(), rows.sum(1), rtol=1e-4)


def test_a_nan_shows_in_its_row_alone(ema: Kernel, excess: Kernel) -> None:
    flat = make_rows(3, ((2500,),))
    flat[1][7] = torch.nan
    finite = ema(make_rows(3, ((2500,),), seed=1), flat, 3, *factors(3)).isfinite()
    assert finite.tolist() == [[True, False, True], [False] * 3, [True, False, True]]
    assert excess([torch.ones(2500) for _ in range(3)], flat, 3, EPSILON).isfinite().tolist() == [True, False, True]


def test_autograd_sees_that_state_was_written() -> None:
    for update in (
        lambda s: ema_gram_([[s]], [[torch.ones(3)]], torch.ones(1), torch.ones(1)),
        lambda s: excess_risk_([[s]], [[torch.ones(3)]]),
    ):
        x, saved = torch.ones(3, requires_grad=True), torch.ones(3)
        product = (x * saved).sum()
        update(saved)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_opcheck() -> None:
    flat = make_rows(3, ((5, 3), (7,)))
    flat[1] = None
    for namespace, name in ((torch.ops.fastmtl, "reference"), (torch.ops.fastmtl_cpp, "cpp")):
        row_kernel("ema_gram_", name)
        state = make_rows(3, ((5, 3), (7,)), seed=1)
        torch.library.opcheck(namespace.ema_gram_.default, (state, flat, 3, *factors(3)))
        torch.library.opcheck(namespace.excess_risk_.default, ([t.square() for t in state], flat, 3, EPSILON))


# Inductor itself imports what torch has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_without_graph_breaks() -> None:
    flat = make_rows(2, ((5, 3), (70,)))
    rows = [flat[:2], flat[2:]]

    def step(state: list[list[Tensor]], sums: list[list[Tensor]]) -> Tensor:
        gram = ema_gram_(state, rows, torch.tensor(0.5), torch.ones(2))
        return gram.sum(0) + excess_risk_(sums, rows) + state[0][0].sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        made = make_rows(4, ((5, 3), (70,)), seed=1)
        state, sums = [made[:2], made[2:4]], [[t.square() for t in made[4:6]], [t.square() for t in made[6:]]]
        results.append([run(state, sums), *made[:4], *sums[0], *sums[1]])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-6)


ROWS = [[torch.ones(2)], [torch.ones(2)]]


@pytest.mark.parametrize(
    ("state", "rows", "keep", "gains", "words"),
    [
        ([[torch.ones(2)]], ROWS, torch.ones(2), torch.ones(2), "one tensor for each of the 2 tensors of rows, got 1"),
        (
            [[torch.ones(2)], [torch.ones(3)]],
            ROWS,
            torch.ones(2),
            torch.ones(2),
            r"state\[1\]\[0\] must have the shape",
        ),
        ([[torch.ones(2).long()]] * 2, ROWS, torch.ones(2), torch.ones(2), r"state\[0\]\[0\] must be a dense float32"),
        ([[torch.ones(1).expand(2)]] * 2, ROWS, torch.ones(2), torch.ones(2), "one dense memory layout"),
        ([[torch.ones(4)[::2]]] * 2, ROWS, torch.ones(2), torch.ones(2), "one dense memory layout"),
        (ROWS, ROWS, torch.ones(3), torch.ones(2), "keep must hold 2 floats"),
        (ROWS, ROWS, torch.ones(2), torch.ones(2).long(), "gains must hold 2 floats"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(
    state: list[list[Tensor]], rows: list[list[Tensor]], keep: Tensor, gains: Tensor, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        ema_gram_(state, rows, keep, gains)


def test_bad_sums_are_refused_with_a_sentence() -> None:
    with pytest.raises(UsageError, match="epsilon must be above 0"):
        excess_risk_(ROWS, ROWS, 0.0)
    with pytest.raises(UsageError, match="sums must hold one tensor for each of the 2"):
        excess_risk_(ROWS[:1], ROWS)
