"""More rows than a kernel takes at once, against float64, and solvers of as many tasks."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.aggregation.rows import add_combined, gram_of
from fastmtl.errors import UsageError
from fastmtl.ops import _blocks, implementation
from fastmtl.ops._blocks import row_blocks

SIZES = (129, 200, 300)
SHAPES = ((7, 3), (50,), (), (11,))
TYPES = (torch.float32, torch.bfloat16)


def _rows(count: int, seed: int = 0) -> list[list[Tensor | None]]:
    """Rows of several dtypes, with gaps; the second tensor is there in the last third of the rows alone."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[Tensor | None]] = []
    for t in range(count):
        row: list[Tensor | None] = [torch.randn(shape, generator=generator) for shape in SHAPES]
        row[3] = None if t % 3 == 0 else torch.randn(11, generator=generator).to(TYPES[t % 2])
        row[1] = row[1] if t > 2 * count // 3 else None
        rows.append(row)
    return rows


def _wide(rows: list[list[Tensor | None]], first: int = 0, end: int = 4) -> Tensor:
    """Return the (T, P) rows in float64."""
    return torch.stack(
        [
            torch.cat(
                [
                    torch.zeros(shape, dtype=torch.float64).flatten() if part is None else part.double().flatten()
                    for part, shape in zip(row[first:end], SHAPES[first:end], strict=True)
                ]
            )
            for row in rows
        ]
    )


@pytest.mark.parametrize("count", SIZES)
def test_gram(count: int) -> None:
    rows, exact = _rows(count), _wide(_rows(count))
    found = ops.gram(rows)
    scale = exact.norm(dim=1)
    assert ((found - exact @ exact.T).abs() <= 1e-6 * scale[:, None] * scale).all()
    assert torch.equal(found, found.T)
    grouped = ops.gram(rows, [0, 2, 0, 2])
    assert grouped.shape == (3, count, count)
    assert not grouped[1].any()
    second = _wide(rows, 1, 2)
    third = _wide(rows, 3, 4)
    assert ((grouped[2] - second @ second.T - third @ third.T).abs() <= 1e-6 * scale[:, None] * scale).all()


def test_gram_of_float64_rows_and_of_what_is_not_finite() -> None:
    rows = torch.randn(200, 301, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ops.gram(rows), rows @ rows.T, rtol=1e-13, atol=1e-12)
    rows[150, 7] = torch.nan
    bad = ops.gram(rows).isnan()
    assert bad[150].all()
    assert bad.sum() == 399


@pytest.mark.parametrize("count", SIZES)
def test_combine(count: int) -> None:
    rows, exact = _rows(count), _wide(_rows(count))
    weights = torch.randn(3, count, generator=torch.Generator().manual_seed(2))
    weights[:, 5] = 0
    rows[5] = [None if part is None else torch.full_like(part, torch.nan) for part in rows[5]]
    exact[5] = 0
    for found, w in zip(ops.combine(rows, weights), weights, strict=True):
        sums = torch.cat([part.double().flatten() for part in found])
        bound = 2e-6 * (w.double().abs() @ exact.abs()) + 1e-12
        assert ((sums - w.double() @ exact).abs() <= bound).all()
    (single,) = ops.combine([[None, part] for _, part, *_ in rows], weights[0])[1:]
    assert torch.equal(single, ops.combine(rows, weights[0])[1])
    assert ops.combine([[None, part] for _, part, *_ in rows], weights[0])[0] is None

    grouped = ops.combine(rows, weights[:2], [0, 1, 1, 0])
    first, second = ops.combine(rows, weights[0]), ops.combine(rows, weights[1])
    assert all(torch.equal(a, b) for a, b in zip(grouped, [first[0], second[1], second[2], first[3]], strict=True))


def test_sums_into_bfloat16_are_rounded_once_and_out_may_be_a_row() -> None:
    rows = [[row] for row in torch.randn(200, 40, generator=torch.Generator().manual_seed(3))]
    weights = torch.rand(200, generator=torch.Generator().manual_seed(4))
    exact = weights @ torch.stack([row for (row,) in rows])
    out = torch.ones(40, dtype=torch.bfloat16)
    ops.combine_([out], rows, weights, accumulate=True)
    torch.testing.assert_close(out.float(), (exact + 1).bfloat16().float(), rtol=2**-8, atol=0)
    assert (out.float() - exact - 1).abs().max() <= 2**-8 * (exact + 1).abs().max()
    version = rows[0][0]._version
    ops.combine_([rows[0][0]], rows, weights)
    torch.testing.assert_close(rows[0][0], exact, rtol=1e-5, atol=1e-5)
    assert rows[0][0]._version > version


@pytest.mark.parametrize("count", SIZES)
def test_state_ops(count: int) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = [
        [torch.randn(9, generator=generator), None if t % 2 else torch.randn(4, generator=generator)]
        for t in range(count)
    ]
    keep, gains = torch.rand(count, generator=generator), torch.rand(count, generator=generator)

    def state() -> list[list[Tensor]]:
        made = torch.Generator().manual_seed(6)
        return [[torch.rand(9, generator=made), torch.rand(4, generator=made)] for _ in range(count)]

    for scale in (keep, torch.tensor(0.5)):
        found, flat = state(), [part for row in state() for part in row]
        gram = ops.ema_gram_(found, rows, scale, gains)
        args = (flat, [part for row in rows for part in row], count, scale.expand(count), gains)
        exact = implementation("ema_gram_", "reference")(*args)
        torch.testing.assert_close(gram, exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close([part for row in found for part in row], flat, rtol=1e-6, atol=1e-7)

    found, flat = state(), [part for row in state() for part in row]
    risks = ops.excess_risk_(found, rows)
    exact = implementation("excess_risk_", "reference")(flat, [part for row in rows for part in row], count, 1e-7)
    torch.testing.assert_close(risks, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close([part for row in found for part in row], flat, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("noisy", [True, False])
def test_sign_dropout(noisy: bool) -> None:
    rows = [[part.float() if part is not None else None for part in row] for row in _rows(200)]
    leak, random = torch.rand(200, generator=torch.Generator().manual_seed(7)), torch.tensor([3, 4])
    noise = [torch.rand(shape, generator=torch.Generator().manual_seed(8)) for shape in SHAPES] if noisy else None
    found = ops.graddrop_rows(rows, leak, random, noise)
    flat = [part for row in rows for part in row]
    exact = implementation("graddrop_rows", "reference")(flat, 200, leak, random, noise or [])
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)

    grads = [torch.randn(3, 40, generator=torch.Generator().manual_seed(t)) for t in range(200)]
    shared = ops.graddrop([torch.ones(3, 40)], grads, 0.1, random)
    exact = implementation("graddrop", "reference")([torch.ones(3, 40)], grads, 0.1, random)
    torch.testing.assert_close(shared, exact, rtol=1e-5, atol=1e-5)


def test_jacobians_of_aggregators() -> None:
    jacobian = torch.randn(200, 5, 4, generator=torch.Generator().manual_seed(9))
    exact = jacobian.double().flatten(1)
    torch.testing.assert_close(gram_of([jacobian]), exact @ exact.T, rtol=1e-6, atol=1e-5)
    param, weights = torch.zeros(5, 4, requires_grad=True), torch.rand(200, dtype=torch.float64)
    for times in (1, 2):
        add_combined([param], [jacobian], weights)
        torch.testing.assert_close(param.grad, (times * weights @ exact).view(5, 4).float(), rtol=1e-5, atol=1e-5)
    assert gram_of([jacobian[:0]]).shape == (0, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[170].__setitem__(0, torch.zeros(2)), r"rows\[170\]\[0\] must have shape \(7, 3\)"),
        (
            lambda rows: rows[190].__setitem__(2, torch.zeros((), dtype=torch.int64)),
            r"rows\[190\]\[2\] must be float32",
        ),
        (lambda rows: rows[180].pop(), r"4 in row 0 and 3 in row 180"),
    ],
)
def test_what_is_wrong_is_named_by_its_row(change: Any, words: str) -> None:
    rows = _rows(200)
    change(rows)
    with pytest.raises(UsageError, match=words):
        ops.gram(rows)
    with pytest.raises(UsageError, match=words):
        ops.combine(rows, torch.ones(200))


def test_weights_must_fit() -> None:
    rows = torch.ones(200, 3)
    with pytest.raises(UsageError, match=r"weights must have the shape \(200,\), got \(201,\)"):
        ops.combine_([torch.zeros(3)], rows, torch.ones(201))
    with pytest.raises(UsageError, match="gains must hold 200 floats"):
        ops.ema_gram_(torch.ones(200, 3), rows, torch.tensor(0.5), torch.ones(201))
    with pytest.raises(UsageError, match="epsilon must be above 0"):
        ops.excess_risk_(torch.ones(200, 3), rows, 0.0)


def test_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    _blocks._warn.cache_clear()
    with caplog.at_level(logging.WARNING, logger="fastmtl"):
        ops.gram(torch.ones(128, 3))
        assert not caplog.records
        for _ in range(2):
            ops.gram(torch.ones(129, 3))
            ops.combine(torch.ones(129, 3), torch.ones(129))
    (record,) = caplog.records
    assert "more than 128 task gradients" in record.message


def test_blocks_are_few_and_alike() -> None:
    for count in (1, 64, 65, 128, 129, 200, 385):
        blocks = list(row_blocks(count, 64))
        assert [a for a, _ in blocks] == [0, *(b for _, b in blocks[:-1])]
        sizes = [b - a for a, b in blocks]
        assert sum(sizes) == count
        assert max(sizes) <= min(64, min(sizes) + 1)
        assert len(blocks) == -(-count // 64)


@pytest.fixture(scope="module", params=[129, 200])
def gram(request: pytest.FixtureRequest) -> Tensor:
    """The Gram matrix of gradients with a common part, of lengths from 0.1 to 10."""
    generator = torch.Generator().manual_seed(request.param)
    jacobian = torch.randn(request.param, 400, dtype=torch.float64, generator=generator)
    jacobian = (jacobian + 0.1) * 10 ** (2 * torch.rand(request.param, 1, dtype=torch.float64, generator=generator) - 1)
    return jacobian @ jacobian.T


def test_min_norm_meets_its_bound(gram: Tensor) -> None:
    weights = ops.min_norm(gram)
    length = gram.diagonal().sqrt()
    image, square = gram @ weights, weights @ gram @ weights
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1)
    assert (image >= (1 - 1e-6) * square - 1e-12 * length * (weights @ length)).all()


def test_projections_onto_the_dual_cone_are_optimal(gram: Tensor) -> None:
    matrix = gram / gram.diagonal().sum() + 1e-4 * torch.eye(len(gram), dtype=gram.dtype)
    targets = torch.eye(len(gram), dtype=gram.dtype) / len(gram)
    found = ops.dual_cone(matrix, targets)
    slopes = found @ matrix
    scale = found.abs() @ matrix.abs()
    assert (found >= targets).all()
    assert (slopes >= -1e-9 * scale).all()
    assert ((found - targets) * slopes <= 1e-9 * scale * found.max()).all()
    torch.testing.assert_close(ops.upgrad(gram), found.sum(0), rtol=1e-9, atol=1e-12)


def test_fair_weights_solve_their_equation(gram: Tensor) -> None:
    weights = ops.nash(gram)
    torch.testing.assert_close(weights * (gram @ weights), torch.ones_like(weights), rtol=1e-8, atol=0)
    weights = ops.fairgrad(gram, 2.0)
    torch.testing.assert_close(weights**0.5 * (gram @ weights), torch.ones_like(weights), rtol=1e-7, atol=0)


def test_closed_forms_and_surgery_are_the_references(gram: Tensor) -> None:
    orders = torch.rand(gram.shape, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :20]
    rho = torch.full_like(gram, 0.1)
    calls: dict[str, tuple[Any, ...]] = {
        "aligned": (gram,),
        "config": (gram,),
        "imtl": (gram,),
        "cagrad": (gram, 0.5),
        "pcgrad": (gram, orders),
        "gradvac": (gram, orders, rho, 0.5),
    }
    for op, args in calls.items():
        found, exact = getattr(ops, op)(*args), implementation(op, "reference")(*args)
        pairs = zip(found, exact, strict=True) if isinstance(found, tuple) else [(found, exact)]
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()), msg=op)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("bad", ["integers", "expanded", "shape", "overlapping", "a row"])
def test_combine_refuses_before_it_writes(accumulate: bool, bad: str) -> None:
    count = 200
    rows: list[list[Tensor | None]] = [[torch.ones(4), torch.ones(4)] for _ in range(count)]
    room = torch.full((8,), 7.0)
    outs: dict[str, list[Tensor]] = {
        "integers": [room[:4], torch.full((4,), 7)],
        "expanded": [room[:4], torch.full((1,), 7.0).expand(4)],
        "shape": [room[:4], torch.full((5,), 7.0)],
        "overlapping": [room[:4], room[2:6]],
        "a row": [room[:4], room[4:]],
    }
    if bad == "a row":
        rows[count - 50][1] = torch.ones(5)
    with pytest.raises(UsageError, match=r"^out\[|^rows\["):
        ops.combine_(outs[bad], rows, torch.full((count,), 0.5), accumulate=accumulate)
    assert all(bool((out == 7).all()) for out in outs[bad])


@pytest.mark.parametrize("op", ["ema_gram_", "excess_risk_"])
@pytest.mark.parametrize("bad", ["shape", "dtype", "state"])
def test_states_are_refused_before_they_are_written(op: str, bad: str) -> None:
    state: list[list[Tensor]] = [[torch.full((4,), 2.0)] for _ in range(200)]
    rows: list[list[Tensor | None]] = [[torch.ones(4)] for _ in range(200)]
    if bad == "state":
        state[150] = [torch.full((4,), 2)]
    else:
        rows[150] = [torch.ones(5) if bad == "shape" else torch.ones(4, dtype=torch.int64)]
    args = (torch.ones(200), torch.ones(200)) if op == "ema_gram_" else ()
    with pytest.raises(UsageError, match=r"^(rows|state|sums)\[150\]\[0\]"):
        getattr(ops, op)(state, rows, *args)
    assert all(bool((part == 2).all()) for (part,) in state)
