"""The stages of an encoder, and of one encoder per task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.support.named import own_place

__all__ = ["Columns", "Stages"]


@dataclass(frozen=True, slots=True)
class Stages:
    """The parts of a ResNet, of ``fastmtl.model`` or torchvision's, or of a ``fastmtl.model.StagedEncoder``.

    Attributes:
        stem: The module before the first stage.
        stages: The stages.
        dims: Channels of each stage's output.
        expansion: Bottleneck factor: attention modules are ``dims // expansion`` wide inside.
        stem_dim: Channels of the stem's output, where they are known.
    """

    stem: nn.Module
    stages: list[nn.Module]
    dims: list[int]
    expansion: int = 1
    stem_dim: int | None = None

    @classmethod
    def of(
        cls, encoder: nn.Module, owner: str, also: str = "", made_by: Callable[[], nn.Module] | None = None
    ) -> Stages:
        """Return the stages of an encoder; ``owner``, what it accepts ``also`` and ``made_by`` are for errors.

        Raises:
            UsageError: The encoder has no stages, or none of known width.
        """
        if all(hasattr(encoder, name) for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer4")):
            stem = nn.Sequential(*(getattr(encoder, name) for name in ("conv1", "bn1", "relu", "maxpool")))
            layers = [getattr(encoder, f"layer{i}") for i in range(1, 5)]
            convs = [[module for module in layer.modules() if isinstance(module, nn.Conv2d)] for layer in layers]
            if all(convs):
                last: int = getattr(encoder, "feature_dim", convs[-1][-1].out_channels)
                stem_dim, *dims = [convs_of_layer[0].in_channels for convs_of_layer in convs]
                if 0 in (stem_dim, *dims):
                    raise UsageError(
                        f"{owner} needs the channels between the stages of {type(encoder).__name__} before the first "
                        "inputs: the first convolution of each layer cannot be lazy."
                    )
                return cls(stem, layers, [*dims, last], 4 if last == 2048 else 1, stem_dim)
        if all(hasattr(encoder, name) for name in ("stem", "stages", "stage_dims")):
            stages = list(cast(nn.ModuleList, encoder.stages))
            return cls(cast(nn.Module, encoder.stem), stages, list(cast(list[int], encoder.stage_dims)))
        # A function of the user's may make a module of torch's.
        place = own_place(type(encoder)) or ("" if made_by is None else own_place(made_by))
        raise UsageError(
            f"{place}{owner} needs an encoder made of stages (a ResNet{also} or a StagedEncoder), "
            f"got {type(encoder).__name__}."
        )

    def levels(self) -> list[nn.Module]:
        """Return stem and stages as one list; a stem of unknown width is part of the first level."""
        if self.stem_dim is not None:
            return [self.stem, *self.stages]
        if isinstance(self.stem, nn.Identity):
            return self.stages
        return [nn.Sequential(self.stem, self.stages[0]), *self.stages[1:]]

    def level_dims(self) -> list[int]:
        """Return the channels of each level's output."""
        return self.dims if self.stem_dim is None else [self.stem_dim, *self.dims]


class Columns(nn.Module):
    """One staged encoder per task, whose features Cross_stitch and LTB mix between the stages.

    Module names are those of LibMTL's ResNets.
    """

    def __init__(self, encoder_class: Callable[[], nn.Module], task_name: list[str], owner: str) -> None:
        super().__init__()
        encoders = [encoder_class() for _ in task_name]
        columns = [Stages.of(encoder, owner, made_by=encoder_class) for encoder in encoders]
        self.resnet_conv = nn.ModuleDict({task: column.stem for task, column in zip(task_name, columns, strict=True)})
        self.resnet_layer = nn.ModuleDict(
            {str(i): nn.ModuleList(column.stages[i] for column in columns) for i in range(len(columns[0].stages))}
        )

    def mixtures(self) -> Sequence[Tensor | None]:
        """Return for each stage the (T, T) units that mix its inputs, None for no mixing."""
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
    """Return for each task t ``sum_j units_tj reps_j``, of (T, T) units and T tensors of one shape."""
    stacked = torch.stack(list(reps))
    return torch.tensordot(units.to(stacked.dtype), stacked, 1).unbind()
