"""The solvers of LibMTL and TorchJD on a Gram matrix, where they are there to be measured beside ours.

TorchJD comes from PyPI; LibMTL from a checkout, which is imported as it is. What that needs repaired to run on today's
torch and numpy is repaired in the running process.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmtl.errors import UsageError

__all__ = ["libmtl_solvers", "torchjd_solvers"]

Solver = Callable[[Tensor], Tensor]
"""From J (T, P) to the update (P,)."""


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


def libmtl_solvers(checkout: Path, size: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return LibMTL's solvers by the name of the strategy, each from J in float32 as LibMTL has it to the update.

    Args:
        checkout: The folder that holds the package ``LibMTL``.
        size: Number of tasks.

    Raises:
        UsageError: There is no LibMTL in the folder.
    """
    if not (checkout / "LibMTL" / "weighting").is_dir():
        raise UsageError(f"There is no LibMTL in {checkout}; give the folder of a checkout.")
    weighting = _import(checkout)
    hyper: dict[str, dict[str, Any]] = {
        "MGDA": {"mgda_gn": "none"},
        "PCGrad": {},
        "CAGrad": {"calpha": 0.5, "rescale": 1},
        "Nash_MTL": {"update_weights_every": 1, "optim_niter": 20, "max_norm": 1.0},
        "FairGrad": {"FairGrad_alpha": 1.0},
        "UPGrad": {"UPGrad_norm_eps": 1e-4, "UPGrad_reg_eps": 1e-4},
    }
    return {name: _solver(getattr(weighting, name), args, size) for name, args in hyper.items()}


def _import(checkout: Path) -> Any:
    if "torch_geometric" not in sys.modules:
        stub: Any = types.ModuleType("torch_geometric")
        stub.loader = types.ModuleType("torch_geometric.loader")
        stub.loader.DataLoader = torch.utils.data.DataLoader
        sys.modules.update({"torch_geometric": stub, "torch_geometric.loader": stub.loader})
    if not hasattr(np, "alltrue"):
        np.alltrue = np.all  # type: ignore[attr-defined]
    sys.path.insert(0, str(checkout))
    try:
        weighting = importlib.import_module("LibMTL.weighting")
        nash: Any = importlib.import_module("LibMTL.weighting.Nash_MTL")
        nash.cp = importlib.import_module("cvxpy")
    finally:
        sys.path.remove(str(checkout))
    return weighting


def _solver(kind: type, hyper: dict[str, Any], size: int) -> Solver:
    """Return a call of LibMTL's own ``backward`` around a network that does nothing."""
    rule: Any = kind()
    rule.task_num, rule.rep_grad, rule.device = size, False, torch.device("cpu")
    seen: dict[str, Tensor] = {}
    rule._compute_grad_dim = lambda: None
    rule._reset_grad = lambda update: seen.update(update=update)
    rule._backward_new_grads = lambda weights, grads: seen.update(update=weights @ grads)
    rule.get_share_params = list
    if hasattr(rule, "init_param"):
        rule.init_param()
    losses = torch.ones(size, requires_grad=True)

    def solve(jacobian: Tensor) -> Tensor:
        rule._compute_grad = lambda losses, mode, rep_grad=False: jacobian.clone()
        rule._get_grads = lambda losses, mode="backward": jacobian.clone()
        seen.clear()
        weights = rule.backward(losses, **hyper)
        return seen["update"] if seen else torch.as_tensor(weights, dtype=jacobian.dtype) @ jacobian

    return solve
