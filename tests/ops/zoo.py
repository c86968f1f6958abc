"""A zoo of task gradients that break solvers, as small Jacobians in float64. All strategies are tested on it.

Every case is deterministic and named, so a failing test names its animal: ``stationary-T8``.
"""

from __future__ import annotations

import functools
import inspect
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

__all__ = ["BETWEEN", "SIZES", "Case", "each", "poisoned", "zoo"]

SIZES = (1, 2, 3, 5, 8, 16, 40, 64, 128)
# Numbers of tasks that say little beside those above and below them.
BETWEEN = (5, 16, 40, 64)


@dataclass(frozen=True, slots=True)
class Case:
    """One Jacobian.

    Attributes:
        name: Kind and number of tasks.
        jacobian: (T, P) float64, one gradient per row.
    """

    name: str
    jacobian: Tensor

    @property
    def gram(self) -> Tensor:
        """(T, T) float64 Gram matrix of the rows."""
        return self.jacobian @ self.jacobian.T

    def __str__(self) -> str:
        return self.name


Kind = Callable[[int, torch.Generator], Tensor]


def _normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator)


def _scales(exponents: Tensor) -> Tensor:
    return 10.0 ** exponents.double()[:, None]


def _random(size: int, generator: torch.Generator) -> Tensor:
    return _normal(size, 2 * size + 3, generator)


def _narrow(size: int, generator: torch.Generator) -> Tensor:
    return _normal(size, max(1, size // 3), generator)


def _rank_one(size: int, generator: torch.Generator) -> Tensor:
    return _normal(size, 1, generator) @ _normal(1, size + 2, generator)


def _all_zero(size: int, generator: torch.Generator) -> Tensor:
    return torch.zeros(size, size + 1, dtype=torch.float64)


def _zero_rows(size: int, generator: torch.Generator) -> Tensor:
    jacobian = _random(size, generator)
    jacobian[::3] = 0
    return jacobian


def _duplicates(size: int, generator: torch.Generator) -> Tensor:
    return _random((size + 1) // 2, generator).repeat_interleave(2, dim=0)[:size]


def _opposite(size: int, generator: torch.Generator) -> Tensor:
    jacobian = _duplicates(size, generator)
    jacobian[1::2] *= -1
    return jacobian


def _opposite_unequal(size: int, generator: torch.Generator) -> Tensor:
    jacobian = _duplicates(size, generator)
    jacobian[1::2] *= -1e3
    return jacobian


def _stationary(size: int, generator: torch.Generator) -> Tensor:
    jacobian = _random(size, generator)
    return jacobian - jacobian.mean(dim=0)


def _stationary_inside(size: int, generator: torch.Generator) -> Tensor:
    # Only some of the tasks balance each other.
    jacobian = _random(size, generator)
    part = (size + 1) // 2
    jacobian[:part] -= jacobian[:part].mean(dim=0)
    return jacobian


def _nearly_parallel(size: int, generator: torch.Generator) -> Tensor:
    jacobian = _random(size, generator)
    return jacobian[:1] + 1e-7 * jacobian


def _nearly_opposite(size: int, generator: torch.Generator) -> Tensor:
    jacobian = _nearly_parallel(size, generator)
    jacobian[1::2] *= -1
    return jacobian


def _conflicting(size: int, generator: torch.Generator) -> Tensor:
    jacobian = 0.05 * _random(size, generator) + _normal(1, 2 * size + 3, generator)
    jacobian[1::2] *= -1
    return jacobian


def _dominating_row(size: int, generator: torch.Generator) -> Tensor:
    jacobian = _random(size, generator)
    jacobian[size // 2] *= 1e6
    return jacobian


def _short_row(size: int, generator: torch.Generator) -> Tensor:
    jacobian = _random(size, generator)
    jacobian[size // 2] *= 1e-6
    return jacobian


def _ill_conditioned(size: int, generator: torch.Generator) -> Tensor:
    jacobian = _normal(size, size + 2, generator)
    return jacobian * torch.logspace(0, -12, size + 2, dtype=torch.float64)


def _integers(size: int, generator: torch.Generator) -> Tensor:
    # Ties, and pivots that are exactly zero.
    return torch.randint(-1, 2, (size, 4), generator=generator).double()


def _tiny(size: int, generator: torch.Generator) -> Tensor:
    return 1e-15 * _conflicting(size, generator)


def _huge(size: int, generator: torch.Generator) -> Tensor:
    return 1e15 * _conflicting(size, generator)


def _rows_far_apart(size: int, generator: torch.Generator) -> Tensor:
    return _scales(12 * (torch.arange(size) % 2)) * _random(size, generator)


def _opposite_rows_far_apart(size: int, generator: torch.Generator) -> Tensor:
    return _scales(12 * (torch.arange(size) // 2 % 2)) * _opposite(size, generator)


def _rows_of_all_scales(size: int, generator: torch.Generator) -> Tensor:
    return _scales(torch.randint(-15, 16, (size,), generator=generator)) * _random(size, generator)


_KINDS: tuple[Kind, ...] = (
    _random,
    _narrow,
    _rank_one,
    _all_zero,
    _zero_rows,
    _duplicates,
    _opposite,
    _opposite_unequal,
    _stationary,
    _stationary_inside,
    _nearly_parallel,
    _nearly_opposite,
    _conflicting,
    _dominating_row,
    _short_row,
    _ill_conditioned,
    _integers,
    _tiny,
    _huge,
    _rows_far_apart,
    _opposite_rows_far_apart,
    _rows_of_all_scales,
)


def zoo(sizes: Sequence[int] = SIZES) -> Iterator[Case]:
    """Yield every kind of finite Jacobian at every number of tasks."""
    for kind in _KINDS:
        for size in sizes:
            name = f"{kind.__name__[1:]}-T{size}"
            yield Case(name, kind(size, torch.Generator().manual_seed(zlib.crc32(name.encode()))))


def poisoned(sizes: Sequence[int] = SIZES) -> Iterator[Case]:
    """Yield Jacobians with one row that has a NaN or an infinity in it."""
    for size in sizes:
        for label, value in (("nan", torch.nan), ("inf", torch.inf), ("minus-inf", -torch.inf)):
            jacobian = _random(size, torch.Generator().manual_seed(size))
            jacobian[size // 2, 1] = value
            yield Case(f"{label}_row-T{size}", jacobian)


def each(cases: Iterable[Case], slow: Collection[int] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test, which takes a ``case``, for one after the other; a test for each would cost more than it does.

    A failure is that of the first case that fails, with the names of all. Cases whose number of tasks is ``slow`` make
    a test of their own, which is marked.
    """
    groups: dict[bool, list[Case]] = {}
    for case in cases:
        groups.setdefault(len(case.jacobian) in slow, []).append(case)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*args: object, cases: Sequence[Case], **kwargs: object) -> None:
            failed: dict[str, Exception] = {}
            for case in cases:
                try:
                    test(*args, case=case, **kwargs)
                except Exception as error:
                    failed[case.name] = error
            for error in failed.values():
                error.add_note(f"{len(failed)} of {len(cases)} cases fail: {', '.join(failed)}")
                raise error

        signature = inspect.signature(test)
        taken = [
            parameter.replace(name="cases") if name == "case" else parameter
            for name, parameter in signature.parameters.items()
        ]
        setattr(run, "__signature__", signature.replace(parameters=taken))  # noqa: B010
        several = [
            pytest.param(group, id="slow" if is_slow else "all", marks=[pytest.mark.slow] if is_slow else [])
            for is_slow, group in groups.items()
        ]
        decorated: Callable[..., None] = pytest.mark.parametrize("cases", several)(run)
        return decorated

    return decorate
