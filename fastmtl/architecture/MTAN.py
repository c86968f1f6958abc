"""Multi-task attention network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.architecture.abstract_arch import AbsArchitecture
from fastmtl.architecture.stages import Stages
from fastmtl.model.stages import mask, norm, pointwise

__all__ = ["MTAN"]


class MTAN(AbsArchitecture):
    """Multi-Task Attention Network: a shared encoder of stages, and soft attention of each task over its features.

    The encoder is a ResNet of ``fastmtl.model``, any ``fastmtl.model.StagedEncoder``, or a module that holds a ResNet
    as ``resnet_network``, which then runs once for each task. Module names and ``state_dict`` keys are LibMTL's.

    Source: Liu, Johns and Davison, "End-To-End Multi-Task Learning With Attention", CVPR 2019.

    Raises:
        UsageError: The encoder is not made of stages.
    """

    needs_stages = True
    by_place = (r"\bencoder_att\.\d+\.(\d+)\.",)

    def _make_network(self) -> None:
        encoder = self.encoder_class()
        inner = getattr(encoder, "resnet_network", encoder)
        stages = Stages.of(inner, "MTAN", ", a module that holds one as resnet_network,", self.encoder_class)
        maps = getattr(inner, "maps", None)
        if maps is None:
            maps = any(isinstance(module, nn.Conv2d) for module in inner.modules())
        attention = AttentionEncoder(stages, self.task_name, maps)
        if inner is encoder:
            self.encoder = attention
        else:
            encoder.resnet_network = attention
            self.encoder = encoder

    @property
    def attention(self) -> AttentionEncoder:
        """The attention network: the encoder itself, or the ``resnet_network`` inside it."""
        return cast(AttentionEncoder, getattr(self.encoder, "resnet_network", self.encoder))

    @property
    def splits(self) -> bool:
        """Whether the encoder is the attention network itself: a wrapper's shared layers follow the attention."""
        return self.encoder is self.attention

    def trunk(self, inputs: Tensor, task_name: str | None = None) -> tuple[Tensor, ...]:
        """Return the shared features of every stage; with a wrapped ResNet, the wrapper's output for each task."""
        if self.splits:
            return self.attention.trunk(inputs)
        # The wrapper's layers read the attended features of one task.
        reps = []
        for task in self.task_name if task_name is None else [task_name]:
            self.attention.forward_task = task
            reps.append(self.encoder(inputs))
        return tuple(reps)

    def branch(self, features: tuple[Tensor, ...], task: str) -> Tensor:
        """Return the attended features of ``task``."""
        return self.attention.attend(features, task) if self.splits else super().branch(features, task)

    def get_share_params(self) -> Iterable[nn.Parameter]:
        """Return the encoder's parameters without the attention; a wrapper's own layers count as shared."""
        attention = self.attention
        shared = [*attention.shared_conv.parameters(), *attention.shared_layer.parameters()]
        inner = {id(param) for param in attention.parameters()}
        return shared + [param for param in self.encoder.parameters() if id(param) not in inner]


def _halve(stage: nn.Module) -> tuple[nn.Module, nn.Module]:
    # An in-place last part would overwrite the features between the halves.
    if isinstance(stage, nn.Sequential) and len(stage) > 1 and not getattr(stage[-1], "inplace", False):
        return stage[:-1], stage[-1]
    return stage, nn.Identity()


class _VectorBlock(nn.Module):
    """A residual block for feature vectors."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(dim_in, dim_out), nn.BatchNorm1d(dim_out), nn.ReLU(inplace=True))
        self.skip = nn.Linear(dim_in, dim_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def _lift(dim_in: int, dim_out: int, expansion: int, maps: bool) -> nn.Module:
    """Return the module from attended features to the next stage's width."""
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
    so all tasks share one pass through it. Features are ``maps`` (B, C, H, W), or vectors (B, C), or sequences of
    vectors (B, L, C).
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
            seen = middle
            if attended is not None:
                seen = torch.cat([middle, self._fit(attended, middle)], dim=1 if self.maps else -1)
            attended = self._by_rows(cast(nn.ModuleList, masks)[index], seen) * output
            if i < len(self.encoder_block_att):
                attended = self._by_rows(self.encoder_block_att[i], attended)
        assert attended is not None
        return attended

    def _by_rows(self, module: nn.Module, x: Tensor) -> Tensor:
        """Apply a module for maps or for vectors; vectors of sequences become rows."""
        if self.maps or x.dim() == 2:
            return module(x)
        return module(x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    def _fit(self, attended: Tensor, like: Tensor) -> Tensor:
        """Max-pool maps to the size of ``like``; 2 x 2 pooling where the size halves."""
        if not self.maps or attended.shape[-2:] == like.shape[-2:]:
            return attended
        return F.adaptive_max_pool2d(attended, like.shape[-2:])

    def forward(self, inputs: Tensor) -> list[Tensor] | Tensor:
        """Return the attended features of all tasks, or of ``forward_task`` alone if that is set."""
        features = self.trunk(inputs)
        if self.forward_task is not None:
            return self.attend(features, self.forward_task)
        return [self.attend(features, task) for task in self.task_name]
