"""Losses, gradients and weights that training cannot go on with: noticed on the device, reported when it is read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastmtl.errors import NonFiniteError, UsageError
from fastmtl.support.dtypes import wide_dtype

__all__ = ["FiniteGuard"]


class FiniteGuard:
    """Remembers the first training step with a loss, gradient or task weight that is of no use, without a host sync.

    Of no use is what is NaN or infinite, and a loss that the strategy refuses.

    Attributes:
        refusal: What the strategy needs of losses, as the end of a sentence.
        found_inf: Scalar float tensor, 1 from that step on. Optimizers leave the parameters alone while it is 1, so
            what is saved afterwards is still finite.

    Args:
        device: Where losses live.
        task_name: The task names.
    """

    def __init__(self, device: torch.device, task_name: list[str]) -> None:
        self.task_name = task_name
        self.refusal = ""
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._first = torch.zeros((), dtype=torch.int64, device=device)
        self._bad = torch.zeros(4, len(task_name), dtype=torch.bool, device=device)
        self._losses = torch.zeros(len(task_name), dtype=wide_dtype(device), device=device)

    def start(self, step: int) -> None:
        """Count training steps from ``step``."""
        self._step.fill_(step)

    def watch(self, losses: Tensor, gram: Tensor | None, weights: Tensor | None, refused: Tensor | None = None) -> None:
        """Look at a step's losses (T,), gradients, by the diagonal of the Gram matrix (T, T), and weights (T,).

        ``refused`` tells which losses the strategy has no use for, None if it takes any.
        """
        norms = losses if gram is None else gram.diagonal().to(losses.dtype)
        sizes = torch.stack([losses, norms, losses if weights is None else weights.to(losses.dtype)])
        # In the order in which one is the cause of the next.
        lost, *others = (~sizes.isfinite()).unbind()
        bad = torch.stack([lost, torch.zeros_like(lost) if refused is None else refused, *others])
        fresh = bad.any() & (self.found_inf == 0)
        self._first.copy_(torch.where(fresh, self._step, self._first))
        self._bad.copy_(torch.where(fresh, bad, self._bad))
        self._losses.copy_(torch.where(fresh, losses, self._losses))
        self.found_inf.copy_(torch.maximum(self.found_inf, bad.any().to(self.found_inf.dtype)))
        self._step.add_(1)

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
        step, kept = self._first.item(), f"parameters were not updated from there on, {_where(last_checkpoint)}"
        flags = zip(("loss", "refused", "gradient", "weight"), self._bad.tolist(), strict=True)
        what, bad_tasks = next((what, bad) for what, bad in flags if any(bad))
        tasks = [task for task, bad in zip(self.task_name, bad_tasks, strict=True) if bad]
        if what != "refused":
            raise NonFiniteError(
                f"The {what} of {', '.join(tasks)} became NaN or infinite in training step {step}; {kept}."
            )
        losses = [f"{loss:.4g}" for loss, bad in zip(self._losses.tolist(), bad_tasks, strict=True) if bad]
        raise UsageError(
            f"The loss of {', '.join(tasks)} was {', '.join(losses)} in training step {step}, but {self.refusal}; "
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
                f"The parameters became NaN or infinite by training step {self._step.item()}, of finite losses: a "
                f"gradient was not finite, or the learning rate is too large; {_where(last_checkpoint)}."
            )


def _where(last_checkpoint: str | None) -> str:
    return "no checkpoint was written" if last_checkpoint is None else f"the last checkpoint is {last_checkpoint}"
