"""Small networks of published comparisons: MultiMNIST's LeNet, and the nine layers of CelebA."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["CelebANet", "LeNet"]


class LeNet(nn.Module):
    """LeNet for MultiMNIST (Sener and Koltun, NeurIPS 2018): images (b, channels, 32, 32) to features (b, 50, 1, 1).

    Two convolutions of 5 x 5 with 10 and 20 channels, each with a pooling of 2 x 2, and a linear layer of 50.

    Args:
        channels: Of the images.
    """

    feature_dim = 50

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 10, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(10, 20, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(20 * 5 * 5, self.feature_dim),
            nn.ReLU(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the features."""
        features: Tensor = self.layers(images)
        return features[:, :, None, None]


class CelebANet(nn.Module):
    """The network of CelebA's 40 attributes (Liu et al., FAMO, NeurIPS 2023): images (b, 3, h, w) to (b, 512, 1, 1).

    Seven convolutions of 3 x 3 with 64 to 512 channels, the mean over positions, and two linear layers of 512, each
    with batch normalisation; a decoder of one linear layer follows.
    """

    feature_dim = 512

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for stage, widths in enumerate(((64,), (128, 128), (256, 256), (512, 512))):
            layers += [nn.MaxPool2d(2)] if stage else []
            for width in widths:
                layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                before = width
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        for _ in range(2):
            layers += [nn.Linear(before, before, bias=False), nn.BatchNorm1d(before), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features."""
        features: Tensor = self.layers(images)
        return features[:, :, None, None]
