"""The gradients of task-specific parameters: found during the backward passes, written once their weights are known."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["OwnGradients", "set_grads", "summed"]

Grads = Sequence[Tensor | None]


class OwnGradients:
    """Gradients of the task-specific parameters, task by task or as a sum over all tasks.

    Args:
        params: The task-specific parameters.
        parts: One gradient list per task, or a single one that holds the sum over the tasks.
        owners: For a single part: the task of each parameter, where every parameter belongs to one.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], parts: Sequence[Grads], owners: Sequence[int] | None = None
    ) -> None:
        self.params = params
        self.parts = parts
        self.owners = owners

    def absorb(self, other: OwnGradients) -> None:
        """Add the gradients of another batch."""
        self.parts = summed(self.parts, other.parts)

    def write(self, weights: Tensor | None) -> None:
        """Add the gradients, each task's weighted by ``weights`` (T,) if given, to ``.grad``."""
        by_task = None if weights is None else weights.unbind()
        if by_task is not None and len(self.parts) == 1 and len(by_task) > 1:
            assert self.owners is not None
            self.parts = [_scaled(self.parts[0], [by_task[owner] for owner in self.owners])]
        elif by_task is not None:
            self.parts = [
                _scaled(part, [weight] * len(self.params)) for part, weight in zip(self.parts, by_task, strict=True)
            ]
        total = [[param.grad for param in self.params]]
        for part in self.parts:
            total = summed(total, [part])
        set_grads(self.params, total[0])


def _scaled(grads: Grads, weights: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if grad is None else grad * weight.to(grad.dtype) for grad, weight in zip(grads, weights, strict=True)]


def set_grads(params: Sequence[nn.Parameter], grads: Grads) -> None:
    """Let ``.grad`` be these gradients, copied where autograd did not make them for one parameter alone.

    What a sum is made of gets one gradient, what is summed up gets an expanded scalar, and pieces get views of a whole.
    Clipping, unscaling and optimizers write into ``.grad``.
    """
    taken = set()
    for param, grad in zip(params, grads, strict=True):
        if grad is None or grad is param.grad:
            continue
        storage = grad.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != grad.nbytes:
            grad = grad.clone()
        taken.add(storage.data_ptr())
        param.grad = grad


def summed(rows: Sequence[Grads], others: Sequence[Grads]) -> list[list[Tensor | None]]:
    """Return the sums of gradients of two batches, None where neither has one."""
    return [
        [a if b is None else b if a is None else a + b for a, b in zip(mine, other, strict=True)]
        for mine, other in zip(rows, others, strict=True)
    ]
