"""Customized gate control."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastmtl.architecture.experts import Experts
from fastmtl.architecture.gates import IMG_SIZE, count_experts, make_gate, mix
from fastmtl.architecture.MMoE import MMoE
from fastmtl.support.hyper import Hyper

__all__ = ["CGC"]


class CGC(MMoE):
    """Customized Gate Control: MMoE with further experts of each task's own, which only its gate mixes in.

    Its gates read what those of ``MMoE`` do. Source: Tang et al., "Progressive Layered Extraction (PLE): A Novel
    Multi-Task Learning (MTL) Model for Personalized Recommendations", RecSys 2020.

    Raises:
        UsageError: ``num_experts`` does not fit the tasks, or neither ``img_size`` nor an encoder with ``feature_dim``.
    """

    hyper = {  # noqa: RUF012
        "img_size": IMG_SIZE,
        "num_experts": Hyper(
            type=int, default=(1, 1), many=True, help="Number of shared experts, then of each task's own."
        ),
    }

    def __init__(
        self,
        task_name: list[str],
        encoder_class: Callable[[], nn.Module],
        decoders: nn.ModuleDict,
        rep_grad: bool,
        multi_input: bool,
        device: torch.device,
        **kwargs: Any,
    ) -> None:
        given = kwargs.get("num_experts", self.hyper["num_experts"].default)
        shared, *own = count_experts(given, len(task_name), "CGC")
        super().__init__(task_name, encoder_class, decoders, rep_grad, multi_input, device, **kwargs)
        self.experts_specific = nn.ModuleDict(
            {task: Experts(encoder_class() for _ in range(count)) for task, count in zip(task_name, own, strict=True)}
        )
        self.gate_specific = nn.ModuleDict(
            {task: make_gate(self.input_size, shared + count) for task, count in zip(task_name, own, strict=True)}
        )

    def trunk(self, inputs: Tensor, task_name: str | None = None) -> tuple[Tensor, ...]:
        """Return the shared experts' outputs (E, B, ...) and the inputs."""
        return self.experts_shared(inputs), inputs

    def branch(self, features: tuple[Tensor, ...], task: str) -> Tensor:
        """Return the mixture of shared and own experts of ``task``."""
        shared, inputs = features
        selector = cast(nn.ModuleDict, self.gate_specific)[task](self._gate_input(features))
        own = self.experts_specific[task](inputs)
        return mix(shared, selector[:, : len(shared)]) + mix(own, selector[:, len(shared) :])
