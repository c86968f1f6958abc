"""watch_ against its definition, on every backend that is here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops import watch_
from tests.ops.gram_solver import DEVICES
from tests.ops.rows import backend_kernel

NAN, INF = math.nan, math.inf


class Watched:
    """The state of an op on a device, and what it saw of a step."""

    def __init__(self, backend: str, size: int, step: int = 5) -> None:
        self.kernel: Callable[..., None] = backend_kernel("watch_", backend)
        self.device = DEVICES[backend]
        self.found_inf = torch.zeros((), device=self.device)
        self.steps = torch.tensor([step, 0], device=self.device)
        self.first_bad = torch.zeros(5, size, dtype=torch.float64, device=self.device)

    def __call__(self, *numbers: Tensor | None) -> None:
        moved = [None if tensor is None else tensor.to(self.device) for tensor in numbers]
        self.kernel(self.found_inf, self.steps, self.first_bad, *moved)

    @property
    def seen(self) -> tuple[float, list[int], list[list[float]]]:
        return self.found_inf.item(), self.steps.tolist(), self.first_bad.tolist()


@pytest.fixture(params=DEVICES)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def numbers(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    jacobian = torch.randn(size, 7, generator=generator).double()
    losses = torch.rand(size, generator=generator).to(dtype)
    return losses, jacobian @ jacobian.T, torch.rand(size, generator=generator).to(dtype), torch.zeros(size).bool()


@pytest.mark.parametrize("size", [1, 2, 31, 33, 300])
def test_good_steps_are_counted(backend: str, size: int) -> None:
    watched = Watched(backend, size)
    for _ in range(3):
        watched(*numbers(size))
    assert watched.seen == (0, [8, 0], [[0] * size] * 5)


@pytest.mark.parametrize("place", [0, 40, 299])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("what", range(4))
def test_the_first_bad_step_is_kept(backend: str, what: int, value: float, place: int) -> None:
    size = 300
    watched = Watched(backend, size)
    watched(*numbers(size))
    bad = numbers(size)
    if what == 1:
        bad[1][place, place] = value
    elif what == 3:
        bad[3][place] = True
    else:
        bad[what][place] = value
    watched(*bad)
    row = {0: 0, 1: 2, 2: 3, 3: 1}[what]
    expected = torch.zeros(5, size, dtype=torch.float64)
    expected[row, place] = 1
    expected[4] = bad[0].double()
    first = watched.first_bad.cpu()
    assert watched.found_inf.item() == 1
    assert watched.steps.tolist() == [7, 6]
    torch.testing.assert_close(first, expected, rtol=0, atol=0, equal_nan=True)
    # A later one is not.
    later = numbers(size)
    later[0].fill_(NAN)
    watched(*later)
    assert watched.steps.tolist() == [8, 6]
    torch.testing.assert_close(watched.first_bad.cpu(), first, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_strides(backend: str, dtype: torch.dtype) -> None:
    losses, gram, weights, _ = numbers(6, dtype)
    strided = torch.stack([losses, losses], 1)[:, 0]
    watched = Watched(backend, 6)
    watched(strided, gram.to(dtype).T, weights.repeat_interleave(2)[::2])
    assert watched.found_inf.item() == 0
    strided[4] = NAN
    watched(strided, gram[:6, :6], None, None)
    assert watched.first_bad[0].tolist() == [0, 0, 0, 0, 1, 0]


def test_only_the_diagonal_counts(backend: str) -> None:
    losses, gram, *_ = numbers(4)
    gram[0, 1] = NAN
    watched = Watched(backend, 4)
    watched(losses, gram)
    assert watched.found_inf.item() == 0


def test_runs_in_a_compiled_graph() -> None:
    def run(losses: Tensor) -> tuple[Tensor, ...]:
        state = torch.zeros(()), torch.zeros(2, dtype=torch.int64), torch.zeros(5, 2, dtype=torch.float64)
        watch_(*state, losses)
        return state

    losses = torch.tensor([1.0, NAN])
    for one, other in zip(run(losses), torch.compile(run, fullgraph=True, backend="aot_eager")(losses), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_opcheck() -> None:
    state = torch.zeros(()), torch.zeros(2, dtype=torch.int64), torch.zeros(5, 3, dtype=torch.float64)
    for rest in ((), numbers(3)[1:]):
        torch.library.opcheck(torch.ops.fastmtl.watch_.default, (*state, torch.rand(3), *rest))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("losses", torch.zeros(2, 2)),
        ("losses", torch.zeros(2, dtype=torch.int64)),
        ("gram", torch.zeros(3, 3)),
        ("weights", torch.zeros(3)),
        ("refused", torch.zeros(2)),
        ("found_inf", torch.zeros((), dtype=torch.float64)),
        ("steps", torch.zeros(2)),
        ("first_bad", torch.zeros(5, 3, dtype=torch.float64)),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: Tensor) -> None:
    arguments: dict[str, Any] = {
        "found_inf": torch.zeros(()),
        "steps": torch.zeros(2, dtype=torch.int64),
        "first_bad": torch.zeros(5, 2, dtype=torch.float64),
        "losses": torch.zeros(2),
    }
    with pytest.raises(UsageError, match=name):
        watch_(**{**arguments, name: value})
