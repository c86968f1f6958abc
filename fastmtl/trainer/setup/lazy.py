"""Layers whose shapes the first inputs decide: they get them before anything counts or trains parameters."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader

from fastmtl.architecture import AbsArchitecture
from fastmtl.engine.model import preserving_buffers
from fastmtl.errors import UsageError
from fastmtl.trainer.setup.loaders import to_device

__all__ = ["settle_shapes"]


def settle_shapes(model: AbsArchitecture, example_inputs: Any) -> None:
    """Run one forward pass where there are example inputs, so that lazy layers get their shapes.

    It leaves no trace in random numbers, buffers and modes. The layers are initialised after it, in the order of the
    network's modules: a seed gives what it gives a network without lazy layers, if all of its layers are lazy.

    Args:
        model: The network; it goes to its device if it runs.
        example_inputs: Inputs of a batch, by task if multi-input, or a function that returns them, which is called if
            there are lazy layers; None if there are none.

    Raises:
        UsageError: There are lazy layers and no inputs, or inputs that do not reach all of them or do not fit.
    """
    lazy = _lazy_layers(model)
    if isinstance(example_inputs, FunctionType | MethodType | partial):
        example_inputs = example_inputs() if lazy else None
    if example_inputs is None:
        if lazy:
            raise UsageError(
                f"{_listed(lazy)} lazy, so that the first inputs decide the shapes: give Trainer example_inputs, the "
                "inputs of a batch."
            )
        return
    if model.multi_input and not isinstance(example_inputs, Mapping):
        raise UsageError(
            f"example_inputs must be a dictionary by task when multi_input is True, got "
            f"{type(example_inputs).__name__}.{_hint(example_inputs, model.task_name)}"
        )
    model.to(model.device)
    # The class of a layer is another one once it has its shape.
    resettable = [module for module in lazy.values() if _draws_as_torch_does(module)]
    with _without_trace(model):
        _run(model, to_device(example_inputs, model.device), training=False)
        if _lazy_layers(model):
            # Parts of some networks run in training only.
            _run(model, to_device(example_inputs, model.device), training=True)
    if left := _lazy_layers(model):
        told = _without_inputs(model, example_inputs) or ": leave out what does not run."
        raise UsageError(f"{_listed(left)} lazy and not reached by example_inputs{told}")
    for module in resettable:
        module.reset_parameters()  # type: ignore[operator]


def _lazy_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if any(map(is_lazy, chain(module._parameters.values(), module._buffers.values())))
    }


def _listed(layers: Mapping[str, nn.Module]) -> str:
    names = list(layers)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'}"


def _without_inputs(model: AbsArchitecture, inputs: Any) -> str | None:
    """Return which tasks have no inputs of their own, as the end of a sentence."""
    missing = [task for task in model.task_name if model.multi_input and task not in inputs]
    if not missing:
        return None
    return f", which has no inputs of {', '.join(missing)}, only of {', '.join(map(repr, inputs)) or 'no task'}."


def _hint(inputs: Any, tasks: list[str]) -> str:
    """Return what example inputs are taken for, where they look like something else."""
    if isinstance(inputs, DataLoader | Iterator):
        return " It looks like a loader: give the inputs of a batch, next(iter(loader))[0]."
    if isinstance(inputs, list | tuple) and len(inputs) == 2:
        labels = inputs[1]
        if isinstance(labels, Mapping) and any(task in labels for task in tasks):
            return " It looks like a pair of inputs and labels: give the inputs alone."
    if callable(inputs) and not isinstance(inputs, nn.Module):
        return " It looks like a function, but is an object of a class: give its __call__, or a lambda."
    return ""


def _draws_as_torch_does(module: nn.Module) -> bool:
    """Return whether a layer is drawn by ``reset_parameters`` alone, and may be drawn anew."""
    methods = [getattr(type(module), name, None) for name in ("initialize_parameters", "reset_parameters")]
    return all(getattr(method, "__module__", "").startswith("torch.") for method in methods)


@torch.no_grad()
def _run(model: AbsArchitecture, inputs: Any, training: bool) -> None:
    model.train(training)
    try:
        if not model.multi_input:
            model(inputs)
            return
        for task in model.task_name:
            if task in inputs:
                model(inputs[task], task)
    except UsageError:
        raise
    except Exception as cause:
        parts = [inputs, *(inputs.values() if model.multi_input else ())]
        hint = next(filter(None, (_hint(part, model.task_name) for part in parts)), "")
        raise UsageError(f"example_inputs cannot go through the network: {cause}{'.' if hint else ''}{hint}") from cause


@contextmanager
def _without_trace(model: AbsArchitecture) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), preserving_buffers(model):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        for module, training in modes:
            module.training = training
        if model.rep_grad:
            model.rep, model.rep_tasks = {}, {}
