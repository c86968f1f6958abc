"""Batch norm over several processes, one process at a time."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmtl.distributed import Alone, Peers
from fastmtl.distributed.batch_norm import SyncBatchNorm, synchronize


class _Alone(Peers):
    """A group whose other members have nothing, so that its sums are what this one has."""

    def __init__(self) -> None:
        self.size = 2
        self.sent: list[int] = []

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.sent.append(tensor.numel())
        return tensor


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(3), (5, 3)),
        (nn.BatchNorm1d(3, affine=False, momentum=None), (5, 3, 4)),
        (nn.BatchNorm2d(3, eps=1e-2), (2, 3, 4, 5)),
        (nn.BatchNorm3d(3, track_running_stats=False), (2, 3, 2, 2, 3)),
    ],
    ids=["1d", "1d sequence", "2d", "3d"],
)
def test_alone_it_is_batch_norm(norm: Any, shape: tuple[int, ...]) -> None:
    norm = norm.double()
    other = type(norm)(3, norm.eps, norm.momentum, norm.affine, norm.track_running_stats).double()
    peers = _Alone()
    mine = nn.Sequential(norm)
    synchronize(mine, peers)
    assert isinstance(mine[0], SyncBatchNorm)
    assert list(mine[0].state_dict()) == list(other.state_dict())
    # Far from zero, sums of squares lose what the variance is made of.
    x = 1e3 + torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for module, given in zip((mine, other), inputs, strict=True):
        out = module(given)
        for power in (2, 3):
            (out**power).sum().backward(retain_graph=power == 2)
    assert peers.sent == [7, 6, 6]
    assert torch.allclose(mine(inputs[0]), other(inputs[1]), rtol=1e-8, atol=1e-8)
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-6, atol=1e-7)
    for ours, theirs in zip(mine.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10)
    for ours, theirs in zip(mine.parameters(), other.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-8, atol=1e-8)
    mine.eval()
    other.eval()
    assert torch.allclose(mine(x), other(x), rtol=1e-9, atol=1e-9)


def test_shared_modules_stay_shared_and_others_stay() -> None:
    class Own(nn.BatchNorm1d):
        pass

    norm = nn.BatchNorm1d(2)
    weight = norm.weight
    model = nn.ModuleList([norm, nn.Sequential(norm), Own(2)])
    synchronize(model, _Alone())
    assert model[0] is model[1][0]
    assert model[0].weight is weight
    assert type(model[2]) is Own


def test_a_pickle_has_no_processes_a_copy_has_the_same() -> None:
    peers: Any = _Alone()
    model: Any = nn.Sequential(nn.BatchNorm1d(3))
    synchronize(model, peers)
    again = pickle.loads(pickle.dumps(model))
    assert isinstance(again[0].peers, Alone)
    assert copy.deepcopy(model)[0].peers is peers
    x, plain = torch.randn(5, 3), nn.BatchNorm1d(3)
    torch.testing.assert_close(again(x), plain(x))
    torch.testing.assert_close(again[0].running_var, plain.running_var)
