"""The base of all strategies, and what those written for LibMTL use: task gradients as vectors, and ``backward``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmtl import ops
from fastmtl.engine.weights import Rows, Weights
from fastmtl.errors import UsageError
from fastmtl.support.hyper import Hyper
from fastmtl.weighting.base import LossNeeds, StepNeeds, Strategy

__all__ = ["AbsWeighting", "Hyper", "LossNeeds", "Rows", "Weights"]


class AbsWeighting(Strategy):
    """Base of all strategies, mixed into the model class behind an architecture.

    A rule overrides methods of :class:`~fastmtl.weighting.base.Strategy`. A strategy written for LibMTL overrides
    ``backward`` instead, and uses ``_get_grads`` and ``_backward_new_grads``.
    """

    @classmethod
    def needs_of_step(cls) -> StepNeeds:
        """Return what a step gives the strategy: ``needs``, or ``"backward"`` to one that overrides ``backward``."""
        return cls.needs if cls.backward is AbsWeighting.backward else "backward"

    def backward(self, losses: Tensor, **kwargs: Any) -> np.ndarray | None:
        """Fill ``.grad`` of all parameters from (T,) losses that still carry their graph; return the weights.

        For loops that call the model as LibMTL's trainer does; fastmtl's Trainer calls it only where it is overridden.
        Where weights or losses are NaN or infinite, what the strategy remembers stays as it is.

        Raises:
            UsageError: The strategy needs the Trainer, or cannot use one of the losses.
        """
        if self.samples > 1 or self.looks_back or self.needs in ("reps", "lookahead"):
            raise UsageError(f"{type(self).__name__} needs fastmtl's Trainer; its backward cannot be called alone.")
        refused = self.refused(losses.detach(), **kwargs)
        if refused is not None and bool(refused.any()):
            task = int(refused.to(torch.uint8).argmax())
            raise UsageError(
                f"The loss of {self.task_name[task]} is {losses[task].item():.4g}, but {self.refusal(**kwargs)}."
            )
        before = {name: getattr(self, name).clone() for name in self.remembered()}
        if self.needs == "losses":
            weights = self.weigh(losses.detach(), None, **kwargs)
            (losses * weights.shared.to(losses.dtype)).sum().backward()
        else:
            weights = self._combine_grads(losses, **kwargs)
        if weights.max_norm is not None:
            nn.utils.clip_grad_norm_(list(self.get_share_params()), weights.max_norm)
        for name, grad in weights.own_grads.items():
            self.get_parameter(name).grad = grad
        finite = torch.cat([losses.detach().isfinite(), weights.shared.isfinite().flatten()]).all()
        for name, old in before.items():
            setattr(self, name, torch.where(finite, getattr(self, name), old))
        return None if weights.reported is None else np.asarray(weights.reported.detach().cpu().numpy())

    def _combine_grads(self, losses: Tensor, **kwargs: Any) -> Weights:
        """Fill ``.grad`` with the weighted sum of the task gradients; return the weights."""
        if self.weighs_heads and self.rep_grad:
            raise UsageError(f"{type(self).__name__} with rep_grad needs fastmtl's Trainer.")
        grads = self._get_grads(losses, mode="autograd" if self.weighs_heads else "backward")
        per_grads, grads = grads if self.rep_grad else (None, grads)
        groups, rows = self.groups(**kwargs), self._as_rows(grads)
        if self.needs == "rows":
            weights = self.weigh_rows(losses.detach(), rows, **kwargs)
        else:
            weights = self.weigh(
                losses.detach(), ops.gram(grads) if groups is None else ops.gram(rows, groups), **kwargs
            )
        if weights.heads is not None:
            (losses * weights.heads.to(losses.dtype)).sum().backward()
        if self.rep_grad:
            self._backward_new_grads(weights.shared.to(losses.dtype), per_grads)
        else:
            update = [torch.zeros_like(param) for param in self.get_share_params()]
            ops.combine_(update, rows if weights.rows is None else weights.rows, weights.shared, groups)
            self._reset_grad(self._as_vector(update))
        return weights

    def _as_rows(self, grads: Tensor) -> Rows:
        """Return (T, P) gradients in the shapes of the shared parameters; (T, F) ones of representations stay whole."""
        if self.rep_grad:
            return [[grad] for grad in grads]
        shapes = [param.shape for param in self.get_share_params()]
        return [
            [part.reshape(shape) for part, shape in zip(grad.split(self.grad_index), shapes, strict=True)]
            for grad in grads
        ]

    def _compute_grad_dim(self) -> None:
        """Set ``grad_index``, the sizes of the shared parameters, and ``grad_dim``, their sum P."""
        if not hasattr(self, "grad_index"):
            self.grad_index = [param.numel() for param in self.get_share_params()]
            self.grad_dim = sum(self.grad_index)

    def _grad2vec(self) -> Tensor:
        """Return the gradients of the shared parameters as one (P,) vector; missing ones are zero."""
        return self._as_vector(param.grad for param in self.get_share_params())

    def _as_vector(self, grads: Iterable[Tensor | None]) -> Tensor:
        """Return a gradient for each shared parameter as one (P,) vector; missing ones are zero."""
        params = self.get_share_params()
        parts = [torch.zeros_like(param) if grad is None else grad for param, grad in zip(params, grads, strict=True)]
        return torch.cat([part.detach().flatten() for part in parts])

    def _compute_grad(self, losses: Tensor, mode: str, rep_grad: bool = False) -> Any:
        """Return the (T, P) gradients of the tasks, or with ``rep_grad`` those of the representations.

        Mode ``"backward"`` also accumulates the gradients of the task-specific parameters; ``"autograd"`` does not.
        """
        if mode not in ("backward", "autograd"):
            raise ValueError(f"mode must be 'backward' or 'autograd', got {mode!r}.")
        grads = []
        for index, task in enumerate(self.task_name):
            loss = losses[index]
            if rep_grad:
                loss.backward(retain_graph=True)
                grad = self.rep_tasks[task].grad
                assert grad is not None
                grads.append(grad.detach().clone())
            elif mode == "backward":
                loss.backward(retain_graph=index + 1 < self.task_num)
                grads.append(self._grad2vec())
                self.zero_grad_share_params()
            else:
                params = list(self.get_share_params())
                grads.append(self._as_vector(torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)))
        return grads if rep_grad and not isinstance(self.rep, Tensor) else torch.stack(grads)

    def _get_grads(self, losses: Tensor, mode: str = "backward") -> Any:
        """Return the (T, P) task gradients, or with ``rep_grad`` a list of them and their batch sums (T, F)."""
        if not self.rep_grad:
            self._compute_grad_dim()
            return self._compute_grad(losses, mode)
        per_grads = self._compute_grad(losses, mode, rep_grad=True)
        sums = [grad.flatten(1).sum(0) for grad in per_grads]
        if len({len(total) for total in sums}) > 1:
            raise ValueError("The representations of all tasks must have the same size with rep_grad.")
        return [per_grads, torch.stack(sums)]

    def _reset_grad(self, new_grads: Tensor) -> None:
        """Write a (P,) vector into ``.grad`` of the shared parameters that have one."""
        for param, part in zip(self.get_share_params(), new_grads.split(self.grad_index), strict=True):
            if param.grad is not None:
                param.grad = part.reshape(param.shape).to(param.dtype).clone()

    def _backward_new_grads(self, batch_weight: Any, per_grads: Any = None, grads: Any = None) -> None:
        """Set the shared parameters' gradients to the sum of (T,) weights times the (T, P) ``grads`` of the tasks.

        With ``rep_grad`` the sum is that of ``per_grads``, the gradients of the tasks' representations.
        """
        if len(batch_weight) != self.task_num:
            raise UsageError(
                f"_backward_new_grads takes a weight for each of {self.task_num} tasks, got {len(batch_weight)}."
            )
        task_grads = per_grads if self.rep_grad else grads
        weighted = (batch_weight[t] * task_grads[t] for t in range(self.task_num))
        if not self.rep_grad:
            self._reset_grad(sum(weighted))
        elif isinstance(self.rep, dict):
            torch.autograd.backward([self.rep[task] for task in self.task_name], list(weighted))
        else:
            self.rep.backward(sum(weighted))
