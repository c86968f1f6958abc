"""combine and combine_ against a float64 reference, on every backend that is here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops import combine, combine_
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

Kernel = Callable[..., Any]
NAN = float("nan")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def kernel(backend: str) -> Kernel:
    return row_kernel("combine", backend)


@pytest.fixture
def kernel_(backend: str) -> Kernel:
    return row_kernel("combine_", backend)


def expected(flat: Flat, weights: Tensor) -> list[Tensor | None]:
    """Return sum_t w_t row_t by the definition, in float64."""
    num_rows = len(weights)
    width = len(flat) // num_rows
    sums: list[Tensor | None] = []
    for k in range(width):
        terms = [
            w * row.double() for w, row in zip(weights.double(), flat[k::width], strict=True) if row is not None and w
        ]
        shape = next((row.shape for row in flat[k::width] if row is not None), None)
        sums.append(None if shape is None else sum(terms, torch.zeros(shape, dtype=torch.float64)))
    return sums


def check(got: Tensor | None, want: Tensor | None, scale: Tensor | None, eps: float | None = None) -> None:
    """Check one result against its float64 value; the error may be 4 eps of the sum of the terms' sizes."""
    assert (got is None) == (want is None)
    if got is None or want is None or scale is None:
        return
    assert got.shape == want.shape
    info = torch.finfo(got.dtype)
    # Below the smallest normal number the spacing no longer shrinks with the value.
    spacing = info.smallest_normal * info.eps
    assert ((got.double() - want).abs() <= 4 * (info.eps if eps is None else eps) * scale + spacing).all()


def sizes(flat: Flat, weights: Tensor) -> list[Tensor | None]:
    return expected([None if row is None else row.abs() for row in flat], weights.abs())


def random_weights(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.mark.parametrize("num_rows", TASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_is_accurate(kernel: Kernel, num_rows: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    flat = make_rows(num_rows, SHAPES, dtype)
    weights = random_weights(num_rows).to(weight_dtype)
    got = kernel(flat, num_rows, weights)
    for result, want, scale in zip(got, expected(flat, weights), sizes(flat, weights), strict=True):
        assert result.dtype == dtype
        check(result, want, scale)


@pytest.mark.usefixtures("poisoned_memory")
def test_large_results_are_written_whole(kernel: Kernel) -> None:
    flat = make_rows(3, ((2_200_003,),))
    weights = random_weights(3)
    check(kernel(flat, 3, weights)[0], expected(flat, weights)[0], sizes(flat, weights)[0])


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_writes_into_every_element_of_out_and_no_other(
    kernel_: Kernel, accumulate: bool, out_dtype: torch.dtype, offset: int
) -> None:
    length = 2_200_003 if out_dtype == torch.float32 else 5003
    flat = make_rows(2, ((length,), (3, 5)))
    weights = random_weights(2)
    memory = torch.full((length + 8,), NAN, dtype=out_dtype)
    out = [memory[offset : offset + length], torch.full((3, 5), NAN, dtype=out_dtype)]
    start = [torch.ones(length), torch.ones(3, 5)]
    if accumulate:
        for target, value in zip(out, start, strict=True):
            target.copy_(value)
    kernel_(out, flat, 2, weights, None, accumulate)
    assert memory[:offset].isnan().all()
    assert memory[offset + length :].isnan().all()
    for got, want, scale, add in zip(out, expected(flat, weights), sizes(flat, weights), start, strict=True):
        assert want is not None
        assert scale is not None
        eps = max(torch.finfo(out_dtype).eps, torch.finfo(torch.float32).eps)
        check(got, want + add * accumulate, scale + add, eps)


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_parameter_without_rows(kernel_: Kernel, accumulate: bool) -> None:
    flat = make_rows(2, ((5,), (3, 2), (4,)))
    flat[1] = flat[4] = None
    out = [torch.full(shape, 2.0) for shape in ((5,), (3, 2), (4,))]
    kernel_(out, flat, 2, torch.ones(2), None, accumulate)
    assert (out[1] == (2.0 if accumulate else 0.0)).all()
    rows = [flat[:3], flat[3:]]
    sums = combine(rows, torch.ones(2))
    assert sums[1] is None
    assert torch.equal(sums[0], flat[0] + flat[3])
    both = combine(rows, torch.ones(2, 2))
    assert [[t is None for t in result] for result in both] == [[False, True, False]] * 2


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_row_of_weight_zero_is_not_read(kernel: Kernel, kernel_: Kernel, value: float) -> None:
    for layout in ("contiguous", "strided"):
        flat = make_rows(3, ((4099,), (7,)))
        flat[2:4] = [relaid(torch.full((n,), value), layout) for n in (4099, 7)]
        weights = torch.tensor([0.5, 0.0, 2.0])
        without = [flat[0], flat[1], None, None, flat[4], flat[5]]
        for got, want, scale in zip(
            kernel(flat, 3, weights), expected(without, weights), sizes(without, weights), strict=True
        ):
            check(got, want, scale)
        out = [torch.zeros(4099), torch.zeros(7)]
        kernel_(out, flat, 3, torch.zeros(3), None, True)
        assert all((target == 0).all() for target in out)
        assert kernel(flat, 3, torch.ones(3))[0].isfinite().sum() == 0


@pytest.mark.usefixtures("poisoned_memory")
def test_many_weightings_in_one_pass(kernel: Kernel) -> None:
    flat = make_rows(5, ((63,), (4099,), (0,), (3, 7)))
    weights = random_weights(4, 5)
    weights[1, 2] = weights[3] = 0
    got = kernel(flat, 5, weights)
    assert len(got) == 16
    for m in range(4):
        for result, want, scale in zip(
            got[4 * m : 4 * m + 4], expected(flat, weights[m]), sizes(flat, weights[m]), strict=True
        ):
            check(result, want, scale)
    public = combine([flat[4 * t : 4 * t + 4] for t in range(5)], weights)
    assert [len(result) for result in public] == [4] * 4
    # One weighting is still a list of weightings.
    assert len(combine([flat[4 * t : 4 * t + 4] for t in range(5)], weights[:1])) == 1


def test_groups_have_weights_of_their_own(kernel: Kernel, kernel_: Kernel) -> None:
    flat = make_rows(3, ((63,), (4099,), (5,)))
    groups, weights = [1, 0, 1], random_weights(2, 3)
    got = kernel(flat, 3, weights, groups)
    out = [torch.full_like(t, NAN) for t in got]
    kernel_(out, flat, 3, weights, groups)
    for k, group in enumerate(groups):
        column = flat[k::3]
        check(got[k], expected(column, weights[group])[0], sizes(column, weights[group])[0])
        check(out[k], got[k].double(), sizes(column, weights[group])[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("others", ["contiguous", "same"])
@pytest.mark.usefixtures("poisoned_memory")
def test_memory_layout_does_not_matter(kernel: Kernel, kernel_: Kernel, layout: str, others: str) -> None:
    shapes = ((8, 3, 5, 5), (33, 7), (64,), (1, 4, 1, 9))
    flat = [relaid(t, layout) for t in make_rows(4, shapes) if t is not None]
    if others == "contiguous":
        flat = [t.contiguous() if i >= 4 else t for i, t in enumerate(flat)]
    weights = random_weights(4)
    got = kernel(flat, 4, weights)
    targets = [relaid(torch.full(shape, NAN), "strided" if layout == "expanded" else layout) for shape in shapes]
    kernel_(targets, flat, 4, weights)
    for result, target, want, scale in zip(got, targets, expected(flat, weights), sizes(flat, weights), strict=True):
        check(result, want, scale)
        check(target, want, scale)
    if layout == "channels_last" and others == "same":
        assert got[0].is_contiguous(memory_format=torch.channels_last)


def test_result_has_the_promoted_dtype(kernel: Kernel) -> None:
    flat: Flat = [torch.ones(3, dtype=torch.bfloat16), torch.ones(3), torch.ones(3, dtype=torch.float16)]
    flat += [torch.ones(3, dtype=torch.float16), torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float16)]
    got = kernel(flat, 2, torch.ones(2))
    assert [t.dtype for t in got] == [torch.float32, torch.float64, torch.float16]
    assert all((t == 2).all() for t in got)


@pytest.mark.parametrize("accumulate", [False, True])
def test_out_may_be_a_row(kernel_: Kernel, accumulate: bool) -> None:
    flat = make_rows(3, ((2_200_003,), (5, 4)))
    weights = random_weights(3)
    own = [flat[2], flat[3]]
    want, scale = expected(flat, weights), sizes(flat, weights)
    added = [t.double() * accumulate for t in own]
    kernel_(own, flat, 3, weights, None, accumulate)
    for k in range(2):
        check(own[k], want[k] + added[k], scale[k] + added[k].abs())


@pytest.mark.parametrize("shift", [1, 2, 1000])
def test_out_may_overlap_rows(kernel_: Kernel, shift: int) -> None:
    memory = torch.randn(700_000, generator=torch.Generator().manual_seed(3))
    half = 300_000
    flat: Flat = [memory[:half], memory[half : 2 * half], memory[shift : half + shift], memory[:half]]
    weights = random_weights(2)
    want, scale = expected(flat, weights), sizes(flat, weights)
    out = [memory[shift : half + shift], torch.zeros(half)]
    kernel_(out, flat, 2, weights)
    check(out[0], want[0], scale[0])
    check(out[1], want[1], scale[1])


def test_overlapping_outs_are_refused() -> None:
    memory = torch.zeros(10)
    rows = [[torch.ones(6), torch.ones(6)]]
    with pytest.raises(UsageError, match=r"out\[0\] and out\[1\] must not overlap"):
        combine_([memory[:6], memory[4:]], rows, torch.ones(1))
    with pytest.raises(UsageError, match="must not be expanded"):
        combine_([torch.zeros(1).expand(6), torch.zeros(6)], rows, torch.ones(1))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(kernel: Kernel, threads: int) -> None:
    flat = make_rows(4, ((100_003,), (64,), (2_200_003,)))
    before = torch.get_num_threads()
    first = kernel(flat, 4, random_weights(4))
    try:
        torch.set_num_threads(threads)
        again = kernel(flat, 4, random_weights(4))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_autograd_sees_that_out_was_written() -> None:
    x = torch.ones(3, requires_grad=True)
    saved = torch.ones(3)
    product = (x * saved).sum()
    combine_([saved], [[torch.ones(3)]], torch.ones(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@settings(max_examples=150, deadline=None)
@given(drawn=any_rows(), data=st.data())
def test_any_rows(drawn: tuple[Flat, int], data: st.DataObject) -> None:
    flat, num_rows = drawn
    weights = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, 1.0, -0.5, 1e-3, 3.0]), min_size=num_rows, max_size=num_rows)),
        dtype=data.draw(st.sampled_from([torch.float32, torch.float64])),
    )
    wants = [w for w in expected(flat, weights) if w is not None]
    scales = [s for s in sizes(flat, weights) if s is not None]
    results = {backend: row_kernel("combine", backend)(flat, num_rows, weights) for backend in BACKENDS}
    for got in results.values():
        for result, want, scale in zip(got, wants, scales, strict=True):
            check(result, want, scale)
    for a, b in zip(*results.values(), strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()


def test_opcheck() -> None:
    flat = make_rows(3, ((5, 3), (7,), (2, 3, 4, 5)))
    flat[1] = None
    flat[2::3] = [relaid(t, "channels_last") for t in flat[2::3]]
    for namespace, name in ((torch.ops.fastmtl, "reference"), (torch.ops.fastmtl_cpp, "cpp")):
        backend_kernel("combine", name)
        torch.library.opcheck(namespace.combine.default, (flat, 3, torch.ones(3)))
        torch.library.opcheck(namespace.combine.default, (flat, 3, torch.ones(2, 3)))
        torch.library.opcheck(namespace.combine.default, (flat, 3, torch.ones(2, 3), [1, 0, 1]))
        for accumulate in (False, True):
            out = [torch.zeros(5, 3), torch.zeros(7), torch.zeros(2, 3, 4, 5)]
            torch.library.opcheck(namespace.combine_.default, (out, flat, 3, torch.ones(3), None, accumulate))


# Inductor itself imports what torch has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_without_graph_breaks() -> None:
    rows = [make_rows(1, ((5, 3), (70,), (4,)), seed=seed) for seed in range(3)]
    rows[1][0] = rows[0][2] = rows[1][2] = rows[2][2] = None
    weights = torch.tensor([0.5, 2.0, 0.0])
    compiled = torch.compile(lambda rows, weights: combine(rows, weights), fullgraph=True)
    for got, want in zip(compiled(rows, weights), combine(rows, weights), strict=True):
        assert (got is None and want is None) or torch.equal(got, want)

    def step(out: list[Tensor], weights: Tensor) -> Tensor:
        combine_(out, rows, weights, accumulate=True)
        return out[0] * 2

    compiled_out, eager_out = ([torch.ones(5, 3), torch.ones(70), torch.ones(4)] for _ in range(2))
    result = torch.compile(step, fullgraph=True)(compiled_out, weights)
    assert torch.equal(result, step(eager_out, weights))
    for got, want in zip(compiled_out, eager_out, strict=True):
        assert torch.equal(got, want)


ROWS = [[torch.ones(2)], [torch.ones(2)]]


@pytest.mark.parametrize(
    ("weights", "groups", "words"),
    [
        (torch.ones(3), None, r"weights must have the shape \(2,\) or \(M, 2\), got \(3,\)"),
        (torch.ones(2, 2, 2), None, "weights must have the shape"),
        (torch.ones(2, dtype=torch.int64), None, "floating point"),
        (torch.ones(2), [0], r"\(1, 2\), got \(2,\)"),
        (torch.ones(1, 2), [0, 0], "one group for each"),
    ],
)
def test_bad_weights_are_refused_with_a_sentence(weights: Tensor, groups: list[int] | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        combine(ROWS, weights, groups)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ([], "one tensor for each of the 1"),
        ([torch.ones(3)], r"out\[0\] must have shape \(2,\)"),
        ([torch.ones(2, dtype=torch.int64)], "floating-point"),
    ],
)
def test_bad_out_is_refused_with_a_sentence(out: list[Tensor], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        combine_(out, ROWS, torch.ones(2))


def test_in_place_takes_one_weighting() -> None:
    with pytest.raises(UsageError, match="weights"):
        combine_([torch.ones(2)], ROWS, torch.ones(1, 2))
