"""Multiple gradient descent algorithm."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper, LossNeeds, Weights
from fastmtl.weighting.rules import counted

__all__ = ["MGDA"]


class MGDA(AbsWeighting):
    """Multiple Gradient Descent Algorithm: the shortest vector in the convex hull of the task gradients.

    With g_t divided by n_t, ``w = argmin ||sum_t w_t g_t / n_t||`` over the simplex. The update is the minimiser
    itself, ``sum_t w_t g_t / n_t``; with ``rep_grad`` it is ``sum_t w_t g_t``, as in LibMTL. Where n_t has the loss in
    it, a task whose loss is 0 takes no part in a step.

    Source: Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018.
    """

    needs = "gram"
    takes_groups = True
    use_of_losses = "it divides the gradients by them"
    hyper = {  # noqa: RUF012
        "mgda_gn": Hyper(
            type=str,
            default="none",
            choices=("none", "l2", "loss", "loss+"),
            help="What each task's gradient is divided by: nothing, its norm, the loss, or loss times norm.",
        )
    }

    def weigh(self, losses: Tensor, gram: Tensor, *, mgda_gn: str = "none", **hyper: object) -> Weights:
        """Return the min-norm weights."""
        if mgda_gn == "none":
            return Weights(shared=ops.min_norm(gram))
        known = counted(losses) if "loss" in mgda_gn else torch.ones_like(losses, dtype=torch.bool)
        # A task that takes no part is replaced by a copy of one that does, which gets the weights of its copies.
        place = torch.arange(len(losses), device=losses.device)
        place = torch.where(known, place, known.to(torch.uint8).argmax())
        squared_norms = gram.diagonal(dim1=-2, dim2=-1)
        scale = self._scale(losses.to(gram.dtype), squared_norms, mgda_gn)[..., place]
        solution = ops.min_norm(scale[..., None] * gram[..., place, :][..., place] * scale[..., None, :])
        weights = torch.where(known, torch.zeros_like(solution).index_add(-1, place, solution), 0.0)
        return Weights(shared=weights if self.rep_grad else weights * scale, logged=weights, known=known)

    def loss_needs(self, *, mgda_gn: str = "none", **hyper: object) -> LossNeeds:
        """Return what losses must be: positive where gradients are divided by them."""
        return "positive" if "loss" in mgda_gn else "any"

    @staticmethod
    def _scale(losses: Tensor, squared_norms: Tensor, mgda_gn: str) -> Tensor:
        """Return 1 / n_t, and 0 for a task whose n_t is 0: its gradient vanishes in every direction."""
        size = torch.ones_like(squared_norms)
        if mgda_gn in ("l2", "loss+"):
            size = squared_norms.sqrt()
        if mgda_gn in ("loss", "loss+"):
            size = size * losses
        return torch.where(size == 0, torch.zeros_like(size), 1 / size)
