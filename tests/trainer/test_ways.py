"""However a step is run, every task has the same gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmtl.engine.methods.batched import Batched
from fastmtl.engine.methods.layerwise import Layerwise
from fastmtl.engine.methods.split import Split
from fastmtl.engine.methods.traced import Traced
from fastmtl.trainer.compile.capture import StepCapture
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.trainer.precision import LossScaler
from fastmtl.weighting import AbsWeighting, Weights
from tests.trainer.test_capture import Rerun
from tests.trainer.toy import flat, force_way, loaders, make_trainer

TASKS, ROWS = 3, 24
WAYS: dict[str, dict[str, Any]] = {
    "batched": {"vjps": "batched"},
    "layerwise": {"vjps": "layerwise"},
    "compiled": {"compile": True, "vjps": "sequential"},
    "traced": {"compile": True, "vjps": "traced"},
    "batched, heads compiled": {"vjps": "batched", "compile": True},
    "layerwise, heads compiled": {"vjps": "layerwise", "compile": True},
    "captured": {},
    "accumulated": {"accumulate": 3},
}
# Relative to the norm of the gradient: a few units in the last place of what the network computes in.
TOLERANCES = {"float64": 1e-12, "fp32": 1e-5, "bf16": 2e-2, "fp16": 3e-3}


# A compiled network is compiled anew for each dtype, which takes seconds.
CASES = [
    pytest.param(way, dtype, marks=[pytest.mark.slow] if "compile" in options else [])
    for way, options in WAYS.items()
    for dtype in TOLERANCES
    if ("compile" not in options or dtype == "float64" or (way, dtype) in (("compiled", "bf16"), ("traced", "fp16")))
]


class OneTask(AbsWeighting):
    """The update is one task's gradient."""

    needs = "gram"
    which = 0

    def weigh(self, losses: Tensor, gram: Tensor | None, **hyper: Any) -> Weights:
        return Weights(shared=(torch.arange(len(losses)) == self.which).to(losses.dtype))


def _wide() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))


def _batches(tasks: int, sizes: tuple[int, ...], shift: float) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Return all rows in batches, some without labels, the inputs shifted."""
    ((x, labels),) = loaders(tasks, rows=ROWS, batch=ROWS)
    labels["task0"][:5], labels["task1"][2::7] = -100, torch.nan
    split = {task: each.split(sizes) for task, each in labels.items()}
    return [(part, {task: split[task][k] for task in labels}) for k, part in enumerate((x + shift).split(sizes))]


def _gradients(dtype: str, tasks: int, captured: bool = False, **way: Any) -> list[Tensor]:
    """Return the gradients of a step for each task, with that task's alone for the shared network, and a Gram matrix.

    The last is the strategy's.
    """
    precision = "fp32" if dtype == "float64" else dtype
    optimizer = {"optim": "sgd", "lr": 0.0}
    trainer = make_trainer(OneTask, count=tasks, encoder_class=_wide, precision=precision, optim_param=optimizer, **way)
    trainer.model.epoch = 0
    sizes = (11, 8, 5) if trainer.step.batches == 3 else (ROWS,)
    # Only the last step's batch counts.
    steps = [_batches(tasks, sizes, shift) for shift in ([4.0, 3.0, 2.0, 1.0, 0.0] if captured else [0.0])]
    if dtype == "float64":
        trainer.model.double()
        steps = [
            [(x.double(), labels | {"task1": labels["task1"].double()}) for x, labels in batches] for batches in steps
        ]
    if isinstance(trainer.step.scaler, LossScaler):
        trainer.step.scaler.scale.fill_(2.0**8)
    found = []
    for task in range(tasks):
        rule: Any = trainer.model
        rule.which = task
        if captured:
            trainer.step.capture = StepCapture(rule, trainer.optimizer, Rerun(trainer), lambda message: None)
        for batches in steps:
            trainer.step(batches, StepBuffer())
        assert not captured or trainer.step.capture.replays == 2
        found.append(flat([param.grad for param in trainer.model.parameters()]))
    kinds = {"batched": Batched, "layerwise": Layerwise, "traced": Traced}
    engine: Any = trainer.step.engine
    assert type(engine.method) is kinds.get(way.get("vjps", ""), Split)
    assert engine.possible
    assert getattr(engine.method, "traces", True)
    assert trainer.step.latest is not None
    assert trainer.step.latest.gram is not None
    return [*found, trainer.step.latest.gram]


@pytest.mark.parametrize(("way", "dtype"), CASES)
def test_every_way_gives_every_tasks_gradient(way: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force_way(monkeypatch, "compressed")
    torch.compiler.reset()
    # A third task makes for more to compile, but for no other code.
    tasks = 2 if "compile" in WAYS[way] else TASKS
    want = _gradients(dtype, tasks, vjps="sequential")
    got = _gradients(dtype, tasks, way == "captured", **WAYS[way])
    for expected, found in zip(want, got, strict=True):
        assert expected.norm() > 0
        assert (found - expected).norm() <= TOLERANCES[dtype] * expected.norm()
    assert not torch.allclose(want[0], want[1])
