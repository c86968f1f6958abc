"""Balanced gradients of several processes in loops of one's own, and through Lightning's and Accelerate's launchers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastmtl
from fastmtl.aggregation import IMTLG, MGDA, CAGrad, GradDrop, GradVac, Mean, NashMTL, PCGrad, TrimmedMean, UPGrad
from fastmtl.distributed import find_peers
from fastmtl.errors import UsageError
from tests.distributed.group import in_processes

pytestmark = pytest.mark.usefixtures("in_float64")

ROWS = 12
AGGREGATORS = {
    "UPGrad": UPGrad,
    "MGDA": MGDA,
    "IMTLG": IMTLG,
    "NashMTL": lambda: NashMTL(3),
    "PCGrad": PCGrad,
    "GradVac": GradVac,
    "Mean": Mean,
    "TrimmedMean": lambda: TrimmedMean(1),
    "GradDrop": GradDrop,
}
# With weights of each group of parameters; four losses.
GROUPED = {
    "MGDA": MGDA,
    "PCGrad": PCGrad,
    "CAGrad": lambda: CAGrad(0.5),
    "UPGrad": UPGrad,
    "NashMTL": lambda: NashMTL(4),
}


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5))
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(3))

    def forward(self, inputs: Tensor, labels: Tensor) -> list[Tensor]:
        features = self.shared(inputs)
        return [(head(features)[:, 0] - labels[:, t]).square().mean() for t, head in enumerate(self.heads)]


def _train(name: str, kind: str) -> list[Tensor]:
    """Return the parameters after two steps of two accumulated batches each."""
    net = _Net()
    peers = find_peers()
    rank, size = (0, 1) if peers is None else (peers.rank, peers.size)
    model: Any = DistributedDataParallel(net) if kind == "ddp" and peers is not None else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    aggregator = AGGREGATORS[name]()
    # Only the first process's numbers count.
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(5 + rank)
    for _ in range(2):
        for _ in range(2):
            inputs, labels = (torch.randn(ROWS, n, generator=generator)[rank::size] for n in (4, 3))
            losses = model(inputs, labels)
            if kind == "balance":
                fastmtl.balance(losses, shared=net.shared, weighting=aggregator)
            else:
                fastmtl.balanced(losses, shared=net.shared, weighting=aggregator).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach() for param in net.parameters()]


class _Branches(nn.Module):
    """Each loss goes through one of three branches, in every other row through the next one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.ModuleList(nn.Linear(4, 5) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(4))

    def forward(self, inputs: Tensor, labels: Tensor, turns: list[int]) -> list[Tensor]:
        found = []
        for t, head in enumerate(self.heads):
            parts = [
                head(self.shared[(t + turn) % 3](x).tanh())[:, 0] - y
                for turn, x, y in zip(turns, inputs.chunk(len(turns)), labels[:, t].chunk(len(turns)), strict=True)
            ]
            found.append(torch.cat(parts).square().mean())
        return found


def _train_branches(given: list[tuple[str, str | dict[str, str]]]) -> list[Any]:
    """Return the parameters after three steps, in which other losses reach a branch in each of four processes."""
    peers = find_peers()
    turns = [0, 1, 2, 3] if peers is None else [peers.rank]
    ends = []
    for name, groups in given:
        net, generator = _Branches(), torch.Generator().manual_seed(1)
        aggregator = (AGGREGATORS if groups == "all" else GROUPED)[name]()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        torch.manual_seed(5)
        for _ in range(3):
            inputs, labels = (torch.randn(ROWS, n, generator=generator) for n in (4, 4))
            parts = [part.chunk(4) for part in (inputs, labels)]
            inputs, labels = (torch.cat([part[turn] for turn in turns]) for part in parts)
            fastmtl.balance(net(inputs, labels, turns), shared=net.shared, weighting=aggregator, groups=groups)
            optimizer.step()
            optimizer.zero_grad()
        ends.append([param.detach() for param in net.parameters()])
    return ends


@pytest.mark.slow
def test_losses_may_reach_other_parameters_in_each_process(tmp_path: Path) -> None:
    cases: list[tuple[str, str | dict[str, str]]] = [(name, "all") for name in ("UPGrad", "MGDA", "PCGrad", "GradDrop")]
    cases += [(name, groups) for name in GROUPED for groups in ("layer", {"0": "first"})]
    wanted = _train_branches(cases)
    for found in in_processes(4, tmp_path, _train_branches, cases):
        for case, params, expected in zip(cases, found, wanted, strict=True):
            for param, each in zip(params, expected, strict=True):
                torch.testing.assert_close(param, each, rtol=1e-9, atol=1e-12, msg=f"{case}")


def _mismatches(_: None) -> list[str]:
    """Return what is said of shared parameters in another order, and of parameters of other values."""
    peers = find_peers()
    assert peers is not None
    said = []
    for kind in ("order", "values"):
        net = _Branches()
        if kind == "values":
            net.shared[0].weight.data.add_(peers.rank)
        losses = net(torch.ones(6, 4), torch.ones(6, 4), [peers.rank if kind == "order" else 0])
        with pytest.raises(UsageError) as caught:
            fastmtl.balance(losses, shared=None if kind == "order" else net.shared, weighting="mgda")
        said.append(str(caught.value))
    return said


def test_other_parameters_in_each_process_are_refused(tmp_path: Path) -> None:
    for said in in_processes(2, tmp_path, _mismatches, None):
        for sentence in said:
            assert "The processes' losses depend on other parameters, on others in this order" in sentence


def _train_all(cases: list[tuple[str, str]]) -> list[Any]:
    return [_train(*case) for case in cases]


@pytest.mark.slow
def test_the_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    cases = [(name, kind) for name in AGGREGATORS for kind in ("balance", "balanced", "ddp")]
    wanted = _train_all(cases)
    for found in in_processes(2, tmp_path, _train_all, cases):
        for case, params, expected in zip(cases, found, wanted, strict=True):
            for param, each in zip(params, expected, strict=True):
                torch.testing.assert_close(param, each, rtol=1e-9, atol=1e-12, msg=f"{case}")


@pytest.mark.slow
@pytest.mark.parametrize("library", ["lightning", "accelerate"])
def test_other_trainers_launch_several_processes(library: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    script = str(Path(__file__).with_name("loops.py"))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    for folder, launcher in (("one", []), ("two", torchrun)):
        (tmp_path / folder).mkdir()
        done = subprocess.run(
            [sys.executable, *launcher, script, library, str(tmp_path / folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    alone = torch.load(tmp_path / "one" / "0.pt")
    for rank in range(2):
        found = torch.load(tmp_path / "two" / f"{rank}.pt")
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
