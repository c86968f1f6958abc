"""Where an encoder can be cut into stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

from fastmtl.errors import UsageError

__all__ = ["Stages"]


@dataclass(frozen=True, slots=True)
class Stages:
    """The parts of a ResNet, of ``fastmtl.model`` or torchvision's, or of a ``fastmtl.model.StagedEncoder``.

    Attributes:
        stem: What comes before the first stage.
        stages: The stages, in order.
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
    def of(cls, encoder: nn.Module, owner: str, also: str = "") -> Stages:
        """Return the stages of an encoder.

        Args:
            encoder: The encoder.
            owner: The architecture that needs them, for the message.
            also: What else the architecture takes.

        Raises:
            UsageError: It has none.
        """
        if all(hasattr(encoder, name) for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer4")):
            stem = nn.Sequential(*(getattr(encoder, name) for name in ("conv1", "bn1", "relu", "maxpool")))
            layers = [getattr(encoder, f"layer{i}") for i in range(1, 5)]
            convs = [[each for each in layer.modules() if isinstance(each, nn.Conv2d)] for layer in layers]
            if all(convs):
                last: int = getattr(encoder, "feature_dim", convs[-1][-1].out_channels)
                stem_dim, *dims = [each[0].in_channels for each in convs]
                return cls(stem, layers, [*dims, last], 4 if last == 2048 else 1, stem_dim)
        if all(hasattr(encoder, name) for name in ("stem", "stages", "stage_dims")):
            stages = list(cast(nn.ModuleList, encoder.stages))
            return cls(cast(nn.Module, encoder.stem), stages, list(cast(list[int], encoder.stage_dims)))
        raise UsageError(
            f"{owner} needs an encoder made of stages (a ResNet{also} or a StagedEncoder), "
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
