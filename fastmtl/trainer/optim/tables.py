"""Adam for networks with embedding tables, which takes sparse and dense gradients in one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim._functional import sparse_adam

__all__ = ["SparseAdam"]


class SparseAdam(torch.optim.Adam):
    """Adam, and for parameters with sparse gradients the rule of :class:`torch.optim.SparseAdam`.

    That rule moves only the rows that a gradient has values for; the moments of the others do not decay, and there is
    no weight decay. The step count is the parameter's.

    Args:
        params: As of :class:`torch.optim.Adam`, as all other arguments are.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters from their gradients."""
        sparse: list[tuple[dict[str, Any], Tensor, Tensor]] = []
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.grad.is_sparse:
                    sparse.append((group, param, param.grad))
                    param.grad = None
        try:
            loss = super().step(closure)
        finally:
            for _, param, grad in sparse:
                param.grad = grad
        for group, param, grad in sparse:
            self._step_sparse(group, param, grad)
        return loss

    def _step_sparse(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        state = self.state[param]
        if not state:
            # The names and kinds of Adam's state.
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        sparse_adam(
            [param],
            [grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [int(state["step"])],
            eps=group["eps"],
            beta1=float(beta1),
            beta2=float(beta2),
            lr=float(group["lr"]),
            maximize=group["maximize"],
        )
