"""graddrop and graddrop_rows against their definition, on every backend that is here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops import graddrop, graddrop_rows
from fastmtl.ops._philox import uniform
from tests.ops.rows import (
    BACKENDS,
    DTYPES,
    LAYOUTS,
    SHAPES,
    Flat,
    any_rows,
    backend_kernel,
    make_rows,
    relaid,
    row_kernel,
)

Kernel = Callable[..., list[Tensor]]
NAN = float("nan")
RANDOM = torch.tensor([0x0123456789ABCDEF, 2**40 + 3])


@pytest.fixture(params=BACKENDS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return row_kernel("graddrop", request.param)


@pytest.fixture(params=BACKENDS)
def rows_kernel(request: pytest.FixtureRequest) -> Kernel:
    return row_kernel("graddrop_rows", request.param)


def whole_numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return small whole numbers, whose sums are exact: no rounding decides which sign stays."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask(signed: Tensor, noise: Tensor) -> Tensor:
    """Return M_t by the definition of the purity."""
    sizes = signed.abs().sum(0)
    purity = torch.where(sizes > 0, (1 + signed.sum(0) / sizes) / 2, 0.5)
    return ((purity > noise) & (signed > 0)) | ((purity < noise) & (signed < 0))


def expected(reps: list[Tensor], grads: list[Tensor], leak: float, noise: Tensor) -> list[Tensor]:
    """Return the result in float64 by the definition."""
    each = reps * len(grads) if len(reps) == 1 else reps
    signed = torch.stack([(g.double() * r.double().sign()).sum(0) for g, r in zip(grads, each, strict=True)])
    factor = leak + (1 - leak) * mask(signed, noise.double()).double()
    dropped = [g.double() * f for g, f in zip(grads, factor, strict=True)]
    return [torch.stack(dropped).sum(0)] if len(reps) == 1 else dropped


def check(got: Tensor, want: Tensor, scale: float = 1.0) -> None:
    eps = max(torch.finfo(got.dtype).eps, torch.finfo(torch.float32).eps)
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= 4 * eps * (want.abs() + scale)).all()


FEATURES: tuple[tuple[int, ...], ...] = ((1,), (63,), (129,), (3, 5, 7), (4099,), (0,), ())


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leak", [0.0, 0.25])
@pytest.mark.usefixtures("poisoned_memory")
def test_follows_the_definition(kernel: Kernel, features: tuple[int, ...], dtype: torch.dtype, leak: float) -> None:
    count = torch.Size(features).numel()
    noise = uniform(RANDOM, 0, count).reshape(features)
    for tasks, batch in ((1, 3), (2, 1), (3, 17), (40, 2), (3, 0)):
        grads = [whole_numbers((batch, *features), 7 * t, dtype) for t in range(tasks)]
        shared = [whole_numbers((batch, *features), 99, dtype)]
        own = [whole_numbers((batch, *features), 50 + t, dtype) for t in range(tasks)]
        for reps in (shared, own):
            got = kernel(reps, grads, leak, RANDOM)
            assert len(got) == len(reps)
            for one, want in zip(got, expected(reps, grads, leak, noise), strict=True):
                assert one.dtype == dtype
                check(one, want)


def test_batches_of_different_size(kernel: Kernel) -> None:
    reps, grads = ([whole_numbers((n, 70), seed + n) for n in (3, 0, 8)] for seed in (0, 20))
    noise = uniform(RANDOM, 0, 70)
    for one, want in zip(kernel(reps, grads, 0.5, RANDOM), expected(reps, grads, 0.5, noise), strict=True):
        check(one, want)


def test_many_features_and_rows(kernel: Kernel) -> None:
    grads = [torch.randn(37, 50_021, generator=torch.Generator().manual_seed(t)) for t in range(3)]
    reps = [torch.randn(37, 50_021, generator=torch.Generator().manual_seed(9))]
    noise = torch.rand(50_021, generator=torch.Generator().manual_seed(10))
    check(kernel(reps, grads, 0.1, RANDOM, noise)[0], expected(reps, grads, 0.1, noise)[0], scale=8.0)


@pytest.mark.parametrize("features", [3, 21, 67, 131])
@pytest.mark.usefixtures("poisoned_memory")
def test_few_features_of_a_large_batch(kernel: Kernel, features: int) -> None:
    grads = [whole_numbers((700, features), t) for t in range(5)]
    reps = [whole_numbers((700, features), 9)]
    check(kernel(reps, grads, 0.5, RANDOM)[0], expected(reps, grads, 0.5, uniform(RANDOM, 0, features))[0], scale=8.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("others", ["contiguous", "same"])
@pytest.mark.usefixtures("poisoned_memory")
def test_memory_layout_does_not_matter(kernel: Kernel, layout: str, others: str) -> None:
    shape = (4, 6, 5, 3)
    noise = torch.rand(shape[1:], generator=torch.Generator().manual_seed(1))
    reps, grads = ([relaid(whole_numbers(shape, seed + t), layout) for t in range(3)] for seed in (0, 10))
    if others == "contiguous":
        grads = [grad.contiguous() for grad in grads]
    for given_reps in (reps, reps[:1]):
        wanted = expected(given_reps, grads, 0.5, noise)
        for one, want in zip(kernel(given_reps, grads, 0.5, RANDOM, noise), wanted, strict=True):
            check(one, want)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "contiguous"])
def test_all_backends_draw_the_same_numbers(layout: str) -> None:
    reps, grads = ([relaid(whole_numbers((4, 6, 5, 3), seed + t), layout) for t in range(3)] for seed in (0, 10))
    flat = [relaid(whole_numbers((4, 6, 5, 3), seed), layout) for seed in range(6)]
    results = []
    for backend in BACKENDS:
        own = row_kernel("graddrop", backend)(reps, grads, 0.5, RANDOM)
        rows = row_kernel("graddrop_rows", backend)(flat, 3, torch.zeros(3), RANDOM, [])
        results.append([*own, *rows])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


def test_numbers_follow_seed_and_offset(kernel: Kernel) -> None:
    grads = [torch.ones(1, 4096), -torch.ones(1, 4096)]
    streams = torch.tensor([[1, 1], [1, 2], [2, 1]])
    results = [kernel([torch.ones(1, 4096)], grads, 0.0, stream)[0] for stream in streams]
    assert torch.equal(results[0], kernel([torch.ones(1, 4096)], grads, 0.0, torch.tensor([1, 1]))[0])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert 0.45 < (results[a] == results[b]).double().mean() < 0.55
    assert abs(results[0].double().mean()) < 0.05


def test_a_sign_stays_as_often_as_its_share(kernel: Kernel) -> None:
    # Three quarters of the gradient is positive.
    count = 40_000
    grads = [torch.full((1, count), 3.0), torch.full((1, count), -1.0)]
    got = kernel([torch.ones(1, count)], grads, 0.0, RANDOM)[0]
    assert abs((got == 3).double().mean() - 0.75) < 0.01
    assert ((got == 3) | (got == -1)).all()


def test_agreeing_tasks_keep_everything(kernel: Kernel) -> None:
    grads = [torch.rand(3, 100, generator=torch.Generator().manual_seed(t)) + 0.1 for t in range(4)]
    check(kernel([torch.ones(3, 100)], grads, 0.0, RANDOM)[0], torch.stack(grads).double().sum(0))


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_nan_shows_in_its_place_alone(kernel: Kernel, value: float) -> None:
    reps, grads = [torch.ones(3, 40)], [torch.ones(3, 40) for _ in range(2)]
    grads[1][1, 7] = value
    finite = kernel(reps, grads, 0.5, RANDOM)[0].isfinite()
    assert not finite[1, 7]
    assert finite.sum() == finite.numel() - 1


def test_a_nan_in_a_representation_leaves_neither_sign(kernel: Kernel) -> None:
    reps, grads = [torch.ones(3, 40)], [torch.ones(3, 40), torch.full((3, 40), -1.0)]
    reps[0][1, 7] = NAN
    got = kernel(reps, grads, 0.0, RANDOM)[0]
    assert (got[:, 7] == 0).all()
    assert (got[:, :7].abs() == 1).all()


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_scale_of_the_losses_does_not_matter(kernel: Kernel, scale: float) -> None:
    reps = [whole_numbers((5, 300), 1)]
    grads = [whole_numbers((5, 300), 2 + t, torch.float64) for t in range(3)]
    power = 2.0 ** round(torch.tensor(scale).log2().item())
    want = kernel(reps, grads, 0.0, RANDOM)[0]
    assert torch.equal(kernel(reps, [g * power for g in grads], 0.0, RANDOM)[0], want * power)


def expected_rows(flat: Flat, num_rows: int, leak: Tensor, noise: list[Tensor]) -> list[Tensor]:
    width = len(flat) // num_rows
    results = []
    for k in range(width):
        column = [(t, flat[t * width + k]) for t in range(num_rows) if flat[t * width + k] is not None]
        if column:
            signed = torch.stack([row.double() for _, row in column])
            leaks = leak.double()[[t for t, _ in column]].view(-1, *[1] * (signed.dim() - 1))
            factor = leaks + (1 - leaks) * mask(signed, noise[k].double()).double()
            results.append((signed * factor).sum(0))
    return results


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 40, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_rows_follow_the_definition(rows_kernel: Kernel, num_rows: int, dtype: torch.dtype) -> None:
    flat: Flat = [whole_numbers(shape, i * 31 + t, dtype) for t in range(num_rows) for i, shape in enumerate(SHAPES)]
    if num_rows > 1:
        flat[1] = flat[len(SHAPES) + 3] = None
    leak = torch.linspace(0, 1, num_rows)
    noise, first = [], 0
    for shape in SHAPES:
        count = torch.Size(shape).numel()
        noise.append(uniform(RANDOM, first, count).reshape(shape))
        first += (count + 3) // 4 * 4
    got = rows_kernel(flat, num_rows, leak, RANDOM, [])
    for one, want in zip(got, expected_rows(flat, num_rows, leak, noise), strict=True):
        assert one.dtype == dtype
        check(one, want, scale=4.0 * num_rows)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poisoned_memory")
def test_rows_of_any_layout(rows_kernel: Kernel, layout: str) -> None:
    shapes = ((8, 3, 5, 5), (33, 7), (64,))
    flat: Flat = [relaid(whole_numbers(shape, t + i), layout) for t in range(3) for i, shape in enumerate(shapes)]
    flat[3] = flat[3].contiguous()
    noise = [torch.rand(shape, generator=torch.Generator().manual_seed(3)) for shape in shapes]
    leak = torch.tensor([0.0, 0.5, 0.0])
    for one, want in zip(rows_kernel(flat, 3, leak, RANDOM, noise), expected_rows(flat, 3, leak, noise), strict=True):
        check(one, want, scale=12.0)


@settings(max_examples=80, deadline=None)
@given(drawn=any_rows(), seed=st.integers(0, 2**40))
def test_any_rows(drawn: tuple[Flat, int], seed: int) -> None:
    flat, num_rows = drawn
    exact: Flat = [None if row is None else (row * 2).round() for row in flat]
    leak = torch.linspace(0, 0.5, num_rows)
    random = torch.tensor([seed, 5])
    results = [row_kernel("graddrop_rows", b)(exact, num_rows, leak, random, []) for b in BACKENDS]
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        check(one, other.double(), scale=8.0 * num_rows)


@st.composite
def any_reps(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor]]:
    tasks = draw(st.integers(1, 5))
    features = draw(st.lists(st.integers(0, 5) | st.sampled_from([33, 65]), max_size=3))
    shared = draw(st.booleans())
    sizes = [draw(st.integers(0, 6))] * tasks if shared else [draw(st.integers(0, 6)) for _ in range(tasks)]

    def tensor(size: int, number: int) -> Tensor:
        made = whole_numbers((size, *features), number).to(draw(st.sampled_from(DTYPES)))
        return relaid(made, draw(st.sampled_from(LAYOUTS)))

    grads = [tensor(size, t) for t, size in enumerate(sizes)]
    return [tensor(size, 9 + t) for t, size in enumerate(sizes[: 1 if shared else None])], grads


@settings(max_examples=80, deadline=None)
@given(drawn=any_reps(), leak=st.sampled_from([0.0, 0.5, 1.0]))
def test_any_reps(drawn: tuple[list[Tensor], list[Tensor]], leak: float) -> None:
    reps, grads = drawn
    results = [row_kernel("graddrop", b)(reps, grads, leak, RANDOM) for b in BACKENDS]
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        check(one, other.double())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(kernel: Kernel, rows_kernel: Kernel, threads: int) -> None:
    reps = [torch.randn(16, 9001, generator=torch.Generator().manual_seed(0))]
    grads = [torch.randn(16, 9001, generator=torch.Generator().manual_seed(t)) for t in (1, 2)]
    flat = make_rows(3, ((100_003,), (64,)))

    def results() -> list[Tensor]:
        return [*kernel(reps, grads, 0.1, RANDOM), *rows_kernel(flat, 3, torch.zeros(3), RANDOM, [])]

    before = torch.get_num_threads()
    first = results()
    try:
        torch.set_num_threads(threads)
        again = results()
    finally:
        torch.set_num_threads(before)
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(first, again, strict=True))
    kernels = (kernel, "graddrop"), (rows_kernel, "graddrop_rows")
    if all(each is not backend_kernel(op, "reference") for each, op in kernels):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_opcheck() -> None:
    reps, grads = [torch.randn(4, 3, 5)], [torch.randn(4, 3, 5) for _ in range(3)]
    own = [torch.randn(4, 3, 5) for _ in range(3)]
    flat = make_rows(3, ((5, 3), (7,)))
    flat[1] = None
    for namespace, name in ((torch.ops.fastmtl, "reference"), (torch.ops.fastmtl_cpp, "cpp")):
        row_kernel("graddrop", name)
        torch.library.opcheck(namespace.graddrop.default, (reps, grads, 0.5, RANDOM))
        torch.library.opcheck(namespace.graddrop.default, (own, grads, 0.5, RANDOM, torch.rand(3, 5)))
        torch.library.opcheck(namespace.graddrop_rows.default, (flat, 3, torch.zeros(3), RANDOM, []))


# Inductor itself imports what torch has deprecated.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_without_graph_breaks() -> None:
    reps, grads = [torch.randn(4, 30)], [torch.randn(4, 30) for _ in range(3)]

    def step(reps: list[Tensor], grads: list[Tensor], random: Tensor) -> tuple[Any, ...]:
        dropped = graddrop(reps, grads, 0.5, random)[0] * 2
        return dropped, *graddrop_rows([[grad] for grad in grads], torch.zeros(3), random + 1)

    compiled = torch.compile(step, fullgraph=True)
    for got, want in zip(compiled(reps, grads, RANDOM), step(reps, grads, RANDOM), strict=True):
        assert torch.equal(got, want)


def test_a_parameter_without_rows() -> None:
    got = graddrop_rows([[None, torch.ones(3)], [None, torch.ones(3)]], torch.zeros(2), RANDOM)
    assert got[0] is None
    assert torch.equal(got[1], torch.full((3,), 2.0))


ONES = [torch.ones(2, 3)]


@pytest.mark.parametrize(
    ("reps", "grads", "random", "noise", "words"),
    [
        (ONES * 2, ONES * 3, RANDOM, None, "one for each of the 3 grads, got 2"),
        (ONES, [], RANDOM, None, "of the 0 grads"),
        (ONES, [torch.ones(2, 4)], RANDOM, None, r"grads\[0\] must have the shape|reps\[0\] must have the shape"),
        ([torch.ones(3, 3)], ONES, RANDOM, None, r"grads\[0\] must have the shape \(3, 3\)"),
        ([torch.ones(())], [torch.ones(())], RANDOM, None, r"\(batch, ...\)"),
        ([ONES[0].long()], ONES, RANDOM, None, r"reps\[0\] must be a dense float32"),
        (ONES, ONES, torch.zeros(2), None, "seed and offset"),
        (ONES, ONES, RANDOM[:1], None, "seed and offset"),
        (ONES, ONES, RANDOM, torch.ones(2), r"noise must be floats of the shape \(3,\)"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(
    reps: list[Tensor], grads: list[Tensor], random: Tensor, noise: Tensor | None, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        graddrop(reps, grads, 0.0, random, noise)


@pytest.mark.parametrize(
    ("leak", "noise", "words"),
    [
        (torch.zeros(3), None, "leak must hold 1 floats"),
        (torch.zeros(1), [], "noise must hold one tensor for each of the 1"),
        (torch.zeros(1), [torch.zeros(2)], r"noise\[0\] must be floats of the shape \(3,\)"),
    ],
)
def test_bad_rows_are_refused_with_a_sentence(leak: Tensor, noise: list[Tensor] | None, words: str) -> None:
    if noise == []:
        noise = [torch.zeros(3)] * 2
    with pytest.raises(UsageError, match=words):
        graddrop_rows([[torch.ones(3)]], leak, RANDOM, noise)
