"""Mixed precision: autocast for the forward passes, and a loss scale that keeps float16 gradients from vanishing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["PRECISIONS", "LossScaler", "set_tf32"]

PRECISIONS: Mapping[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def set_tf32(tf32: bool, device: torch.device) -> None:
    """Choose whether a CUDA GPU multiplies float32 matrices and convolves in TF32, with 10 bits of mantissa.

    The choice is the process's. Other devices have no TF32, and nothing changes there.
    """
    if device.type == "cuda":
        # The settings by operator, fp32_precision, make reading these raise, and inductor reads them.
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32


class LossScaler:
    """The factor on all losses of a float16 step, kept and adapted on the device.

    It is halved after a step whose gradients are not finite, which is skipped, and doubled after 2,000 good ones.

    Attributes:
        scale: Scalar, the factor.
        found_inf: Scalar, 1 if the gradients of this step are not finite.
        skipped: Scalar, the steps skipped so far.

    Args:
        device: Where the gradients are.

    Source: Micikevicius et al., "Mixed Precision Training", ICLR 2018.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), 2.0**16, device=device)
        self.found_inf = torch.zeros((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    @torch.no_grad()
    def unscale(self, grads: Sequence[Tensor]) -> None:
        """Divide gradients by the scale in place; note in ``found_inf`` whether all are finite."""
        self.found_inf.zero_()
        inverse = self.scale.reciprocal()
        for dtype in {grad.dtype for grad in grads}:
            same = [grad for grad in grads if grad.dtype == dtype]
            torch._amp_foreach_non_finite_check_and_unscale_(same, self.found_inf, inverse)

    @torch.no_grad()
    def update(self) -> None:
        """Adapt the scale to what the step found."""
        self.skipped.add_(self.found_inf.to(self.skipped.dtype))
        torch._amp_update_scale_(self.scale, self._good_steps, self.found_inf, 2.0, 0.5, 2000)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"scale": self.scale, "good_steps": self._good_steps, "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.scale.copy_(state["scale"])
        self._good_steps.copy_(state["good_steps"])
        self.skipped.copy_(state["skipped"])
