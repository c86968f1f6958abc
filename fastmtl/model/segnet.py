"""SegNet, and SegNet with MTAN's attention: encoders whose output has the size of the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.model.stages import mask

__all__ = ["SegNet", "SegNet_MTAN_decoder", "SegNet_MTAN_encoder"]

CHANNELS = (64, 128, 256, 512, 512)


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _convs(channels: int, count: int) -> nn.Sequential:
    return (
        _conv(channels, channels) if count == 1 else nn.Sequential(*(_conv(channels, channels) for _ in range(count)))
    )


class _Level(NamedTuple):
    """The shared features at one resolution.

    The encoder's features after its first and its last convolution, the features that the decoder unpools from the
    level below, and the decoder's features.
    """

    down: tuple[Tensor, Tensor]
    lifted: Tensor
    up: Tensor


class SegNet(nn.Module):
    """SegNet without its classifier: ``(batch, inputs, h, w)`` to ``(batch, channels[0], h, w)``.

    A VGG-like encoder, and a decoder that unpools with the indices of the encoder's pooling. h and w must be at least
    ``2 ** len(channels)``. The state_dict keys are those of the shared part of LibMTL's SegNet.

    Source: Badrinarayanan, Kendall and Cipolla, `SegNet <https://arxiv.org/abs/1511.00561>`_.

    Args:
        channels: Channels of the levels, from the image's size downwards.
        inputs: Channels of the image.

    Attributes:
        feature_dim: Channels of the output.
    """

    def __init__(self, channels: Sequence[int] = CHANNELS, inputs: int = 3) -> None:
        super().__init__()
        if len(channels) < 2:
            raise UsageError(f"channels must name at least two levels, got {list(channels)}.")
        self.feature_dim = channels[0]
        before = [inputs, *channels[:-1]]
        # The decoder gives each level the width of the one above it, the uppermost level its own.
        after = [channels[0], *channels[:-1]]
        repeats = [1 if level < 2 else 2 for level in range(len(channels))]
        self.encoder_block = nn.ModuleList(map(_conv, before, channels))
        self.decoder_block = nn.ModuleList(map(_conv, channels, after))
        self.conv_block_enc = nn.ModuleList(map(_convs, channels, repeats))
        self.conv_block_dec = nn.ModuleList(map(_convs, after, repeats))
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def levels(self, x: Tensor) -> list[_Level]:
        """Return the features of every level, from the image's size downwards."""
        down, places = [], []
        for first, rest in zip(self.encoder_block, self.conv_block_enc, strict=True):
            features = first(x)
            down.append((features, rest(features)))
            x, place = F.max_pool2d(down[-1][1], 2, return_indices=True)
            places.append(place)
        levels: list[_Level] = []
        for level in reversed(range(len(down))):
            lifted = F.max_unpool2d(x, places[level], [2, 2], output_size=down[level][1].shape[-2:])
            x = self.conv_block_dec[level](self.decoder_block[level](lifted))
            levels.insert(0, _Level(down[level], lifted, x))
        return levels

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return the decoder's features at the image's size."""
        return self.levels(x)[0].up


class SegNet_MTAN_encoder(SegNet):
    """SegNet with soft attention of each task on every level of its encoder and decoder.

    ``forward`` returns a list, one ``(batch, channels[0], h, w)`` per task; to be used with the architecture HPS. The
    state_dict keys are LibMTL's.

    Source: Liu, Johns and Davison, "End-To-End Multi-Task Learning With Attention", CVPR 2019.

    Args:
        task_num: The number of tasks.
        channels: As of `SegNet`.
        inputs: As of `SegNet`.
    """

    def __init__(self, task_num: int = 3, channels: Sequence[int] = CHANNELS, inputs: int = 3) -> None:
        super().__init__(channels, inputs)
        after = [channels[0], *channels[:-1]]
        seen_down = [channels[0], *(2 * width for width in channels[1:])]
        seen_up = [width + above for width, above in zip(channels, after, strict=True)]
        self.encoder_att = nn.ModuleList(
            nn.ModuleList(map(mask, seen_down, channels, channels)) for _ in range(task_num)
        )
        self.decoder_att = nn.ModuleList(nn.ModuleList(map(mask, seen_up, after, after)) for _ in range(task_num))
        self.encoder_block_att = nn.ModuleList(map(_conv, channels, [*channels[1:], channels[-1]]))
        self.decoder_block_att = nn.ModuleList(map(_conv, channels, after))
        self._init_weights()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the attended features of every task."""
        levels = self.levels(x)
        return [self._attend(levels, task) for task in range(len(self.encoder_att))]

    def _attend(self, levels: list[_Level], task: int) -> Tensor:
        encoder_masks, decoder_masks = self.encoder_att[task], self.decoder_att[task]
        assert isinstance(encoder_masks, nn.ModuleList)
        assert isinstance(decoder_masks, nn.ModuleList)
        attended: Tensor | None = None
        for level, attention, lift in zip(levels, encoder_masks, self.encoder_block_att, strict=True):
            first, last = level.down
            seen = first if attended is None else torch.cat([first, attended], dim=1)
            attended = F.max_pool2d(lift(attention(seen) * last), 2)
        assert attended is not None
        upwards = list(zip(levels, decoder_masks, self.decoder_block_att, strict=True))[::-1]
        for level, attention, lift in upwards:
            attended = F.interpolate(attended, size=level.lifted.shape[-2:], mode="bilinear", align_corners=True)
            attended = attention(torch.cat([level.lifted, lift(attended)], dim=1)) * level.up
        return attended


class SegNet_MTAN_decoder(nn.Module):
    """The decoder of one task: ``(batch, inputs, h, w)`` to ``(batch, outputs, h, w)`` by two convolutions.

    Args:
        task_name: A task of NYUv2, which then sets ``outputs``: ``"segmentation"`` (13), ``"depth"`` (1) or
            ``"normal"`` (3); any name if ``outputs`` is given.
        outputs: Channels of the prediction.
        inputs: Channels of the encoder's output.

    Raises:
        UsageError: Another task without ``outputs``.
    """

    def __init__(self, task_name: str, outputs: int | None = None, inputs: int = CHANNELS[0]) -> None:
        super().__init__()
        known = {"segmentation": 13, "depth": 1, "normal": 3}
        if outputs is None and task_name not in known:
            raise UsageError(f"outputs must be given for the task {task_name!r}; it is known for {', '.join(known)}.")
        self.pred_task = nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, padding=1), nn.Conv2d(inputs, outputs or known[task_name], 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the prediction."""
        prediction: Tensor = self.pred_task(x)
        return prediction
