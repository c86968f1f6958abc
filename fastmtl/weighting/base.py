"""What every weighting strategy is: a rule that turns losses and the Gram matrix into weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastmtl import ops
from fastmtl.engine.comm import CutsRows
from fastmtl.engine.lookahead import LookAhead
from fastmtl.engine.weights import Rows, Weights
from fastmtl.errors import UsageError
from fastmtl.support.dtypes import falls_below
from fastmtl.support.hyper import Hyper

__all__ = ["AbsWeighting", "Hyper", "LossNeeds", "Needs", "Rows", "StepNeeds", "Weights"]

Needs = Literal["losses", "gram", "rows", "reps", "lookahead"]
StepNeeds = Literal[Needs, "backward"]
LossNeeds = Literal["any", "non-negative", "positive"]


class AbsWeighting(nn.Module):
    """Base of all strategies, mixed into the model class behind an architecture.

    A strategy says what it ``needs`` and overrides the method of that name below. It is given the losses, detached and
    (T,), with k samples (k, T), and the hyper-parameters by name; it runs no backward pass and never reads a tensor on
    the host. What it remembers is registered with :meth:`remember`. A strategy written for LibMTL overrides
    ``backward`` instead and uses ``_get_grads`` and ``_backward_new_grads``.

    Attributes:
        needs: ``"losses"``: one backward pass of the weighted losses. ``"gram"``: the gradients of all tasks, of which
            :meth:`weigh` sees the Gram matrix. ``"rows"``: the gradients themselves, for :meth:`weigh_rows`.
            ``"reps"``: representations and their gradients, for :meth:`mask_reps`. ``"lookahead"``: gradients where
            a step would lead, for :meth:`look_ahead`.
        hyper: The hyper-parameters, by name.
        samples: Batches per step, each with its own forward and backward passes.
        weighs_heads: Whether the gradients of task-specific parameters are weighted too.
        needs_losses: What losses must be for the rule to have a meaning. A step with a negative one changes nothing and
            is reported, unless ``"any"`` will do; one that is negative by rounding counts as 0. With ``"positive"`` one
            of 0 takes no part in a step.
        use_of_losses: Why, as the second half of the sentence the user gets: ``"it takes their logarithms"``.
        reads_losses: Whether the weights depend on the losses of the step.
        looks_back: Whether :meth:`after_step` wants the batch's losses after the update, from a second forward pass.
        allows_rep_grad: Whether ``rep_grad`` can be on.
        active: The tasks of this step if it has only some; ``task_num`` is then their number.
        row_states: What it keeps that is as large as the task gradients, by name.
        sum_parts: Sums a tensor over the processes that each have a part of every gradient; None if one has them whole.
    """

    needs: ClassVar[Needs] = "losses"
    hyper: ClassVar[Mapping[str, Hyper]] = {}
    samples: ClassVar[int] = 1
    weighs_heads: ClassVar[bool] = False
    needs_losses: ClassVar[LossNeeds] = "any"
    use_of_losses: ClassVar[str] = ""
    reads_losses: ClassVar[bool] = True
    looks_back: ClassVar[bool] = False
    allows_rep_grad: ClassVar[bool] = True

    active: list[int] | None = None
    row_states: Mapping[str, CutsRows] = MappingProxyType({})
    sum_parts: Callable[[Tensor], Tensor] | None = None
    task_dims: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    strategy_name: str
    loss_scale: nn.Parameter
    task_num: int
    task_name: list[str]
    device: torch.device
    rep_grad: bool
    rep: Any
    rep_tasks: dict[str, Tensor]
    epoch: int
    epochs: int
    train_loss_buffer: np.ndarray

    @classmethod
    def needs_of_step(cls) -> StepNeeds:
        """Return what a step gives the strategy: ``needs``, or ``"backward"`` to one that overrides ``backward``."""
        return cls.needs if cls.backward is AbsWeighting.backward else "backward"

    def init_param(self) -> None:
        """Create the strategy's own parameters and state; called once the architecture is built."""

    def remember(self, name: str, value: Tensor, task_dims: Sequence[int] | None = None) -> None:
        """Keep a tensor from step to step: it is part of ``state_dict``, and moves with the model.

        Write into it (``self.name.copy_(...)``) or assign to it. ``task_dims`` are the dimensions that have one entry
        per task; the first one unless given, none for a scalar.
        """
        self.register_buffer(name, value)
        dims = range(min(value.dim(), 1)) if task_dims is None else task_dims
        self.task_dims = {**self.task_dims, name: tuple(dims)}

    def whole(self, sums: Tensor) -> Tensor:
        """Return sums over all entries of the gradients, such as a Gram matrix, from those over the entries given.

        A strategy that ``needs`` rows calls it, as with several processes each has a part of every row.
        """
        return sums if self.sum_parts is None else self.sum_parts(sums.contiguous())

    def remembered(self) -> list[str]:
        """Return the names of what :meth:`remember` keeps."""
        return list(self.task_dims)

    def start_epoch(self, **hyper: Any) -> None:
        """Prepare for the steps of ``self.epoch``; the one place where a strategy may wait for the device."""

    def groups(self, **hyper: Any) -> list[int] | None:
        """Return the group of each shared parameter, 0 .. L-1, where groups are weighed apart; None for one group."""
        return None

    def weigh(self, losses: Tensor, gram: Any, **hyper: Any) -> Weights:
        """Return the weights of this step.

        ``gram`` is the float64 Gram matrix of the task gradients if ``needs`` is ``"gram"``, else None: (T, T), with L
        groups of parameters (L, T, T), with k samples (k T, k T), sample by sample. With ``rep_grad`` the gradients are
        those of the representation, summed over the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} overrides neither weigh nor backward.")

    def weigh_rows(self, losses: Tensor, rows: Rows, **hyper: Any) -> Weights:
        """Return the weights of this step from the T gradients.

        ``rows`` has each as a list over the shared parameters with None where a parameter has none; read-only. With
        several processes, lists of the pieces this one has; see :meth:`whole`.
        """
        raise NotImplementedError

    def mask_reps(
        self, losses: Tensor, reps: Sequence[Tensor], grads: Sequence[Tensor], **hyper: Any
    ) -> Sequence[Tensor]:
        """Return what flows back into the representations in place of their gradients, or its sum where they are one.

        ``reps`` are T representations (B, ...), the very same tensor T times where the tasks share it.
        """
        raise NotImplementedError

    def look_ahead(self, ahead: LookAhead, **hyper: Any) -> Weights:
        """Return the weights for the step's last batch, or rows over all parameters and their weights.

        ``ahead`` has the step's first batch in two halves, and passes on them at parameters of choice.
        """
        raise NotImplementedError

    def loss_needs(self, **hyper: Any) -> LossNeeds:
        """Return what losses must be with these hyper-parameters."""
        return self.needs_losses

    def refused(self, losses: Tensor, **hyper: Any) -> Tensor | None:
        """Return which of (T,) losses they must not be, on the device; None if any will do."""
        return None if self.loss_needs(**hyper) == "any" else falls_below(losses, 0.0)

    def refusal(self, **hyper: Any) -> str:
        """Return what a loss must be, and why, as the end of a sentence."""
        name = getattr(self, "strategy_name", type(self).__name__)
        return f"{name} needs {self.loss_needs(**hyper)} losses: {self.use_of_losses}"

    def after_step(self, losses: Tensor, **hyper: Any) -> None:
        """Learn from the losses (T,) the same batch has after the update."""

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
        if self.samples > 1 or self.looks_back or self.needs in ("reps", "lookahead"):
            raise UsageError(f"{type(self).__name__} needs fastmtl's Trainer; its backward cannot be called alone.")
        refused = self.refused(losses.detach(), **kwargs)
        if refused is not None and bool(refused.any()):
            at = int(refused.to(torch.uint8).argmax())
            raise UsageError(
                f"The loss of {self.task_name[at]} is {losses[at].item():.4g}, but {self.refusal(**kwargs)}."
            )
        if self.needs == "losses":
            weights = self.weigh(losses.detach(), None, **kwargs)
            (losses * weights.shared.to(losses.dtype)).sum().backward()
        else:
            weights = self._combine(losses, **kwargs)
        if weights.max_norm is not None:
            nn.utils.clip_grad_norm_(list(self.get_share_params()), weights.max_norm)
        for name, grad in weights.own_grads.items():
            self.get_parameter(name).grad = grad
        shown = weights.reported
        return None if shown is None else np.asarray(shown.detach().cpu().numpy())

    def _combine(self, losses: Tensor, **kwargs: Any) -> Weights:
        """Fill ``.grad`` as the weights of the task gradients say, and return them."""
        if self.weighs_heads and self.rep_grad:
            raise UsageError(f"{type(self).__name__} with rep_grad needs fastmtl's Trainer.")
        found = self._get_grads(losses, mode="autograd" if self.weighs_heads else "backward")
        per_grads, grads = found if self.rep_grad else (None, found)
        groups, rows = self.groups(**kwargs), self._as_rows(grads)
        if self.needs == "rows":
            weights = self.weigh_rows(losses.detach(), rows, **kwargs)
        else:
            gram = ops.gram(grads) if groups is None else ops.gram(rows, groups)
            weights = self.weigh(losses.detach(), gram, **kwargs)
        if weights.heads is not None:
            (losses * weights.heads.to(losses.dtype)).sum().backward()
        if self.rep_grad:
            self._backward_new_grads(weights.shared.to(losses.dtype), per_grads)
        else:
            update = [torch.zeros_like(param) for param in self.get_share_params()]
            ops.combine_(update, rows if weights.rows is None else weights.rows, weights.shared, groups)
            self._reset_grad(torch.cat([grad.flatten() for grad in update]))
        return weights

    def _as_rows(self, grads: Tensor) -> Rows:
        """Return (T, P) gradients cut into the shape of the shared parameters, (T, F) ones of representations whole."""
        if self.rep_grad:
            return [[grad] for grad in grads]
        shapes = [param.shape for param in self.get_share_params()]
        return [
            [part.reshape(shape) for part, shape in zip(grad.split(self.grad_index), shapes, strict=True)]
            for grad in grads
        ]

    def _compute_grad_dim(self) -> None:
        if not hasattr(self, "grad_index"):
            self.grad_index = [param.numel() for param in self.get_share_params()]
            self.grad_dim = sum(self.grad_index)

    def _grad2vec(self) -> Tensor:
        """Return the gradients of the shared parameters as one (P,) vector; missing ones are zero."""
        return self._as_vector([param.grad for param in self.get_share_params()])

    def _as_vector(self, grads: Iterable[Tensor | None]) -> Tensor:
        return torch.cat(
            [
                param.new_zeros(param.numel()) if grad is None else grad.detach().flatten()
                for param, grad in zip(self.get_share_params(), grads, strict=True)
            ]
        )

    def _compute_grad(self, losses: Tensor, mode: str, rep_grad: bool = False) -> Any:
        """Return the (T, P) gradients of the tasks, or with ``rep_grad`` those of the representations.

        Mode ``"backward"`` also accumulates the gradients of the task-specific parameters; ``"autograd"`` does not.
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
                grads.append(self._as_vector(found))
        return grads if rep_grad and not isinstance(self.rep, Tensor) else torch.stack(grads)

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

    def _backward_new_grads(self, batch_weight: Any, per_grads: Any = None, grads: Any = None) -> None:
        """Set the shared parameters' gradients to the sum of (T,) weights times the (T, P) ``grads`` of the tasks.

        With ``rep_grad`` the sum is that of ``per_grads``, the gradients of the tasks' representations.
        """
        found = per_grads if self.rep_grad else grads
        weighted = (batch_weight[t] * found[t] for t in range(self.task_num))
        if not self.rep_grad:
            self._reset_grad(sum(weighted))
        elif isinstance(self.rep, dict):
            torch.autograd.backward([self.rep[task] for task in self.task_name], list(weighted))
        else:
            self.rep.backward(sum(weighted))
