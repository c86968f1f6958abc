"""Gram matrices of task gradients beside training: for strategies that need none, and for looking at single layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmtl.engine.comm import Local
from fastmtl.engine.context import StepContext
from fastmtl.engine.cut import Structure
from fastmtl.engine.engine import GradientEngine
from fastmtl.engine.labels import present_tasks
from fastmtl.engine.losses import Problem
from fastmtl.engine.methods.whole import Whole
from fastmtl.engine.regions import Regions
from fastmtl.engine.scaling import LossScale
from fastmtl.engine.side_effects import in_one_piece, without_side_effects

__all__ = ["GramProbe"]


class GramProbe:
    """Computes the Gram matrix of a batch's task gradients, of the shared parameters; training does not notice.

    A call costs one forward pass and one backward pass per task. Buffers, random numbers and losses are as before
    afterwards, and no ``.grad`` is written.

    Args:
        problem: The network with its losses.
    """

    def __init__(self, problem: Problem) -> None:
        comm = Local(problem.shared_params, list(problem.model.parameters()))
        regions = Regions(problem, False, lambda line: None)
        self._problem = problem
        self._comm = comm
        self._engine = GradientEngine(Whole(Structure(problem, comm), regions, comm, weighs_heads=False))
        self._scale = LossScale(torch.zeros((), device=problem.model.device))

    def gram(self, inputs: Any, labels: Any, groups: Sequence[int] | None = None) -> Tensor:
        """Return the inner products (T, T) of the task gradients; NaN for tasks without labels in the batch.

        Args:
            inputs: The inputs on the device, by task if multi-input.
            labels: The labels by task.
            groups: The group 0 .. L-1 of each of ``problem.shared_params``; the result is then (L, T, T).
        """
        problem = self._problem
        names = problem.tasks
        present = present_tasks(problem.losses, [labels])
        places = list(range(len(names))) if present is None else present
        if not places:
            shape = (len(names),) * 2 if groups is None else (max(groups) + 1, *(len(names),) * 2)
            return torch.full(shape, torch.nan, device=problem.model.device)
        tasks = tuple(names[place] for place in places)
        ctx = StepContext.of([(inputs, labels)], tasks, problem, self._comm, 1, self._scale, lambda params: [])
        with without_side_effects(problem), in_one_piece(problem.model):
            gram = self._engine.differentiate(ctx, None).gram(groups).detach()
        if present is None:
            return gram
        whole = gram.new_full((*gram.shape[:-2], len(names), len(names)), torch.nan)
        at = torch.tensor(places, device=gram.device)
        whole[..., at[:, None], at] = gram
        return whole

    def of_steps(self, count: int, inputs: Any, labels: Any) -> np.ndarray:
        """Return (n, T, T) for n steps of which only the last one is known; NaN for the others."""
        gram = self.gram(inputs, labels).cpu().double().numpy()
        steps = np.full((count, *gram.shape), np.nan)
        steps[-1] = gram
        return steps
