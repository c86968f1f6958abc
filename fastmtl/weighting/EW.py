"""Equal weighting, or constant weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.support.names import resolve_name
from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper, Weights

__all__ = ["EW"]


class EW(AbsWeighting):
    """Equal Weighting: every loss has weight 1, or the constant given; the update is the weighted sum of gradients."""

    reads_losses = False
    hyper = {  # noqa: RUF012
        "loss_weights": Hyper(
            type=str, default=(), many=True, help="Constant weights such as left=1 right=0.5; tasks left out have 1."
        )
    }

    _constants: list[float] | None = None
    _equal_weights: Tensor | None = None

    def weigh(self, losses: Tensor, gram: None, *, loss_weights: Sequence[str] = (), **hyper: object) -> Weights:
        """Return the constants."""
        if self._constants is None:
            self._constants = self._read(loss_weights)
        if self.active is not None:
            return Weights(shared=_filled([self._constants[task] for task in self.active], losses))
        if (
            self._equal_weights is None
            or self._equal_weights.device != losses.device
            or self._equal_weights.dtype != losses.dtype
        ):
            self._equal_weights = _filled(self._constants, losses)
        # Autograd may return a cotangent as a gradient, which clipping writes into.
        return Weights(shared=self._equal_weights.clone())

    def _read(self, loss_weights: Sequence[str]) -> list[float]:
        """Return the constants of all tasks."""
        constants = dict.fromkeys(self.task_name, 1.0)
        for assignment in loss_weights:
            name, _, value = assignment.partition("=")
            task = resolve_name(name, {known: known for known in constants}, "task in loss_weights")
            try:
                constants[task] = float(value)
            except ValueError:
                raise UsageError(f"loss_weights must be given as task=number, got {assignment!r}.") from None
        return list(constants.values())


def _filled(values: Sequence[float], losses: Tensor) -> Tensor:
    """Return numbers as a tensor like the losses, filled on their device: a copy from the host would wait."""
    return torch.stack([torch.full_like(losses[0], value) for value in values])
