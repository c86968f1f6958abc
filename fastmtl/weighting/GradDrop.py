"""Gradient sign dropout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.hyper import Hyper
from fastmtl.weighting.base import AbsWeighting
from fastmtl.weighting.rules import kept_signs

__all__ = ["GradDrop"]


class GradDrop(AbsWeighting):
    """Gradient Sign Dropout: where the tasks' gradients of a feature differ in sign, one sign is kept at random.

    With ``s_t`` the sum over the batch of ``grad_t sign(rep_t)``, the purity is
    ``P = (1 + sum_t s_t / sum_t |s_t|) / 2``; for uniform U the mask keeps positive ``s_t`` where ``P > U`` and
    negative ones where ``P < U``. What flows back is ``grad_t (leak + (1 - leak) mask_t)``.

    Source: Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout", NeurIPS 2020.
    """

    needs = "reps"
    hyper = {  # noqa: RUF012
        "leak": Hyper(type=float, default=0.0, help="Share of the dropped gradients that flows on.")
    }

    def draw(self, like: Tensor) -> Tensor:
        """Return uniform noise of the shape of ``like``."""
        return torch.rand_like(like)

    def mask_reps(
        self, losses: Tensor, reps: Sequence[Tensor], grads: Sequence[Tensor], *, leak: float = 0.0, **hyper: Any
    ) -> Sequence[Tensor]:
        """Return the masked gradients."""
        signed = torch.stack([(grad * rep.sign()).sum(0) for grad, rep in zip(grads, reps, strict=True)])
        kept = kept_signs(signed, self.draw(signed[0]))
        factor = leak + (1 - leak) * kept.to(signed.dtype)
        return [grad * own for grad, own in zip(grads, factor, strict=True)]
