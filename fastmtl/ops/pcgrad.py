"""PCGrad's weights: conflicting task gradients projected onto each other's normal planes, from their Gram matrix."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastmtl.ops._orders import as_orders, check_orders, check_tasks
from fastmtl.ops._registry import declare
from fastmtl.ops._square import check_gram, solved
from fastmtl.support.dtypes import wide_dtype

__all__ = ["pcgrad"]


def _check(gram: Tensor, orders: Tensor) -> None:
    check_gram(gram)
    check_orders(orders, gram)


def _project(orders: Tensor, gram: Tensor) -> Tensor:
    """Return the column sums of the coefficients, all rows together, every product computed anew."""
    square = gram.diagonal()
    coefficients = torch.eye(len(gram), dtype=gram.dtype)
    for others in orders.unbind(1):
        product = (coefficients * gram[others]).sum(dim=1)
        conflicts = (product < 0) & (square[others] > 0)
        amount = torch.where(conflicts, -product / square[others], 0)
        coefficients.scatter_add_(1, others[:, None], amount[:, None])
    return coefficients.sum(dim=0)


_pcgrad = declare(
    "pcgrad",
    "(Tensor gram, Tensor orders) -> Tensor",
    check=_check,
    # All groups meet in the same orders.
    reference=lambda gram, orders: solved(partial(_project, as_orders(orders.cpu())), gram.shape[:-1], gram),
    fake=lambda gram, orders: gram.new_empty(gram.shape[:-1], dtype=wide_dtype(gram.device)),
    check_contents=lambda gram, orders: check_tasks(orders),
)


def pcgrad(gram: Tensor, orders: Tensor) -> Tensor:
    """Return the weights w for which sum_j w_j g_j is PCGrad's update.

    Each task i starts with p = g_i. For j in ``orders[i]``, first to last, where p conflicts with g_j it loses its part
    along g_j:

        p <- p - (<p, g_j> / G_jj) g_j    if <p, g_j> < 0 and G_jj > 0,

    which is carried out on the coefficients of p. The update is the sum of the T vectors p. It differs from that of
    exact arithmetic by at most 1e-12 sum_i sqrt(G_ii) in length, for a G that is exact up to float64 rounding, whatever
    the scales of its rows; so after its last step no p has a product below -1e-12 |g_i| |g_j| with the last task j.
    Weights do not depend on the scale of G.

    Args:
        gram: (T, T) Gram matrix, or (L, T, T) those of L groups of parameters, for (L, T).
        orders: (T, K) int64 tasks that each gradient is projected against in all groups, K >= 0, usually a random
            permutation per row. A row may name its own task, under the same rule, or a task more than once. Or (T, T)
            float keys: each row's order is that of its rising keys, so that random keys need not be sorted before.
            Entries that are no tasks are refused on the CPU; kernels on other devices skip them, as a check would wait
            for the device.

    Source:
        Yu et al., "Gradient surgery for multi-task learning", NeurIPS 2020.

    Example:
        >>> pcgrad(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]), torch.tensor([[1], [0]]))
        tensor([2.0000, 1.2500], dtype=torch.float64)
    """
    return _pcgrad(gram, orders)
