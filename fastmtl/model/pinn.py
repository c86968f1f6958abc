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
        features: dict[str, Any] = {name: self.network(where) for name, where in points.items() if name != "inside"}
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            where = points["inside"].detach().requires_grad_()
            value: Tensor = self.network(where)
            first = _derivatives(value, where)
            second = torch.stack(
                [
                    torch.stack(
                        [_derivative(first[:, field, axis], where)[:, axis] for axis in range(where.shape[1])], 1
                    )
                    for field in range(value.shape[1])
                ],
                1,
            )
        jet = (value, first, second)
        features["inside"] = jet if keep else tuple(part.detach() for part in jet)
        return features


def _derivatives(value: Tensor, where: Tensor) -> Tensor:
    """Return the derivatives (n, fields, coordinates) of values (n, fields), each of one point."""
    return torch.stack([_derivative(column, where) for column in value.unbind(1)], 1)


def _derivative(column: Tensor, where: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(column.sum(), where, create_graph=True)
    return gradient
