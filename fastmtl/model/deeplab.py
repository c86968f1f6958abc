"""DeepLab's head for dense predictions: atrous spatial pyramid pooling and a classifier."""

from __future__ import annotations

from fastmtl.model._torchvision import import_torchvision

_deeplab = import_torchvision().models.segmentation.deeplabv3

__all__ = ["DeepLabHead"]


class DeepLabHead(_deeplab.DeepLabHead):  # type: ignore[name-defined]
    """A decoder from ``(batch, in_channels, h, w)`` to ``(batch, num_classes, h, w)``; torchvision's.

    Its state_dict keys are those of the decoder in LibMTL's examples. In training mode a batch needs two images, as
    one branch has one value per image and channel, which batch norm normalises.

    Source: Chen et al., `Rethinking Atrous Convolution <https://arxiv.org/abs/1706.05587>`_.

    Args:
        in_channels: Channels of the encoder's output.
        num_classes: Channels of the prediction.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes, atrous_rates=(12, 24, 36))
