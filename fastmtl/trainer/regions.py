"""The compiled regions of a training step, and proof that they are what the step runs in."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from fastmtl.trainer.problem import Problem

__all__ = ["CompileReport", "Regions", "measure_compiled"]

_NAMES = ("trunk", "heads", "reps", "decode", "whole", "single", "single_rep", "single_decode")


class Regions:
    """The functions of a `Problem`, each compiled on its own if asked for.

    The network is cut where its graph forks: a compiled backward pass computes all its gradients at once, so one graph for
    trunk and heads would run every head once per task.

    Args:
        problem: The functions.
        compiled: Compile them with torch.compile.
        on_compile: Told when the compilation of a region begins and ends.
    """

    trunk: Callable[..., Any]
    heads: Callable[..., Any]
    reps: Callable[..., Any]
    decode: Callable[..., Any]
    whole: Callable[..., Any]
    single: Callable[..., Any]
    single_rep: Callable[..., Any]
    single_decode: Callable[..., Any]

    def __init__(self, problem: Problem, compiled: bool, on_compile: Callable[[str], None]) -> None:
        self.compiled = compiled
        for name in _NAMES:
            function = getattr(problem, name)
            setattr(self, name, _Region(name, function, on_compile) if compiled else function)


class _Region:
    """A function compiled at its first call."""

    def __init__(self, name: str, function: Callable[..., Any], on_compile: Callable[[str], None]) -> None:
        self.name = name
        self.on_compile = on_compile
        self.function = torch.compile(function)
        self.called = False

    def __call__(self, *args: Any) -> Any:
        if self.called:
            return self.function(*args)
        self.called = True
        start = time.perf_counter()
        self.on_compile(f"compiling {self.name}")
        result = self.function(*args)
        self.on_compile(f"compiled {self.name} in {time.perf_counter() - start:.1f} s")
        return result
