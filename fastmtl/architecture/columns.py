"""One staged encoder per task, side by side: what Cross_stitch and LTB mix between the stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastmtl.architecture.stages import Stages

__all__ = ["Columns"]


class Columns(nn.Module):
    """The stems and the stages of T encoders, under LibMTL's names for those of its ResNets.

    Args:
        encoders: T encoders.
        task_name: The task names, in order.
        owner: The architecture, for the message.

    Raises:
        UsageError: The encoders are not made of stages.
    """

    def __init__(self, encoders: Sequence[nn.Module], task_name: list[str], owner: str) -> None:
        super().__init__()
        columns = [Stages.of(encoder, owner) for encoder in encoders]
        self.resnet_conv = nn.ModuleDict({task: each.stem for task, each in zip(task_name, columns, strict=True)})
        self.resnet_layer = nn.ModuleDict(
            {str(i): nn.ModuleList(each.stages[i] for each in columns) for i in range(len(columns[0].stages))}
        )

    def mixtures(self) -> Sequence[Tensor | None]:
        """Return for each stage the (T, T) units that mix what it reads, None where every task reads its own."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """Return the representation of every task."""
        reps: Sequence[Tensor] = [stem(inputs) for stem in self.resnet_conv.values()]
        for units, layers in zip(self.mixtures(), self.resnet_layer.values(), strict=True):
            if units is not None:
                reps = _mix(units, reps)
            reps = [layer(rep) for layer, rep in zip(cast(nn.ModuleList, layers), reps, strict=True)]
        return list(reps)


def _mix(units: Tensor, reps: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return for each task t ``sum_j units_tj reps_j``.

    Args:
        units: (T, T).
        reps: T tensors of one shape.
    """
    stacked = torch.stack(list(reps))
    return torch.tensordot(units.to(stacked.dtype), stacked, 1).unbind()
