"""Trainable parameters that no loss reaches, named once: they would stay as they are without a word."""

from __future__ import annotations

import warnings

from torch import Tensor

from fastmtl.engine.losses import Problem
from fastmtl.engine.model import Tasks

__all__ = ["UnreachedParameters"]

# Steps after which a parameter that has had no gradient is named, if all tasks have been trained by then; after
# the longer time nothing is.
_STEPS, _MOST_STEPS = 10, 100
_MOST_NAMES = 5


class UnreachedParameters:
    """Looks at the gradients of the first steps.

    Args:
        problem: The network.
        fills: Whether ``.grad`` of parameters without a gradient holds zeros.
    """

    def __init__(self, problem: Problem, fills: bool) -> None:
        self._problem = problem
        self._fills = fills
        self._steps = 0
        self._tasks = set(problem.tasks)
        shared = set(problem.shared_params)
        self._missing = {name: param for name, param in problem.model.named_parameters() if param in shared}
        self._moved: dict[str, Tensor] = {}

    def look(self, tasks: Tasks) -> None:
        """Look at ``.grad`` after a step of some tasks; warn when enough have been.

        Warns:
            UserWarning: Some shared parameters have had no gradient, while others have.
        """
        if not self._missing or not tasks:
            return
        self._steps += 1
        self._tasks.difference_update(tasks)
        self._missing = {name: param for name, param in self._missing.items() if param.grad is None or self._fills}
        for name, param in self._missing.items():
            if param.grad is not None:
                self._moved[name] = self._moved[name] | param.grad.any() if name in self._moved else param.grad.any()
        if self._steps >= _MOST_STEPS:
            self._missing = {}
        if self._steps < _STEPS or self._tasks:
            return
        self._missing = {n: param for n, param in self._missing.items() if n not in self._moved or not self._moved[n]}
        names, self._missing = list(self._missing), {}
        # Where all are without, gradients are kept elsewhere.
        if names and len(names) < len(self._problem.shared_params):
            more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
            warnings.warn(
                f"No loss has reached {', '.join(names[:_MOST_NAMES])}{more} in the first {self._steps} steps: "
                "these shared parameters are not trained. Freeze them if that is meant.",
                stacklevel=2,
            )
