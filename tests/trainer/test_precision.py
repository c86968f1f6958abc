"""bf16 and fp16 steps, and the loss scale."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.loss import MSELoss
from fastmtl.metrics import AbsMetric
from fastmtl.trainer.log.jsonl import JsonlLogger, read_jsonl
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.trainer.optim.masking import MaskedOptimizer
from fastmtl.trainer.precision import PRECISIONS, LossScaler, set_tf32
from fastmtl.weighting import WEIGHTINGS, AbsWeighting, Weights
from tests.host_reads import NoHostRead
from tests.trainer.toy import flat, loaders, make_trainer

FP16 = sorted(name for name, rule in WEIGHTINGS.items() if rule.needs != "lookahead")


def _stepped(name: str, precision: str, **options: Any) -> Any:
    rep_grad = WEIGHTINGS[name].needs == "reps"
    trainer = make_trainer(name, count=3, precision=precision, rep_grad=rep_grad, **options)
    trainer.model.epoch, trainer.model.epochs = 0, 1
    if isinstance(trainer.step.scaler, LossScaler):
        trainer.step.scaler.scale.fill_(2.0**8)
    torch.manual_seed(1)
    batches = list(loaders(3))[:1] * trainer.step.batches
    trainer.step(batches, StepBuffer())
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", FP16)
def test_gradients_are_those_of_float32_up_to_rounding(name: str, precision: str) -> None:
    options = {"optim_param": {"optim": "adam" if WEIGHTINGS[name].steers_adam else "sgd", "lr": 0.0}}
    one, other = (
        flat([param.grad for param in _stepped(name, each, **options).model.parameters() if param.grad is not None])
        for each in ("fp32", precision)
    )
    assert other.dtype == torch.float32
    assert (one - other).norm() <= (0.02 if precision == "fp16" else 0.16) * one.norm()


def test_the_network_computes_in_the_low_precision_and_losses_do_not() -> None:
    seen: dict[str, torch.dtype] = {}
    trainer = make_trainer("MGDA", precision="bf16")
    trainer.model.encoder.register_forward_hook(lambda module, given, out: seen.update(features=out.dtype))
    inputs, labels = next(iter(loaders()))
    losses, preds = trainer.step.problem.whole(inputs, labels)
    assert seen["features"] == torch.bfloat16
    assert losses[0].dtype == preds["task0"].dtype == torch.float32


class _Spy(AbsWeighting):
    """Keeps the Gram matrices it sees."""

    needs = "gram"

    def init_param(self) -> None:
        self.remember("last", torch.zeros(self.task_num, self.task_num, dtype=torch.float64))

    def weigh(self, losses: Tensor, gram: Tensor | None, **hyper: Any) -> Weights:
        assert gram is not None
        self.last.copy_(gram)
        return Weights(shared=torch.ones_like(losses))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_predictions_in_containers_are_scored_in_float32(precision: str) -> None:
    seen: list[torch.dtype] = []

    class Named(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.last = nn.Linear(8, width)

        def forward(self, x: Tensor) -> dict[str, Any]:
            assert self.last(x).dtype == PRECISIONS[precision]
            return {"all": [self.last(x)]}

    class OfNamed(MSELoss):
        def compute_loss(self, pred: Any, gt: Tensor) -> Tensor:
            seen.append(pred["all"][0].dtype)
            return super().compute_loss(pred["all"][0], gt)

    class Ignored(AbsMetric):
        def update_fun(self, pred: Any, gt: Tensor) -> None:
            seen.append(pred["all"][0].dtype)

        def score_fun(self) -> list[float]:
            return [0.0]

        def reinit(self) -> None:
            pass

    tasks = {"task1": {"metrics": ["none"], "metrics_fn": Ignored(), "loss_fn": OfNamed(), "weight": [0]}}
    decoders = nn.ModuleDict({"task1": Named(1)})
    trainer = make_trainer("MGDA", task_dict=tasks, decoders=decoders, precision=precision)
    data = [(x, {"task1": labels["task1"]}) for x, labels in loaders()]
    trainer.train(data, data, 1)
    assert set(seen) == {torch.float32}


def test_strategies_see_gradients_without_the_scale() -> None:
    grams = []
    for precision in ("fp32", "fp16"):
        trainer = make_trainer(_Spy, precision=precision)
        if isinstance(trainer.step.scaler, LossScaler):
            trainer.step.scaler.scale.fill_(2.0**8)
        trainer.step([next(iter(loaders()))], StepBuffer())
        grams.append(trainer.model.last)
    torch.testing.assert_close(grams[0], grams[1], rtol=0.02, atol=1e-5)


def test_an_overflow_skips_the_step_and_leaves_no_trace_but_a_smaller_scale() -> None:
    trainer = make_trainer(_Spy, precision="fp16")
    trainer.step.scaler.scale.fill_(2.0**8)
    batch = next(iter(loaders()))
    trainer.step([batch], StepBuffer())
    trainer.step.scaler.scale.fill_(2.0**60)
    before, known = flat(trainer.model.parameters()), trainer.model.last.clone()
    trainer.step([batch], StepBuffer())
    assert torch.equal(flat(trainer.model.parameters()), before)
    assert torch.equal(trainer.model.last, known)
    assert trainer.step.scaler.scale == 2.0**59
    assert trainer.step.scaler.skipped == 1
    trainer.guard.check(None)
    trainer.step.scaler.scale.fill_(2.0**10)
    trainer.step([batch], StepBuffer())
    assert not torch.equal(flat(trainer.model.parameters()), before)
    assert trainer.step.scaler.skipped == 1


def test_an_overflow_leaves_no_trace_in_what_is_learned_from_a_second_look() -> None:
    trainer = make_trainer("FAMO", precision="fp16")
    batch = next(iter(loaders()))
    for _ in range(3):
        trainer.step.scaler.scale.fill_(2.0**8)
        trainer.step([batch], StepBuffer())
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.step.scaler.scale.fill_(2.0**120)
    trainer.step([batch], StepBuffer())
    assert trainer.step.scaler.skipped == 1
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("options", [{"weight_momentum": 0.9}, {"update_weights_every": 3}], ids=str)
def test_an_overflow_leaves_no_trace_in_weights_that_last(options: dict[str, Any], first: bool) -> None:
    trainer = make_trainer("MGDA", precision="fp16", **options)
    batch = next(iter(loaders()))

    def step(scale: float) -> bool:
        assert isinstance(trainer.step.scaler, LossScaler)
        trainer.step.scaler.scale.fill_(scale)
        before = flat(trainer.model.parameters())
        trainer.step([batch], StepBuffer())
        return not torch.equal(flat(trainer.model.parameters()), before)

    if not first:
        assert all(step(2.0**8) for _ in range(3))
    average = trainer.step.weights.average
    assert not step(2.0**120)
    if average is not None:
        torch.testing.assert_close(trainer.step.weights.average, average)
    assert all(step(2.0**8) for _ in range(6))
    assert isinstance(trainer.step.scaler, LossScaler)
    assert trainer.step.scaler.skipped == 1
    trainer.guard.check(None)


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        (torch.optim.RMSprop, {"momentum": 0.5}),
        (torch.optim.Adam, {"fused": False, "amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9, "fused": False}),
    ],
)
def test_a_masked_step_of_any_optimizer_changes_nothing(kind: Any, args: dict[str, Any]) -> None:
    found = []
    for masked in (False, True):
        param, flag = torch.nn.Parameter(torch.ones(3)), torch.zeros(())
        optimizer = MaskedOptimizer(kind([param], lr=0.1, **args), flag)
        for grad, bad in ((1.0, 0), (torch.inf, 1), (2.0, 0), (torch.nan, 1), (3.0, 0)):
            if bad and not masked:
                continue
            flag.fill_(bad)
            param.grad = torch.full((3,), grad)
            optimizer.step()
        found.append(param.detach())
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("skips", [(), (0,), (0, 1, 3), (2,)], ids=str)
def test_momentum_begins_as_in_torch(fused: bool, maximize: bool, skips: tuple[int, ...]) -> None:
    args: dict[str, Any] = {
        "lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": maximize,
    }  # fmt: skip
    params = [torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(4)]
    (plain, plain_late, param, late), flag = params, torch.zeros(())
    reference = torch.optim.SGD([plain, plain_late], **args)
    optimizer = torch.optim.SGD([param, late], fused=fused, **args)
    for step, grad in enumerate(torch.randn(6, 2, generator=torch.Generator().manual_seed(1))):
        bad = step in skips
        flag.fill_(float(bad))
        param.grad = grad * torch.nan if bad else grad.clone()
        # Not all parameters begin together.
        late.grad = None if step < 2 else param.grad.clone()
        MaskedOptimizer(optimizer, flag).step()
        if not bad:
            plain.grad, plain_late.grad = grad.clone(), None if step < 2 else grad.clone()
            reference.step()
        # A run may end anywhere and go on.
        state = optimizer.state_dict()
        optimizer = torch.optim.SGD([param, late], fused=fused, **args)
        optimizer.load_state_dict(copy.deepcopy(state))
    torch.testing.assert_close(param, plain)
    torch.testing.assert_close(late, plain_late)


def test_scale_doubles_after_many_good_steps() -> None:
    scaler = LossScaler(torch.device("cpu"))
    param = nn.Parameter(torch.ones(1))
    param.grad = torch.ones(1)
    for _ in range(2000):
        scaler.unscale([param], lambda flag: flag)
        scaler.settle(torch.zeros(()))
    assert scaler.scale == 2.0**17


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reads_nothing_on_the_host(precision: str) -> None:
    trainer = make_trainer("MGDA", precision=precision, clip_grad_norm=1.0)
    batch, buffer = next(iter(loaders())), StepBuffer()
    trainer.step([batch], buffer)
    with NoHostRead():
        trainer.step([batch], buffer)


def test_skipped_steps_are_counted_in_every_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    trainer = make_trainer("MGDA", precision="fp16", logger=JsonlLogger(path), log_every=1)
    trainer.step.scaler.scale.fill_(2.0**120)
    data = loaders()
    trainer.train(data, data, 2)
    rows = [row for row in read_jsonl(path) if row["event"] == "steps"]
    assert [row["skipped"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss_scale"] for row in rows] == pytest.approx([2.0**k for k in range(119, 113, -1)])
    said = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert [line.split(" were")[0] for line in said] == ["fp16: 3 of 3 steps so far", "fp16: 6 of 6 steps so far"]


def test_resumes_with_its_scale(tmp_path: Path) -> None:
    data = loaders()
    first = make_trainer("MGDA", precision="fp16", save_path=str(tmp_path))
    first.step.scaler.scale.fill_(2.0**9)
    first.train(data, data, 1)
    again = make_trainer("MGDA", precision="fp16", resume=str(tmp_path / "last.pt"))
    assert again.step.scaler.scale == first.step.scaler.scale == 2.0**9


@pytest.mark.parametrize("name", ["MOML", "FORUM"])
def test_fp16_is_refused_where_a_strategy_runs_its_own_passes(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} runs backward passes of its own.*got fp16"):
        make_trainer(name, precision="fp16")


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(UsageError, match="precision"):
        make_trainer("EW", precision="fp8")


def test_clipping_limits_the_norm_of_all_gradients_after_the_scale_is_out() -> None:
    for precision in ("fp32", "fp16"):
        trainer = make_trainer("MGDA", precision=precision, clip_grad_norm=0.01)
        if isinstance(trainer.step.scaler, LossScaler):
            trainer.step.scaler.scale.fill_(2.0**8)
        trainer.step([next(iter(loaders()))], StepBuffer())
        norm = flat([param.grad for param in trainer.model.parameters()]).norm()
        torch.testing.assert_close(norm, torch.tensor(0.01), rtol=1e-3, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_strategys_limit_holds_in_steps_without_a_solve(precision: str) -> None:
    trainer = make_trainer(
        "Nash_MTL", precision=precision, update_weights_every=2, weight_args={"max_norm": 0.01}
    )  # fmt: skip
    if isinstance(trainer.step.scaler, LossScaler):
        trainer.step.scaler.scale.fill_(2.0**8)
    for _ in range(2):
        trainer.step([next(iter(loaders()))], StepBuffer())
        norm = flat([param.grad for param in trainer.model.get_share_params()]).norm()
        assert float(norm) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, "1", True])
def test_a_limit_that_stops_training_is_refused(limit: Any) -> None:
    with pytest.raises(UsageError, match=r"clip_grad_norm must be (a number|above 0), got"):
        make_trainer("EW", clip_grad_norm=limit)


def test_channels_last_reaches_inputs_and_weights() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            assert x.is_contiguous(memory_format=torch.channels_last)
            return self.conv(x).mean((2, 3))

    trainer = make_trainer("MGDA", encoder_class=Net, channels_last=True)
    assert trainer.model.encoder.conv.weight.is_contiguous(memory_format=torch.channels_last)
    inputs, labels = trainer.prepared(
        (torch.randn(4, 3, 8, 8), {"task0": torch.zeros(4, dtype=torch.int64), "task1": torch.zeros(4, 1)})
    )
    trainer.step([(inputs, labels)], StepBuffer())
    assert trainer.model.encoder.conv.weight.grad is not None


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_set_on_cuda_alone(tf32: bool) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        make_trainer("EW", tf32=tf32)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
        set_tf32(tf32, torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cudnn.allow_tf32 == tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("weighting", ["MoCo", "DB_MTL", "ExcessMTL"])
def test_weights_of_strategies_with_rows_are_reported_without_the_scale(weighting: str) -> None:
    shown = []
    for precision in ("fp32", "fp16"):
        trainer = make_trainer(weighting, precision=precision)
        if isinstance(trainer.step.scaler, LossScaler):
            trainer.step.scaler.scale.fill_(2.0**8)
        trainer.step([next(iter(loaders()))], StepBuffer())
        assert trainer.step.latest is not None
        shown.append(trainer.step.latest.weights)
    torch.testing.assert_close(shown[0], shown[1], rtol=0.02, atol=1e-3)
