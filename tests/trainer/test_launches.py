"""What a step launches beyond forward passes, VJPs and the optimizer: few operators, however many tasks there are."""

from __future__ import annotations

import fastmtl.benchmarks.step as bench
import pytest
import torch
from fastmtl.benchmarks.launches import LaunchCounter
from fastmtl.benchmarks.overhead import STRATEGIES, floor_of
from fastmtl.benchmarks.step import trainer_step
from fastmtl.benchmarks.work import Work

MOST = 12


@pytest.mark.parametrize("count", [2, 9])
@pytest.mark.parametrize("weighting", STRATEGIES)
def test_a_step_launches_little(weighting: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Labels are looked at in the host's memory.
    monkeypatch.setattr(bench, "are_complete", lambda losses, labels: True)
    work = Work(net="tiny", arch="HPS", count=count, batch=8, size=1, device=torch.device("cpu"))
    ours, floor = trainer_step(work, weighting, "fp32"), floor_of(work, weighting)
    # The first steps look at the network, and for parameters that nothing reaches.
    for _ in range(12):
        ours()
    assert ours.launches() - floor.launches() <= MOST


def test_launches_are_counted_one_by_one() -> None:
    params = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)]
    with LaunchCounter() as counter:
        loss = (params[0].view(3, 1)[:2, 0] * params[1]).sum()
        loss.backward()
    # One product forward, two backward.
    assert counter.counts["mul"] == 3
    with torch.no_grad(), LaunchCounter() as fused:
        torch._foreach_add_(params, 1.0)
        params[0].unsqueeze(0).expand(4, 3).detach()
        torch.empty(3)
    assert dict(fused.counts) == {"_foreach_add_": 1}
