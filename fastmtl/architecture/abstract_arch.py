"""The base of all architectures: a shared trunk, a branch per task, a decoder per task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastmtl.support.hyper import Hyper

__all__ = ["AbsArchitecture"]


class AbsArchitecture(nn.Module):
    """Base of all architectures, compatible with LibMTL's class.

    A prediction is ``decoders[task](branch(trunk(inputs), task))``. ``trunk`` has shared parameters only and runs once
    for all tasks, so that the trainer can differentiate all heads at once and run one VJP per task through the trunk.
    Subclasses define ``trunk`` and ``branch``, or override ``forward``, as in LibMTL, which is then differentiated as a
    whole.

    Args:
        task_name: The T task names, in order.
        encoder_class: Creates an encoder, called without arguments.
        decoders: One module per task.
        rep_grad: Balance gradients of the representation instead of the shared parameters.
        multi_input: Every task has its own inputs.
        device: The device of the model.
        kwargs: Hyper-parameters of the architecture, see ``hyper``.

    Attributes:
        by_place: Patterns of ``state_dict`` names that identify tasks by index, not by name: the group of a pattern is
            a task's index; without a group the tensor has one entry per task. Used to load weights of other tasks.
        needs_stages: Whether it attaches something to the stages of the encoder, which must be made of some.
    """

    hyper: ClassVar[Mapping[str, Hyper]] = {}
    by_place: ClassVar[tuple[str, ...]] = ()
    needs_stages: ClassVar[bool] = False

    encoder: nn.Module

    def __init__(
        self,
        task_name: list[str],
        encoder_class: Callable[[], nn.Module],
        decoders: nn.ModuleDict,
        rep_grad: bool,
        multi_input: bool,
        device: torch.device,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.task_name = task_name
        self.task_num = len(task_name)
        self.encoder_class = encoder_class
        self.decoders = decoders
        self.rep_grad = rep_grad
        self.multi_input = multi_input
        self.device = device
        self.kwargs = {name: spec.default for name, spec in self.hyper.items()} | kwargs
        if rep_grad:
            self.rep_tasks: dict[str, Tensor] = {}
            self.rep: Tensor | dict[str, Tensor] = {}
        self._make_network()

    def _make_network(self) -> None:
        """Create all modules between inputs and decoders; to be overridden."""

    def trunk(self, inputs: Tensor, task_name: str | None = None) -> tuple[Tensor, ...]:
        """Return the shared features that all branches read, of inputs (B, ...) of one task (multi-input) or of all.

        An encoder may return a list with one representation per task. Representations may be containers of tensors and
        other objects.
        """
        features = self.encoder(inputs)
        return tuple(features) if isinstance(features, list | tuple) else (features,)

    def branch(self, features: tuple[Tensor, ...], task: str) -> Tensor:
        """Return the representation that ``decoders[task]`` reads, from the trunk's features."""
        return features[0] if len(features) == 1 else features[self.task_name.index(task)]

    def forward(self, inputs: Tensor, task_name: str | None = None) -> dict[str, Tensor]:
        """Return the predictions by task for inputs (B, ...), of ``task_name`` alone if it is given."""
        features = self.trunk(inputs, task_name)
        tasks = self.task_name if task_name is None else [task_name]
        reps = {task: self.branch(features, task) for task in tasks}
        same_rep = not self.multi_input and len({id(rep) for rep in reps.values()}) == 1
        return {task: self.decoders[task](self._prepare_rep(rep, task, same_rep)) for task, rep in reps.items()}

    def get_share_params(self) -> Iterable[nn.Parameter]:
        """Return the shared parameters, whose task gradients are balanced."""
        return self.encoder.parameters()

    def zero_grad_share_params(self) -> None:
        """Set the gradients of the shared parameters to zero."""
        for param in self.get_share_params():
            if param.grad is not None:
                param.grad.zero_()

    def _prepare_rep(self, rep: Tensor, task: str, same_rep: bool | None = None) -> Tensor:
        """Cut the graph at the representation if ``rep_grad``, and store both sides in ``rep`` and ``rep_tasks``."""
        if not self.rep_grad:
            return rep
        if same_rep:
            self.rep = rep
        else:
            if not isinstance(self.rep, dict):
                self.rep = {}
            self.rep[task] = rep
        self.rep_tasks[task] = rep.detach().clone().requires_grad_()
        return self.rep_tasks[task]

    @property
    def splits(self) -> bool:
        """Whether ``forward`` is the composition of ``trunk``, ``branch`` and decoders."""
        mro = type(self).__mro__
        whole = next(i for i, c in enumerate(mro) if "forward" in c.__dict__)
        parts = min(next(i for i, c in enumerate(mro) if name in c.__dict__) for name in ("trunk", "branch"))
        return parts <= whole
