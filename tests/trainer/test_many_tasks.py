"""More tasks than the kernels take at once."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.model import MLPEncoder
from fastmtl.ops._rows import Rows, flatten
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.weighting import WEIGHTINGS
from tests.trainer.toy import flat, loaders, make_trainer


def _trained(name: str, count: int, **options: Any) -> Tensor:
    """Return parameters, and what is remembered, after two steps."""
    trainer = make_trainer(
        name,
        count=count,
        encoder_class=lambda: MLPEncoder(6, [40, 8]),
        rep_grad=WEIGHTINGS[name].needs == "reps",
        optim_param={"optim": "sgd", "lr": 1e-3},
        **options,
    )
    trainer.model.epoch, trainer.model.epochs = 1, 2
    torch.manual_seed(3)
    random.seed(3)
    batch = next(iter(loaders(count, rows=24, batch=24)))
    for _ in range(2):
        trainer.step([batch] * trainer.step.batches, StepBuffer())
    trainer.guard.check(None)
    kept = {name: value for name, value in trainer.model.named_buffers() if value.is_floating_point()}
    return flat([*trainer.model.parameters(), *(value.float() for value in kept.values())])


def _use_plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the references, in float64 and of all rows at once, in the place of the ops on rows."""
    reference = {name: ops.implementation(name, "reference") for name in ("gram", "combine_", "ema_gram_")}
    risks = ops.implementation("excess_risk_", "reference")

    def ema(state: Rows, rows: Rows, keep: Tensor, gains: Tensor) -> Tensor:
        return reference["ema_gram_"](flatten(state)[0], *flatten(rows), keep.expand(len(gains)), gains)

    def combine_(out: Any, rows: Rows, weights: Tensor, groups: Any = None, accumulate: bool = False) -> None:
        reference["combine_"](out, *flatten(rows), weights, groups, accumulate)

    def combine(rows: Rows, weights: Tensor, groups: Any = None) -> list[Tensor | None]:
        found = [next((part for part in column if part is not None), None) for column in zip(*rows, strict=True)]
        used = [k for k, part in enumerate(found) if part is not None]
        out = {k: torch.empty_like(found[k]) for k in used}
        some = None if groups is None else [groups[k] for k in used]
        combine_(list(out.values()), [[row[k] for k in used] for row in rows], weights, some)
        return [out.get(k) for k in range(len(found))]

    monkeypatch.setattr(ops, "gram", lambda rows, groups=None: reference["gram"](*flatten(rows), groups))
    monkeypatch.setattr(ops, "combine_", combine_)
    monkeypatch.setattr(ops, "combine", combine)
    monkeypatch.setattr(ops, "ema_gram_", ema)
    monkeypatch.setattr(ops, "excess_risk_", lambda sums, rows: risks(flatten(sums)[0], *flatten(rows), 1e-7))


@pytest.mark.parametrize(
    ("name", "count", "options"),
    [
        ("MGDA", 200, {}),
        ("PCGrad", 130, {"vjps": "sequential"}),
        ("GradVac", 130, {"weight_args": {"GradVac_group_type": 2}}),
        ("MGDA", 130, {"vjps": "layerwise"}),
        pytest.param("IMTL", 130, {}, marks=pytest.mark.slow),
        pytest.param("DB_MTL", 130, {}, marks=pytest.mark.slow),
        ("MoCo", 130, {"clip_grad_norm": 1.0}),
        ("ExcessMTL", 130, {}),
        pytest.param("SDMGrad", 44, {}, marks=pytest.mark.slow),
        ("MOML", 65, {}),
        pytest.param("MGDA", 200, {"tasks_per_step": 150}, marks=pytest.mark.slow),
        ("MGDA", 130, {"accumulate": 2}),
    ],
    ids=str,
)
def test_steps_are_those_of_plain_operators(
    name: str, count: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _trained(name, count, **options)
    _use_plain_operators(monkeypatch)
    exact = _trained(name, count, **options)
    assert found.isfinite().all()
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["EW", "GradDrop", "Nash_MTL", "UPGrad", "GO4Align"])
def test_trains_many_tasks(name: str) -> None:
    assert _trained(name, 130).isfinite().all()
