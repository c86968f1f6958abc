"""What every weighting strategy is: a rule that turns losses and the Gram matrix into weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastmtl.engine.comm import RowShapedState
from fastmtl.engine.groups import Groups
from fastmtl.engine.lookahead import LookAhead
from fastmtl.engine.weights import Rows, Weights
from fastmtl.support.classes import overrides
from fastmtl.support.dtypes import falls_below
from fastmtl.support.hyper import Hyper

__all__ = ["LossNeeds", "Needs", "StepNeeds", "Strategy"]

Needs = Literal["losses", "gram", "rows", "reps", "lookahead"]
StepNeeds = Literal[Needs, "backward"]
LossNeeds = Literal["any", "non-negative", "positive"]


class Strategy(nn.Module):
    """A rule that turns losses, or gradients, of T tasks into weights.

    A strategy says what it ``needs`` and overrides the method that belongs to it. That method gets the losses, detached
    and (T,), with k samples (k, T), and the hyper-parameters by name; it runs no backward pass and never reads a tensor
    on the host. What it remembers is registered with :meth:`remember`.

    Attributes:
        needs: ``"losses"``: one backward pass of the weighted losses. ``"gram"``: the gradients of all tasks, of which
            :meth:`weigh` sees the Gram matrix. ``"rows"``: the gradients themselves, for :meth:`weigh_rows`.
            ``"reps"``: representations and their gradients, for :meth:`mask_reps`. ``"lookahead"``: gradients where
            a step would lead, for :meth:`look_ahead`.
        hyper: The hyper-parameters, by name.
        samples: Batches per step, each with its own forward and backward passes.
        weighs_heads: Whether the gradients of task-specific parameters are weighted too.
        needs_losses: What losses must be for the rule to have a meaning. Unless it is ``"any"``, a step with a negative
            loss changes nothing and is reported; a loss that is negative by rounding counts as 0. With ``"positive"`` a
            task whose loss is 0 takes no part in the step.
        use_of_losses: Why, as the second half of the sentence the user gets: ``"it takes their logarithms"``.
        reads_losses: Whether the weights depend on the losses of the step.
        looks_back: Whether :meth:`after_step` gets the batch's losses after the update, from a second forward pass.
        allows_rep_grad: Whether ``rep_grad`` can be on.
        takes_groups: Whether :meth:`weigh` takes the Gram matrices (L, T, T) of L groups of parameters at once, and
            returns ``shared`` (L, T). Else it is called for each group in turn, and what it remembers is of that group.
        against_groups: Why groups have no meaning for the rule, as the end of a sentence; ``""`` if they have.
        grouping: The groups of the shared parameters that the trainer's ``groups`` asks for; None for one of all.
        weighs_rest: Whether other groups have been weighed in this step before those that are weighed now.
        tasks_per_step: Tasks of a step, where the option of this name is not given; all if None.
        steers_adam: Whether the update is made for Adam, so that its first moment becomes what the rule wants: other
            optimizers are refused.
        first_decay: Adam's beta1 in this step, where ``steers_adam``.
        active: Indices of the tasks of this step if it has only some; ``task_num`` is then their number.
        row_states: State that is as large as the task gradients, by name.
        sum_parts: Sums a tensor over the processes that each have a part of every gradient; None if this process has
            the whole gradients.
        task_dims: Which dimensions of each remembered tensor have one entry per task, by name.
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
    takes_groups: ClassVar[bool] = False
    against_groups: ClassVar[str] = ""
    tasks_per_step: ClassVar[int | None] = None
    steers_adam: ClassVar[bool] = False

    grouping: Groups | None = None
    weighs_rest = False
    first_decay: float = 0.9
    active: list[int] | None = None
    row_states: Mapping[str, RowShapedState] = MappingProxyType({})
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

    def __init_subclass__(cls, **options: Any) -> None:
        """Reset ``takes_groups`` of a base class where ``weigh`` is overridden."""
        super().__init_subclass__(**options)
        if overrides(cls, "weigh", "takes_groups"):
            cls.takes_groups = False

    def init_param(self) -> None:
        """Create the strategy's own parameters and state; called once the architecture is built."""

    def remember(self, name: str, value: Tensor, task_dims: Sequence[int] | None = None) -> None:
        """Keep a tensor from step to step: it is part of ``state_dict``, and moves with the model.

        Write into it (``self.name.copy_(...)``) or assign to it. ``task_dims`` are the dimensions that have one entry
        per task: by default the first one, none of a scalar.
        """
        self.register_buffer(name, value)
        dims = range(min(value.dim(), 1)) if task_dims is None else task_dims
        self.task_dims = {**self.task_dims, name: tuple(dims)}

    def whole(self, sums: Tensor) -> Tensor:
        """Return sums over all entries of the gradients, such as a Gram matrix, from sums over this process's entries.

        A strategy that ``needs`` rows calls it: with several processes each has a part of every row.
        """
        return sums if self.sum_parts is None else self.sum_parts(sums.contiguous())

    def remembered(self) -> list[str]:
        """Return the names of what :meth:`remember` keeps."""
        return list(self.task_dims)

    def start_epoch(self, **hyper: Any) -> None:
        """Prepare for the steps of ``self.epoch``; the one place where a strategy may wait for the device."""

    def groups(self, **hyper: Any) -> list[int] | None:
        """Return the group of each shared parameter, 0 .. L-1, where groups have weights of their own; None for one."""
        return None if self.grouping is None else self.grouping.of

    def weigh(self, losses: Tensor, gram: Any, **hyper: Any) -> Weights:
        """Return the weights of this step's losses or gradients.

        ``gram`` is the float64 Gram matrix of the task gradients if ``needs`` is ``"gram"``, else None: (T, T), with k
        samples (k T, k T), sample by sample; with ``takes_groups`` those of L groups are (L, T, T). With ``rep_grad``
        the gradients are those of the representation, summed over the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} overrides neither weigh nor backward.")

    def weigh_rows(self, losses: Tensor, rows: Rows, **hyper: Any) -> Weights:
        """Return the weights of this step's T gradients.

        ``rows`` holds for each task a list over the shared parameters, with None where the task has no gradient; it is
        read-only. With several processes the lists hold the pieces that this one has; see :meth:`whole`.
        """
        raise NotImplementedError

    def mask_reps(
        self, losses: Tensor, reps: Sequence[Tensor], grads: Sequence[Tensor], **hyper: Any
    ) -> Sequence[Tensor]:
        """Return what flows back into the representations in place of their gradients.

        ``reps`` are T representations (B, ...), the very same tensor T times where the tasks share it; then one sum
        over the tasks is returned.
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
        """Return (T,) booleans on the device: which losses the rule cannot use; None if it takes any."""
        return None if self.loss_needs(**hyper) == "any" else falls_below(losses, 0.0)

    def refusal(self, **hyper: Any) -> str:
        """Return what a loss must be, and why, as the end of a sentence."""
        name = getattr(self, "strategy_name", type(self).__name__)
        return f"{name} needs {self.loss_needs(**hyper)} losses: {self.use_of_losses}"

    def after_step(self, losses: Tensor, **hyper: Any) -> None:
        """Learn from the losses (T,) that the same batch has after the update."""

    def get_share_params(self) -> Iterable[nn.Parameter]:
        """Return the shared parameters; the architecture overrides this."""
        raise NotImplementedError

    def zero_grad_share_params(self) -> None:
        """Set the gradients of the shared parameters to zero; the architecture overrides this."""
        raise NotImplementedError
