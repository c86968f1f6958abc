"""Adaptive information transfer."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fastmtl.architecture.abstract_arch import AbsArchitecture
from fastmtl.architecture.experts import feature_dim

__all__ = ["AITM"]


class AITM(AbsArchitecture):
    """Adaptive Information Transfer Multi-task framework: each task of a sequence learns how much the one before helps.

    Of the encoder's features x (B, D), or of those at each place of a map or a text, each task's tower makes ``q_t =
    relu(A_t x + a_t)``. The first task's representation is ``z_1 = q_1``; then ``z_t = sum_u w_u V_t u`` over ``u`` in
    ``relu(B_t z_(t-1) + b_t)`` and q_t, with ``w = softmax(<Q_t u, K_t u> / sqrt(D))``. The order of the tasks is that
    of the steps, such as click, conversion. The encoder has the shared parameters.

    The paper's calibrator, a penalty where a later step is more probable than the one before it, is left out: it is a
    loss of two tasks. The predictions of ``ESMM`` are never in that order.

    Source: Xi et al., "Modeling the Sequential Dependence among Audience Multi-step Conversions with Multi-task
    Learning in Targeted Display Advertising", KDD 2021.

    Raises:
        UsageError: The encoder has no ``feature_dim``.
    """

    def _make_network(self) -> None:
        self.encoder = self.encoder_class()
        dim = feature_dim(self.encoder)
        self.towers = nn.ModuleDict({task: nn.Sequential(nn.Linear(dim, dim), nn.ReLU()) for task in self.task_name})
        self.transfers = nn.ModuleDict({task: _Transfer(dim) for task in self.task_name[1:]})

    def branch(self, features: tuple[Tensor, ...], task: str) -> Tensor:
        """Return the representation of ``task``, of the encoder's shape, with what comes from the tasks before it."""
        (rep,) = features
        is_map = rep.dim() == 4
        if is_map:
            rep = rep.movedim(1, -1)
        first, *others = self.task_name[: self.task_name.index(task) + 1]
        reached = cast(Tensor, self.towers[first](rep))
        for other in others:
            reached = self.transfers[other](reached, self.towers[other](rep))
        return reached.movedim(-1, 1) if is_map else reached


class _Transfer(nn.Module):
    """Attention over what the task before passes on and a task's own tower."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.passed = nn.Sequential(nn.Linear(dim, dim), nn.ReLU())
        self.value, self.query, self.key = (nn.Linear(dim, dim, bias=False) for _ in range(3))

    def forward(self, before: Tensor, own: Tensor) -> Tensor:
        """Return (B, ..., D) from two (B, ..., D)."""
        both = torch.stack([self.passed(before), own])
        scores = (self.query(both) * self.key(both)).sum(-1, keepdim=True) * both.shape[-1] ** -0.5
        return (scores.softmax(0) * self.value(both)).sum(0)
