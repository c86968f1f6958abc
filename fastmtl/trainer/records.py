"""What the steps leave for the log: kept on the device, read in one transfer per log interval."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from fastmtl.trainer.logger import StepRecords

__all__ = ["StepBuffer"]


class StepBuffer:
    """Collects losses, weights and Gram matrices of training steps."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._losses: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._grams: list[Tensor] = []
        self._since = time.perf_counter()

    def __len__(self) -> int:
        return len(self._losses)

    def restart_clock(self) -> None:
        """Leave out the time until now, spent on something else than steps."""
        self._since = time.perf_counter()

    def add(self, losses: Tensor, weights: Tensor | None, gram: Tensor | None) -> None:
        """Keep one step: (T,) losses, (T,) weights, (T, T) Gram matrix."""
        self._losses.append(losses)
        if weights is not None:
            self._weights.append(weights)
        if gram is not None:
            self._grams.append(gram)

    def flush(self, epoch: int, next_step: int) -> StepRecords:
        """Read everything and empty the buffer; the only place where the loop waits for the device.

        Args:
            epoch: The epoch the steps belong to.
            next_step: Global index of the step after the last one kept.
        """
        count = len(self)
        now = time.perf_counter()
        device = self._losses[0].device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        kept = [torch.stack(each) for each in (self._losses, self._weights, self._grams) if each]
        values = torch.cat([each.to(device, dtype).flatten() for each in kept]).cpu().numpy()
        tasks = self._losses[0].numel()
        losses, values = values[: count * tasks].reshape(count, tasks), values[count * tasks :]
        weights = gram = None
        if self._weights:
            weights, values = values[: count * tasks].reshape(count, tasks), values[count * tasks :]
        if self._grams:
            gram = values.reshape(count, tasks, tasks)
        records = StepRecords(
            epoch=epoch,
            first_step=next_step - count,
            losses=losses,
            weights=weights,
            gram=gram,
            seconds=now - self._since,
        )
        self._clear()
        return records
