"""The network of a physics-informed problem: a multi-layer perceptron, with its derivatives."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Jet", "PhysicsEncoder"]


class Jet(NamedTuple):
    """A function of points with its derivatives: value (n, fields), first and second (n, fields, coordinates).

    ``second`` has the derivatives twice by the same coordinate.
    """

    value: Tensor
    first: Tensor
    second: Tensor


class PhysicsEncoder(nn.Module):
    """A perceptron with tanh, whose first input, ``inside``, also gets the derivatives by its coordinates.

    Args:
        fields: Outputs of the perceptron.
        coordinates: Inputs of the perceptron.
        width: Width of the hidden layers.
        depth: Number of hidden layers.
    """

    def __init__(self, fields: int = 1, coordinates: int = 2, width: int = 50, depth: int = 5) -> None:
        super().__init__()
        self.feature_dim = fields
        widths = [coordinates, *[width] * depth]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.Tanh()]
        self.network = nn.Sequential(*layers, nn.Linear(width, fields))
        for layer in self.network:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, points: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the `Jet` of the points ``inside``, and the value (m, fields) at each other set of points (m, 2)."""
        return {name: self._jet(where) if name == "inside" else self.network(where) for name, where in points.items()}

    def _jet(self, points: Tensor) -> Jet:
        """Return the value with its derivatives, carried forward from layer to layer by the chain rule.

        With z = W x + b the derivatives of z are W times those of x. With y = tanh(z), by each coordinate,
        y' = (1 - y^2) z' and y'' = (1 - y^2) z'' - 2 y z' y'. That is one pass of 1 + 2 C times as many rows, for C
        coordinates, in place of backward passes for every field and derivative, which would be differentiated again.
        """
        value, second = points, None
        first = torch.eye(points.shape[1], dtype=points.dtype, device=points.device)[:, None]
        for layer in self.network:
            value = layer(value)
            if isinstance(layer, nn.Linear):
                first = nn.functional.linear(first, layer.weight)
                second = None if second is None else nn.functional.linear(second, layer.weight)
            else:
                slope, before = 1 - value.square(), first
                first = slope * before
                bend = -2 * value * before * first
                second = bend if second is None else torch.addcmul(bend, slope, second)
        assert second is not None
        return Jet(value, first.movedim(0, 2), second.movedim(0, 2))
