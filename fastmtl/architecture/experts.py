"""Experts, equal encoders of the same inputs, and the gates that mix their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from operator import index

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fastmtl.errors import UsageError
from fastmtl.model.features import undrawn_tables
from fastmtl.model.stages import StagedEncoder
from fastmtl.support.hyper import Hyper

__all__ = [
    "IMG_SIZE",
    "NUM_EXPERTS",
    "Experts",
    "count_experts",
    "feature_dim",
    "image_size",
    "integers",
    "make_experts",
    "make_gate",
    "mix",
    "read",
    "size_of_gates",
]

# Hyper-parameters that are one or several integers, possibly as text from LibMTL's command line.
Integers = int | str | Iterable[int | str]

IMG_SIZE = Hyper(
    type=int,
    default=(),
    many=True,
    help="Size of one input, such as 3 32 32: gates read the flattened inputs; without it, the experts' mean features.",
)
NUM_EXPERTS = Hyper(type=int, default=(1, 1), many=True, help="Number of shared experts, then of each task's own.")


_ROW_BY_ROW = (
    nn.ELU,
    nn.Flatten,
    nn.GELU,
    nn.Identity,
    nn.LayerNorm,
    nn.LeakyReLU,
    nn.Linear,
    nn.ReLU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Tanh,
)


class Experts(nn.ModuleList):
    """A list of experts; the call returns all their outputs.

    On a GPU experts of equal shape made of linear layers and activations are vectorised: each layer is one batched
    matrix product in place of E kernel launches. On a CPU this is slower for all sizes. All other experts run in turn:
    running statistics of batch norm and random numbers of dropout would differ, and grouped convolutions are not faster
    than separate ones.

    Attributes:
        together: Whether the experts can be vectorised, if no module has hooks.
    """

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__(experts)
        first = _anatomy(self[0])
        alike = first is not None and all(_anatomy(expert) == first for expert in self)
        # vmap needs parameters to batch over.
        self.together = len(self) > 1 and alike and any(True for _ in self[0].parameters())

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (E, B, ...) outputs for (B, ...) inputs."""
        joins = self.together and next(self.parameters()).device.type != "cpu"
        if not joins or any(map(_is_hooked, self.modules())):
            return torch.stack([expert(inputs) for expert in self])
        return self.jointly(inputs)

    def jointly(self, inputs: Tensor) -> Tensor:
        """Return the outputs of experts that can be vectorised, from one pass."""
        names = [name for name, _ in self[0].named_parameters()]
        stacked = {name: torch.stack([expert.get_parameter(name) for expert in self]) for name in names}

        def run(params: dict[str, Tensor]) -> Tensor:
            return functional_call(self[0], params, (inputs,))

        return vmap(run)(stacked)


def _anatomy(expert: nn.Module) -> list[object] | None:
    """Return what must be equal for experts to be vectorised; None if an expert cannot be."""
    parts: list[object] = []
    for name, module in expert.named_modules():
        container = type(module) in (nn.Sequential, nn.ModuleList) or (
            isinstance(module, StagedEncoder) and type(module).forward is StagedEncoder.forward
        )
        if not (container or type(module) in _ROW_BY_ROW):
            return None
        shapes = [(key, param.shape, param.dtype) for key, param in module.named_parameters(recurse=False)]
        parts.append((name, type(module), "" if container else module.extra_repr(), shapes))
    return parts


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def make_experts(
    make: Callable[[], nn.Module], count: int, bottom: nn.Module | None = None
) -> tuple[list[nn.Module], nn.Module]:
    """Return experts, and what they begin with and share, which is left out of them; an identity if that is nothing.

    Encoders share their ``stem`` if they say so by ``shares_stem``, as a ``FeatureEncoder`` does: its tables, which are
    made once.

    Args:
        make: Makes an encoder.
        count: The number of experts.
        bottom: What other experts share with these; that of the first one if None.

    Raises:
        UsageError: Some encoders share their stem, and others do not.
    """
    experts = []
    for _ in range(count):
        if bottom is None or isinstance(bottom, nn.Identity):
            expert = make()
        else:
            with undrawn_tables() as made:
                expert = make()
            if any(tables is not getattr(expert, "stem", None) for tables in made):
                # Some of them will be read.
                expert = make()
        stem = expert.get_submodule("stem") if getattr(expert, "shares_stem", False) else None
        if bottom is None:
            bottom = nn.Identity() if stem is None else stem
        if (stem is None) != isinstance(bottom, nn.Identity) and not isinstance(stem, nn.Identity):
            raise UsageError("encoder_class must return encoders of one kind: only some of these share their tables.")
        if stem is not None:
            expert.stem = nn.Identity()
        experts.append(expert)
    assert bottom is not None
    return experts, bottom


def size_of_gates(value: Integers, bottom: nn.Module) -> list[int]:
    """Return ``img_size``, the size of what gates read; if it is empty, that of the vectors of a shared bottom."""
    size = image_size(value)
    width = getattr(bottom, "width", None)
    return [width] if not size and isinstance(width, int) else size


def make_gate(inputs: int, experts: int) -> nn.Sequential:
    """Return a gate: (B, inputs) to (B, experts) weights that sum to 1."""
    return nn.Sequential(nn.Linear(inputs, experts), nn.Softmax(dim=-1))


def mix(reps: Tensor, selector: Tensor) -> Tensor:
    """Return ``sum_e selector_be reps_eb``, the mixture of (E, B, ...) outputs by (B, E) weights."""
    return torch.einsum("eb...,be->b...", reps, selector)


def read(inputs: Tensor, reps: Tensor, img_size: Sequence[int]) -> Tensor:
    """Return the input of a gate, (B, F): the flattened inputs if ``img_size`` is given, else the mean features.

    Args:
        inputs: (B, ...).
        reps: Features of all experts, (E, B, C), (E, B, L, C) or (E, B, C, H, W).
        img_size: Size of one input, or empty.

    Raises:
        UsageError: The inputs have another size, or are not floating-point numbers.
    """
    if not img_size:
        mean = reps.mean(0)
        if mean.dim() == 2:
            return mean
        return mean.mean(1) if mean.dim() == 3 else mean.flatten(2).mean(2)
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise UsageError(f"img_size must be left out for inputs of {kind}: gates can only read floating-point inputs.")
    flat = inputs.flatten(1)
    if flat.shape[1] != prod(img_size):
        raise UsageError(
            f"img_size must be the size of one input, got {tuple(img_size)} and inputs of {tuple(inputs.shape[1:])}."
        )
    return flat


def feature_dim(encoder: nn.Module) -> int:
    """Return the channels of an encoder's output.

    Raises:
        UsageError: The encoder has no integer ``feature_dim``.
    """
    dim = getattr(encoder, "feature_dim", None)
    if not isinstance(dim, int):
        raise UsageError(
            f"Gates need img_size, the size of one input, or an encoder with the attribute feature_dim, the channels "
            f"of its output; got no img_size and {type(encoder).__name__}."
        )
    return dim


def integers(value: Integers, name: str) -> list[int]:
    """Return the integers of the hyper-parameter ``name``.

    Raises:
        UsageError: The value holds anything else.
    """
    values = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    try:
        return [int(item) if isinstance(item, str) else index(item) for item in values]
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be an integer or a list of them, got {value!r}.") from None


def image_size(value: Integers) -> list[int]:
    """Return ``img_size`` as a list, which may be empty.

    Raises:
        UsageError: It has other values than integers of at least 1.
    """
    size = integers(value, "img_size")
    if not all(length >= 1 for length in size):
        raise UsageError(f"img_size must be at least 1 in every dimension, got {value}.")
    return size


def count_experts(value: Integers, tasks: int, owner: str) -> list[int]:
    """Return the numbers of shared experts and of each task's, given in full or as [shared, of each task].

    Raises:
        UsageError: Another number of values, or one below 1.
    """
    counts = integers(value, "num_experts")
    counts = [counts[0], *counts[1:] * tasks] if len(counts) == 2 else counts
    if len(counts) != tasks + 1 or not all(count >= 1 for count in counts):
        raise UsageError(
            f"num_experts of {owner} must be the number of shared experts, then that of each of the {tasks} tasks' "
            f"own, all at least 1, got {value}."
        )
    return counts
