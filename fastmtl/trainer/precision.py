"""Mixed precision: autocast for the forward passes, and a loss scale that keeps float16 gradients from vanishing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from fastmtl.engine.gradients import coalesced, numbers_of
from fastmtl.engine.scaling import LossScale, Undoable
from fastmtl.engine.weights import Rows

__all__ = ["PRECISIONS", "LossScaler", "make_scaler", "set_tf32"]

PRECISIONS: Mapping[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

T = TypeVar("T")


def set_tf32(tf32: bool, device: torch.device) -> None:
    """Choose whether a CUDA GPU multiplies float32 matrices and convolves in TF32, with 10 bits of mantissa.

    The choice is the process's. Other devices have no TF32, and nothing changes there.
    """
    if device.type == "cuda":
        # The settings by operator, fp32_precision, make reading these raise, and inductor reads them.
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32


def make_scaler(precision: str, found_inf: Tensor) -> LossScale:
    """Return the loss scale of a precision of `PRECISIONS`, from the flag that keeps the optimizer from changing."""
    return LossScaler(found_inf.device) if precision == "fp16" else LossScale(found_inf)


class LossScaler(LossScale):
    """The factor on all losses of a float16 step, kept and adapted on the device.

    It is halved after a step whose gradients are not finite, which is skipped, and doubled after 2,000 good ones.

    Attributes:
        scale: Scalar, the factor.
        found_inf: Scalar, 1 if the gradients of this step are not finite.
        masked: Scalar, 1 if the optimizer must not change anything.
        skipped: Scalar, the steps skipped so far.

    Args:
        device: Where the gradients are.

    Source: Micikevicius et al., "Mixed Precision Training", ICLR 2018.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.zeros((), device=device))
        self.scale = torch.full((), 2.0**16, device=device)
        self.found_inf = torch.zeros((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    @override
    def factor(self, share: Tensor | None) -> Tensor:
        return self.scale if share is None else self.scale * share

    @override
    def up(self, value: Tensor) -> Tensor:
        return value * self.scale

    @override
    def limit(self, max_norm: float) -> Tensor:
        return max_norm * self.scale

    @override
    def gram(self, gram: Tensor) -> Tensor:
        return gram / self.scale.to(gram.dtype) ** 2

    @override
    def rows(self, rows: Rows) -> Rows:
        inverse = self.scale.reciprocal()
        return [[None if grad is None else grad * inverse.to(grad.dtype) for grad in row] for row in rows]

    @override
    def watched(self, gram: Tensor | None, weights: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        # A float16 gradient that overflows is no error: the step is skipped, and the scale falls.
        return None, None

    @override
    @torch.no_grad()
    def unscale(self, params: Iterable[Tensor], any_shard: Callable[[Tensor], Tensor]) -> None:
        # Of sparse ones the values, each index once: a sum may overflow.
        grads = []
        for param in params:
            if param.grad is not None:
                param.grad = coalesced(param.grad)
                grads.append(numbers_of(param.grad))
        self.found_inf.zero_()
        inverse = self.scale.reciprocal()
        for dtype in {grad.dtype for grad in grads}:
            same = [grad for grad in grads if grad.dtype == dtype]
            torch._amp_foreach_non_finite_check_and_unscale_(same, self.found_inf, inverse)
        self.found_inf.copy_(any_shard(self.found_inf))

    @override
    @contextmanager
    def undoing(self, state: Undoable[T]) -> Iterator[None]:
        learned = state.learned()
        yield
        state.take_back(learned, self.found_inf != 0)

    @override
    @torch.no_grad()
    def settle(self, found_inf: Tensor) -> None:
        torch.maximum(found_inf, self.found_inf, out=self.masked)
        self.skipped.add_(self.found_inf.to(self.skipped.dtype))
        torch._amp_update_scale_(self.scale, self._good_steps, self.found_inf, 2.0, 0.5, 2000)

    @override
    def logged(self) -> list[Tensor]:
        return [self.scale, self.skipped]

    @override
    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"scaler": {"scale": self.scale, "good_steps": self._good_steps, "skipped": self.skipped}}

    @override
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        # A run in another precision has left none.
        for name, place in self.state_dict()["scaler"].items():
            place.copy_(state.get("scaler", {}).get(name, place))
