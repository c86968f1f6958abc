"""What the steps leave for the log: kept on the device, read in one transfer per log interval."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from fastmtl.support.dtypes import wide_dtype
from fastmtl.trainer.log.logger import StepRecords, conflict_share

__all__ = ["StepBuffer", "StepLosses", "StepSignals"]


class StepLosses(Mapping[str, Tensor]):
    """The losses of a step by task.

    Attributes:
        vector: (T,) losses of all tasks; NaN for one that is not in the step, and not among the names.

    Args:
        names: The tasks of the step.
        places: Their places in the vector.
        vector: The losses.
    """

    def __init__(self, names: Sequence[str], places: Sequence[int], vector: Tensor) -> None:
        self.vector = vector
        self._places = dict(zip(names, places, strict=True))

    def __getitem__(self, task: str) -> Tensor:
        return self.vector[self._places[task]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSignals:
    """What one step showed, on the device: reading it waits, computing with it does not.

    Attributes:
        losses: (T,) losses; NaN for a task that was not in the step, as in the others.
        weights: (T,) task weights, None if the strategy has none.
        gram: (T, T) inner products of the task gradients, None if the strategy needs none.
        gram_error: How far an estimate of them is off, in the steps in which it is measured.
        group_weights: (L, T) task weights of groups of parameters; None without groups.
        group_grams: (L, T, T) inner products of the task gradients in each group, None likewise.
    """

    losses: Tensor
    weights: Tensor | None
    gram: Tensor | None
    gram_error: Tensor | None = None
    group_weights: Tensor | None = None
    group_grams: Tensor | None = None

    @property
    def norms(self) -> Tensor | None:
        """(T,) gradient norms."""
        return None if self.gram is None else self.gram.diagonal().clamp(min=0).sqrt()

    @property
    def cosines(self) -> Tensor | None:
        """(T, T) cosines of the task gradients; NaN where one is zero."""
        norms = self.norms
        if self.gram is None or norms is None:
            return None
        return (self.gram / norms[:, None] / norms).clamp(-1, 1)

    @property
    def conflict_rate(self) -> Tensor | None:
        """Share of the pairs of tasks, of those in the step, whose gradients have a negative inner product."""
        return None if self.gram is None else conflict_share(self.gram)


_SIGNALS = tuple(entry.name for entry in fields(StepSignals))


class StepBuffer:
    """Collects what training steps show."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._steps: list[StepSignals] = []
        self._since = time.perf_counter()

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: StepSignals) -> None:
        """Keep one step; what one step lacks and others have is NaN."""
        self._steps.append(step)

    def flush(self, epoch: int, next_step: int, numbers: Sequence[Tensor] = ()) -> StepRecords:
        """Read everything and empty the buffer; the only place where the loop waits for the device.

        ``next_step`` is the global index of the step after the last one kept; ``numbers`` are the loss scale of float16
        steps and how many were skipped so far, none in another precision.
        """
        now = time.perf_counter()
        device = self._steps[0].losses.device
        kept = [_stacked([getattr(step, name) for step in self._steps]) for name in _SIGNALS]
        kept += [number.reshape(1) for number in numbers]
        wide = [stack.to(device, wide_dtype(device)).flatten() for stack in kept if stack is not None]
        values = torch.cat(wide).cpu().numpy()
        ends = np.cumsum([0 if stack is None else stack.numel() for stack in kept])
        losses, weights, gram, errors, group_weights, group_grams, *counts = (
            None if stack is None else part.reshape(stack.shape)
            for stack, part in zip(kept, np.split(values, ends[:-1]), strict=True)
        )
        assert losses is not None
        scale, skipped = counts or (None, None)
        records = StepRecords(
            epoch=epoch,
            first_step=next_step - len(self),
            losses=losses,
            weights=weights,
            gram=gram,
            gram_errors=errors,
            group_weights=group_weights,
            group_grams=group_grams,
            seconds=now - self._since,
            loss_scale=None if scale is None else float(scale[0]),
            skipped=None if skipped is None else int(skipped[0]),
        )
        self._clear()
        return records


def _stacked(steps: Sequence[Tensor | None]) -> Tensor | None:
    """Return the steps' values stacked, NaN for a step without; None if no step has any."""
    present = [value for value in steps if value is not None]
    if not present:
        return None
    absent = torch.full_like(present[0], torch.nan) if len(present) < len(steps) else None
    return torch.stack([absent if value is None else value for value in steps])  # type: ignore[misc]
