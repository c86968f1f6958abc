"""Multi-task attention network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn

from fastmtl.architecture.attention import AttentionEncoder
from fastmtl.architecture.base import AbsArchitecture
from fastmtl.architecture.stages import Stages

__all__ = ["MTAN"]


class MTAN(AbsArchitecture):
    """Multi-Task Attention Network: a shared encoder of stages, and soft attention over its features for each task.

    The encoder is a ResNet of ``fastmtl.model``, any ``fastmtl.model.StagedEncoder``, or a module that holds a ResNet
    as ``resnet_network``, which then runs once for each task. Module names and ``state_dict`` keys are LibMTL's.

    Source: Liu, Johns and Davison, "End-To-End Multi-Task Learning With Attention", CVPR 2019.

    Raises:
        UsageError: The encoder is not made of stages.
    """

    def _make_network(self) -> None:
        encoder = self.encoder_class()
        inner = getattr(encoder, "resnet_network", encoder)
        stages = Stages.of(inner, "MTAN", ", a module that holds one as resnet_network,")
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
        """Whether the encoder is the attention network itself; the layers of a wrapper are shared, but come after."""
        return self.encoder is self.attention

    def trunk(self, inputs: Tensor, task_name: str | None = None) -> tuple[Tensor, ...]:
        """Return the shared features of every stage; with a wrapped ResNet, what the wrapper makes of each task's."""
        if self.splits:
            return self.attention.trunk(inputs)
        # The wrapper's own layers read the features of one task.
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
