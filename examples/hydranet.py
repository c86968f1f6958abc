"""A hydra: one image backbone with heads for two classifications and two regressions, balanced in one call."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastmtl
from fastmtl.data.digits import embedded_digits
from fastmtl.data.multimnist import draw_pairs, overlay


class Hydra(nn.Module):
    """A convolutional backbone and a head per task."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 128),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict(
            {
                "left": nn.Linear(128, 10),
                "right": nn.Linear(128, 10),
                "ink": nn.Linear(128, 1),
                "sum": nn.Linear(128, 1),
            }
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return each task's prediction."""
        features = self.backbone(images)
        return {task: head(features) for task, head in self.heads.items()}


def pairs(split: str, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return images of two overlaid digits: which they are, how much of the image is bright, and their sum."""
    digits = embedded_digits()[split]
    left, right = draw_pairs(count, len(digits.labels), (0, 0))
    images = overlay(digits.images[left], digits.images[right])[:, None].float() / 255
    labels = {"left": digits.labels[left], "right": digits.labels[right]}
    labels["ink"] = 10 * images.mean((1, 2, 3))[:, None]
    labels["sum"] = (labels["left"] + labels["right"]).float()[:, None] / 10
    return images, labels


def losses(predictions: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the loss of each task."""
    measures = {"left": functional.cross_entropy, "right": functional.cross_entropy}
    return {
        task: measures.get(task, functional.mse_loss)(prediction, labels[task])
        for task, prediction in predictions.items()
    }


def train(epochs: int = 10, images: int = 4000) -> dict[str, float]:
    """Return each task's loss on images of other digits."""
    torch.manual_seed(0)
    net = Hydra()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    inputs, labels = pairs("train", images)
    for epoch in range(epochs):
        for batch in torch.randperm(images).split(64):
            optimizer.zero_grad()
            found = losses(net(inputs[batch]), {task: label[batch] for task, label in labels.items()})
            fastmtl.balance(found, shared=net.backbone, weighting="upgrad")
            optimizer.step()
        print(f"epoch {epoch}: " + ", ".join(f"{task} {loss.item():.3f}" for task, loss in found.items()))
    with torch.no_grad():
        inputs, labels = pairs("test", 1000)
        return {task: loss.item() for task, loss in losses(net(inputs), labels).items()}


if __name__ == "__main__":
    print(train())
