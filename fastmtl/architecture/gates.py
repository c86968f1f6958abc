"""Gates: what they read, and the mixtures of experts they make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from operator import index

import torch
from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.support.hyper import Hyper

__all__ = [
    "IMG_SIZE",
    "NUM_EXPERTS",
    "count_experts",
    "feature_dim",
    "flatten",
    "image_size",
    "integers",
    "make_gate",
    "mix",
    "pool",
]

# Hyper-parameters that are integers: one, several, or text as on LibMTL's command line.
Integers = int | str | Iterable[int | str]

IMG_SIZE = Hyper(
    type=int,
    default=(),
    many=True,
    help="Size of one input, such as 3 32 32: gates read the flattened inputs; without it, the experts' mean features.",
)
NUM_EXPERTS = Hyper(type=int, default=(1, 1), many=True, help="Number of shared experts, then of each task's own.")


def make_gate(inputs: int, experts: int) -> nn.Sequential:
    """Return a gate: (B, inputs) to (B, experts) weights that sum to 1."""
    return nn.Sequential(nn.Linear(inputs, experts), nn.Softmax(dim=-1))


def mix(reps: Tensor, selector: Tensor) -> Tensor:
    """Return ``sum_e selector_be reps_eb``, the mixture for every row.

    Args:
        reps: (E, B, ...) outputs of the experts.
        selector: (B, E) weights.
    """
    return torch.einsum("eb...,be->b...", reps, selector)


def flatten(inputs: Tensor, img_size: Sequence[int]) -> Tensor:
    """Return (B, ...) inputs as (B, F), which a gate made for ``img_size`` can read.

    Raises:
        UsageError: The inputs have another size, or are not floating-point numbers.
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise UsageError(f"img_size must be left out for inputs of {kind}: gates can only read floating-point inputs.")
    flat = inputs.flatten(1)
    if flat.shape[1] != prod(img_size):
        raise UsageError(
            f"img_size must be the size of one input, got {tuple(img_size)} and inputs of {tuple(inputs.shape[1:])}."
        )
    return flat


def pool(reps: Tensor) -> Tensor:
    """Return the mean features of all experts: (E, B, C), (E, B, L, C) or (E, B, C, H, W) to (B, C)."""
    mean = reps.mean(0)
    if mean.dim() == 2:
        return mean
    return mean.mean(1) if mean.dim() == 3 else mean.flatten(2).mean(2)


def feature_dim(encoder: nn.Module) -> int:
    """Return the channels of an encoder's output.

    Raises:
        UsageError: It does not tell.
    """
    dim = getattr(encoder, "feature_dim", None)
    if not isinstance(dim, int):
        raise UsageError(
            f"Gates need img_size, the size of one input, or an encoder with the attribute feature_dim, the channels "
            f"of its output; got no img_size and {type(encoder).__name__}."
        )
    return dim


def integers(given: Integers, name: str) -> list[int]:
    """Return one integer or several as a list; they may be text, as on LibMTL's command line.

    Args:
        given: The hyper-parameter's value.
        name: Its name, for the message.

    Raises:
        UsageError: Something else.
    """
    several = given if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    try:
        return [int(each) if isinstance(each, str) else index(each) for each in several]
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be an integer or a list of them, got {given!r}.") from None


def image_size(given: Integers) -> list[int]:
    """Return ``img_size`` as a list, empty where none is given.

    Raises:
        UsageError: No integers, or one below 1.
    """
    size = integers(given, "img_size")
    if not all(each >= 1 for each in size):
        raise UsageError(f"img_size must be at least 1 in every dimension, got {given}.")
    return size


def count_experts(given: Integers, tasks: int, owner: str) -> list[int]:
    """Return the number of shared experts and the number of every task's own.

    Args:
        given: ``num_experts``: [shared, own of task 1, own of task 2, ...], or [shared, own of each task].
        tasks: The number of tasks.
        owner: The architecture, for the message.

    Raises:
        UsageError: Another number of them, or one below 1.
    """
    counts = integers(given, "num_experts")
    counts = [counts[0], *counts[1:] * tasks] if len(counts) == 2 else counts
    if len(counts) != tasks + 1 or not all(count >= 1 for count in counts):
        raise UsageError(
            f"num_experts of {owner} must be the number of shared experts, then that of each of the {tasks} tasks' "
            f"own, all at least 1, got {given}."
        )
    return counts
