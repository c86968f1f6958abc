"""gram against a float64 reference, on every backend that is here."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops import gram
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


@pytest.fixture(params=BACKENDS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return row_kernel("gram", request.param)


def expected(flat: Flat, num_rows: int) -> Tensor:
    """Return G by the definition, in float64; a missing gradient adds nothing."""
    width = len(flat) // num_rows
    result = torch.zeros(num_rows, num_rows, dtype=torch.float64)
    for i in range(num_rows):
        for j in range(num_rows):
            for a, b in zip(flat[i * width : (i + 1) * width], flat[j * width : (j + 1) * width], strict=True):
                if a is not None and b is not None:
                    result[i, j] += a.double().flatten().dot(b.double().flatten())
    return result


def matrix(flat: Flat, num_rows: int) -> Tensor:
    """Return J (T, P); no gradient may be missing."""
    width = len(flat) // num_rows
    return torch.stack([torch.cat([t.flatten() for t in flat[i * width : (i + 1) * width]]) for i in range(num_rows)])


def error(got: Tensor, want: Tensor) -> float:
    """Return the greatest error in units of sqrt(G_ii G_jj)."""
    scale = want.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    return ((got - want) / scale[:, None] / scale).abs().max().item()


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", TASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_is_as_accurate_as_torch(kernel: Kernel, num_rows: int, dtype: torch.dtype) -> None:
    shapes = SHAPES if num_rows <= 8 else ((1,), (63,), (1031,), (0,))
    allowed, worst = 4 * (torch.finfo(torch.float64).eps * 64 if dtype == torch.float64 else EPS), 0.0
    for seed in range(20 if num_rows <= 16 else 3):
        flat = make_rows(num_rows, shapes, dtype, seed)
        jacobian = matrix(flat, num_rows).double()
        want = jacobian @ jacobian.T
        if dtype != torch.float64:
            allowed = max(allowed, error((jacobian.float() @ jacobian.float().T).double(), want))
        got = kernel(flat, num_rows)
        assert got.dtype == torch.float64
        assert torch.equal(got, got.T)
        worst = max(worst, error(got, want))
    assert worst <= allowed


@pytest.mark.parametrize("scale", [1e-19, 1e-15, 1e-8, 1.0, 1e8, 1e15, 1e19])
def test_float32_keeps_its_accuracy_at_all_scales(kernel: Kernel, scale: float) -> None:
    for magnitudes in ([scale] * 6, [scale, 1.0, 1 / scale, scale, 1.0, 0.0]):
        flat = [t * m for m, t in zip(magnitudes, make_rows(6, ((5003,),)), strict=True) if t is not None]
        assert error(kernel(flat, 6), expected(flat, 6)) <= 4 * EPS


def test_one_large_entry_does_not_hide_the_small_ones_of_other_rows(kernel: Kernel) -> None:
    flat = [torch.full((3000,), 1e-19), torch.full((3000,), 1e-19)]
    flat[0][17] = 1e19
    assert error(kernel(flat, 2), expected(flat, 2)) <= 4 * EPS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("others", ["contiguous", "same"])
@pytest.mark.usefixtures("poisoned_memory")
def test_memory_layout_does_not_matter(kernel: Kernel, layout: str, others: str) -> None:
    shapes = ((8, 3, 5, 5), (33, 7), (64,), (1, 4, 1, 9))
    flat = [relaid(t, layout) for t in make_rows(4, shapes) if t is not None]
    if others == "contiguous":
        flat = [t.contiguous() if i % 2 else t for i, t in enumerate(flat)]
    assert error(kernel(flat, 4), expected(flat, 4)) <= 4 * EPS


def test_mixed_dtypes(kernel: Kernel) -> None:
    flat = [t.to(DTYPES[i % 4]) for i, t in enumerate(make_rows(5, ((1031,), (7,), (129,)))) if t is not None]
    assert error(kernel(flat, 5), expected(flat, 5)) <= 4 * EPS


@pytest.mark.usefixtures("poisoned_memory")
def test_missing_gradients_are_zero(kernel: Kernel) -> None:
    flat = make_rows(4, ((63,), (129,), (5,), (70,)))
    for gap in (0, 2, 5, 6, 10, 14, 3, 7, 11, 15):
        flat[gap] = None
    assert error(kernel(flat, 4), expected(flat, 4)) <= 4 * EPS


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_entries_show_in_their_row_and_column_alone(kernel: Kernel, value: float) -> None:
    flat = make_rows(6, ((2500,),))
    flat[2][1234] = value
    finite = kernel(flat, 6).isfinite()
    touched = torch.zeros(6, 6, dtype=torch.bool)
    touched[2] = touched[:, 2] = True
    assert torch.equal(finite, ~touched)


@pytest.mark.parametrize("rows", [[[]], [[], []], [[None], [None]], [[torch.zeros(0)], [None]]], ids=str)
def test_nothing_to_sum_gives_zero(rows: list[list[Tensor | None]]) -> None:
    assert torch.equal(gram(rows), torch.zeros(len(rows), len(rows), dtype=torch.float64))
    assert gram(rows, [0] * len(rows[0])).shape == (min(len(rows[0]), 1), len(rows), len(rows))


def test_groups_have_matrices_of_their_own(kernel: Kernel) -> None:
    shapes = ((63,), (4099,), (5,), (129,), (1,))
    groups = [2, 0, 2, 3, 0]
    flat = make_rows(3, shapes)
    got = kernel(flat, 3, groups)
    assert got.shape == (4, 3, 3)
    for group in range(4):
        part = [t for i, t in enumerate(flat) if groups[i % 5] == group]
        assert error(got[group], expected(part, 3) if part else torch.zeros(3, 3).double()) <= 4 * EPS


def test_takes_a_matrix() -> None:
    jacobian = torch.randn(3, 1001, generator=torch.Generator().manual_seed(0))
    for given_matrix in (jacobian, jacobian.T.contiguous().T, jacobian[:, ::2]):
        assert error(gram(given_matrix), given_matrix.double() @ given_matrix.double().T) <= 4 * EPS


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_bits_do_not_depend_on_threads(kernel: Kernel, threads: int) -> None:
    flat = make_rows(5, ((100_003,), (64,), (64,), (30_011,)))
    before = torch.get_num_threads()
    first = kernel(flat, 5)
    try:
        torch.set_num_threads(threads)
        again = [kernel(flat, 5) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    if kernel is not backend_kernel("gram", "reference"):
        assert all(torch.equal(first, other) for other in again)
    assert all(torch.equal(again[0], other) for other in again)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(drawn=any_rows())
def test_any_rows(drawn: tuple[Flat, int]) -> None:
    flat, num_rows = drawn
    want = expected(flat, num_rows)
    for backend in BACKENDS:
        assert error(row_kernel("gram", backend)(flat, num_rows), want) <= 8 * EPS


def test_opcheck() -> None:
    flat = make_rows(3, ((5, 3), (7,)))
    flat[1] = None
    for namespace in (torch.ops.fastmtl, torch.ops.fastmtl_cpp):
        if namespace is torch.ops.fastmtl_cpp:
            backend_kernel("gram", "cpp")
        torch.library.opcheck(namespace.gram.default, (flat, 3))
        torch.library.opcheck(namespace.gram.default, (flat, 3, [1, 0]))


# Inductor itself imports what torch has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_without_graph_breaks() -> None:
    rows = [make_rows(1, ((5, 3), (70,)), seed=seed) for seed in range(3)]
    rows[1][0] = None
    compiled = torch.compile(lambda rows: gram(rows) * 2, fullgraph=True)
    assert torch.equal(compiled(rows), gram(rows) * 2)


@pytest.mark.parametrize(
    ("rows", "groups", "words"),
    [
        ([], None, "rows must hold at least 1 row, got 0"),
        ([[torch.zeros(1)], []], None, "1 in row 0 and 0 in row 1"),
        ([[torch.zeros(2)], [torch.zeros(3)]], None, r"rows\[1\]\[0\] must have shape \(2,\) as rows\[0\]\[0\]"),
        ([[torch.zeros(2, dtype=torch.int64)]], None, r"rows\[0\]\[0\] must be float32"),
        ([[torch.zeros(2, 2).to_mkldnn()]], None, "layout"),
        (torch.zeros(2, 3, 4), None, r"\(T, P\), got \(2, 3, 4\)"),
        ([[torch.zeros(2)]], [0, 1], "one group for each of the 1 tensors"),
        ([[torch.zeros(2)]], [-1], "at least 0"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(rows: list[list[Tensor]], groups: list[int] | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        gram(rows, groups)


@pytest.mark.skipif("FASTMTL_TEST_LARGE" not in os.environ, reason="takes 5 GB; set FASTMTL_TEST_LARGE=1")
def test_more_elements_than_32_bits_count() -> None:
    length = 2**31 + 1001
    row = torch.zeros(length, dtype=torch.bfloat16)
    row[-1], row[2**31 - 1], row[0] = 3.0, 2.0, 1.0
    assert gram([[row]]).item() == 14.0
