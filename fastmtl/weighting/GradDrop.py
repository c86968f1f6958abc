"""Gradient sign dropout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper

__all__ = ["GradDrop"]


class GradDrop(AbsWeighting):
    """Gradient Sign Dropout: where the tasks' gradients of a feature differ in sign, one sign is kept at random.

    With ``s_t`` the sum over the batch of ``grad_t sign(rep_t)``, the purity is
    ``P = (1 + sum_t s_t / sum_t |s_t|) / 2``; for uniform U the mask keeps positive ``s_t`` where ``P > U`` and
    negative ones where ``P < U``. What flows back is ``grad_t (leak + (1 - leak) mask_t)``.

    The numbers U are Philox's, of a seed drawn from torch's generator and an offset that counts the steps.

    Source: Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout", NeurIPS 2020.
    """

    needs = "reps"
    hyper = {  # noqa: RUF012
        "leak": Hyper(type=float, default=0.0, least=0.0, help="Share of the dropped gradients that flows on.")
    }

    seed_and_offset: Tensor

    def init_param(self) -> None:
        """Draw the seed."""
        seed = torch.randint(2**63 - 1, ())
        self.remember("seed_and_offset", torch.stack([seed, torch.zeros_like(seed)]), task_dims=())

    def mask_reps(
        self, losses: Tensor, reps: Sequence[Tensor], grads: Sequence[Tensor], *, leak: float = 0.0, **hyper: object
    ) -> Sequence[Tensor]:
        """Return the masked gradients, summed where the tasks share the representation."""
        shares = all(rep is reps[0] for rep in reps)
        masked = ops.graddrop(reps[:1] if shares else reps, grads, leak, self.seed_and_offset)
        self.seed_and_offset[1] += 1
        return masked
