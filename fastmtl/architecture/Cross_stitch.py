"""Cross-stitch networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastmtl.architecture.base import AbsArchitecture
from fastmtl.architecture.columns import Columns, mix_columns
from fastmtl.errors import UsageError

__all__ = ["Cross_stitch"]


class Cross_stitch(AbsArchitecture):
    """Cross-stitch Networks: an encoder per task, whose features are mixed linearly between the stages.

    What stage i + 1 of task t reads is ``sum_j unit_itj rep_ij`` over the outputs of stage i of all tasks; the units
    start at 1. The encoder is a ResNet of ``fastmtl.model`` or a ``fastmtl.model.StagedEncoder``. All encoders and
    units count as shared parameters, as in LibMTL.

    Source: Misra et al., "Cross-stitch Networks for Multi-task Learning", CVPR 2016.

    Raises:
        UsageError: The encoder is not made of stages, or every task has its own inputs.
    """

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
        super().__init__(task_name, encoder_class, decoders, rep_grad, multi_input, device, **kwargs)
        if multi_input:
            raise UsageError("Cross_stitch mixes features of one input: multi_input must be False.")
        self.encoder = _CrossStitched([encoder_class() for _ in task_name], task_name)


class _CrossStitched(Columns):
    def __init__(self, encoders: Sequence[nn.Module], task_name: list[str]) -> None:
        super().__init__(encoders, task_name, "Cross_stitch")
        # One for every stage, as in LibMTL's checkpoints; nothing follows the last.
        self.cross_unit = nn.Parameter(torch.ones(len(self.resnet_layer), len(task_name), len(task_name)))

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """Return the representation of every task."""
        reps: Sequence[Tensor] = [stem(inputs) for stem in self.resnet_conv.values()]
        for i, layers in enumerate(self.resnet_layer.values()):
            if i:
                reps = mix_columns(self.cross_unit[i - 1], reps)
            reps = [layer(rep) for layer, rep in zip(cast(nn.ModuleList, layers), reps, strict=True)]
        return list(reps)
