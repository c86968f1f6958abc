"""Every solver does for the Gram matrices of groups of parameters what it does for each alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtl import linalg, ops
from fastmtl.errors import UsageError
from fastmtl.ops import implementation
from tests.ops.gram_solver import DEVICES
from tests.ops.orders import others
from tests.ops.rows import backend_kernel
from tests.ops.zoo import zoo

# The other arguments of each op, for the Gram matrices of groups (L, T, T) and for that of one of them.
Arguments = Callable[[Tensor], tuple[Any, ...]]


def vectors(grams: Tensor) -> Tensor:
    """(..., T) numbers of both signs, other ones in each group."""
    return torch.linspace(-1, 2, grams[..., 0].numel(), dtype=torch.float64).reshape(grams.shape[:-1])


def targets(grams: Tensor) -> Tensor:
    return torch.stack([vectors(grams), vectors(grams).flip(-1)], dim=-2)


OPS: dict[str, tuple[Arguments, Callable[[tuple[Any, ...], int], tuple[Any, ...]]]] = {}


def of_group(args: tuple[Any, ...], place: int) -> tuple[Any, ...]:
    return tuple(arg[place] if isinstance(arg, Tensor) else arg for arg in args)


def as_they_are(args: tuple[Any, ...], place: int) -> tuple[Any, ...]:
    return args


for _name in ("aligned", "config", "imtl"):
    OPS[_name] = (lambda grams: ()), as_they_are
OPS |= {
    "min_norm": (lambda grams: (None,), as_they_are),
    "min_norm warm": (lambda grams: (vectors(grams).clamp(min=0),), of_group),
    "nash": (lambda grams: (None,), as_they_are),
    "nash warm": (lambda grams: (vectors(grams).abs() + 0.1,), of_group),
    "fairgrad": (lambda grams: (2.0, vectors(grams).abs() + 0.1), of_group),
    "cagrad": (lambda grams: (0.5,), as_they_are),
    "cagrad_update": (lambda grams: (0.5,), as_they_are),
    "upgrad": (lambda grams: (1e-4, 1e-4), as_they_are),
    "nonneg_qp": (lambda grams: (vectors(grams),), of_group),
    "dual_cone": (lambda grams: (vectors(grams),), of_group),
    "dual_cone of several": (lambda grams: (targets(grams),), of_group),
    # All groups meet in the same orders.
    "pcgrad": (lambda grams: (others(grams.shape[-1]),), as_they_are),
}


def grams_of(size: int) -> Tensor:
    """Groups that differ in kind, one without any gradient among them."""
    kinds = [
        case.gram for case in zoo((size,)) if case.name.rsplit("-", 1)[0] in ("random", "conflicting", "zero_rows")
    ]
    return torch.stack([*kinds, torch.zeros(size, size, dtype=torch.float64)])


@pytest.mark.parametrize("size", [1, 2, 3, 17, 40])
@pytest.mark.parametrize("backend", DEVICES)
@pytest.mark.parametrize("case", OPS)
def test_groups_are_solved_as_each_alone(case: str, backend: str, size: int) -> None:
    name, (arguments, one_of) = case.split()[0], OPS[case]
    kernel, device = backend_kernel(name, backend), DEVICES[backend]
    grams = grams_of(size)
    args = arguments(grams)
    there = [arg.to(device) if isinstance(arg, Tensor) else arg for arg in args]
    weights = kernel(grams.to(device), *there).cpu()
    assert weights.shape == (len(grams), *((2,) if "update" in name or "several" in case else ()), size)
    for place, gram in enumerate(grams):
        alone = [arg.to(device) if isinstance(arg, Tensor) else arg for arg in one_of(args, place)]
        assert torch.equal(weights[place], kernel(gram.to(device), *alone).cpu())


@pytest.mark.parametrize("case", OPS)
def test_a_group_that_is_not_finite_leaves_the_others(case: str) -> None:
    name, (arguments, _) = case.split()[0], OPS[case]
    grams = grams_of(3)
    args = arguments(grams)
    want = backend_kernel(name, "cpp")(grams, *args)
    grams[1, 2, 2] = torch.nan
    for backend in ("reference", "cpp"):
        weights = backend_kernel(name, backend)(grams, *args)
        assert weights[1].isnan().any()
        torch.testing.assert_close(weights[[0, 2]], want[[0, 2]], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", OPS)
def test_opcheck(case: str) -> None:
    grams = grams_of(3)
    torch.library.opcheck(getattr(torch.ops.fastmtl, case.split()[0]).default, (grams, *OPS[case][0](grams)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_and_strides(dtype: torch.dtype) -> None:
    grams = grams_of(3).to(dtype)
    spread = torch.stack([grams, grams], dim=-1)[..., 0]
    assert torch.equal(ops.min_norm(spread), ops.min_norm(grams.double()))


@pytest.mark.parametrize("backend", DEVICES)
@pytest.mark.parametrize("groups", [1, 4, 40])
def test_the_norm_is_that_of_all_groups(backend: str, groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    jacobians = torch.randn(groups, 3, 5, dtype=torch.float64, generator=generator)
    weights = torch.randn(groups, 3, dtype=torch.float64, generator=generator)
    kernel, device = backend_kernel("cap_norm", backend), DEVICES[backend]
    capped = kernel((jacobians @ jacobians.mT).to(device), weights.to(device), 0.5).cpu()
    assert (weights[:, None] @ jacobians).norm() > 0.5
    torch.testing.assert_close((capped[:, None] @ jacobians).norm().item(), 0.5, rtol=1e-5, atol=0)
    torch.testing.assert_close(capped / capped[0, 0], weights / weights[0, 0])
    torch.library.opcheck(torch.ops.fastmtl.cap_norm.default, (jacobians @ jacobians.mT, weights, 0.5))


def test_the_projector_takes_groups() -> None:
    grams = grams_of(3)
    project = linalg.QuadprogProjector()
    for wanted in (vectors(grams), targets(grams)):
        alone = [project(target, gram) for target, gram in zip(wanted, grams, strict=True)]
        assert torch.equal(project(wanted, grams), torch.stack(alone))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda grams: ops.min_norm(grams, torch.ones(3)), "warm_start must hold 12 floats, one per row of gram"),
        (lambda grams: ops.dual_cone(grams, torch.ones(2, 3)), r"targets must be a \(4, 3\) or \(4, M, 3\) tensor"),
        (lambda grams: ops.nonneg_qp(grams[:, :2], torch.ones(4, 3)), r"gram must be a \(T, T\) matrix or \(L, T, T\)"),
        (lambda grams: ops.cap_norm(grams, torch.ones(3), 1.0), "weights must hold 12 floats"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(grams_of(3))


def test_every_solver_is_here() -> None:
    """An op that is declared as a solver takes groups: what is not in the table has its own tests."""
    assert {name.split()[0] for name in OPS} <= set(implementation.__globals__["OPS"])
