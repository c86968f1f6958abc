"""Experts: encoders of one kind that read the same inputs, run together where that is exact."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fastmtl.model.stages import StagedEncoder

__all__ = ["Experts"]

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

    On a GPU experts of equal shape made of linear layers and activations run as one network whose parameters carry a
    dimension more: a layer is one batched matrix product in place of E small ones, which would each be launched. On a
    CPU, where nothing is launched, that was seen to be slower for all sizes. All other experts run in turn: batch norm
    keeps running statistics and dropout draws random numbers, which a joint pass would do differently, and libraries
    compute the convolutions of one expert at least as well as a grouped convolution of all.

    Args:
        experts: The E experts.

    Attributes:
        together: Whether they can run as one, unless a hook wants to see each of them.
    """

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__(experts)
        first = _anatomy(self[0])
        alike = first is not None and all(_anatomy(each) == first for each in self)
        # Without parameters there is nothing to batch over.
        self.together = len(self) > 1 and alike and any(True for _ in self[0].parameters())

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (E, B, ...) outputs for (B, ...) inputs."""
        joins = self.together and next(self.parameters()).device.type != "cpu"
        if not joins or any(map(_is_hooked, self.modules())):
            return torch.stack([expert(inputs) for expert in self])
        return self.jointly(inputs)

    def jointly(self, inputs: Tensor) -> Tensor:
        """Return the outputs of experts that can run as one, from one pass."""
        names = [name for name, _ in self[0].named_parameters()]
        stacked = {name: torch.stack([expert.get_parameter(name) for expert in self]) for name in names}

        def run(params: dict[str, Tensor]) -> Tensor:
            return functional_call(self[0], params, (inputs,))

        return vmap(run)(stacked)


def _anatomy(expert: nn.Module) -> list[object] | None:
    """Return what must be equal for experts to run as one, or None for one that cannot."""
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
