"""Rows of tables: which are touched, sums over what touches them, and sparse gradients in the ops on rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmtl import ops
from fastmtl.errors import UsageError
from fastmtl.ops._touched import aligned_rows
from tests.ops.rows import BACKENDS, DTYPES, backend_kernel, on_device

Rows = list[list[Tensor | None]]


def _kernel(op: str, backend: str) -> Any:
    # Torch's sort finds the rows on a GPU.
    kernel = backend_kernel(op, "reference" if (op, backend) == ("group_rows", "cuda") else backend)
    return on_device(kernel, "cuda") if backend == "cuda" else kernel


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [0, 1, 2, 63, 2048, 5000])
@pytest.mark.parametrize("bound", [1, 7, 2**11, 2**11 + 1, 10**7, 2**62])
def test_groups(backend: str, size: int, bound: int) -> None:
    ids = torch.randint(bound, (size,), generator=torch.Generator().manual_seed(size))
    rows, order, starts = _kernel("group_rows", backend)(ids)
    distinct, counts = ids.unique(return_counts=True)
    assert torch.equal(rows, distinct)
    assert torch.equal(starts.diff(), counts)
    assert starts[0] == 0
    assert torch.equal(ids[order], rows.repeat_interleave(counts))
    # Positions of one id keep their order, so that sums do not depend on chance.
    assert all(bool((part.diff() > 0).all()) for part in order.split(counts.tolist()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [0, 1, 3, 32, 257, 600])
@pytest.mark.usefixtures("poisoned_memory")
def test_sums(backend: str, dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    ids = torch.randint(11, (90,), generator=generator)
    source = torch.randint(20, (90,), generator=generator)
    scale = torch.rand(90, generator=generator)
    values = [torch.randn(20, width, generator=generator).to(dtype) for _ in range(3)]
    long = [torch.randn(width, 90, generator=generator).to(dtype).mT for _ in range(2)]
    _, order, starts = ops.group_rows(ids)
    kernel = _kernel("sum_rows", backend)
    for given_values, arguments in ((values, (source, scale)), (values, (source, None)), (long, (None, None))):
        got = kernel(given_values, order, starts, *arguments)
        taken, factor = arguments[0], arguments[1]
        for total, value in zip(got, given_values, strict=True):
            parts = value.double()[torch.arange(90) if taken is None else taken]
            parts = parts if factor is None else parts * factor.double()[:, None]
            want = torch.zeros(11, width, dtype=torch.float64).index_add_(0, ids, parts)[ids.unique()]
            assert total.dtype == dtype
            torch.testing.assert_close(total, want.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend: str) -> None:
    values = torch.ones(3, 2)
    values[1] = torch.nan
    _, order, starts = ops.group_rows(torch.tensor([4, 9, 4]))
    (total,) = _kernel("sum_rows", backend)([values], order, starts, None, None)
    assert total[0].tolist() == [2, 2]
    assert total[1].isnan().all()


def test_registration_and_compilation() -> None:
    ids = torch.tensor([3, 1, 3, 0])
    # Not test_faketensor: the number of rows depends on the ids.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fastmtl.group_rows.default, (ids,), test_utils=tests)
    _, order, starts = ops.group_rows(ids)
    torch.library.opcheck(torch.ops.fastmtl.sum_rows.default, ([torch.ones(4, 2)], order, starts), test_utils=tests)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.group_rows(torch.zeros(2, 2, dtype=torch.int64)), r"ids must be \(n,\) int64"),
        (lambda: ops.group_rows(torch.zeros(2)), r"ids must be \(n,\) int64"),
        (lambda: ops.group_rows(torch.tensor([0, -3])), "ids must be at least 0, got -3"),
        (lambda: _sum([]), "at least one tensor"),
        (lambda: _sum([torch.ones(3)]), r"values\[0\] must be"),
        (lambda: _sum([torch.ones(2, 1), torch.ones(2, 2)]), r"values\[1\] must be"),
        (lambda: _sum([torch.ones(1, 1)]), "order must have at most the 1 rows"),
        (lambda: _sum([torch.ones(2, 1)], order=[0, 2]), "order must be from 0 to 1, got 0 to 2"),
        (lambda: _sum([torch.ones(2, 1)], starts=[0, 3]), "starts must be from 0 to 2, got 0 to 3"),
        (lambda: _sum([torch.ones(2, 1)], starts=[1, 0]), "starts must not fall"),
        (lambda: _sum([torch.ones(2, 1)], starts=[]), "starts must hold at least one"),
        (lambda: _sum([torch.ones(2, 1)], source=[0]), "source must have the shape"),
        (lambda: _sum([torch.ones(2, 1)], source=[0, 2]), "source must be from 0 to 1, got 0 to 2"),
        (lambda: _sum([torch.ones(2, 1)], scale=[1.0]), "scale must have the shape"),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def _sum(
    values: list[Tensor], order: Any = (0, 1), starts: Any = (0, 1, 2), source: Any = None, scale: Any = None
) -> None:
    given = None if source is None else torch.tensor(source, dtype=torch.int64)
    factors = None if scale is None else torch.tensor(scale)
    ops.sum_rows(
        values, torch.tensor(order, dtype=torch.int64), torch.tensor(starts, dtype=torch.int64), given, factors
    )


@st.composite
def sparse_rows(draw: st.DrawFn) -> Rows:
    """Draw rows of which parameters are dense, sparse with equal or different indices, mixed, or missing."""
    tasks, seed = draw(st.integers(1, 4)), draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    columns: list[list[Tensor | None]] = []
    for _ in range(draw(st.integers(1, 3))):
        shape = draw(st.sampled_from([(9, 3), (5,), (4, 3, 2)]))
        depth = draw(st.integers(1, len(shape)))
        kind = draw(st.sampled_from(["equal", "apart", "mixed"]))
        common = _indices(draw, shape[:depth], generator)
        column: list[Tensor | None] = []
        for _ in range(tasks):
            indices = common if kind == "equal" else _indices(draw, shape[:depth], generator)
            values = torch.randn(indices.shape[1], *shape[depth:], generator=generator)
            row = torch.sparse_coo_tensor(indices, values, shape, check_invariants=True)
            if draw(st.booleans()):
                row = row.coalesce()
            absent = draw(st.integers(0, 4)) == 0
            column.append(None if absent else row.to_dense() if kind == "mixed" and draw(st.booleans()) else row)
        columns.append(column)
    return [list(row) for row in zip(*columns, strict=True)]


def _indices(draw: st.DrawFn, sizes: tuple[int, ...], generator: torch.Generator) -> Tensor:
    count = draw(st.integers(0, 12))
    return torch.stack([torch.randint(size, (count,), generator=generator) for size in sizes])


def _dense(rows: Rows) -> Rows:
    return [[grad.to_dense() if grad is not None else None for grad in row] for row in rows]


@settings(max_examples=60, deadline=None)
@given(sparse_rows(), st.integers(0, 2**16))
def test_ops_on_rows_take_sparse_gradients(rows: Rows, seed: int) -> None:
    if all(grad is None for row in rows for grad in row):
        return
    dense, width = _dense(rows), len(rows[0])
    torch.testing.assert_close(ops.gram(rows), ops.gram(dense), rtol=1e-5, atol=1e-5)
    groups = [k % 2 for k in range(width)]
    torch.testing.assert_close(ops.gram(rows, groups), ops.gram(dense, groups), rtol=1e-5, atol=1e-5)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, len(rows), generator=generator)
    for given_weights, of in ((weights[0], None), (weights, None), (weights[: max(groups) + 1], groups)):
        got, want = ops.combine(rows, given_weights, of), ops.combine(dense, given_weights, of)
        for one, other in zip(_flat(got), _flat(want), strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                torch.testing.assert_close(one.to_dense(), other, rtol=1e-5, atol=1e-5)
    for k, total in enumerate(ops.combine(rows, weights[0])):
        column = [row[k] for row in rows if row[k] is not None]
        assert total is None or isinstance(total, Tensor)
        if column and all(grad.is_sparse for grad in column if grad is not None):
            assert total is not None
            assert total.is_sparse
            assert total.is_coalesced()
    for accumulate in (False, True):
        known = [[row[k] for row in dense if row[k] is not None] for k in range(width)]
        start = [
            torch.randn(column[0].shape) if column and column[0] is not None else torch.ones(2) for column in known
        ]
        out, want_out = [[tensor.clone() for tensor in start] for _ in range(2)]
        ops.combine_(out, rows, weights[0], accumulate=accumulate)
        ops.combine_(want_out, dense, weights[0], accumulate=accumulate)
        for one, other in zip(out, want_out, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def _flat(sums: Any) -> list[Tensor | None]:
    return [each for of in sums for each in of] if sums and isinstance(sums[0], list) else sums


def test_graddrop_drops_the_entries_that_are_there() -> None:
    indices = torch.tensor([[1, 4, 1]])
    rows: Rows = [
        [torch.sparse_coo_tensor(indices, torch.tensor([[1.0], [2.0], [3.0]]), (6, 1), check_invariants=True)],
        [torch.sparse_coo_tensor(indices, torch.tensor([[-1.0], [5.0], [0.0]]), (6, 1), check_invariants=True)],
    ]
    noise = [torch.full((6, 1), 0.5)]
    leak, random = torch.zeros(2), torch.tensor([0, 0])
    (got,) = ops.graddrop_rows(rows, leak, random, noise)
    (want,) = ops.graddrop_rows(_dense(rows), leak, random, noise)
    assert got is not None
    assert got.is_sparse
    assert want is not None
    assert torch.equal(got.to_dense(), want)
    (drawn,) = ops.graddrop_rows(rows, leak, random)
    assert drawn is not None
    assert set(drawn.to_dense()[1].tolist()) <= {4.0, -1.0}


def test_more_rows_than_a_kernel_takes() -> None:
    indices = torch.randint(7, (1, 20))
    rows: Rows = [
        [torch.sparse_coo_tensor(indices, torch.randn(20, 2), (7, 2), check_invariants=True)] for _ in range(130)
    ]
    torch.testing.assert_close(ops.gram(rows), ops.gram(_dense(rows)), rtol=1e-5, atol=1e-4)
    weights = torch.randn(130)
    (got,), (want,) = ops.combine(rows, weights), ops.combine(_dense(rows), weights)
    assert isinstance(got, Tensor)
    assert isinstance(want, Tensor)
    torch.testing.assert_close(got.to_dense(), want, rtol=1e-4, atol=1e-4)


def test_aligned_rows_share_their_indices() -> None:
    indices = torch.tensor([[3, 1, 3]])
    flat = [torch.sparse_coo_tensor(indices, torch.ones(3, 2) * t, (5, 2), check_invariants=True) for t in (1.0, 2.0)]
    one, other = aligned_rows(flat, 2)
    assert one is not None
    assert other is not None
    assert one._indices().data_ptr() == other._indices().data_ptr()
    assert one._values().tolist() == [[1, 1], [2, 2]]
    # A second look finds nothing to do.
    again = aligned_rows([one, other], 2)[0]
    assert again is not None
    assert again._values().data_ptr() == one._values().data_ptr()


def test_sparse_rows_that_do_not_fit_are_refused() -> None:
    row = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, 2), (3, 2), check_invariants=True)
    with pytest.raises(UsageError, match="must have one shape, dtype and device"):
        ops.gram([[row], [torch.ones(4, 2)]])
    with pytest.raises(UsageError, match=r"out\[0\] must be a dense tensor of shape \(3, 2\)"):
        ops.combine_([torch.ones(4, 2)], [[row]], torch.ones(1))
    with pytest.raises(UsageError, match="out must hold one tensor for each of the 1"):
        ops.combine_([], [[row]], torch.ones(1))
