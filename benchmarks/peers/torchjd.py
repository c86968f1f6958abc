"""TorchJD beside us, where it is installed: its solvers on a Gram matrix, and its training step."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from fastmtl.benchmarks.contender import LocalContender
from fastmtl.benchmarks.work import Work
from torch import Tensor

from fastmtl.errors import UsageError

__all__ = ["torchjd_aggregator", "torchjd_can", "torchjd_solvers", "torchjd_step"]

Solver = Callable[[Tensor], Tensor]
"""From J (T, P) to the weights (T,)."""


def torchjd_solvers(size: int) -> dict[str, Solver]:
    """Return TorchJD's solvers by the name of the strategy; nothing where it is not installed.

    Args:
        size: Number of tasks.
    """
    try:
        module = importlib.import_module("torchjd.aggregation")
    except ImportError:
        return {}
    by_gram = {
        "MGDA": module.MGDAWeighting(),
        "PCGrad": module.PCGradWeighting(),
        "CAGrad": module.CAGradWeighting(c=0.5),
        "FairGrad": module.FairGradWeighting(alpha=1.0),
        "UPGrad": module.UPGradWeighting(),
    }

    def from_gram(weighting: Any) -> Solver:
        gram: dict[int, Tensor] = {}

        def solve(jacobian: Tensor) -> Tensor:
            key = id(jacobian)
            if key not in gram:
                gram[key] = jacobian @ jacobian.T
            weights: Tensor = weighting(gram[key])
            return weights

        return solve

    solvers = {name: from_gram(weighting) for name, weighting in by_gram.items()}
    nash = module.NashMTL(n_tasks=size)
    solvers["Nash_MTL"] = lambda jacobian: nash.weighting(jacobian)
    return solvers


# From the number of tasks to the aggregator of the same strategy.
_AGGREGATORS: dict[str, Callable[[Any, int], Any]] = {
    "Aligned_MTL": lambda module, size: module.AlignedMTL(),
    "CAGrad": lambda module, size: module.CAGrad(c=0.5),
    "ConFIG": lambda module, size: module.ConFIG(),
    "DualProj": lambda module, size: module.DualProj(),
    "EW": lambda module, size: module.Sum(),
    "FairGrad": lambda module, size: module.FairGrad(alpha=1.0),
    "GradVac": lambda module, size: module.GradVac(),
    "IMTL": lambda module, size: module.IMTLG(),
    "MGDA": lambda module, size: module.MGDA(),
    "Nash_MTL": lambda module, size: module.NashMTL(n_tasks=size),
    "PCGrad": lambda module, size: module.PCGrad(),
    "UPGrad": lambda module, size: module.UPGrad(),
}


def torchjd_can(arch: str, weighting: str) -> bool:
    """Return whether TorchJD has the strategy, for a network of one encoder."""
    return arch == "HPS" and weighting in _AGGREGATORS


def torchjd_aggregator(weighting: str, size: int, package: str = "torchjd") -> Any:
    """Return the aggregator of a strategy for ``size`` tasks, of TorchJD or a package with its names."""
    return _AGGREGATORS[weighting](importlib.import_module(f"{package}.aggregation"), size)


def torchjd_step(work: Work, weighting: str, package: str = "torchjd") -> LocalContender:
    """Return a training step by ``mtl_backward`` and ``jac_to_grad``.

    Args:
        work: What to train; of architecture HPS.
        weighting: A strategy for which :func:`torchjd_can` holds.
        package: ``"torchjd"``, or ``"fastmtl"``, which has the same functions.

    Raises:
        UsageError: The package is not installed.
    """
    try:
        autojac: Any = importlib.import_module(f"{package}.autojac")
        aggregator = torchjd_aggregator(weighting, len(work.tasks), package)
    except ImportError:
        raise UsageError("TorchJD is not installed; pip install torchjd.") from None
    encoder, decoders = work.modules()
    optimizer = torch.optim.SGD([*encoder.parameters(), *decoders.parameters()], lr=work.lr)
    shared = list(encoder.parameters())

    def step() -> None:
        features = encoder(work.inputs)
        losses = [work.loss(decoders[task](features), task) for task in work.tasks]
        optimizer.zero_grad()
        autojac.mtl_backward(losses, features=features)
        autojac.jac_to_grad(shared, aggregator)
        optimizer.step()

    return LocalContender(run=step, shared=shared)
