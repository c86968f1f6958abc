"""FAMO's weights, and the step by which it learns their logits, each in one pass over T numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops._registry import declare
from fastmtl.ops._vectors import check_vectors
from fastmtl.support.dtypes import wide_dtype

__all__ = ["even_fall", "even_fall_slope", "famo_step_", "famo_weights"]

_TINY = 1e-8
_DECAY = (0.9, 0.999)


def even_fall(logits: Tensor, excess: Tensor, smallest: float) -> Tensor:
    """Return ``z_t / (excess_t + 1e-8)`` over their sum, 0 where the excess is below ``smallest``."""
    share = torch.where(excess >= smallest, torch.softmax(logits, dim=-1) / (excess + _TINY), 0.0)
    total = share.sum()
    return share / torch.where(total > 0, total, 1.0)


def even_fall_slope(logits: Tensor, before: Tensor, after: Tensor, smallest: float) -> Tensor:
    """Return the gradient of the logits, from the excess losses of one batch before and after the update.

    It is 0 where the excess was below ``smallest`` before; z leaves those tasks out.
    """
    known = before >= smallest
    fall = torch.where(known, (before + _TINY).log() - (after.clamp(min=0) + _TINY).log(), 0.0)
    share = torch.where(known, torch.softmax(torch.where(known, logits, -torch.inf), dim=-1), 0.0)
    return share * (fall - share @ fall)


def _weights(logits: Tensor, losses: Tensor, least: Tensor) -> Tensor:
    wide = wide_dtype(losses.device)
    return even_fall(logits.to(wide), losses.to(wide) - least.to(wide), torch.finfo(losses.dtype).tiny)


_famo_weights = declare(
    "famo_weights",
    "(Tensor logits, Tensor losses, Tensor least) -> Tensor",
    check=lambda logits, losses, least: check_vectors(losses, losses=losses, logits=logits, least=least),
    reference=_weights,
    fake=lambda logits, losses, least: torch.empty_like(losses, dtype=wide_dtype(losses.device)),
)


def famo_weights(logits: Tensor, losses: Tensor, least: Tensor) -> Tensor:
    """Return FAMO's weights, ``z_t / D_t`` over their sum, with ``z = softmax(logits)``, ``D = losses - least + 1e-8``.

    Args:
        logits: (T,).
        losses: (T,).
        least: (T,) lower bounds of the losses. A task whose loss is not above it has weight 0 and no part in the sum.

    Returns:
        (T,) in float64.

    Source:
        Liu, Feng, Stone and Liu, "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023.

    Example:
        >>> famo_weights(torch.zeros(2), torch.tensor([1.0, 3.0]), torch.zeros(2))
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    return _famo_weights(logits, losses, least)


def _check_step(
    logits: Tensor,
    first: Tensor,
    second: Tensor,
    steps: Tensor,
    before: Tensor,
    after: Tensor,
    least: Tensor,
    lr: float,
    decay: float,
) -> None:
    check_vectors(logits, logits=logits, first=first, second=second, before=before, after=after, least=least)
    if steps.numel() != 1 or not steps.is_floating_point() or steps.device != logits.device:
        raise UsageError(f"steps must be one float on {logits.device}, got {steps.dtype} on {steps.device}.")


@torch.no_grad()
def _step(
    logits: Tensor,
    first: Tensor,
    second: Tensor,
    steps: Tensor,
    before: Tensor,
    after: Tensor,
    least: Tensor,
    lr: float,
    decay: float,
) -> None:
    dtype, smallest = wide_dtype(logits.device), torch.finfo(before.dtype).tiny
    excess, later, wide = before.to(dtype) - least.to(dtype), after.to(dtype) - least.to(dtype), logits.to(dtype)
    known = excess >= smallest
    grad = even_fall_slope(wide, excess, later, smallest) + decay * wide
    steps.add_(1)
    count = steps.to(dtype)
    moments = first.to(dtype).lerp(grad, 1 - _DECAY[0]), second.to(dtype).lerp(grad * grad, 1 - _DECAY[1])
    size = (moments[1] / (1 - _DECAY[1] ** count)).sqrt() + _TINY
    moved = wide - lr * moments[0] / (1 - _DECAY[0] ** count) / size
    for place, new in zip((first, second, logits), (*moments, moved), strict=True):
        place.copy_(torch.where(known, new.to(place.dtype), place))


_famo_step_ = declare(
    "famo_step_",
    "(Tensor(a!) logits, Tensor(b!) first, Tensor(c!) second, Tensor(d!) steps, Tensor before, Tensor after, "
    "Tensor least, float lr, float decay) -> ()",
    check=_check_step,
    reference=_step,
    fake=lambda *args, **kwargs: None,
)


def famo_step_(
    logits: Tensor,
    first: Tensor,
    second: Tensor,
    steps: Tensor,
    before: Tensor,
    after: Tensor,
    least: Tensor,
    lr: float,
    decay: float,
) -> None:
    """Move FAMO's logits, by Adam, towards tasks whose losses fell least in relation to their size.

    The gradient is ``z_t (f_t - sum_s z_s f_s) + decay logits_t`` with ``z = softmax(logits)`` and
    ``f = log(before - least + 1e-8) - log(max(after - least, 0) + 1e-8)``. A task whose loss was not above its lower
    bound takes no part, and keeps its logit and moments.

    Args:
        logits: (T,), updated in place.
        first: (T,) first moments, updated in place.
        second: (T,) second moments, updated in place.
        steps: One float, the steps so far, counted up.
        before: (T,) losses before the update of the network.
        after: (T,) losses of the same batch after it.
        least: (T,) lower bounds.
        lr: Learning rate.
        decay: Weight decay.

    Source:
        Liu, Feng, Stone and Liu, "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023; Kingma and Ba, "Adam: A
        Method for Stochastic Optimization", ICLR 2015.
    """
    _famo_step_(logits, first, second, steps, before, after, least, lr, decay)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version((logits, first, second, steps))
