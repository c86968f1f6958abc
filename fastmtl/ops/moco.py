"""MoCo's rates, and the step by which it learns its weights, each in one pass over T numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops._registry import declare
from fastmtl.ops._square import check_gram, check_vector
from fastmtl.support.dtypes import wide_dtype

__all__ = ["moco_rates_", "moco_step_"]


def _check_steps(steps: Tensor, gram: Tensor) -> None:
    if steps.numel() != 1 or not steps.is_floating_point() or steps.device != gram.device:
        raise UsageError(f"steps must be one float on {gram.device}, got {steps.dtype} on {steps.device}.")


def _check_rates(steps: Tensor, losses: Tensor, gram: Tensor, beta: float, sigma: float) -> None:
    check_gram(gram)
    check_vector("losses", losses, gram)
    _check_steps(steps, gram)


def _rates(steps: Tensor, losses: Tensor, gram: Tensor, beta: float, sigma: float) -> Tensor:
    wide = wide_dtype(gram.device)
    steps.add_(1)
    rate = beta / steps.to(wide) ** sigma
    gains = rate * losses.to(wide).clamp(min=0) / (gram.diagonal().to(wide).sqrt() + 1e-8)
    return torch.stack([(1 - rate).expand_as(gains), gains])


_moco_rates_ = declare(
    "moco_rates_",
    "(Tensor(a!) steps, Tensor losses, Tensor gram, float beta, float sigma) -> Tensor",
    check=_check_rates,
    reference=_rates,
    fake=lambda steps, losses, gram, beta, sigma: losses.new_empty((2, *losses.shape), dtype=wide_dtype(gram.device)),
)


def moco_rates_(steps: Tensor, losses: Tensor, gram: Tensor, beta: float, sigma: float) -> tuple[Tensor, Tensor]:
    """Count a step of MoCo; return what its averages keep, and the gains of the gradients, as :func:`ema_gram_` takes.

    With k the steps, this one included, and ``r = beta / k^sigma`` the averages keep ``1 - r``, and the gradient of
    task t gains ``r max(losses_t, 0) / (sqrt(G_tt) + 1e-8)``.

    Args:
        steps: One float, the steps so far, counted up.
        losses: (T,).
        gram: (T, T) Gram matrix of the gradients.
        beta: Learning rate of the averages.
        sigma: The power by which it falls.

    Returns:
        Two (T,) vectors in float64.

    Source:
        Fernando et al., "Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Stochastic
        Approach", ICLR 2023.
    """
    keep, gains = _moco_rates_(steps, losses, gram, beta, sigma).unbind()
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(steps)
    return keep, gains


def _check_step(weights: Tensor, products: Tensor, steps: Tensor, gamma: float, sigma: float, rho: float) -> None:
    check_gram(products)
    check_vector("weights", weights, products)
    _check_steps(steps, products)


def _step(weights: Tensor, products: Tensor, steps: Tensor, gamma: float, sigma: float, rho: float) -> Tensor:
    wide = wide_dtype(weights.device)
    before = weights.to(wide)
    pull = products.to(wide) @ before + rho * before
    moved = torch.softmax(before - gamma / steps.to(wide) ** sigma * pull, dim=-1)
    weights.copy_(moved)
    return moved


_moco_step_ = declare(
    "moco_step_",
    "(Tensor(a!) weights, Tensor products, Tensor steps, float gamma, float sigma, float rho) -> Tensor",
    check=_check_step,
    reference=_step,
    fake=lambda weights, products, steps, gamma, sigma, rho: torch.empty_like(
        weights, dtype=wide_dtype(weights.device)
    ),
)


def moco_step_(weights: Tensor, products: Tensor, steps: Tensor, gamma: float, sigma: float, rho: float) -> Tensor:
    """Move MoCo's weights, ``w = softmax(w - gamma / k^sigma (Y Y^T w + rho w))``, in place; return them in float64.

    Args:
        weights: (T,), updated in place.
        products: (T, T) Gram matrix Y Y^T of the averages.
        steps: One float, the steps k so far.
        gamma: Learning rate of the weights.
        sigma: The power by which it falls.
        rho: Regularization.

    Source:
        Fernando et al., "Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Stochastic
        Approach", ICLR 2023.
    """
    moved = _moco_step_(weights, products, steps, gamma, sigma, rho)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(weights)
    return moved
