"""The attention modules of MTAN, over an encoder made of stages."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.architecture.stages import Stages
from fastmtl.model.stages import mask, norm, pointwise

__all__ = ["AttentionEncoder"]


def _halve(stage: nn.Module) -> tuple[nn.Module, nn.Module]:
    # A last part that works in place would overwrite the features between the halves.
    if isinstance(stage, nn.Sequential) and len(stage) > 1 and not getattr(stage[-1], "inplace", False):
        return stage[:-1], stage[-1]
    return stage, nn.Identity()


class _VectorBlock(nn.Module):
    """What a residual block is for feature maps, for feature vectors."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(dim_in, dim_out), nn.BatchNorm1d(dim_out), nn.ReLU(inplace=True))
        self.skip = nn.Linear(dim_in, dim_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def _lift(dim_in: int, dim_out: int, expansion: int, maps: bool) -> nn.Module:
    """Carry attended features to the next stage's width."""
    if not maps:
        return _VectorBlock(dim_in, dim_out)
    from fastmtl.model.resnet import BasicBlock, Bottleneck

    downsample = nn.Sequential(pointwise(dim_in, dim_out, maps, bias=False), norm(dim_out, maps))
    block = BasicBlock if expansion == 1 else Bottleneck
    return cast(nn.Module, block(dim_in, dim_out // expansion, downsample=downsample))


class AttentionEncoder(nn.Module):
    """A staged encoder with one soft attention branch per task.

    A stage has two halves, the second its last part. In stage i a task's mask is computed from the features between the
    halves and the task's own features of stage i - 1; it multiplies the stage's output. ``trunk`` is the encoder alone,
    so all tasks share one pass through it.

    Args:
        stages: The encoder's parts.
        task_name: The task names, in order.
        maps: The features are maps (B, C, H, W); otherwise vectors (B, C), or sequences of them (B, L, C).
    """

    def __init__(self, stages: Stages, task_name: list[str], maps: bool) -> None:
        super().__init__()
        self.task_name = task_name
        self.forward_task: str | None = None
        self.maps = maps
        dims, expansion = stages.dims, stages.expansion
        self.shared_conv = stages.stem
        self.shared_layer = nn.ModuleDict(
            {str(i): nn.ModuleList(_halve(stage)) for i, stage in enumerate(stages.stages)}
        )
        self.encoder_att = nn.ModuleDict()
        self.encoder_block_att = nn.ModuleList()
        # Stage by stage, as LibMTL does, so that a seed gives its initial weights.
        for i, dim in enumerate(dims):
            inputs, width = (dim if i == 0 else 2 * dim), max(dim // expansion, 1)
            self.encoder_att[str(i)] = nn.ModuleList(mask(inputs, width, dim, maps) for _ in task_name)
            if i + 1 < len(dims):
                self.encoder_block_att.append(_lift(dim, dims[i + 1], expansion, maps))

    def trunk(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Return (middle, output) of every stage, flattened: 2 x stages tensors."""
        features = []
        x = self.shared_conv(inputs)
        for pair in self.shared_layer.values():
            first, second = cast(nn.ModuleList, pair)
            middle = first(x)
            x = second(middle)
            features += [middle, x]
        return tuple(features)

    def attend(self, features: tuple[Tensor, ...], task: str) -> Tensor:
        """Return the attended features of the last stage for ``task``."""
        index = self.task_name.index(task)
        attended: Tensor | None = None
        for i, (masks, middle, output) in enumerate(
            zip(self.encoder_att.values(), features[::2], features[1::2], strict=True)
        ):
            mask_input = (
                middle
                if attended is None
                else torch.cat([middle, self._fit(attended, middle)], dim=1 if self.maps else -1)
            )
            attended = self._by_rows(cast(nn.ModuleList, masks)[index], mask_input) * output
            if i < len(self.encoder_block_att):
                attended = self._by_rows(self.encoder_block_att[i], attended)
        assert attended is not None
        return attended

    def _by_rows(self, module: nn.Module, x: Tensor) -> Tensor:
        """Apply a module for maps or for vectors; the vectors of sequences are so many rows."""
        if self.maps or x.dim() == 2:
            return module(x)
        return module(x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    def _fit(self, attended: Tensor, like: Tensor) -> Tensor:
        """Pool maps down to the next stage's size; equal to a 2 x 2 max pooling where the sizes halve."""
        if not self.maps or attended.shape[-2:] == like.shape[-2:]:
            return attended
        return F.adaptive_max_pool2d(attended, like.shape[-2:])

    def forward(self, inputs: Tensor) -> list[Tensor] | Tensor:
        """Return the attended features of all tasks, or of ``forward_task`` alone if that is set."""
        features = self.trunk(inputs)
        if self.forward_task is not None:
            return self.attend(features, self.forward_task)
        return [self.attend(features, task) for task in self.task_name]
