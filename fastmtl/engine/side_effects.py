"""Passes over a network without side effects."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmtl.engine.losses import Problem
from fastmtl.engine.model import MTLModel, preserving_buffers

__all__ = ["in_one_piece", "preserving_rng_state", "without_side_effects"]


@contextmanager
def without_side_effects(problem: Problem) -> Iterator[None]:
    """Run the network in the block as in training; then restore buffers, the state of losses and random numbers."""
    with ExitStack() as stack:
        stack.enter_context(preserving_buffers(problem.model))
        stack.enter_context(preserving_rng_state(problem.model.device))
        for loss in problem.losses.values():
            stack.enter_context(_preserving_attributes(loss))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def in_one_piece(model: MTLModel) -> Iterator[None]:
    """Do not cut the graph at the representation in the block, with ``rep_grad`` either."""
    before, model.rep_grad = model.rep_grad, False
    try:
        yield
    finally:
        model.rep_grad = before


@contextmanager
def preserving_rng_state(device: torch.device) -> Iterator[None]:
    """Restore the random generators of torch, NumPy and Python at the end."""
    state, numpy_state = random.getstate(), np.random.get_state()
    on_mps = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        if on_mps is not None:
            torch.mps.set_rng_state(on_mps)


@contextmanager
def _preserving_attributes(owner: Any) -> Iterator[None]:
    """Restore the attributes of an object, such as running means, and the values of those that are tensors."""
    before = dict(vars(owner))
    # Inference tensors have no version counter, and are not changed.
    tensors = [value for value in before.values() if isinstance(value, Tensor) and not value.is_inference()]
    saved = [(tensor, tensor._version, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        vars(owner).clear()
        vars(owner).update(before)
        with torch.no_grad():
            for tensor, version, value in saved:
                if tensor._version != version:
                    tensor.copy_(value)
