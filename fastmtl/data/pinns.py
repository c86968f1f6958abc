"""Physics-informed networks (Raissi et al., JCP 2019): equations whose exact solutions are known, and no data.

A row is one point inside the domain; each batch has points on the boundary with it. What the network is trained on are
residuals, which need its first and second derivatives; the exact solution only serves to measure the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastmtl.data.registry import DatasetInfo, Facts, LoaderOptions, Splits, register
from fastmtl.data.tasks import TaskInfo
from fastmtl.loss import MSELoss
from fastmtl.metrics import AbsMetric, L1Metric
from fastmtl.model.pinn import Jet
from fastmtl.support.shapes import as_entries

__all__ = ["EQUATIONS", "Equation", "Points", "RelativeError", "burgers_solution", "kovasznay_solution"]

# Of the points inside, how many come with one point of each part of the boundary.
_INSIDE_PER_BOUNDARY = 10
_VISCOSITY = 0.01 / math.pi
_REYNOLDS = 40.0
_LAMBDA = _REYNOLDS / 2 - math.sqrt(_REYNOLDS**2 / 4 + 4 * math.pi**2)


@dataclass(frozen=True, kw_only=True)
class Equation:
    """A differential equation on a rectangle.

    Attributes:
        name, about: What it is called, and what it is.
        low, high: Corners of the rectangle.
        sides: Name of each part of the boundary to the functions that map numbers (n,) in [0, 1) to points (n, 2).
        residuals: Task to its residuals (n, r) inside, given the points and the solution with its derivatives.
        solution: Exact solution (n, fields) at points (n, 2), both float64.
        fields: Number of fields of the solution.
    """

    name: str
    about: str
    low: tuple[float, float]
    high: tuple[float, float]
    sides: dict[str, Callable[[Tensor], Tensor]]
    residuals: dict[str, Callable[[Jet], Tensor]]
    solution: Callable[[Tensor], Tensor]
    fields: int = 1

    def inside(self, numbers: Tensor) -> Tensor:
        """Return points (n, 2) of the rectangle, given numbers (n, 2) in [0, 1)."""
        low, high = torch.tensor(self.low), torch.tensor(self.high)
        return low + (high - low) * numbers


def burgers_solution(points: Tensor) -> Tensor:
    """Return u (n, 1) of Burgers' equation at points (n, 2) of x and t, with u = -sin(pi x) at t = 0.

    It is the quotient of two integrals (Cole, 1951; Hopf, 1950), computed by Gauss-Hermite quadrature of 100 points.
    """
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite.hermgauss(100))
    x, t = points.double().T
    shifted = x[:, None] - torch.sqrt(4 * _VISCOSITY * t)[:, None] * nodes
    exponents = -torch.cos(math.pi * shifted) / (2 * math.pi * _VISCOSITY)
    # Its greatest value cancels out of the quotient.
    factors = weights * torch.exp(exponents - exponents.amax(1, keepdim=True))
    u = -(factors * torch.sin(math.pi * shifted)).sum(1) / factors.sum(1)
    return torch.where(t == 0, -torch.sin(math.pi * x), u)[:, None]


def kovasznay_solution(points: Tensor) -> Tensor:
    """Return u, v and p (n, 3) of Kovasznay's flow (1948) behind a grid, at points (n, 2), for Reynolds number 40."""
    x, y = points.double().T
    growth = torch.exp(_LAMBDA * x)
    u = 1 - growth * torch.cos(2 * math.pi * y)
    v = _LAMBDA / (2 * math.pi) * growth * torch.sin(2 * math.pi * y)
    return torch.stack([u, v, (1 - growth**2) / 2], 1)


def _burgers_residual(jet: Jet) -> Tensor:
    u, u_x, u_t, u_xx = jet.value[:, 0], jet.first[:, 0, 0], jet.first[:, 0, 1], jet.second[:, 0, 0]
    return (u_t + u * u_x - _VISCOSITY * u_xx)[:, None]


def _momentum(jet: Jet) -> Tensor:
    u, v = jet.value[:, 0], jet.value[:, 1]
    laplacian = jet.second.sum(2) / _REYNOLDS
    parts = [
        u * jet.first[:, field, 0] + v * jet.first[:, field, 1] + jet.first[:, 2, field] - laplacian[:, field]
        for field in (0, 1)
    ]
    return torch.stack(parts, 1)


def _continuity(jet: Jet) -> Tensor:
    return (jet.first[:, 0, 0] + jet.first[:, 1, 1])[:, None]


def _sides_of_burgers(numbers: Tensor) -> Tensor:
    # Both ends of the interval, at times from 0 to 1.
    half = len(numbers) // 2
    x = torch.cat([-torch.ones(half), torch.ones(len(numbers) - half)])
    return torch.stack([x, numbers], 1)


def _start_of_burgers(numbers: Tensor) -> Tensor:
    return torch.stack([2 * numbers - 1, torch.zeros_like(numbers)], 1)


def _sides_of_kovasznay(numbers: Tensor) -> Tensor:
    low, high = torch.tensor([-0.5, -0.5]), torch.tensor([1.0, 1.5])
    points = low + (high - low) * numbers[:, None]
    side = torch.arange(len(numbers)) % 4
    points[side == 0, 0], points[side == 1, 0] = low[0], high[0]
    points[side == 2, 1], points[side == 3, 1] = low[1], high[1]
    return points


EQUATIONS = {
    equation.name: equation
    for equation in (
        Equation(
            name="burgers",
            about="Burgers' equation u_t + u u_x = nu u_xx, nu = 0.01 / pi, from -sin(pi x), 0 at both ends",
            low=(-1.0, 0.0),
            high=(1.0, 1.0),
            sides={"boundary": _sides_of_burgers, "initial": _start_of_burgers},
            residuals={"equation": _burgers_residual},
            solution=burgers_solution,
        ),
        Equation(
            name="kovasznay",
            about="Kovasznay's flow: the steady Navier-Stokes equations in two dimensions, Reynolds number 40",
            low=(-0.5, -0.5),
            high=(1.0, 1.5),
            sides={"boundary": _sides_of_kovasznay},
            residuals={"momentum": _momentum, "continuity": _continuity},
            solution=kovasznay_solution,
            fields=3,
        ),
    )
}


class Points(Dataset[tuple[dict[str, Tensor], dict[str, Tensor]]]):
    """Points of a domain; ``__getitems__`` returns whole batches.

    A batch of n points inside has ``max(1, n / 10)`` points of each part of the boundary. Inputs are ``inside`` (n, 2)
    and each part of the boundary (m, 2). Labels of an equation are 0 in the columns of its residuals, and the exact
    solution in those after them, which only `RelativeError` looks at; labels on the boundary are the exact solution.

    Args:
        equation: The equation.
        rows: How many points inside.
        seed: Scrambles the Sobol sequences that the points are drawn by.
    """

    def __init__(self, equation: Equation, rows: int, seed: int) -> None:
        drawn = torch.quasirandom.SobolEngine(2 + len(equation.sides), scramble=True, seed=seed).draw(rows)
        self.inside = equation.inside(drawn[:, :2])
        self.numbers = drawn[:, 2:]
        self.equation = equation
        self.exact = equation.solution(self.inside).float()

    def __len__(self) -> int:
        return len(self.inside)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return a batch of one point inside."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the points, and labels by task."""
        rows = torch.as_tensor(indices)
        inputs, labels = {"inside": self.inside[rows]}, {}
        for task in self.equation.residuals:
            width = _RESIDUALS[self.equation.name, task]
            labels[task] = torch.cat([torch.zeros(len(rows), width), self.exact[rows]], 1)
        count = max(1, len(rows) // _INSIDE_PER_BOUNDARY)
        for place, (side, points_of) in enumerate(self.equation.sides.items()):
            inputs[side] = points_of(self.numbers[rows[:count], place])
            labels[side] = self.equation.solution(inputs[side]).float()
        return inputs, labels


# Residuals of each task.
_RESIDUALS = {("burgers", "equation"): 1, ("kovasznay", "momentum"): 2, ("kovasznay", "continuity"): 1}


class ResidualLoss(MSELoss):
    """Mean square of the first columns of the predictions, which are residuals.

    Args:
        columns: How many.
    """

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean square of the residuals (n, columns) in predictions (n, columns + fields)."""
        return super().compute_loss(pred[:, : self.columns], gt[:, : self.columns])


class RelativeError(AbsMetric):
    """Root mean square of the residuals, and relative error of the solution ``|u - u*| / |u*|``, over all batches.

    Args:
        columns: How many columns of the predictions are residuals; the solution is in those after them.
    """

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self._sums: Tensor | None = None

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Add the sums of squares of one batch."""
        pred, gt = as_entries(pred, gt, "RelativeError")
        pred, gt = pred.detach().double(), gt.double()
        residuals, columns = pred[:, : self.columns], self.columns
        parts = [residuals.square().sum(), (pred - gt)[:, columns:].square().sum(), gt[:, columns:].square().sum()]
        sums = torch.stack([*parts, torch.tensor(float(residuals.numel()), dtype=torch.float64, device=pred.device)])
        self._sums = sums if self._sums is None else self._sums + sums

    def score_fun(self) -> list[float]:
        """Return both, NaN before the first batch."""
        if self._sums is None:
            return [math.nan, math.nan]
        residuals, errors, solution, count = self._sums.tolist()
        return [math.sqrt(residuals / count), math.sqrt(errors / solution)]

    def reinit(self) -> None:
        """Forget all batches."""
        super().reinit()
        self._sums = None

    def sync(self, peers: Any) -> None:
        """Add the sums of the other processes."""
        super().sync(peers)
        self._sums = peers.all_reduce_optional(self._sums)


class _Residuals(nn.Module):
    """The decoder of an equation: no parameters, the residuals and the solution from the derivatives inside."""

    def __init__(self, residuals: Callable[[Jet], Tensor]) -> None:
        super().__init__()
        self.residuals = residuals

    def forward(self, features: dict[str, Any]) -> Tensor:
        jet = Jet(*features["inside"])
        return torch.cat([self.residuals(jet), jet.value], 1)


class _Side(nn.Module):
    """The decoder of a part of the boundary: the solution there."""

    def __init__(self, side: str) -> None:
        super().__init__()
        self.side = side

    def forward(self, features: dict[str, Any]) -> Tensor:
        value: Tensor = features[self.side]
        return value


def _residual_head(residuals: Callable[[Jet], Tensor], feature_dim: int, outputs: int) -> nn.Module:
    return _Residuals(residuals)


def _side_head(side: str, feature_dim: int, outputs: int) -> nn.Module:
    return _Side(side)


def _tasks(equation: Equation) -> dict[str, TaskInfo]:
    tasks = {}
    for task, residuals in equation.residuals.items():
        columns = _RESIDUALS[equation.name, task]
        tasks[task] = TaskInfo(
            outputs=columns + equation.fields,
            make_loss=partial(ResidualLoss, columns),
            make_metric=partial(RelativeError, columns),
            metrics=("residual", "error"),
            weight=(0, 0),
            make_head=partial(_residual_head, residuals),
        )
    for side in equation.sides:
        tasks[side] = TaskInfo(
            outputs=equation.fields,
            make_loss=MSELoss,
            make_metric=L1Metric,
            metrics=("L1",),
            weight=(0,),
            make_head=partial(_side_head, side),
        )
    return tasks


def _splits(equation: Equation, options: LoaderOptions) -> Splits:
    rows = {"train": options.n_train or _ROWS["train"], "val": _ROWS["val"], "test": _ROWS["test"]}
    # Other points for each seed of the run, the same held-out ones for all.
    seeds = {"train": options.seed + 2, "val": 0, "test": 1}
    loaders = {
        split: options.loader(Points(equation, count, seeds[split]), split, in_batches=True)
        for split, count in rows.items()
    }
    facts: Facts = {"fields": equation.fields}
    return Splits(train=loaders["train"], val=loaders["val"], test=loaders["test"], rows=rows, facts=facts)


_ROWS = {"train": 10_000, "val": 2_048, "test": 4_096}

register(
    DatasetInfo(
        name=equation.name,
        description=f"{equation.about}: residuals and conditions of a physics-informed network.",
        source="drawn on first use; the exact solution is known",
        licence="as fastmtl's",
        tasks=_tasks(equation),
        rows=dict(_ROWS),
        encoders=(f"pinn-{equation.name}",),
        load_splits=partial(_splits, equation),
        batch_size=1_000,
        test_batch_size=4_096,
        in_memory=True,
    )
    for equation in EQUATIONS.values()
)
