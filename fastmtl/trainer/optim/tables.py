"""Optimizers of networks with embedding tables, and an Adam that takes sparse and dense gradients in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim._functional import sparse_adam

from fastmtl.errors import UsageError
from fastmtl.support.memory import use_huge_pages, zeros_in_huge_pages

__all__ = ["TABLE_OPTIMIZERS", "SparseAdam", "check_table_group", "tables_in_huge_pages"]


class SparseAdam(torch.optim.Adam):
    """Adam, and for parameters with sparse gradients the rule of :class:`torch.optim.SparseAdam`.

    That rule moves only the rows that a gradient has values for; the moments of the others do not decay. The step count
    is the parameter's. In a group with sparse gradients ``weight_decay`` and ``amsgrad`` must be off.

    Args:
        params: As of :class:`torch.optim.Adam`, as all other arguments are.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters from their gradients.

        Raises:
            UsageError: A sparse gradient in a group with weight decay or ``amsgrad``.
        """
        for group in self.param_groups:
            if any(param.grad is not None and param.grad.is_sparse for param in group["params"]):
                check_table_group(SparseAdam, group)
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
            state["exp_avg"] = zeros_in_huge_pages(param)
            state["exp_avg_sq"] = zeros_in_huge_pages(param)
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


# Those of torch that take sparse gradients, and what they cannot do with them, or leave out without a word.
TABLE_OPTIMIZERS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.SGD: ("weight_decay", "dampening"),
    torch.optim.Adagrad: ("weight_decay",),
    SparseAdam: ("weight_decay", "amsgrad"),
}


def check_table_group(kind: type[torch.optim.Optimizer], group: Mapping[str, Any], table: str = "") -> None:
    """Refuse settings of a group of parameters that an optimizer cannot follow where gradients are sparse.

    Args:
        kind: The optimizer's class.
        group: The group, in which a parameter has sparse gradients.
        table: That parameter's name.

    Raises:
        UsageError: There is such a setting.
    """
    for name in TABLE_OPTIMIZERS.get(kind, ()):
        # Without momentum there is nothing to dampen.
        if group[name] and (name != "dampening" or group["momentum"]):
            off, named = "False" if isinstance(group[name], bool) else "0", f" ({table})" if table else ""
            raise UsageError(
                f"{name} of {kind.__name__} must be {off} in a group with sparse gradients{named}, of which only some "
                "rows are known: give the table a group of its own, or set sparse=False."
            )


def tables_in_huge_pages(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Let embedding tables on the CPU, and what the optimizer keeps for each of their rows, lie in huge pages."""
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            state = optimizer.state.get(module.weight, {})
            for tensor in (module.weight, *state.values()):
                if isinstance(tensor, Tensor):
                    use_huge_pages(tensor)
