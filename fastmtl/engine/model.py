"""The interface of a model, which is an architecture with a strategy mixed in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["Features", "HasModules", "Labels", "MTLModel", "Tasks", "preserving_buffers"]

# Tensors, or containers of them.
Features: TypeAlias = tuple[Any, ...]
# The labels of a batch by task; None for a task that has labels in other batches or processes of the step only.
Labels: TypeAlias = Mapping[str, object]
Tasks: TypeAlias = tuple[str, ...]


class HasModules(Protocol):
    """A network, by its modules."""

    def modules(self) -> Iterator[nn.Module]:
        """Return all modules."""


@runtime_checkable
class MTLModel(HasModules, Protocol):
    """A network for several tasks.

    Attributes:
        task_name: The tasks.
        architecture_name: Name of the architecture's class.
        strategy_name: Name of the strategy's class.
        device: Where the model is.
        rep_grad: Whether the gradients of the representations are balanced.
        multi_input: Whether each task has inputs of its own.
        decoders: The decoder of each task.
        rep: With ``rep_grad``, after ``forward``: the representation, or one for each task.
        rep_tasks: The same for each task, detached.
    """

    task_name: list[str]
    architecture_name: str
    strategy_name: str
    device: torch.device
    rep_grad: bool
    multi_input: bool
    decoders: nn.ModuleDict
    rep: Tensor | dict[str, Tensor]
    rep_tasks: dict[str, Tensor]

    @property
    def splits(self) -> bool:
        """Return whether ``trunk`` and ``branch`` are its ``forward``."""

    def __call__(self, inputs: object, task_name: str | None = None) -> dict[str, object]:
        """Return the predictions by task, of one task if it is named."""

    def trunk(self, inputs: Any, task_name: str | None = None) -> Features:
        """Return the shared features."""

    def branch(self, features: Features, task: str) -> Tensor:
        """Return the representation of a task from the shared features."""

    def get_share_params(self) -> Iterable[nn.Parameter]:
        """Return the parameters whose gradients are balanced."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return all parameters."""

    def named_parameters(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """Return all parameters with their names."""


@contextmanager
def preserving_buffers(model: HasModules) -> Iterator[None]:
    """Restore the buffers of a network, such as statistics of batch norms, at the end.

    What a strategy remembers is no part of the network: a forward pass does not change it.
    """
    remembered = getattr(model, "task_dims", {})
    saved = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        # A lazy layer has none yet.
        if buffer is not None and not is_lazy(buffer) and not (module is model and name in remembered)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in saved:
                buffer.copy_(value)
                # The module may have replaced the tensor.
                module._buffers[name] = buffer
