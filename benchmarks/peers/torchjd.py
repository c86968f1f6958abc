"""TorchJD beside us, where it is installed: its solvers on a Gram matrix, and its training step."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from fastmtl.benchmarks.work import Contender, Work
from torch import Tensor

from fastmtl.errors import UsageError

__all__ = ["torchjd_solvers", "torchjd_step"]

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


def torchjd_step(work: Work, weighting: str) -> Contender:
    """Return a training step by ``mtl_backward`` and ``jac_to_grad``.

    Raises:
        UsageError: TorchJD is not installed, or has no such strategy, or the architecture is not HPS.
    """
    try:
        aggregation: Any = importlib.import_module("torchjd.aggregation")
        autojac: Any = importlib.import_module("torchjd.autojac")
    except ImportError:
        raise UsageError("TorchJD is not installed; pip install torchjd.") from None
    make: dict[str, Callable[[], Any]] = {
        "Aligned_MTL": lambda: aggregation.AlignedMTL(),
        "CAGrad": lambda: aggregation.CAGrad(c=0.5),
        "ConFIG": lambda: aggregation.ConFIG(),
        "DualProj": lambda: aggregation.DualProj(),
        "EW": lambda: aggregation.Sum(),
        "FairGrad": lambda: aggregation.FairGrad(alpha=1.0),
        "IMTL": lambda: aggregation.IMTLG(),
        "MGDA": lambda: aggregation.MGDA(),
        "Nash_MTL": lambda: aggregation.NashMTL(n_tasks=len(work.tasks)),
        "PCGrad": lambda: aggregation.PCGrad(),
        "UPGrad": lambda: aggregation.UPGrad(),
    }
    if weighting not in make or work.arch != "HPS":
        raise UsageError(f"TorchJD is compared on HPS with {', '.join(make)}; got {work.arch} with {weighting}.")
    encoder, decoders = work.modules()
    aggregator = make[weighting]()
    optimizer = torch.optim.SGD([*encoder.parameters(), *decoders.parameters()], lr=work.lr)
    shared = list(encoder.parameters())

    def step() -> None:
        features = encoder(work.inputs)
        losses = [work.loss(decoders[task](features), task) for task in work.tasks]
        optimizer.zero_grad()
        autojac.mtl_backward(losses, features=features)
        autojac.jac_to_grad(shared, aggregator)
        optimizer.step()

    return Contender(run=step, shared=shared)
