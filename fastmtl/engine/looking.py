"""Passes over a network that leave no trace in it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmtl.engine.losses import Problem
from fastmtl.engine.model import MTLModel, keeping_buffers

__all__ = ["in_one_piece", "keeping_random_numbers", "leaving_no_trace"]


@contextmanager
def leaving_no_trace(problem: Problem) -> Iterator[None]:
    """Run the network in the block as in training; buffers, what losses remember and random numbers are put back."""
    with ExitStack() as stack:
        stack.enter_context(keeping_buffers(problem.model))
        stack.enter_context(keeping_random_numbers(problem.model.device))
        for loss in problem.losses.values():
            stack.enter_context(_keeping_attributes(loss))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def in_one_piece(model: MTLModel) -> Iterator[None]:
    """Leave the graph whole at the representation, also with ``rep_grad``."""
    before, model.rep_grad = model.rep_grad, False
    try:
        yield
    finally:
        model.rep_grad = before


@contextmanager
def keeping_random_numbers(device: torch.device) -> Iterator[None]:
    """Put the generators of torch, NumPy and Python back at the end."""
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
def _keeping_attributes(owner: Any) -> Iterator[None]:
    """Put back the attributes of an object, such as running means, and the values of those that are tensors."""
    before = dict(vars(owner))
    # What was made for inference alone has no versions; nor is it changed.
    tensors = [kept for kept in before.values() if isinstance(kept, Tensor) and not kept.is_inference()]
    values = [(kept, kept._version, kept.detach().clone()) for kept in tensors]
    try:
        yield
    finally:
        vars(owner).clear()
        vars(owner).update(before)
        with torch.no_grad():
            for kept, version, value in values:
                if kept._version != version:
                    kept.copy_(value)
