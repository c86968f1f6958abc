"""Two regressions with a shared network, in a plain PyTorch loop: what they disagree about is balanced by UPGrad."""

from __future__ import annotations

import torch
from torch import nn

from fastmtl.aggregation import UPGrad
from fastmtl.autojac import jac_to_grad, mtl_backward


def train(steps: int = 200, seed: int = 0) -> list[list[float]]:
    """Return the two losses of each step."""
    torch.manual_seed(seed)
    shared = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 4), nn.ReLU())
    heads = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
    optimizer = torch.optim.SGD([*shared.parameters(), *heads.parameters()], lr=0.1)
    aggregator = UPGrad()

    inputs = torch.randn(256, 10)
    # The tasks want nearly opposite things of the first inputs.
    targets = [inputs[:, :1] + inputs[:, 1:2], inputs[:, 2:3] - inputs[:, :1]]
    history = []
    for _ in range(steps):
        features = shared(inputs)
        losses = [nn.functional.mse_loss(head(features), target) for head, target in zip(heads, targets, strict=True)]
        optimizer.zero_grad()
        mtl_backward(losses, features=features)
        jac_to_grad(shared.parameters(), aggregator)
        optimizer.step()
        history.append([loss.item() for loss in losses])
    return history


if __name__ == "__main__":
    losses = train()
    for step in range(0, len(losses), 40):
        print(f"step {step:3d}: {losses[step][0]:.3f} {losses[step][1]:.3f}")
    print(f"at last : {losses[-1][0]:.3f} {losses[-1][1]:.3f}")
