"""Nash-MTL's weights, the Nash bargaining solution, from the Gram matrix of the task gradients."""

from __future__ import annotations

from torch import Tensor

from fastmtl.ops._square import check_warm, declare_solver
from fastmtl.ops.fairgrad import fair_weights

__all__ = ["nash"]


_nash = declare_solver(
    "nash",
    "(Tensor gram, Tensor? warm_start=None) -> Tensor",
    check=check_warm,
    solve=lambda gram, warm_start=None: fair_weights(gram, 1.0),
)


def nash(gram: Tensor, warm_start: Tensor | None = None) -> Tensor:
    """Return Nash-MTL's weights w > 0 of T gradients: G w = 1/w elementwise.

    The update d = w^T J is the Nash bargaining solution: up to its length it maximises sum_t log <g_t, d> over
    |d| <= r. It does not depend on the lengths of the gradients: with G_ii scaled by s_i^2, w_i is scaled by 1/s_i.
    Arguments and bounds are those of :func:`fairgrad` with alpha = 1, here whatever the scales of the rows.

    Source:
        Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022.

    Example:
        >>> nash(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    return _nash(gram, warm_start)
