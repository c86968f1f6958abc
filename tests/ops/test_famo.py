"""famo_weights and famo_step_ against their formulas in float64, on every backend that is here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.errors import UsageError
from tests.ops.gram_solver import DEVICES
from tests.ops.rows import backend_kernel

SIZES = (1, 2, 7, 33, 300)


def numbers(size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(size)

    def draw() -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64).to(dtype)

    least = draw() / 4
    values = {
        "logits": 3 * draw() - 1,
        "first": draw() - 0.5,
        "second": draw(),
        "steps": torch.tensor(4.0, dtype=dtype),
    }
    values |= {"before": draw() + least, "after": draw() + least - 0.1, "least": least}
    # One task is at its lower bound, another below it.
    if size > 2:
        values["before"][1], values["before"][2] = least[1], least[2] - 1
    return values


def weights(logits: Tensor, losses: Tensor, least: Tensor) -> Tensor:
    excess = losses.double() - least.double()
    known = excess > 0
    share = torch.zeros_like(excess)
    share[known] = torch.softmax(logits.double(), 0)[known] / (excess[known] + 1e-8)
    return share / share.sum() if known.any() else share


def moved(values: dict[str, Tensor], lr: float, decay: float) -> list[Tensor]:
    """What torch's Adam does with the gradient of the tasks that take part."""
    wide = {name: value.double() for name, value in values.items()}
    known = wide["before"] > wide["least"]
    logits, first, second = (wide[name].clone() for name in ("logits", "first", "second"))
    if known.any():
        logit = logits[known].clone().requires_grad_()
        adam = torch.optim.Adam([logit], lr=lr, weight_decay=decay)
        moments = {"exp_avg": first[known].clone(), "exp_avg_sq": second[known].clone()}
        adam.state[logit] = {"step": wide["steps"].float().clone(), **moments}
        fall = (wide["before"] - wide["least"] + 1e-8).log()
        fall = fall - ((wide["after"] - wide["least"]).clamp(min=0) + 1e-8).log()
        (torch.softmax(logit, 0) @ fall[known]).backward()
        adam.step()
        logits[known], first[known], second[known] = logit.detach(), moments["exp_avg"], moments["exp_avg_sq"]
    return [logits, first, second, wide["steps"] + 1]


@pytest.fixture(params=DEVICES)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_weights(backend: str, size: int, dtype: torch.dtype) -> None:
    values = numbers(size, dtype)
    arguments = [values[name].to(DEVICES[backend]) for name in ("logits", "before", "least")]
    found = backend_kernel("famo_weights", backend)(*arguments)
    assert found.dtype == torch.float64
    want = weights(values["logits"], values["before"], values["least"])
    torch.testing.assert_close(found.cpu().double(), want, rtol=1e-13 * size, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_step(backend: str, size: int, dtype: torch.dtype) -> None:
    values = numbers(size, dtype)
    arguments = [value.clone().to(DEVICES[backend]) for value in values.values()]
    backend_kernel("famo_step_", backend)(*arguments, 0.03, 1e-2)
    for got, want in zip(arguments[:4], moved(values, 0.03, 1e-2), strict=True):
        # The gradient is a difference of what nearly cancels.
        torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=20 * torch.finfo(dtype).eps)
    for name, argument in zip(list(values)[4:], arguments[4:], strict=True):
        assert torch.equal(argument.cpu(), values[name])


def test_without_any_task_nothing_moves(backend: str) -> None:
    values = numbers(3, torch.float32) | {"before": torch.zeros(3), "least": torch.ones(3)}
    arguments = [value.clone().to(DEVICES[backend]) for value in values.values()]
    backend_kernel("famo_step_", backend)(*arguments, 0.03, 1e-2)
    for got, name in zip(arguments[:3], values, strict=False):
        assert torch.equal(got.cpu(), values[name])
    weights = backend_kernel("famo_weights", backend)(*(arguments[k] for k in (0, 4, 6)))
    assert weights.tolist() == [0, 0, 0]


def test_nan_shows(backend: str) -> None:
    values = numbers(3, torch.float32)
    values["after"][0] = math.nan
    arguments = [value.clone().to(DEVICES[backend]) for value in values.values()]
    backend_kernel("famo_step_", backend)(*arguments, 0.03, 0.0)
    assert arguments[0][0].isnan()


def test_opcheck_and_graphs() -> None:
    values = list(numbers(3, torch.float32).values())
    torch.library.opcheck(torch.ops.fastmtl.famo_weights.default, (values[0], values[4], values[6]))
    torch.library.opcheck(torch.ops.fastmtl.famo_step_.default, (*values, 0.03, 1e-2))

    def run(*state: Tensor) -> Tensor:
        torch.ops.fastmtl.famo_step_(*state, 0.03, 1e-2)
        return ops.famo_weights(state[0], state[4], state[6])

    compiled: Callable[..., Tensor] = torch.compile(run, fullgraph=True, backend="aot_eager")
    want, got = run(*(value.clone() for value in values)), compiled(*(value.clone() for value in values))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("first", torch.zeros(2)),
        ("before", torch.zeros(3, 1)),
        ("after", torch.zeros(3).long()),
        ("steps", torch.ones(2)),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: Tensor) -> None:
    values: dict[str, Any] = {**numbers(3, torch.float32), name: value}
    with pytest.raises(UsageError, match=name):
        ops.famo_step_(**values, lr=0.03, decay=1e-2)
    with pytest.raises(UsageError, match="least must hold 3 floats"):
        ops.famo_weights(torch.zeros(3), torch.ones(3), torch.zeros(1))
