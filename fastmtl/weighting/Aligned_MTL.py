"""Independent component alignment."""

from __future__ import annotations

from torch import Tensor

from fastmtl import ops
from fastmtl.weighting.abstract_weighting import AbsWeighting, Weights

__all__ = ["Aligned_MTL"]


class Aligned_MTL(AbsWeighting):
    """Aligned-MTL: the principal components of the task gradients are brought to the length of the smallest.

    With the eigenvalues and eigenvectors of G, ``w = sqrt(min_k lambda_k) sum_k v_k v_k^T 1 / sqrt(lambda_k)``; see
    :func:`fastmtl.ops.aligned`.

    Source: Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023.
    """

    needs = "gram"
    takes_groups = True

    def weigh(self, losses: Tensor, gram: Tensor, **hyper: object) -> Weights:
        """Return the weights of the gradients for the sum of the aligned ones."""
        return Weights(shared=ops.aligned(gram))
