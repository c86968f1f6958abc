"""Mixed precision: autocast for the forward passes, and a loss scale that keeps float16 gradients from vanishing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from fastmtl.engine.scaling import Scaled, Unscaled

__all__ = ["PRECISIONS", "FullPrecision", "LossScaler", "make_scaler", "set_tf32"]

PRECISIONS: Mapping[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

T = TypeVar("T")
Watched: TypeAlias = tuple[Tensor | None, Tensor | None]


class Undoable(Protocol[T]):
    """What learns in a step that may be taken back."""

    def learned(self) -> T:
        """Return what `take_back` goes back to."""

    def take_back(self, before: T, bad: Tensor) -> None:
        """Forget what was learned since ``before`` if the scalar ``bad`` is true."""


def set_tf32(tf32: bool, device: torch.device) -> None:
    """Choose whether a CUDA GPU multiplies float32 matrices and convolves in TF32, with 10 bits of mantissa.

    The choice is the process's. Other devices have no TF32, and nothing changes there.
    """
    if device.type == "cuda":
        # The settings by operator, fp32_precision, make reading these raise, and inductor reads them.
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32


def make_scaler(precision: str, found_inf: Tensor) -> FullPrecision | LossScaler:
    """Return the loss scale of a precision.

    Args:
        precision: A name of `PRECISIONS`.
        found_inf: The guard's scalar, 1 if the update must not take place.
    """
    return LossScaler(found_inf.device) if precision == "fp16" else FullPrecision(found_inf)


class FullPrecision(Unscaled):
    """No loss scale: gradients are what they are, and one that is not finite is an error.

    Attributes:
        masked: Scalar, 1 if the optimizer must not change anything.

    Args:
        found_inf: See :func:`make_scaler`.
    """

    def __init__(self, found_inf: Tensor) -> None:
        self.masked = found_inf

    def watched(self, gram: Tensor | None, weights: Tensor | None) -> Watched:
        """Return what of a step's Gram matrix and weights is an error if it is not finite."""
        return gram, weights

    def unscale(self, params: Iterable[nn.Parameter]) -> None:
        """Divide ``.grad`` by the scale."""

    @contextmanager
    def undoing(self, state: Undoable[T]) -> Iterator[None]:
        """Take back what a strategy learns in the block if the gradients of this step overflow."""
        yield

    def settle(self, found_inf: Tensor) -> None:
        """Decide whether the optimizer may change anything, and adapt the scale."""

    def shown(self) -> list[Tensor]:
        """Return scalars for the log: the scale and the steps skipped so far."""
        return []

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on where `state_dict` was taken."""


class LossScaler(Scaled):
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
        self.scale = torch.full((), 2.0**16, device=device)
        self.found_inf = torch.zeros((), device=device)
        self.masked = torch.zeros((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def watched(self, gram: Tensor | None, weights: Tensor | None) -> Watched:
        """Return nothing: a float16 gradient that overflows is no error: the step is skipped, and the scale falls."""
        return None, None

    @torch.no_grad()
    def unscale(self, params: Iterable[nn.Parameter]) -> None:
        """Divide gradients by the scale in place; note in ``found_inf`` whether all are finite."""
        grads = [param.grad for param in params if param.grad is not None]
        self.found_inf.zero_()
        inverse = self.scale.reciprocal()
        for dtype in {grad.dtype for grad in grads}:
            same = [grad for grad in grads if grad.dtype == dtype]
            torch._amp_foreach_non_finite_check_and_unscale_(same, self.found_inf, inverse)

    @contextmanager
    def undoing(self, state: Undoable[T]) -> Iterator[None]:
        """Take back what a strategy learns in the block if the gradients of this step overflow."""
        learned = state.learned()
        yield
        state.take_back(learned, self.found_inf != 0)

    @torch.no_grad()
    def settle(self, found_inf: Tensor) -> None:
        """Skip the step if its gradients overflow, and adapt the scale to what was found."""
        torch.maximum(found_inf, self.found_inf, out=self.masked)
        self.skipped.add_(self.found_inf.to(self.skipped.dtype))
        torch._amp_update_scale_(self.scale, self._good_steps, self.found_inf, 2.0, 0.5, 2000)

    def shown(self) -> list[Tensor]:
        """Return the scale and the steps skipped so far."""
        return [self.scale, self.skipped]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return what a resumed run needs."""
        return {"scaler": {"scale": self.scale, "good_steps": self._good_steps, "skipped": self.skipped}}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on where `state_dict` was taken; a run in another precision has left no scale."""
        if "scaler" in state:
            self.scale.copy_(state["scaler"]["scale"])
            self._good_steps.copy_(state["scaler"]["good_steps"])
            self.skipped.copy_(state["scaler"]["skipped"])
