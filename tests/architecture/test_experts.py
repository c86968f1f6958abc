"""Experts that run as one give what they give in turn."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fastmtl.architecture.experts import Experts
from fastmtl.model import ConvEncoder, MLPEncoder

TOGETHER: dict[str, Callable[[], nn.Module]] = {
    "staged": lambda: MLPEncoder(6, (9, 7)),
    "sequential": lambda: nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 7, bias=False)),
    "in place": lambda: nn.Sequential(nn.Linear(6, 7), nn.ReLU(inplace=True)),
}


class Doubled(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


IN_TURN: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7)),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 7), nn.Dropout(0.5)),
    "own forward": lambda: Doubled(nn.Linear(6, 7)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", [*TOGETHER, *IN_TURN])
def test_outputs_gradients_and_state_are_those_of_experts_in_turn(kind: str, training: bool) -> None:
    torch.manual_seed(0)
    plain = nn.ModuleList(({**TOGETHER, **IN_TURN})[kind]() for _ in range(3)).train(training)
    experts = Experts(copy.deepcopy(plain))
    assert experts.together == (kind in TOGETHER)
    assert list(experts.state_dict()) == list(plain.state_dict())
    inputs = torch.randn(5, 6, dtype=torch.float64)
    plain.double()
    experts.double()
    torch.manual_seed(1)
    want = torch.stack([each(inputs) for each in plain])
    torch.manual_seed(1)
    got = experts.jointly(inputs) if experts.together else experts(inputs)
    torch.testing.assert_close(got, want)
    for each in (got, want):
        each.square().sum().backward()
    for one, other in zip(experts.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(list(experts.buffers()), list(plain.buffers()))


def test_experts_of_different_shape_run_in_turn() -> None:
    assert not Experts([nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 7)), nn.Sequential(nn.Linear(6, 7))]).together
    assert not Experts([nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)]).together
    assert not Experts([ConvEncoder(), ConvEncoder()]).together
    assert not Experts([nn.Linear(6, 7)]).together


@pytest.mark.parametrize("early", [True, False])
def test_a_hook_is_called_for_every_expert(early: bool) -> None:
    linear, seen = [nn.Linear(6, 7) for _ in range(3)], []
    experts = None if early else Experts(linear)
    for expert in linear:
        expert.register_forward_hook(lambda module, inputs, output: seen.append(module))
    (experts or Experts(linear))(torch.randn(5, 6))
    assert seen == linear


def test_pruned_experts_have_masks_of_their_own() -> None:
    experts, inputs = Experts(nn.Linear(6, 7) for _ in range(3)), torch.randn(5, 6)
    for expert in experts:
        prune.random_unstructured(expert, "weight", 0.5)
    torch.testing.assert_close(experts(inputs), torch.stack([expert(inputs) for expert in experts]))


def test_experts_without_parameters() -> None:
    inputs = torch.randn(5, 2, 3)
    torch.testing.assert_close(Experts(nn.Flatten() for _ in range(3))(inputs), inputs.flatten(1).expand(3, 5, 6))
