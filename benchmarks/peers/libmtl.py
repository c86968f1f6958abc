"""LibMTL beside us, from a checkout: its solvers on a Gram matrix, and its training step.

The checkout is imported as it is; what that needs repaired to run on today's torch and numpy, on any device and without
packages its strategy does not use, is repaired in the running process.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from fastmtl.benchmarks.contender import LocalContender
from fastmtl.benchmarks.peers.repairs import OnDevice, repair
from fastmtl.benchmarks.work import Work
from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.support.hyper import fill_hyper
from fastmtl.weighting import WEIGHTINGS

__all__ = ["edge_matrices", "import_libmtl", "libmtl_can", "libmtl_solvers", "libmtl_step"]

Solver = Callable[[Tensor], Tensor]
"""From J (T, P) to the update (P,)."""


def libmtl_solvers(checkout: Path, size: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return LibMTL's solvers by the name of the strategy; each turns J, in LibMTL's float32, into the update.

    Args:
        checkout: The folder that holds the package ``LibMTL``.
        size: Number of tasks.

    Raises:
        UsageError: There is no LibMTL in the folder.
    """
    weighting = import_libmtl(checkout, "LibMTL.weighting")
    hyper: dict[str, dict[str, Any]] = {
        "MGDA": {"mgda_gn": "none"},
        "PCGrad": {},
        "CAGrad": {"calpha": 0.5, "rescale": 1},
        "Nash_MTL": {"update_weights_every": 1, "optim_niter": 20, "max_norm": 1.0},
        "FairGrad": {"FairGrad_alpha": 1.0},
        "UPGrad": {"UPGrad_norm_eps": 1e-4, "UPGrad_reg_eps": 1e-4},
    }
    return {name: _solver(getattr(weighting, name), args, size) for name, args in hyper.items()}


def libmtl_can(checkout: Path, arch: str, weighting: str) -> bool:
    """Return whether LibMTL has architecture and strategy, and trains with one batch a step and parameters' gradients.

    Args:
        checkout: The folder that holds the package ``LibMTL``.
        arch: The architecture.
        weighting: The strategy.
    """
    rule = WEIGHTINGS[weighting]
    known = all(
        (checkout / "LibMTL" / kind / f"{name}.py").is_file()
        for kind, name in (("architecture", arch), ("weighting", weighting))
    )
    return known and rule.needs in ("losses", "gram", "rows") and rule.samples == 1


def libmtl_step(work: Work, weighting: str, checkout: Path) -> LocalContender:
    """Return a training step as LibMTL's trainer runs it, from the loss to the optimizer, metrics included.

    Raises:
        UsageError: There is no LibMTL in the folder.
    """
    module = import_libmtl(checkout, "LibMTL.trainer")
    loss, metrics = import_libmtl(checkout, "LibMTL.loss"), import_libmtl(checkout, "LibMTL.metrics")
    models: Any = import_libmtl(checkout, "LibMTL.model")
    module.torch = OnDevice(work.device)
    state = work.modules()[0].state_dict()

    def make_encoder() -> nn.Module:
        if work.net in ("mlp", "tiny"):
            return work.modules()[0]
        if work.net == "nnconv":
            return edge_matrices(state)
        # What an encoder's initial weights take from the generator is not to be missing elsewhere.
        with torch.random.fork_rng():
            deep = work.net == "resnet50"
            encoder: nn.Module = models.resnet_dilated("resnet50", False) if deep else models.resnet18(pretrained=False)
        encoder.load_state_dict(state)
        return encoder

    task_dict = {
        task: {"metrics": ["Acc"], "metrics_fn": metrics.AccMetric(), "loss_fn": loss.CELoss(), "weight": [1]}
        for task in work.tasks
    }
    hyper = fill_hyper(weighting, WEIGHTINGS[weighting].hyper, {})
    if weighting == "EW":
        hyper = {}
    optim = {"optim": "sgd", "lr": work.lr}
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = module.Trainer(
            task_dict, weighting, work.arch, make_encoder, work.modules()[1], False, False, optim, None,
            weight_args=hyper, arch_args=work.arch_args,
        )  # fmt: skip
    if hasattr(trainer.model, "_binary_codes"):
        # It reads the codes from text, of which numpy 2 takes "0" for true too.
        count = work.arch_args["num_experts"][0]
        width = max(1, (count - 1).bit_length())
        codes = [[int(bit) for bit in f"{expert:0{width}b}"] for expert in range(count)]
        trainer.model._binary_codes = torch.tensor([codes], dtype=torch.bool, device=work.device)
    trainer.model.epoch, trainer.model.epochs = 0, 1
    trainer.model.train()
    labels = dict(work.labels)

    def step() -> None:
        losses, preds = trainer.forward4loss(trainer.model, work.inputs, labels, return_preds=True)
        trainer.meter.update(preds, labels)
        trainer.optimizer.zero_grad(set_to_none=False)
        trainer.model.backward(losses, **hyper)
        trainer.optimizer.step()

    return LocalContender(run=step, shared=list(trainer.model.get_share_params()))


def edge_matrices(state: Mapping[str, Tensor]) -> nn.Module:
    """Return the network of QM9 in LibMTL's form: NNConv, which makes a matrix for each edge, and a GRU."""
    import torch_geometric.nn as graphs

    class Network(nn.Module):
        def __init__(self, width: int = 64) -> None:
            super().__init__()
            self.lin0 = nn.Linear(11, width)
            matrices = nn.Sequential(nn.Linear(5, 128), nn.ReLU(), nn.Linear(128, width * width))
            self.conv = graphs.NNConv(width, width, matrices, aggr="mean")
            self.gru = nn.GRU(width, width)
            self.set2set = graphs.aggr.Set2Set(width, processing_steps=3)
            self.lin1 = nn.Linear(2 * width, width)

        def forward(self, data: Any) -> Tensor:
            atoms = self.lin0(data.x).relu()
            hidden = atoms.unsqueeze(0)
            for _ in range(3):
                messages = self.conv(atoms, data.edge_index, data.edge_attr).relu()
                atoms, hidden = self.gru(messages.unsqueeze(0), hidden)
                atoms = atoms.squeeze(0)
            features: Tensor = self.lin1(self.set2set(atoms, data.batch)).relu()
            return features

    with torch.random.fork_rng():
        network = Network()
    names = {name: f"{name}_l0" if name.startswith("gru.") else name for name in state}
    network.load_state_dict({names[name]: value for name, value in state.items()})
    return network


def import_libmtl(checkout: Path, name: str) -> Any:
    """Return a module of a checkout, repaired.

    Raises:
        UsageError: There is no LibMTL in the folder.
    """
    if not (checkout / "LibMTL" / "weighting").is_dir():
        raise UsageError(f"There is no LibMTL in {checkout}; give the folder of a checkout.")
    repair()
    sys.path.insert(0, str(checkout))
    try:
        nash: Any = importlib.import_module("LibMTL.weighting.Nash_MTL")
        nash.cp = sys.modules["cvxpy"]
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(checkout))


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
