"""A regression and a classification on a shared layer: a penalty on the ratio of their gradient norms, or GradNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmtl import Trainer
from fastmtl.loss import AbsLoss, CELoss
from fastmtl.metrics import AbsMetric, AccMetric


class Net(nn.Module):
    """A shared layer and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Dropout(0.1))
        self.heads = nn.ModuleDict({"value": nn.Linear(50, 1), "kind": nn.Linear(50, 5)})

    def losses(self, inputs: Tensor, labels: dict[str, Tensor]) -> list[Tensor]:
        """Return both losses."""
        features = self.shared(inputs)
        return [
            nn.functional.mse_loss(self.heads["value"](features), labels["value"]),
            nn.functional.cross_entropy(self.heads["kind"](features), labels["kind"]),
        ]


def batches(count: int, seed: int = 0) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Return batches of 32 inputs with a number and one of five kinds."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 32, 10, generator=generator)
    return [(batch, {"value": batch[:, :1] - batch[:, 1:2], "kind": batch[:, :5].argmax(1)}) for batch in inputs]


def with_penalty(epochs: int = 10, alpha: float = 0.12) -> list[list[float]]:
    """Train on ``L_1 + L_2 + alpha | |g_1| / |g_2| - 1 |``, g_t the gradients of the shared parameters."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    shared = list(net.shared.parameters())
    history = []
    for _ in range(epochs):
        for inputs, labels in batches(16):
            losses = net.losses(inputs, labels)
            norms = [
                torch.stack([grad.norm() for grad in torch.autograd.grad(loss, shared, create_graph=True)]).norm()
                for loss in losses
            ]
            optimizer.zero_grad()
            (losses[0] + losses[1] + alpha * (norms[0] / norms[1] - 1).abs()).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            history.append([loss.item() for loss in losses])
    return history


class SquaredLoss(AbsLoss):
    """Mean squared error."""

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean."""
        return nn.functional.mse_loss(pred, gt)


class SquaredError(AbsMetric):
    """Mean squared error over an epoch."""

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Add a batch."""
        self.record.append((pred - gt).square().mean().item() * len(gt))
        self.bs.append(len(gt))

    def score_fun(self) -> list[float]:
        """Return the mean."""
        return [sum(self.record) / sum(self.bs)]


def with_gradnorm(epochs: int = 10) -> Trainer:
    """Train with the strategy GradNorm and the gradients clipped."""
    torch.manual_seed(0)
    tasks = {
        "value": {"metrics": ["MSE"], "metrics_fn": SquaredError(), "loss_fn": SquaredLoss(), "weight": [0]},
        "kind": {"metrics": ["Acc"], "metrics_fn": AccMetric(), "loss_fn": CELoss(), "weight": [1]},
    }
    trainer = Trainer(
        tasks,
        weighting="GradNorm",
        architecture="HPS",
        encoder_class=lambda: Net().shared,
        decoders=Net().heads,
        rep_grad=False,
        multi_input=False,
        optim_param={"optim": "adam", "lr": 1e-2},
        scheduler_param=None,
        clip_grad_norm=1.0,
    )
    loader = batches(16)
    trainer.train(loader, loader, epochs)
    return trainer


if __name__ == "__main__":
    losses = with_penalty()
    print(f"penalty: from {losses[0]} to {losses[-1]}")
    with_gradnorm()
