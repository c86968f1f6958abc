"""Customized gate control."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from fastmtl.architecture.experts import IMG_SIZE, NUM_EXPERTS, Experts, count_experts, make_experts, make_gate, mix
from fastmtl.architecture.MMoE import MMoE

__all__ = ["CGC"]


class CGC(MMoE):
    """Customized Gate Control: MMoE with further experts per task, which only the task's gate mixes in.

    The gates read the same as those of ``MMoE``.

    Source: Tang et al., "Progressive Layered Extraction (PLE): A Novel
    Multi-Task Learning (MTL) Model for Personalized Recommendations", RecSys 2020.

    Raises:
        UsageError: ``num_experts`` does not fit the tasks, or neither ``img_size`` nor an encoder with ``feature_dim``.
    """

    hyper = {  # noqa: RUF012
        "img_size": IMG_SIZE,
        "num_experts": NUM_EXPERTS,
    }

    def _make_network(self) -> None:
        shared, *specific = count_experts(self.kwargs["num_experts"], self.task_num, "CGC")
        super()._make_network()
        counts = dict(zip(self.task_name, specific, strict=True))
        own = {task: make_experts(self.encoder_class, count, self.bottom)[0] for task, count in counts.items()}
        self.experts_specific = nn.ModuleDict({task: Experts(experts) for task, experts in own.items()})
        self.gate_specific = nn.ModuleDict(
            {task: make_gate(self.input_size, shared + count) for task, count in counts.items()}
        )

    def trunk(self, inputs: Tensor, task_name: str | None = None) -> tuple[Tensor, ...]:
        """Return the shared experts' outputs (E, B, ...) and what all experts read."""
        inputs = self.bottom(inputs)
        return self.experts_shared(inputs), inputs

    def branch(self, features: tuple[Tensor, ...], task: str) -> Tensor:
        """Return the mixture of the shared experts and those of ``task``."""
        shared, inputs = features
        selector = cast(nn.ModuleDict, self.gate_specific)[task](self._gate_input(features))
        specific = self.experts_specific[task](inputs)
        return mix(shared, selector[:, : len(shared)]) + mix(specific, selector[:, len(shared) :])
