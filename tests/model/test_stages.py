"""Encoders made of stages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmtl.errors import UsageError
from fastmtl.model import ConvEncoder, MLPEncoder, StagedEncoder


def test_forward_runs_stem_then_stages_in_turn() -> None:
    stages = [nn.Linear(4, 6), nn.Linear(6, 5)]
    encoder = StagedEncoder(nn.Tanh(), stages, [6, 5])
    x = torch.randn(3, 4)
    assert torch.equal(encoder(x), stages[1](stages[0](x.tanh())))
    assert encoder.feature_dim == 5


@pytest.mark.parametrize(
    ("encoder", "x"),
    [
        (ConvEncoder(1, (4, 8, 12, 16)), torch.randn(2, 1, 20, 24)),
        (ConvEncoder(), torch.randn(2, 3, 8, 8)),
        (MLPEncoder(9, (7, 5)), torch.randn(2, 9)),
    ],
    ids=["conv", "conv-default", "mlp"],
)
def test_stage_dims_are_the_channels_of_every_stage(encoder: StagedEncoder, x: torch.Tensor) -> None:
    features = encoder.stem(x)
    for stage, dim in zip(encoder.stages, encoder.stage_dims, strict=True):
        features = stage(features)
        assert features.shape[1] == dim
        assert features.dim() == x.dim()
    assert features.shape[1] == encoder.feature_dim


@pytest.mark.parametrize("encoder", [ConvEncoder(), MLPEncoder(192)], ids=["conv", "mlp"])
def test_the_last_part_of_a_stage_leaves_its_input_alone(encoder: StagedEncoder) -> None:
    x = torch.randn(4, 3, 8, 8)
    first = encoder.stages[0]
    middle = first[:-1](x if isinstance(encoder, ConvEncoder) else x.flatten(1))
    kept = middle.clone()
    first[-1](middle)
    assert torch.equal(middle, kept)


def test_stages_halve_the_image() -> None:
    assert ConvEncoder(3, (8, 8, 8))(torch.randn(1, 3, 16, 12)).shape == (1, 8, 4, 3)


@pytest.mark.parametrize(("count", "dims"), [(0, []), (2, [3])])
def test_stages_and_dims_must_agree(count: int, dims: list[int]) -> None:
    with pytest.raises(UsageError, match=f"got {count} stages"):
        StagedEncoder(nn.Identity(), [nn.Identity() for _ in range(count)], dims)
