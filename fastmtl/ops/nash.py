"""Nash-MTL's weights: the Nash bargaining solution between the tasks, from the Gram matrix of their gradients."""

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

    Where gradients cancel, as opposite or dependent ones do, no finite w solves this. So what is solved is the equation
    of G' = G + 1e-10 diag(G): it caps the weights at 1e5 sqrt(T / G_ii) and moves those of a well-conditioned G by
    about 1e-10 of their size. The residual of every row is

        |(G' w)_i w_i - 1| <= 1e-10 + 1e-14 w_i sum_j |G'_ij| w_j,

    that is 1e-10 unless the row's terms cancel, for a G that is positive semidefinite up to float64 rounding, whatever
    the scales of its rows; a coarser G gets the least ridge of 1e-9, 1e-8, ... that makes it definite. Rows of length
    zero have weight zero. A NaN or infinity in G makes all weights NaN.

    Args:
        gram: (T, T) Gram matrix of the gradients, as :func:`fastmtl.ops.gram` returns it.
        warm_start: (T,) weights of an earlier, similar G. Near the solution they save time; elsewhere they are not
            used. The guarantee stays as it is.

    Returns:
        (T,) float64 weights on the device of ``gram``; float32 on MPS.

    Raises:
        UsageError: ``gram`` is not a square matrix of floats, or ``warm_start`` does not fit it.

    Source:
        Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022.

    Example:
        >>> nash(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    return _nash(gram, warm_start)
