"""What every weighting strategy is: a rule that turns losses and the Gram matrix into weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastmtl.hyper import Hyper

__all__ = ["AbsWeighting", "Needs", "Weights"]

Needs = Literal["losses", "gram"]


@dataclass(kw_only=True, slots=True)
class Weights:
    """What a strategy decides in one step; all tensors are (T,) and stay on the device.

    Attributes:
        shared: The update of the shared parameters is ``sum_t shared_t g_t``, g_t the gradient of task t's loss.
        logged: What is reported as the task weights; ``shared`` unless given.
    """

    shared: Tensor
    logged: Tensor | None = None


class AbsWeighting(nn.Module):
    """Base of all strategies, mixed into the model class behind an architecture.

    A strategy says what it ``needs`` and overrides :meth:`weigh`, which runs no backward pass and never reads a
    tensor on the host. A strategy written for LibMTL overrides ``backward`` instead and uses ``_get_grads`` and
    ``_backward_new_grads``.

    Attributes:
        needs: ``"losses"``: one backward pass of the weighted losses. ``"gram"``: the gradients of all tasks, of which
            :meth:`weigh` sees the Gram matrix.
        hyper: The hyper-parameters, by name.
    """

    needs: ClassVar[Needs] = "losses"
    hyper: ClassVar[Mapping[str, Hyper]] = {}

    task_num: int
    task_name: list[str]
    device: torch.device
    rep_grad: bool
    rep: Any
    rep_tasks: dict[str, Tensor]
    epoch: int
    epochs: int
    train_loss_buffer: np.ndarray

    def init_param(self) -> None:
        """Create the strategy's own parameters and state; called once the architecture is built."""

    def weigh(self, losses: Tensor, gram: Tensor | None, **hyper: Any) -> Weights:
        """Return the weights of this step.

        Args:
            losses: (T,) detached losses.
            gram: (T, T) float64 Gram matrix of the task gradients if ``needs`` is ``"gram"``, else None. With
                ``rep_grad`` the gradients are those of the representation, summed over the batch.
            hyper: The hyper-parameters.
        """
        raise NotImplementedError(f"{type(self).__name__} overrides neither weigh nor backward.")

    def get_share_params(self) -> Iterable[nn.Parameter]:
        """Return the shared parameters; the architecture overrides this."""
        raise NotImplementedError

    def zero_grad_share_params(self) -> None:
        """Set the gradients of the shared parameters to zero; the architecture overrides this."""
        raise NotImplementedError

    def backward(self, losses: Tensor, **kwargs: Any) -> np.ndarray | None:
        """Fill ``.grad`` of all parameters from (T,) losses that still carry their graph; return the weights.

        The trainer does not come here for a strategy with :meth:`weigh`; it is for loops that call the model as
        LibMTL's trainer does.
        """
        from fastmtl import ops

        if self.needs == "losses":
            weights = self.weigh(losses.detach(), None, **kwargs)
            (losses * weights.shared.to(losses.dtype)).sum().backward()
        else:
            grads = self._get_grads(losses)
            per_task = grads[1] if self.rep_grad else grads
            weights = self.weigh(losses.detach(), ops.gram(per_task), **kwargs)
            shared = weights.shared.to(losses.dtype)
            if self.rep_grad:
                self._backward_new_grads(shared, per_grads=grads[0])
            else:
                self._backward_new_grads(shared, grads=grads)
        logged = weights.shared if weights.logged is None else weights.logged
        return np.asarray(logged.detach().cpu().numpy())

    def _compute_grad_dim(self) -> None:
        if not hasattr(self, "grad_index"):
            self.grad_index = [param.numel() for param in self.get_share_params()]
            self.grad_dim = sum(self.grad_index)

    def _grad2vec(self) -> Tensor:
        """Return the gradients of the shared parameters as one (P,) vector; missing ones are zero."""
        return torch.cat(
            [
                param.new_zeros(param.numel()) if param.grad is None else param.grad.detach().flatten()
                for param in self.get_share_params()
            ]
        )

    def _compute_grad(self, losses: Tensor, mode: str, rep_grad: bool = False) -> Any:
        """Return the gradients of every task, (T, P), or of the representations if ``rep_grad``.

        Args:
            losses: (T,) losses with their graph.
            mode: ``"backward"`` also accumulates the gradients of the task-specific parameters; ``"autograd"`` does
                not.
            rep_grad: Differentiate with respect to the representations.
        """
        if mode not in ("backward", "autograd"):
            raise ValueError(f"mode must be 'backward' or 'autograd', got {mode!r}.")
        grads = []
        for index, task in enumerate(self.task_name):
            if rep_grad:
                losses[index].backward(retain_graph=True)
                grad = self.rep_tasks[task].grad
                assert grad is not None
                grads.append(grad.detach().clone())
            elif mode == "backward":
                losses[index].backward(retain_graph=index + 1 < self.task_num)
                grads.append(self._grad2vec())
                self.zero_grad_share_params()
            else:
                params = list(self.get_share_params())
                found = torch.autograd.grad(losses[index], params, retain_graph=True, allow_unused=True)
                parts = [
                    p.new_zeros(p.numel()) if g is None else g.flatten() for p, g in zip(params, found, strict=True)
                ]
                grads.append(torch.cat(parts))
        same_rep = rep_grad and isinstance(self.rep, Tensor)
        return torch.stack(grads) if same_rep or not rep_grad else grads

    def _get_grads(self, losses: Tensor, mode: str = "backward") -> Any:
        """Return the (T, P) task gradients, or with ``rep_grad`` a list of them and their batch sums (T, F)."""
        if not self.rep_grad:
            self._compute_grad_dim()
            return self._compute_grad(losses, mode)
        per_grads = self._compute_grad(losses, mode, rep_grad=True)
        sums = [grad.flatten(1).sum(0) for grad in per_grads]
        if len({len(s) for s in sums}) > 1:
            raise ValueError("The representations of all tasks must have the same size with rep_grad.")
        return [per_grads, torch.stack(sums)]

    def _reset_grad(self, new_grads: Tensor) -> None:
        """Write a (P,) vector into ``.grad`` of the shared parameters."""
        for param, part in zip(self.get_share_params(), new_grads.split(self.grad_index), strict=True):
            if param.grad is not None:
                param.grad = part.reshape(param.shape).to(param.dtype).clone()

    def _backward_new_grads(self, batch_weight: Any, per_grads: Any = None, grads: Tensor | None = None) -> None:
        """Set the gradients of the shared parameters to the weighted sum of the tasks'.

        Args:
            batch_weight: (T,) weights.
            per_grads: With ``rep_grad``: the gradient of each task's representation.
            grads: Otherwise: the (T, P) task gradients.
        """
        if not self.rep_grad:
            assert grads is not None
            self._reset_grad(sum(batch_weight[t] * grads[t] for t in range(self.task_num)))
        elif isinstance(self.rep, dict):
            torch.autograd.backward(
                [self.rep[task] for task in self.task_name],
                [batch_weight[t] * per_grads[t] for t in range(self.task_num)],
            )
        else:
            self.rep.backward(sum(batch_weight[t] * per_grads[t] for t in range(self.task_num)))
