"""Gradients as autograd returns them: added, compared, and written into ``.grad``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastmtl import ops
from fastmtl.engine.weights import Row
from fastmtl.ops._rows import FLOAT_TYPES, is_dense
from fastmtl.ops._touched import aligned_rows, are_sparse, compacted

__all__ = [
    "Grads",
    "TaskGradients",
    "WeightedGradients",
    "add_grads",
    "agree",
    "aligned",
    "are_finite",
    "clip_grads",
    "coalesced",
    "dense_rows",
    "numbers_of",
    "set_grads",
    "sum_present",
    "summed",
    "zero_unless",
]

Grads = Sequence[Tensor | None]

# Gradients computed by two methods differ by less, relative to the tensor's largest entry or the largest of all.
_ROUNDING = 5e-3
_SMALL = 5e-5
# Relative bound on the norm of the difference after rounding to 16 bits, where small entries may be rounding alone.
_HALVED = 5e-2


class TaskGradients:
    """Gradients of the task-specific parameters, task by task or as a sum over all tasks.

    Args:
        params: The task-specific parameters.
        parts: One gradient list per task, or a single one that holds the sum over the tasks.
        owners: With a single part: the task that owns each parameter, if each has one owner.
    """

    def __init__(self, params: Sequence[Tensor], parts: Sequence[Grads], owners: Sequence[int] | None = None) -> None:
        self.params = params
        self.parts = parts
        self.owners = owners

    def absorb(self, other: TaskGradients) -> None:
        """Add the gradients of another batch."""
        count = max(len(self.parts), len(other.parts))
        self.parts = summed(self._by_task(count), other._by_task(count))

    def _by_task(self, count: int) -> Sequence[Grads]:
        """Return ``count`` parts: a sum over tasks is split by the owners, or becomes the first part."""
        if len(self.parts) == count:
            return self.parts
        (part,) = self.parts
        owners = [0] * len(part) if self.owners is None else self.owners
        return [[grad if owner == t else None for grad, owner in zip(part, owners, strict=True)] for t in range(count)]

    def weighted(self, weights: Tensor | None) -> WeightedGradients:
        """Return the sum over the tasks, weighted by ``weights`` (T,) unless None."""
        return WeightedGradients(self.params, [self._added_to([None] * len(self.params), weights)])

    def write(self, weights: Tensor | None) -> None:
        """Add the sum over the tasks, weighted by ``weights`` (T,) unless None, to ``.grad``; frees the gradients."""
        set_grads(self.params, self._added_to([param.grad for param in self.params], weights))
        self.parts = ()

    def _added_to(self, total: Row, weights: Tensor | None) -> Row:
        for part in self._scaled(weights):
            total = summed([total], [part])[0]
        return total

    def _scaled(self, weights: Tensor | None) -> Sequence[Grads]:
        """Return gradients that add up to the sum over the tasks."""
        if weights is None:
            return self.parts
        if len(self.parts) > 1 or len(weights) == 1:
            return [_combined(self.parts, weights, None)]
        assert self.owners is not None
        return [_combined(self.parts, weights, self.owners)]


def _combined(parts: Sequence[Grads], weights: Tensor, owners: Sequence[int] | None) -> Row:
    """Return ``sum_t w_t parts_t``, or a single part with each gradient times the weight (T,) of its owner."""
    present = [grad for part in parts for grad in part if grad is not None]
    if present and all(
        type(grad) is Tensor and grad.layout == torch.strided and grad.dtype in FLOAT_TYPES for grad in present
    ):
        groups = None if owners is None else list(owners)
        by_group = weights if groups is None else weights[: max(groups) + 1, None]
        return cast(Row, ops.combine(parts, by_group, groups))
    # Gradients may be complex, sparse, as those of an embedding, or sharded.
    by_task = weights.unbind()
    if owners is not None:
        return _times(parts[0], [by_task[owner] for owner in owners])
    total: Row = [None] * len(parts[0])
    for part, weight in zip(parts, by_task, strict=True):
        total = summed([total], [_times(part, [weight] * len(part))])[0]
    return total


class WeightedGradients(TaskGradients):
    """The sum over the tasks, already weighted."""

    def _scaled(self, weights: Tensor | None) -> Sequence[Grads]:
        return self.parts


def _times(grads: Grads, weights: Sequence[Tensor]) -> Row:
    return [None if grad is None else grad * weight.to(grad.dtype) for grad, weight in zip(grads, weights, strict=True)]


def set_grads(params: Sequence[Tensor], grads: Grads) -> None:
    """Set ``.grad``, to copies where gradients share memory; None leaves ``.grad`` as it is.

    Autograd gives all terms of a sum the same tensor, the argument of a sum an expanded scalar, and pieces views of a
    whole, whereas clipping, unscaling and optimizers write into ``.grad``.
    """
    taken: set[int] = set()
    for param, grad in zip(params, grads, strict=True):
        if grad is None or grad is param.grad:
            continue
        if grad.is_sparse:
            place = grad._values().untyped_storage().data_ptr()
            param.grad = grad.clone() if place in taken else grad
            taken.add(place)
            continue
        storage = grad.untyped_storage()
        is_unshared = storage.data_ptr() not in taken and storage.nbytes() == grad.nbytes
        if not is_unshared or not (grad.is_contiguous() or is_dense(grad)):
            grad = grad.clone()
            storage = grad.untyped_storage()
        taken.add(storage.data_ptr())
        param.grad = grad


@torch.no_grad()
def add_grads(tensors: Sequence[Tensor], grads: Grads) -> None:
    """Add gradients to ``.grad``, see :func:`set_grads`; None counts as zeros."""
    totals: Row = []
    for tensor, grad in zip(tensors, grads, strict=True):
        if tensor.grad is None:
            totals.append(torch.zeros_like(tensor) if grad is None else grad)
        else:
            totals.append(None if grad is None else _sum(tensor.grad, grad))
    set_grads(tensors, totals)


def summed(rows: Sequence[Grads], others: Sequence[Grads]) -> list[Row]:
    """Return the sums of gradients of two batches, None where neither has one."""
    return [
        [a if b is None else b if a is None else _sum(a, b) for a, b in zip(row, other, strict=True)]
        for row, other in zip(rows, others, strict=True)
    ]


def _sum(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum of two gradients; sparse if both are."""
    return other + one if one.is_sparse and not other.is_sparse else one + other


def aligned(rows: list[Row]) -> list[Row]:
    """Return T rows in which the sparse gradients of a parameter have the same indices, each once."""
    flat = [grad for row in rows for grad in row]
    if not are_sparse(flat):
        return rows
    grads = iter(aligned_rows(flat, len(rows)))
    return [[next(grads) for _ in row] for row in rows]


def dense_rows(rows: list[Row]) -> list[Row]:
    """Return T rows with dense gradients in place of sparse ones."""
    return [[grad.to_dense() if grad is not None and grad.is_sparse else grad for grad in row] for row in rows]


def sum_present(grads: Grads) -> Tensor | None:
    """Return the sum of the gradients that are not None; None if all are."""
    present = [grad for grad in grads if grad is not None]
    return torch.stack(present).sum(0) if len(present) > 1 else next(iter(present), None)


def agree(grads: Grads, reference: Grads, halved: bool = False) -> bool:
    """Return whether gradients are equal up to rounding; None counts as zeros, and NaN equals anything."""
    pairs = [_comparable(one, other) for one, other in zip(grads, reference, strict=True)]
    known = [(one, other) for one, other in pairs if one is not None and other is not None and one.numel()]
    if halved:
        pairs_32 = [(one.float(), other.float()) for one, other in known]
        size = sum(float(other.square().sum()) for _, other in pairs_32)
        return not sum(float((one - other).square().sum()) for one, other in pairs_32) > _HALVED**2 * size
    largest = max((float(other.abs().max()) for _, other in known), default=0.0)
    for one, other in known:
        bound = max(_ROUNDING * float(other.abs().max()), _SMALL * largest)
        if bool(((one - other).abs() > bound).any()):
            return False
    return True


def are_finite(grads: Grads) -> bool:
    """Return whether no gradient has a NaN or an infinite entry; waits for the device."""
    return all(bool(numbers_of(grad).isfinite().all()) for grad in grads if grad is not None)


def coalesced(grad: Tensor) -> Tensor:
    """Return a gradient; if it is sparse, with each index once."""
    if not grad.is_sparse or grad.is_coalesced():
        return grad
    (whole,) = aligned_rows([grad], 1)
    assert whole is not None
    return whole


def zero_unless(flag: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient, or zeros where the scalar ``flag`` is false: even of what is not finite."""
    if not grad.is_sparse:
        return torch.where(flag, grad, 0.0)
    grad = coalesced(grad)
    values = torch.where(flag, grad._values(), 0.0)
    return torch.sparse_coo_tensor(grad._indices(), values, grad.shape, is_coalesced=True, check_invariants=False)


def numbers_of(grad: Tensor) -> Tensor:
    """Return the gradient, or the values of a sparse one, in the very memory where it has each index once."""
    return coalesced(grad)._values() if grad.is_sparse else grad


@torch.no_grad()
def clip_grads(params: Sequence[Tensor], max_norm: float | Tensor) -> None:
    """Scale the gradients, sparse ones too, to a total 2-norm of at most ``max_norm``."""
    if not any(param.grad is not None and param.grad.is_sparse for param in params):
        nn.utils.clip_grad_norm_(params, max_norm)  # type: ignore[arg-type]
        return
    for param in params:
        if param.grad is not None:
            param.grad = coalesced(param.grad)
    numbers = [numbers_of(param.grad) for param in params if param.grad is not None]
    norm = nn.utils.get_total_norm(numbers)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)
    for values in numbers:
        values.mul_(factor.to(values.device))


def _comparable(one: Tensor | None, other: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the numbers of two gradients at the same places; zeros for one that is None."""
    if one is not None and other is not None:
        if one.is_sparse or other.is_sparse:
            (one, other), _ = compacted([one, other], 2)
        return one, other
    there = next((numbers_of(grad) for grad in (one, other) if grad is not None), None)
    nothing = None if there is None else torch.zeros_like(there)
    return there if one is not None else nothing, there if other is not None else nothing
