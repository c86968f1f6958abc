"""Cross-stitch networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmtl.architecture.abstract_arch import AbsArchitecture
from fastmtl.architecture.stages import Columns
from fastmtl.errors import UsageError

__all__ = ["Cross_stitch"]


class Cross_stitch(AbsArchitecture):
    """Cross-stitch Networks: an encoder per task, with features mixed linearly between the stages.

    Stage i + 1 of task t reads ``sum_j unit_itj rep_ij`` over the outputs of stage i of all tasks; units start at 1.
    The encoder is a ResNet of ``fastmtl.model`` or a ``fastmtl.model.StagedEncoder``. All encoders and
    units count as shared parameters, as in LibMTL.

    Source: Misra et al., "Cross-stitch Networks for Multi-task Learning", CVPR 2016.

    Raises:
        UsageError: The encoder is not made of stages, or every task has its own inputs.
    """

    needs_stages = True
    by_place = (r"^encoder\.resnet_layer\.\d+\.(\d+)\.", r"^encoder\.cross_unit$")

    def _make_network(self) -> None:
        if self.multi_input:
            raise UsageError("Cross_stitch mixes features of one input: multi_input must be False.")
        self.encoder = _CrossStitched(self.encoder_class, self.task_name)


class _CrossStitched(Columns):
    def __init__(self, encoder_class: Callable[[], nn.Module], task_name: list[str]) -> None:
        super().__init__(encoder_class, task_name, "Cross_stitch")
        # One per stage, as in LibMTL's checkpoints; the last is unused.
        self.cross_unit = nn.Parameter(torch.ones(len(self.resnet_layer), len(task_name), len(task_name)))

    def mixtures(self) -> list[Tensor | None]:
        """Return None for the first stage, and the units of all further ones."""
        return [None, *(self.cross_unit[i] for i in range(len(self.resnet_layer) - 1))]
