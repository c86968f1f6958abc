"""What the Triton kernels compute: under the interpreter in a process of test_triton.py, without it on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtl.ops import implementation
from fastmtl.ops._philox import uniform
from tests.ops import test_combine, test_graddrop, test_gram, test_min_norm, test_pcgrad
from tests.ops.orders import permutations
from tests.ops.rows import DTYPES, LAYOUTS, Flat, make_rows, on_device, relaid
from tests.ops.zoo import Case, poisoned, zoo

SHAPES = ((1,), (63,), (1031,), (3, 5, 7), (0,), ())
SIZES = (1, 2, 3, 8, 17)


def triton(op: str) -> Callable[..., Any]:
    kernel = implementation(op, "triton")
    return kernel if os.environ.get("TRITON_INTERPRET") == "1" else on_device(kernel, "cuda")


def named(cases: Iterable[Case]) -> list[Any]:
    return [pytest.param(case, id=case.name) for case in cases]


def scaled_error(got: Tensor, want: Tensor) -> float:
    return test_gram.error(got, want)


@pytest.mark.parametrize("num_rows", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_gram_is_accurate(num_rows: int, dtype: torch.dtype) -> None:
    flat = make_rows(num_rows, SHAPES if num_rows <= 3 else ((63,), (300,)), dtype)
    got = triton("gram")(flat, num_rows)
    assert torch.equal(got, got.T)
    assert scaled_error(got, test_gram.expected(flat, num_rows)) <= 1e-13


@pytest.mark.parametrize("scale", [1e-19, 1e-8, 1e19])
def test_gram_of_any_scale(scale: float) -> None:
    flat = [t * m for m, t in zip([scale, 1.0, 1 / scale], make_rows(3, ((1003,),)), strict=True)]
    assert scaled_error(triton("gram")(flat, 3), test_gram.expected(flat, 3)) <= 4 * test_gram.EPS


def with_gaps(num_rows: int) -> Flat:
    flat = make_rows(num_rows, ((63,), (129,), (5,)))
    for gap in (0, 4, 7, 8, 2, 5):
        flat[gap] = None
    return flat


def test_gram_of_groups_and_gaps() -> None:
    flat = with_gaps(3)
    assert scaled_error(triton("gram")(flat, 3), test_gram.expected(flat, 3)) <= 1e-13
    got = triton("gram")(flat, 3, [2, 0, 2])
    assert got.shape == (3, 3, 3)
    torch.testing.assert_close(got, implementation("gram", "reference")(flat, 3, [2, 0, 2]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("others", ["contiguous", "same"])
@pytest.mark.usefixtures("poisoned_memory")
def test_memory_layout_does_not_matter(layout: str, others: str) -> None:
    shapes = ((4, 3, 5, 5), (33, 7), (64,), (1, 4, 1, 9))
    flat = [relaid(t, layout) for t in make_rows(3, shapes)]
    if others == "contiguous":
        flat = [t.contiguous() if i >= 4 else t for i, t in enumerate(flat)]
    assert scaled_error(triton("gram")(flat, 3), test_gram.expected(flat, 3)) <= 1e-13
    weights = test_combine.random_weights(3)
    targets = [relaid(torch.full(s, torch.nan), "strided" if layout == "expanded" else layout) for s in shapes]
    triton("combine_")(targets, flat, 3, weights)
    check_sums(triton("combine")(flat, 3, weights), flat, weights)
    check_sums(targets, flat, weights)
    for one, other in zip(
        triton("combine")(flat, 3, weights), implementation("combine", "reference")(flat, 3, weights), strict=True
    ):
        assert one.stride() == other.stride()


def check_sums(got: list[Tensor], flat: Flat, weights: Tensor) -> None:
    wants = [want for want in test_combine.expected(flat, weights) if want is not None]
    scales = [scale for scale in test_combine.sizes(flat, weights) if scale is not None]
    for one, want, scale in zip(got, wants, scales, strict=True):
        test_combine.check(one, want, scale)


@pytest.mark.parametrize("num_rows", [*SIZES, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_combine_is_accurate(num_rows: int, dtype: torch.dtype) -> None:
    flat = make_rows(num_rows, SHAPES if num_rows <= 8 else ((63,), (300,)), dtype)
    weights = test_combine.random_weights(num_rows)
    check_sums(triton("combine")(flat, num_rows, weights), flat, weights)


def test_combine_of_gaps_groups_and_many_weightings() -> None:
    flat = with_gaps(3)
    weights = test_combine.random_weights(3, 3)
    weights[1] = 0
    for groups in (None, [2, 0, 1]):
        got = triton("combine")(flat, 3, weights, groups)
        want = implementation("combine", "reference")(flat, 3, weights, groups)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_combine_does_not_read_a_row_of_weight_zero() -> None:
    flat = make_rows(3, ((300,),))
    flat[1] = torch.full((300,), torch.nan)
    weights = torch.tensor([1.0, 0.0, 2.0])
    check_sums(triton("combine")(flat, 3, weights), [flat[0], None, flat[2]], weights)
    assert triton("combine")(flat, 3, torch.ones(3))[0].isnan().all()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_in_place(accumulate: bool, dtype: torch.dtype) -> None:
    flat = make_rows(2, ((1031,), (3, 5), (4,)))
    flat[2] = flat[5] = None
    weights = test_combine.random_weights(2)
    results = []
    for kernel in (triton("combine_"), implementation("combine_", "reference")):
        out = [torch.ones(shape, dtype=dtype) for shape in ((1031,), (3, 5), (4,))]
        kernel(out, flat, 2, weights, None, accumulate)
        results.append(out)
    for one, other in zip(*results, strict=True):
        tolerance = 4 * max(torch.finfo(dtype).eps, test_gram.EPS)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("shift", [0, 1, 1000])
def test_combine_into_a_row_or_across_one(shift: int) -> None:
    memory = torch.randn(7000, generator=torch.Generator().manual_seed(3))
    flat: Flat = [memory[:3000], memory[3000:6000], memory[shift : 3000 + shift], memory[:3000]]
    weights = test_combine.random_weights(2)
    want, scale = test_combine.expected(flat, weights), test_combine.sizes(flat, weights)
    out = [memory[shift : 3000 + shift], torch.zeros(3000)]
    triton("combine_")(out, flat, 2, weights)
    for k in range(2):
        test_combine.check(out[k], want[k], scale[k])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tasks", [1, 3, 8, 33])
@pytest.mark.usefixtures("poisoned_memory")
def test_graddrop_follows_the_definition(tasks: int, dtype: torch.dtype) -> None:
    random = test_graddrop.RANDOM
    for features, batch in (((129,), 3), ((3, 5, 7), 2), ((), 4), ((5,), 0)):
        count = torch.Size(features).numel()
        noise = uniform(random, 0, count).reshape(features)
        grads = [test_graddrop.whole_numbers((batch, *features), 7 * t, dtype) for t in range(tasks)]
        reps = [test_graddrop.whole_numbers((batch, *features), 50 + t, dtype) for t in range(tasks)]
        for given in (reps[:1], reps):
            for own in (None, torch.rand(features, generator=torch.Generator().manual_seed(1))):
                want = test_graddrop.expected(given, grads, 0.25, noise if own is None else own)
                for one, other in zip(triton("graddrop")(given, grads, 0.25, random, own), want, strict=True):
                    assert one.dtype == dtype
                    test_graddrop.check(one, other, scale=4.0 * tasks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_graddrop_of_any_layout_draws_the_same_numbers(layout: str) -> None:
    reps, grads = (
        [relaid(test_graddrop.whole_numbers((4, 6, 5, 3), seed + t), layout) for t in range(3)] for seed in (0, 10)
    )
    grads[1] = grads[1].double()
    leak, random = torch.tensor([0.0, 0.5, 1.0]), test_graddrop.RANDOM
    flat: Flat = [*grads, *reps]
    flat[3] = None
    for op, arguments in (
        ("graddrop", (reps, grads, 0.5, random)),
        ("graddrop", (reps[:1], grads, 0.5, random)),
        ("graddrop_rows", (flat, 3, leak, random, [])),
        ("graddrop_rows", (flat, 3, leak, random, [torch.full((4, 6, 5, 3), 0.5)] * 2)),
    ):
        want = implementation(op, "reference")(*arguments)
        for one, other in zip(triton(op)(*arguments), want, strict=True):
            assert one.dtype == other.dtype
            assert one.stride() == other.stride()
            test_graddrop.check(one, other.double(), scale=12.0)


def test_graddrop_of_batches_of_different_size() -> None:
    reps, grads = ([test_graddrop.whole_numbers((n, 70), seed + n) for n in (3, 0, 8)] for seed in (0, 20))
    want = implementation("graddrop", "reference")(reps, grads, 0.5, test_graddrop.RANDOM)
    for one, other in zip(triton("graddrop")(reps, grads, 0.5, test_graddrop.RANDOM), want, strict=True):
        test_graddrop.check(one, other.double())


@pytest.mark.parametrize("case", named([*zoo((1, 2, 3, 8)), *list(zoo((17, 33)))[::11]]))
def test_min_norm_meets_its_bound(case: Case) -> None:
    test_min_norm.check_bound(case.gram, triton("min_norm")(case.gram))


@pytest.mark.parametrize("case", named([*zoo((1, 3, 8)), *list(zoo((17, 33)))[::11]]))
def test_pcgrad_update(case: Case) -> None:
    orders = permutations(len(case.gram))
    test_pcgrad.check_update(case, orders, triton("pcgrad")(case.gram, orders))


def test_pcgrad_by_keys() -> None:
    gram = next(zoo((8,))).gram - 0.5
    keys = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)).mul(4).round()
    keys[2, 3] = keys[2, 1] = torch.nan
    want = implementation("pcgrad", "reference")(gram, keys)
    torch.testing.assert_close(triton("pcgrad")(gram, keys), want)
    assert triton("pcgrad")(gram, torch.empty(8, 0, dtype=torch.int64)).tolist() == [1.0] * 8


@pytest.mark.parametrize("case", named(poisoned((1, 3, 8))))
def test_what_is_not_finite_gives_nan(case: Case) -> None:
    size = len(case.gram)
    assert triton("min_norm")(case.gram).isnan().all()
    assert triton("pcgrad")(case.gram, permutations(size)).isnan().all()
