"""Balanced gradients of parameters that a user's loop has sharded by ``fully_shard``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastmtl
from fastmtl.aggregation import MGDA, GradDrop, NashMTL, UPGrad
from fastmtl.distributed import find_peers
from fastmtl.errors import UsageError
from tests.distributed.group import in_processes

pytestmark = pytest.mark.usefixtures("in_float64")

AGGREGATORS = {"UPGrad": UPGrad, "MGDA": MGDA, "NashMTL": lambda: NashMTL(3)}
# What differs: who runs the backward pass, what is accumulated, when parameters are freed.
KINDS = ("balance", "balanced", "accumulated", "kept", "whole")


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5))
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(3))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, inputs: Tensor, labels: Tensor) -> list[Tensor]:
        features = self.shared(self.frozen(inputs))
        return [(head(features)[:, 0] - labels[:, t]).square().mean() for t, head in enumerate(self.heads)]


def _net(kind: str) -> Any:
    net: Any = _Net()
    if find_peers() is not None:
        for part in () if kind == "whole" else (net.shared[0], net.shared[2]):
            fully_shard(part)
        net = fully_shard(net)
    return net


def _batches(count: int) -> list[tuple[Tensor, Tensor]]:
    peers = find_peers()
    rank, size = (0, 1) if peers is None else (peers.rank, peers.size)
    generator = torch.Generator().manual_seed(1)
    draws = [[torch.randn(12, n, generator=generator) for n in (4, 3)] for _ in range(count)]
    return [(inputs[rank::size], labels[rank::size]) for inputs, labels in draws]


def _train(name: str, kind: str) -> list[Tensor]:
    """Return the parameters after three steps of two accumulated batches each."""
    net = _net(kind)
    optimizer = torch.optim.SGD([param for param in net.parameters() if param.requires_grad], lr=0.1)
    aggregator = AGGREGATORS[name]()
    for index, batch in enumerate(_batches(6)):
        is_last = index % 2 == 1
        if kind == "accumulated" and find_peers() is not None:
            net.set_requires_gradient_sync(is_last)
        if kind == "kept" and find_peers() is not None:
            net.set_reshard_after_backward(is_last)
        losses = net(*batch)
        if kind == "balance":
            fastmtl.balance(losses, shared=net, weighting=aggregator)
        else:
            (fastmtl.balanced(losses, shared=net, weighting=aggregator) / 2).backward()
        if is_last:
            optimizer.step()
            optimizer.zero_grad()
    return [
        param.full_tensor().detach() if isinstance(param, DTensor) else param.detach() for param in net.parameters()
    ]


def _train_all(cases: list[tuple[str, str]]) -> list[Any]:
    return [_train(*case) for case in cases]


def _refusals(_: None) -> list[str]:
    net = _net("balance")
    said = []
    given: tuple[Any, ...] = ((None, UPGrad()), (net.shared, UPGrad()), (net.shared[0], UPGrad()), (net, GradDrop()))
    for shared, aggregator in given:
        with pytest.raises(UsageError) as caught:
            fastmtl.balanced(net(*_batches(1)[0]), shared=shared, weighting=aggregator).backward()
        said.append(str(caught.value))
    with pytest.raises(UsageError) as caught:
        fastmtl.balanced(net(*_batches(1)[0]), shared=net, weighting=UPGrad(), groups="layer")
    said.append(str(caught.value))
    # Gathered from the first forward pass on.
    net = _net("whole")
    net.set_reshard_after_backward(False)
    for shared in (None, net.shared):
        with pytest.raises(UsageError) as caught:
            fastmtl.balance(net(*_batches(1)[0]), shared=shared, weighting=UPGrad())
        said.append(str(caught.value))
    return said


@pytest.mark.slow
def test_sharded_parameters_train_as_in_one_process(tmp_path: Path) -> None:
    cases = [(name, kind) for name in AGGREGATORS for kind in KINDS]
    wanted = _train_all(cases)
    for found in in_processes(2, tmp_path, _train_all, cases):
        for case, params, expected in zip(cases, found, wanted, strict=True):
            for param, each in zip(params, expected, strict=True):
                torch.testing.assert_close(param, each, rtol=1e-9, atol=1e-12, msg=f"{case}")


@pytest.mark.slow
def test_what_sharded_parameters_need_is_said(tmp_path: Path) -> None:
    for said in in_processes(2, tmp_path, _refusals, None):
        assert all("shared must be the whole model" in sentence for sentence in (*said[:3], *said[5:]))
        assert "weighting must need the Gram matrix only" in said[3]
        assert "groups must be all for parameters that fully_shard has sharded" in said[4]
