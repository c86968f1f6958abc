"""Non-finite losses, gradients and weights: noticed on the device, reported when the device is read anyway."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastmtl.errors import NonFiniteError

__all__ = ["FiniteGuard"]


class FiniteGuard:
    """Remembers the first training step with a NaN or infinite loss, gradient or task weight, without a host sync.

    Attributes:
        found_inf: Scalar float tensor, 1 from that step on. Optimizers leave the parameters alone while it is 1, so
            what is saved afterwards is still finite.

    Args:
        device: Where losses live.
        task_name: The task names.
    """

    def __init__(self, device: torch.device, task_name: list[str]) -> None:
        self.task_name = task_name
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._first = torch.zeros((), dtype=torch.int64, device=device)
        self._bad = torch.zeros(3, len(task_name), dtype=torch.bool, device=device)

    def start(self, step: int) -> None:
        """Count training steps from ``step``."""
        self._step.fill_(step)

    def watch(self, losses: Tensor, gram: Tensor | None, weights: Tensor | None) -> None:
        """Look at a step's losses (T,), gradients, by the diagonal of the Gram matrix (T, T), and weights (T,)."""
        norms = losses if gram is None else gram.diagonal().to(losses.dtype)
        bad = ~torch.stack([losses, norms, losses if weights is None else weights.to(losses.dtype)]).isfinite()
        fresh = bad.any() & (self.found_inf == 0)
        self._first.copy_(torch.where(fresh, self._step, self._first))
        self._bad.copy_(torch.where(fresh, bad, self._bad))
        self.found_inf.copy_(torch.maximum(self.found_inf, bad.any().to(self.found_inf.dtype)))
        self._step.add_(1)

    def check(self, last_checkpoint: str | None) -> None:
        """Raise if any step so far was not finite; this reads the device.

        Args:
            last_checkpoint: What to go back to, for the message.

        Raises:
            NonFiniteError: Names the step, the tasks and the checkpoint.
        """
        if self.found_inf.item() == 0:
            return
        where = _where(last_checkpoint)
        found = zip(("loss", "gradient", "weight"), self._bad.tolist(), strict=True)
        # The first of them is the cause of the others.
        what, bad_tasks = next((what, bad) for what, bad in found if any(bad))
        tasks = [task for task, bad in zip(self.task_name, bad_tasks, strict=True) if bad]
        raise NonFiniteError(
            f"The {what} of {', '.join(tasks)} became NaN or infinite in training step {self._first.item()}; "
            f"parameters were not updated from there on, {where}."
        )

    def check_saved(self, params: Iterable[Tensor], last_checkpoint: str | None) -> None:
        """Raise if parameters about to be saved are not finite; this reads the device.

        Losses were, and so were the gradients that a Gram matrix has seen; the next step's losses would show it.

        Args:
            params: The parameters.
            last_checkpoint: What to go back to, for the message.

        Raises:
            NonFiniteError: Names the checkpoint.
        """
        greatest = torch._foreach_norm([param for param in params if param.is_floating_point()], float("inf"))
        if greatest and not torch.stack([each.double() for each in greatest]).isfinite().all():
            raise NonFiniteError(
                f"The parameters became NaN or infinite by training step {self._step.item()}, of finite losses: a "
                f"gradient was not finite, or the learning rate is too large; {_where(last_checkpoint)}."
            )


def _where(last_checkpoint: str | None) -> str:
    return "no checkpoint was written" if last_checkpoint is None else f"the last checkpoint is {last_checkpoint}"
