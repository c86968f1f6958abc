"""The losses and metrics of the tasks, each with sums of its own, and the losses' parameters as a part of the model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from fastmtl.errors import UsageError
from fastmtl.loss import AbsLoss
from fastmtl.metrics import AbsMetric
from fastmtl.trainer.setup.losses import DelegatedLoss, EntryLoss, FunctionLoss, WatchedLoss, as_loss, reduces_to_sum

__all__ = [
    "TaskDict",
    "TaskLosses",
    "check_reductions",
    "hold_losses",
    "loss_names",
    "loss_params",
    "loss_weights",
    "losses_in",
    "losses_of",
    "metrics_of",
]

# For each task ``metrics`` (names), ``metrics_fn``, ``loss_fn`` and ``weight``, as users give them.
TaskDict = Mapping[str, Mapping[str, Any]]


def losses_of(task_dict: TaskDict) -> dict[str, AbsLoss]:
    """Return the losses by task, each an object of its own, as it keeps the task's sums.

    An object of several tasks is copied, unless it holds parameters, which the tasks then train together.

    Raises:
        UsageError: No loss, or one for several tasks that cannot be copied.
    """
    loss_fns = {task: about["loss_fn"] for task, about in task_dict.items()}
    # A list of one is what LibMTL's first versions asked for.
    loss_fns = {
        task: loss_fn[0] if isinstance(loss_fn, list | tuple) and len(loss_fn) == 1 else loss_fn
        for task, loss_fn in loss_fns.items()
    }
    owners: dict[int, str] = {}
    losses: dict[str, AbsLoss] = {}
    for task, part in loss_fns.items():
        owner, name = owners.setdefault(id(part), task), _name(task, "loss_fn")
        loss = as_loss(part, name)
        if loss is part and owner != task:
            is_trained = any(param.requires_grad for param in _holder(part).parameters())
            loss = DelegatedLoss(part) if is_trained else _copy(part, name, owner)
        losses[task] = loss
    return losses


def metrics_of(task_dict: TaskDict) -> dict[str, AbsMetric]:
    """Return the metrics by task, each an object of its own, as it keeps the task's sums.

    Raises:
        UsageError: No metric, as LibMTL's first versions' list of two functions, or one for several tasks that cannot
            be copied.
    """
    owners: dict[int, str] = {}
    metrics: dict[str, AbsMetric] = {}
    for task, about in task_dict.items():
        part, name = about["metrics_fn"], _name(task, "metrics_fn")
        if isinstance(part, list | tuple):
            raise UsageError(
                f"{name} is a list: its functions are now update_fun and score_fun of a class derived from "
                f"fastmtl.metrics.AbsMetric, as AccMetric()."
            )
        if not hasattr(part, "update_fun") or isinstance(part, type):
            raise UsageError(
                f"{name} must be an object of a class derived from fastmtl.metrics.AbsMetric, as AccMetric(), got "
                f"{part!r}."
            )
        owner = owners.setdefault(id(part), task)
        metrics[task] = part if owner == task else _copy(part, name, owner)
    return metrics


def _name(task: str, key: str) -> str:
    return f"task_dict[{task!r}][{key!r}]"


def _copy(part: Any, name: str, owner: str) -> Any:
    try:
        return copy.deepcopy(part)
    except Exception as cause:
        raise UsageError(
            f"{name} is the object of {owner!r} too: give each task one of its own, as it keeps the task's sums; it "
            f"cannot be copied: {cause}."
        ) from cause


class TaskLosses(nn.ModuleDict):
    """The parameters and buffers of losses, by task.

    Modules that were in evaluation mode when they were given stay in it, as a fixed network that a loss compares with.

    Args:
        modules: What holds them.
        apart: The parameters that are of losses alone.
    """

    def __init__(self, modules: Mapping[str, nn.Module], apart: list[nn.Parameter]) -> None:
        super().__init__(dict(modules))
        self.apart = apart
        self._fixed = [module for module in self.modules() if not module.training]

    @override
    def train(self, mode: bool = True) -> TaskLosses:
        super().train(mode)
        for module in self._fixed:
            module.training = False
        return self


class _Held(nn.Module):
    """The parameters and modules of an object that is no module."""

    def __init__(self, parts: Mapping[str, nn.Module | nn.Parameter]) -> None:
        super().__init__()
        for name, part in parts.items():
            free = f"{name}_" if hasattr(self, name) else name
            if isinstance(part, nn.Module):
                self.add_module(free, part)
            else:
                self.register_parameter(free, part)


def hold_losses(model: nn.Module, losses: Mapping[str, AbsLoss]) -> TaskLosses | None:
    """Make the parameters and buffers of losses a part of the model, so that they are trained, moved and saved with it.

    They are in ``model.loss_fn``, by task, with ``_`` behind the name where the network has such an attribute. What
    several tasks have in common is the first one's.

    Raises:
        UsageError: A loss uses a tensor to train that no optimizer would see.
    """
    of_network = set(model.parameters())
    held: dict[str, nn.Module] = {}
    taken: set[int] = set()
    for task, loss in losses.items():
        origin = _origin(loss)
        if id(origin) in taken:
            continue
        taken.add(id(origin))
        _refuse_unseen(origin, _name(task, "loss_fn"), of_network)
        module = _holder(origin)
        if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
            raise UsageError(
                f"{_name(task, 'loss_fn')} has lazy layers, whose shapes the first predictions would decide: give them "
                "sizes."
            )
        if any(True for _ in (*module.parameters(), *module.buffers())):
            held[task] = module
    for task, loss in losses.items():
        if isinstance(loss, WatchedLoss):
            loss.watch(_name(task, "loss_fn"), model.parameters)
    if not held:
        return None
    name = "loss_fn"
    while hasattr(model, name):
        name += "_"
    params = {param: None for module in held.values() for param in module.parameters() if param not in of_network}
    task_losses = TaskLosses(held, list(params))
    setattr(model, name, task_losses)
    return task_losses


def check_reductions(losses: Mapping[str, AbsLoss], several: bool) -> None:
    """Refuse sums over a batch where the losses of ``several`` batches or processes are averaged by their labels."""
    for task, loss in losses.items():
        if several and reduces_to_sum(loss):
            raise UsageError(
                f"{_name(task, 'loss_fn')} is a sum over the batch, reduction='sum': with accumulate or several "
                "processes it must be a mean."
            )


def losses_in(model: nn.Module) -> tuple[str, TaskLosses | None]:
    """Return the name in a model of what :func:`hold_losses` has put there, and it; None if it has not."""
    return next(
        ((name, module) for name, module in model.named_children() if isinstance(module, TaskLosses)), ("", None)
    )


def loss_params(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model that are its losses' alone."""
    _, losses = losses_in(model)
    return [] if losses is None else losses.apart


def loss_names(model: nn.Module) -> list[str]:
    """Return the names of the entries of a model's ``state_dict`` that are its losses'."""
    name, losses = losses_in(model)
    return [] if losses is None else [f"{name}.{key}" for key in losses.state_dict()]


def loss_weights(model: nn.Module) -> list[str]:
    """Return the names of the entries of a model's ``state_dict`` that are weights of torch's losses."""
    name, losses = losses_in(model)
    modules = [] if losses is None else losses.named_modules(prefix=name)
    return [
        f"{place}.{key}"
        for place, module in modules
        if type(module).__module__ == "torch.nn.modules.loss"
        for key, _ in module.named_buffers(recurse=False)
    ]


def _origin(loss: AbsLoss) -> object:
    """Return what was given for a loss."""
    if isinstance(loss, FunctionLoss):
        function: Any = loss.function
        while isinstance(function, partial):
            function = function.func
        if isinstance(function, MethodType) and not isinstance(function.__self__, type):
            return function.__self__
        return function if isinstance(function, nn.Module) else loss.function
    return loss.inner if isinstance(loss, DelegatedLoss | EntryLoss) else loss


def _holder(origin: object) -> nn.Module:
    """Return a module with the parameters and buffers of what was given for a loss; itself if it is one."""
    if isinstance(origin, nn.Module):
        return origin
    parts: dict[str, nn.Module | nn.Parameter] = {}
    for name, part in _parts(origin):
        free = name.replace(".", "_")
        while free in parts:
            free += "_"
        parts[free] = part
    return _Held(parts)


def _parts(owner: object, above: tuple[object, ...] = ()) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    """Yield the modules and parameters that an object holds as attributes, in containers and further losses too."""
    for name, value in _entries(owner, is_given=not above and not isinstance(owner, FunctionType | partial)):
        if isinstance(value, nn.Module | nn.Parameter):
            yield name, value
        elif not any(value is holder for holder in above):
            for inner, part in _parts(value, (*above, owner)):
                yield f"{name}_{inner}", part


def _entries(owner: object, is_given: bool = False) -> list[tuple[str, object]]:
    """Return what an object holds, by name; of objects that are no losses only of one whose method was given."""
    if isinstance(owner, Mapping):
        return [(str(key), value) for key, value in owner.items()]
    if isinstance(owner, list | tuple):
        return [(str(index), value) for index, value in enumerate(owner)]
    is_loss = hasattr(owner, "compute_loss") or (
        callable(owner) and not isinstance(owner, FunctionType | partial | type)
    )
    return list(getattr(owner, "__dict__", {}).items()) if is_loss or is_given else []


def _refuse_unseen(origin: object, name: str, of_network: set[nn.Parameter]) -> None:
    """Refuse what a loss would have trained, in the user's eyes, and no optimizer would see."""
    for key, value in _entries(origin):
        if isinstance(value, Tensor) and value.requires_grad and not isinstance(value, nn.Parameter):
            raise UsageError(
                f"{name} has a tensor {key!r} that requires gradients and is no nn.Parameter: make it one to train it."
            )
    for key, value in _captured(origin).items():
        params = value.parameters() if isinstance(value, nn.Module) else [value] if isinstance(value, Tensor) else []
        # A trainer of an earlier run is a module too.
        if not hasattr(value, "task_dict") and any(param.requires_grad and param not in of_network for param in params):
            raise UsageError(
                f"{name} is a function that uses {key!r}, whose parameters are not the model's: to train them, give a "
                "module or a class derived from fastmtl.loss.AbsLoss that holds them; else let none require gradients."
            )


def _captured(origin: object) -> dict[str, object]:
    """Return what a function uses beside its arguments, by name."""
    if isinstance(origin, partial):
        bound = {f"argument {index}": value for index, value in enumerate(origin.args)} | origin.keywords
        return bound | _captured(origin.func)
    if not isinstance(origin, FunctionType):
        return {}
    used = inspect.getclosurevars(origin)
    return {**used.nonlocals, **used.globals}
