"""Losses, gradients and weights that training cannot go on with: noticed on the device, reported when it is read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.errors import NonFiniteError, UsageError
from fastmtl.support.dtypes import wide_dtype

__all__ = ["FiniteGuard"]


class FiniteGuard:
    """Remembers the first training step with a loss, gradient or task weight that is of no use, without a host sync.

    Of no use is what is NaN or infinite, and a loss that the strategy refuses.

    Attributes:
        refusal: What the strategy needs of losses, as the end of a sentence.
        weigher: What gives the weights, where it is code of the user's.
        found_inf: Scalar float tensor, 1 from that step on. Optimizers leave the parameters alone while it is 1, so
            what is saved afterwards is still finite.

    Args:
        device: Where losses live.
        task_name: The task names.
    """

    def __init__(self, device: torch.device, task_name: list[str]) -> None:
        self.task_name = task_name
        self.refusal = ""
        self.weigher = ""
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)
        # The number of the next step, and of the first bad one.
        self._steps = torch.zeros(2, dtype=torch.int64, device=device)
        self._first_bad = torch.zeros(5, len(task_name), dtype=wide_dtype(device), device=device)

    def start(self, step: int) -> None:
        """Count training steps from ``step``."""
        self._steps[0].fill_(step)

    def watch(self, losses: Tensor, gram: Tensor | None, weights: Tensor | None, refused: Tensor | None = None) -> None:
        """Look at a step's losses (T,), gradients, by the diagonal of the Gram matrix (T, T), and weights (T,).

        ``refused`` tells which losses the strategy has no use for, None if it takes any.
        """
        if weights is not None and not weights.is_floating_point():
            weights = weights.to(losses.dtype)
        ops.watch_(self.found_inf, self._steps, self._first_bad, losses, gram, weights, refused)

    def check(self, last_checkpoint: str | None) -> None:
        """Raise if any step so far was of no use; this reads the device.

        Args:
            last_checkpoint: What to go back to, for the message.

        Raises:
            NonFiniteError: Something was NaN or infinite. Names the step, the tasks and the checkpoint.
            UsageError: The strategy has no use for a loss. Names the loss and what the strategy needs, too.
        """
        if self.found_inf.item() == 0:
            return
        step, kept = self._steps[1].item(), f"parameters were not updated from there on, {_where(last_checkpoint)}"
        *bad_of_all, losses = self._first_bad.tolist()
        # In the order in which one is the cause of the next.
        flags = zip(("loss", "refused", "gradient", "weight"), bad_of_all, strict=True)
        what, bad_tasks = next((what, bad) for what, bad in flags if any(bad))
        tasks = [task for task, bad in zip(self.task_name, bad_tasks, strict=True) if bad]
        if what != "refused":
            source = f" from {self.weigher}" if what == "weight" and self.weigher else ""
            raise NonFiniteError(
                f"The {what} of {', '.join(tasks)}{source} became NaN or infinite in training step {step}; {kept}."
            )
        refused = [f"{loss:.4g}" for loss, bad in zip(losses, bad_tasks, strict=True) if bad]
        raise UsageError(
            f"The loss of {', '.join(tasks)} was {', '.join(refused)} in training step {step}, but {self.refusal}; "
            f"{kept}. EW takes any loss."
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
        if greatest and not torch.stack([norm.double() for norm in greatest]).isfinite().all():
            raise NonFiniteError(
                f"The parameters became NaN or infinite by training step {self._steps[0].item()}, of finite losses: a "
                f"gradient was not finite, or the learning rate is too large; {_where(last_checkpoint)}."
            )


def _where(last_checkpoint: str | None) -> str:
    return "no checkpoint was written" if last_checkpoint is None else f"the last checkpoint is {last_checkpoint}"
