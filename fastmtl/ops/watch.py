"""What a training step must not go on with, noticed on the device in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops._registry import declare
from fastmtl.support.dtypes import wide_dtype

__all__ = ["watch_"]


def _check(
    found_inf: Tensor,
    steps: Tensor,
    first_bad: Tensor,
    losses: Tensor,
    gram: Tensor | None = None,
    weights: Tensor | None = None,
    refused: Tensor | None = None,
) -> None:
    size = losses.numel()
    given = {"losses": losses, "gram": gram, "weights": weights, "refused": refused}
    state = {"found_inf": found_inf, "steps": steps, "first_bad": first_bad}
    shapes = dict.fromkeys(given, (size,)) | {
        "gram": (size, size),
        "found_inf": (),
        "steps": (2,),
        "first_bad": (5, size),
    }
    dtypes = {"refused": torch.bool, "found_inf": torch.float32, "steps": torch.int64}
    dtypes["first_bad"] = wide_dtype(losses.device)
    for name, tensor in {**given, **state}.items():
        if tensor is None:
            continue
        dtype = dtypes.get(name)
        fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if tensor.shape != shapes[name] or not fits or tensor.device != losses.device:
            raise UsageError(
                f"{name} must be {shapes[name]} {'floats' if dtype is None else dtype} on {losses.device}, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}."
            )


def _reference(
    found_inf: Tensor,
    steps: Tensor,
    first_bad: Tensor,
    losses: Tensor,
    gram: Tensor | None = None,
    weights: Tensor | None = None,
    refused: Tensor | None = None,
) -> None:
    nothing = torch.zeros_like(losses, dtype=torch.bool)
    flags = [
        ~losses.isfinite(),
        nothing if refused is None else refused,
        nothing if gram is None else ~gram.diagonal().isfinite(),
        nothing if weights is None else ~weights.isfinite(),
    ]
    bad = torch.stack(flags)
    fresh = bad.any() & (found_inf == 0)
    seen = torch.cat([bad.to(first_bad.dtype), losses[None].to(first_bad.dtype)])
    first_bad.copy_(torch.where(fresh, seen, first_bad))
    steps[1].copy_(torch.where(fresh, steps[0], steps[1]))
    found_inf.copy_(torch.maximum(found_inf, bad.any().to(found_inf.dtype)))
    steps[0].add_(1)


_watch_ = declare(
    "watch_",
    "(Tensor(a!) found_inf, Tensor(b!) steps, Tensor(c!) first_bad, Tensor losses, Tensor? gram=None, "
    "Tensor? weights=None, Tensor? refused=None) -> ()",
    check=_check,
    reference=_reference,
    fake=lambda *args, **kwargs: None,
)


def watch_(
    found_inf: Tensor,
    steps: Tensor,
    first_bad: Tensor,
    losses: Tensor,
    gram: Tensor | None = None,
    weights: Tensor | None = None,
    refused: Tensor | None = None,
) -> None:
    """Look at a training step and remember the first one that is bad; never waits for the device.

    A step is bad if a loss, an entry on the Gram matrix's diagonal or a weight is NaN or infinite, or if a loss is
    refused.

    Args:
        found_inf: () float32 flag, set to 1 by a bad step, and never back to 0.
        steps: (2,) int64: the number of this step, which is counted up, and that of the first bad one.
        first_bad: (5, T) float64, of the first bad step: 1 where a task's loss, its refusal, gradient or weight was
            bad, one row each, and the losses.
        losses: (T,) losses.
        gram: (T, T) Gram matrix of the task gradients.
        weights: (T,) weights.
        refused: (T,) booleans: the losses that a strategy cannot use.

    Example:
        >>> found_inf, steps, first_bad = torch.zeros(()), torch.tensor([7, 0]), torch.zeros(5, 2).double()
        >>> watch_(found_inf, steps, first_bad, torch.tensor([1.0, torch.inf]))
        >>> found_inf, steps, first_bad[0]
        (tensor(1.), tensor([8, 7]), tensor([0., 1.], dtype=torch.float64))
    """
    _watch_(found_inf, steps, first_bad, losses, gram, weights, refused)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version((found_inf, steps, first_bad))
