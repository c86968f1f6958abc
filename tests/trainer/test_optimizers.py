"""Optimizers by name, class and function, with groups of parameters, on every way a step may be left out."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.trainer.compile.capture import reason_against
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.trainer.optim.masking import MaskedOptimizer
from fastmtl.trainer.optim.optimizer import OPTIMIZERS, Parameters, learning_rates, make_optimizer
from fastmtl.trainer.setup.options import StepOptions
from tests.trainer.toy import encoder, fill_grads, loaders, make_trainer

CPU = torch.device("cpu")


def network() -> nn.Module:
    return nn.ModuleDict(
        {"encoder": nn.Linear(2, 2), "decoders": nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})}
    )


def named() -> dict[str, nn.Parameter]:
    return dict(network().named_parameters())


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "muon"])
@pytest.mark.parametrize("case", [str.upper, str.title, str])
def test_any_name_of_torch_in_any_case(name: str, case: Any) -> None:
    optimizer = make_optimizer(named(), {"optim": case(name), "lr": 0.01}, CPU)
    assert type(optimizer) is OPTIMIZERS[name]
    assert optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "muon"])
def test_a_step_is_that_of_torch(name: str) -> None:
    trainer = make_trainer("MGDA", optim_param={"optim": name, "lr": 0.01})
    batch = next(iter(loaders()))
    fill_grads(trainer, [batch])
    expected = [param.detach().clone().requires_grad_() for param in trainer.model.parameters()]
    kind: Any = OPTIMIZERS[name]
    reference = kind(expected, lr=0.01)
    for mine, param in zip(expected, trainer.model.parameters(), strict=True):
        mine.grad = None if param.grad is None else param.grad.clone()
    reference.step()
    trainer.step([batch], StepBuffer())
    for mine, param in zip(expected, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(param, mine)


def test_muon_takes_matrices() -> None:
    matrices = {"encoder.weight": nn.Parameter(torch.ones(2, 2))}
    assert type(make_optimizer(matrices, {"optim": "muon", "lr": 0.01}, CPU)) is torch.optim.Muon
    with pytest.raises(UsageError, match="Muon only supports 2D parameters"):
        make_trainer(optim_param={"optim": "muon", "lr": 0.01})


class Lars(torch.optim.Optimizer):
    """Counts on the host and keeps what begins with ones, as optimizers of other packages do."""

    def __init__(self, params: Any, lr: float, trust: float = 0.02) -> None:
        super().__init__(params, {"lr": lr, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                state.setdefault("count", 0)
                state.setdefault("scale", torch.ones(()))
                state["count"] += 1
                state["scale"] *= 0.9
                local = group["trust"] * param.norm() / (param.grad.norm() + 1e-8)
                param.sub_(param.grad * local * state["scale"] * group["lr"] / state["count"])


class NeedsClosure(Lars):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


class AsksForClosure(Lars):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None, "Sharpness-aware minimisation requires a closure"


def test_a_class_of_one_s_own() -> None:
    trainer = make_trainer(optim_param={"optim": Lars, "lr": 0.5, "trust": 0.1, "params": {"decoders": {"lr": 0.1}}})
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.5, 0.1]
    before = [param.clone() for param in trainer.model.parameters()]
    trainer.train(loaders(), loaders(), 1)
    assert all(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))


class Counting(torch.optim.SGD):
    """Counts how often its gradients are cleared."""

    cleared = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.cleared += 1
        super().zero_grad(set_to_none)


def test_an_optimizer_clears_gradients_its_own_way() -> None:
    trainer = make_trainer(optim_param={"optim": Counting, "lr": 0.1})
    trainer.train(loaders(), loaders(), 1)
    assert isinstance(trainer.optimizer, Counting)
    assert trainer.optimizer.cleared == len(loaders())


@pytest.mark.parametrize(
    ("optim_param", "message"),
    [
        ({"optim": "LBFGS", "lr": 0.1}, "LBFGS cannot be used: it computes the loss several times in a step"),
        ({"optim": torch.optim.LBFGS, "lr": 0.1}, "LBFGS cannot be used: it computes the loss several times"),
        ({"optim": "sparse_adam", "lr": 0.1}, "Unknown optimizer"),
        ({"optim": torch.optim.SparseAdam, "lr": 0.1}, "SparseAdam cannot be used: it takes sparse gradients only"),
        ({"optim": NeedsClosure, "lr": 0.1}, "NeedsClosure cannot be used: its step needs a closure"),
        ({"optim": lambda params, lr: object(), "lr": 0.1}, "must derive from torch.optim.Optimizer, got a object"),
        ({"optim": "adam", "lrr": 0.1}, "cannot be used"),
        ({"optim": 3, "lr": 0.1}, "optimizer must be one of"),
        ({"lr": 0.1}, "optim_param must name the optim"),
        ({"optim": "adam", "params": {"decoder": {"lr": 0.1}}}, "'decoder', with which no parameter's name begins: "
         "there are decoders, decoders.task0, decoders.task1, encoder, "),
        ({"optim": "adam", "params": {"encoder": {"rate": 0.1}}}, "has 'rate', which Adam does not take"),
        ({"optim": "adam", "params": {"encoder": 0.1}}, "must be {beginning of names: settings}"),
        ({"optim": "sgd", "lr": 0.1, "params": {"encoder": {"lr": None}}}, "lr of the group 'encoder' in params of "
         "optim_param must be a number, got None"),
        ({"optim": "adam", "params": {"encoder": {"lr": "fast"}}}, "must be a number, got 'fast'"),
        ({"optim": "sgd", "params": {"encoder": {"lr": float("nan")}}}, "must be a number, got nan"),
        ({"optim": "sgd", "lr": 0.1, "params": {"encoder": {"lr": -0.1}}}, "The group 'encoder' in params of "
         "optim_param, {'lr': -0.1}, cannot be used: Invalid learning rate: -0.1"),
        ({"optim": "adam", "params": {"encoder": {"betas": [0.9, 2]}}}, "The group 'encoder'.*Invalid beta"),
        ({"optim": Lars, "lr": 0.1, "params": {"encoder": {"trust": "x"}}}, "trust of the group 'encoder'"),
        (None, "optim_param must name the optim"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(optim_param: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_trainer(optim_param=optim_param)


def test_a_closure_asked_for_in_the_first_step_is_one_sentence() -> None:
    trainer = make_trainer(optim_param={"optim": AsksForClosure, "lr": 0.1})
    with pytest.raises(
        UsageError, match="AsksForClosure cannot take a step: Sharpness-aware minimisation requires a cl"
    ):
        trainer.train(loaders(), loaders(), 1)


def test_the_longest_beginning_of_a_name_counts() -> None:
    settings = {"decoders": {"lr": 0.2}, "decoders.b": {"lr": 0.3, "weight_decay": 0.5}, "decoders.b.bias": {"lr": 0.4}}
    params = named()
    optimizer = make_optimizer(params, {"optim": "adamw", "lr": 0.1, "params": settings}, CPU)
    names = {id(param): name for name, param in params.items()}
    found = {names[id(param)]: group["lr"] for group in optimizer.param_groups for param in group["params"]}
    assert found == {
        "encoder.weight": 0.1, "encoder.bias": 0.1, "decoders.a.weight": 0.2, "decoders.a.bias": 0.2,
        "decoders.b.weight": 0.3, "decoders.b.bias": 0.4,
    }  # fmt: skip
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.01, 0.5, 0.01]


def test_names_that_only_begin_alike_are_others() -> None:
    params = {"enc.w": nn.Parameter(torch.ones(1)), "encoder.w": nn.Parameter(torch.ones(1))}
    optimizer = make_optimizer(params, {"optim": "sgd", "lr": 0.1, "params": {"enc": {"lr": 0.2}}}, CPU)
    assert learning_rates(optimizer, list(params.values())) == [0.2, 0.1]


def test_a_group_of_the_strategy_s_parameters() -> None:
    trainer = make_trainer("UW", optim_param={"optim": "sgd", "lr": 0.1, "params": {"loss_scale": {"lr": 0.0}}})
    before = trainer.model.loss_scale.clone()
    trainer.train(loaders(), loaders(), 1)
    assert torch.equal(trainer.model.loss_scale, before)


def test_a_group_is_updated_with_its_own_rate() -> None:
    slow = make_trainer("EW", optim_param={"optim": "sgd", "lr": 0.1, "params": {"decoders.task1": {"lr": 0.01}}})
    batch = next(iter(loaders()))
    before = {name: param.detach().clone() for name, param in slow.model.named_parameters()}
    fill_grads(slow, [batch])
    grads = {name: param.grad.clone() for name, param in slow.model.named_parameters() if param.grad is not None}
    slow.step([batch], StepBuffer())
    for name, param in slow.model.named_parameters():
        rate = 0.01 if name.startswith("decoders.task1") else 0.1
        torch.testing.assert_close(param, before[name] - rate * grads[name])


def test_a_function_makes_the_optimizer() -> None:
    def by_decay(params: Parameters) -> torch.optim.Optimizer:
        biases = [param for name, param in params.named.items() if name.endswith("bias")]
        rest = [param for name, param in params.named.items() if not name.endswith("bias")]
        return torch.optim.AdamW([{"params": rest}, {"params": biases, "weight_decay": 0.0}], lr=0.01)

    trainer = make_trainer(optim_param=None, optimizer=by_decay)
    assert [len(group["params"]) for group in trainer.optimizer.param_groups] == [4, 4]
    trainer.train(loaders(), loaders(), 1)
    plain = make_trainer(optim_param=None, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    assert len(plain.optimizer.param_groups[0]["params"]) == 8


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda params: torch.optim.SGD(params[:-1], lr=0.1), "lacks decoders.task1.bias|lacks encoder"),
        (
            lambda params: torch.optim.SGD([nn.Parameter(torch.ones(3)), *params], lr=0.1),
            r"\(3,\), which is not the mod",
        ),
        (torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1), "must be a function of the parameters"),
        ("sgd", "must be a function of the parameters"),
        (lambda params: torch.optim.Adam(params.named), "cannot be called with the parameters, a list with them by"),
    ],
)
def test_functions_that_do_not_fit_are_refused(optimizer: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_trainer(optim_param=None, optimizer=optimizer)
    with pytest.raises(UsageError, match="optimizer and optim_param say the same"):
        make_trainer(optimizer=lambda params: torch.optim.SGD(params, lr=0.1))


def test_another_optimizer_put_in_its_place_is_refused() -> None:
    trainer = make_trainer()
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="optimizer cannot be replaced: give Trainer optimizer"):
        trainer.train(loaders(), loaders(), 1)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "muon"])
@pytest.mark.parametrize("first", [True, False])
def test_skipped_steps_leave_no_trace(name: str, first: bool) -> None:
    args: dict[str, Any] = {"lr": 0.1} | ({"fused": False} if name in ("sgd", "adam", "adamw", "adagrad") else {})
    _compare_skipped(lambda params: OPTIMIZERS[name](params, **args), first)


@pytest.mark.parametrize("first", [True, False])
def test_skipped_steps_of_other_packages_optimizers_leave_no_trace(first: bool) -> None:
    _compare_skipped(lambda params: Lars(params, 0.1), first)


def _compare_skipped(make: Any, first: bool) -> None:
    """Steps of which some are skipped, as float16 does, against those alone that are not."""
    steps = [(1.0, 0), (torch.inf, 1), (2.0, 0), (torch.nan, 1), (3.0, 0)]
    if first:
        steps.insert(0, (torch.nan, 1))
    results: list[Tensor] = []
    for masked in (False, True):
        param, flag = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]])), torch.zeros(())
        optimizer = MaskedOptimizer(make([param]), flag, skips=True)
        for grad, bad in steps:
            if bad and not masked:
                continue
            flag.fill_(bad)
            param.grad = torch.full((2, 2), grad)
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_a_step_that_is_not_finite_moves_nothing_under_any_optimizer() -> None:
    param, flag = nn.Parameter(torch.ones(2)), torch.ones(())
    param.grad = torch.full((2,), torch.nan)
    MaskedOptimizer(Lars([param], 0.1), flag).step()
    assert torch.equal(param, torch.ones(2))


def test_groups_that_are_fused_and_not_are_undone() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": params[:1], "fused": True}, {"params": params[1:]}], lr=0.1)
    for param in params:
        param.grad = torch.ones(2)
    flag = torch.ones(())
    MaskedOptimizer(optimizer, flag).step()
    assert all(torch.equal(param, torch.ones(2)) for param in params)
    flag.zero_()
    MaskedOptimizer(optimizer, flag).step()
    assert all(torch.equal(param.detach(), torch.full((2,), 0.9)) for param in params)


@pytest.mark.parametrize(
    ("optim", "precision", "reason"),
    [
        ("sgd", "fp16", None),
        ("adam", "fp16", None),
        ("nadam", "fp32", None),
        ("nadam", "fp16", "NAdam is told of float16 steps to leave out by the host"),
        ("adafactor", "fp32", "Adafactor may count its steps on the host"),
        (Lars, "fp32", "Lars may count its steps on the host"),
    ],
)
def test_graphs_are_of_optimizers_that_the_host_has_no_part_in(optim: Any, precision: str, reason: str | None) -> None:
    trainer = make_trainer(optim_param={"optim": optim, "lr": 0.01})
    options = StepOptions(precision=precision)
    assert reason_against(trainer.model, trainer.optimizer, options, torch.device("cuda")) == reason


class Averaging(torch.optim.SGD):
    """Evaluates an average, as schedule-free optimizers do: it must be told what is going on."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.modes: list[bool] = []

    def train(self) -> None:
        self.modes.append(True)

    def eval(self) -> None:
        self.modes.append(False)


def test_an_optimizer_that_knows_modes_is_told() -> None:
    trainer = make_trainer(optim_param={"optim": Averaging, "lr": 0.1})
    trainer.train(loaders(), loaders(), 2)
    assert trainer.optimizer.modes == [True, False, True, False]


def test_rates_of_numpy_can_be_gone_on_with(tmp_path: Any) -> None:
    options: dict[str, Any] = {
        "optim_param": {"optim": "adam", "lr": np.float64(0.01), "params": {"encoder": {"lr": np.float32(0.5)}}},
        "scheduler_param": {"scheduler": "exp", "gamma": np.float64(0.9)},
    }
    make_trainer(save_path=str(tmp_path), **options).train(loaders(), loaders(), 1)
    trainer = make_trainer(resume=str(tmp_path), **options)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.009, 0.45])


def test_bilevel_strategies_look_ahead_with_each_parameter_s_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slope of the weights by autograd, in float64, through a step whose rates differ."""
    rates = {"encoder": 0.02, "decoders.task1": 0.3}
    groups = {name: {"lr": rate} for name, rate in rates.items()}
    trainer = make_trainer("AutoLambda", count=3, optim_param={"optim": "sgd", "lr": 0.05, "params": groups})
    trainer.model.epoch = 0
    with torch.no_grad():
        trainer.model.logits.value.copy_(torch.tensor([0.5, -0.3, 0.1]))
    model = copy.deepcopy(trainer.model).double()
    slopes: list[Tensor] = []
    monkeypatch.setattr(trainer.model.logits, "step", lambda grad, lr: slopes.append(grad))
    x, labels = next(iter(loaders(3)))
    trainer.step([(x, labels)] * 2, StepBuffer())

    def losses(values: dict[str, Tensor], rows: slice) -> Tensor:
        preds = torch.func.functional_call(model, values, (x[rows].double(),))
        of = trainer.meter.losses
        gt = {task: y[rows].double() if y.is_floating_point() else y[rows] for task, y in labels.items()}
        return torch.stack([of[task].compute_loss(preds[task], gt[task]) for task in trainer.task_name])

    values = dict(model.named_parameters())
    logits = model.logits.value.detach().clone().requires_grad_()
    inner = torch.softmax(logits, -1) @ losses(values, slice(0, 4))
    grads = torch.autograd.grad(inner, list(values.values()), create_graph=True, allow_unused=True)
    rate = {name: next((r for prefix, r in rates.items() if name.startswith(prefix)), 0.05) for name in values}
    stepped = {
        name: value if grad is None else value - rate[name] * grad
        for (name, value), grad in zip(values.items(), grads, strict=True)
    }
    (expected,) = torch.autograd.grad(losses(stepped, slice(4, 8)).sum(), logits)
    torch.testing.assert_close(slopes[0].double(), expected, rtol=3e-2, atol=1e-5)


def test_numbers_that_are_texts_and_rates_that_are_tensors() -> None:
    optim_param = {"optim": "adam", "lr": "1e-2", "params": {"encoder": {"lr": "1e-4", "betas": ["0.5", 0.9]}}}
    groups = make_trainer(optim_param=optim_param).optimizer.param_groups
    assert [(group["lr"], list(group["betas"])) for group in groups] == [(0.01, [0.9, 0.999]), (1e-4, [0.5, 0.9])]
    rate = torch.tensor(0.1)
    scheduler = {"scheduler": "exp", "gamma": 0.5}
    trainer = make_trainer(optim_param={"optim": "adam", "lr": rate}, scheduler_param=scheduler)
    trainer.train(loaders(), loaders(), 1)
    assert float(trainer.optimizer.param_groups[0]["lr"]) == pytest.approx(0.05)
    assert float(rate) == pytest.approx(0.1)


def test_nesterov_of_a_group_with_momentum_of_its_own() -> None:
    optim_param = {"optim": "sgd", "lr": 0.1, "params": {"encoder": {"momentum": 0.9, "nesterov": True}}}
    assert make_trainer(optim_param=optim_param).optimizer.param_groups[1]["nesterov"]


def test_parameters_unfrozen_later_must_be_the_optimizer_s() -> None:
    def frozen(optimizer: Any) -> Any:
        def made() -> nn.Module:
            network = encoder()
            for param in list(network.parameters())[:2]:
                param.requires_grad_(False)
            return network

        return make_trainer(optim_param=None, optimizer=optimizer, encoder_class=made)

    trainer = frozen(lambda params: torch.optim.SGD([p for p in params if p.requires_grad], lr=0.1))
    trainer.train(loaders(), loaders(), 1)
    trainer.model.requires_grad_(True)
    with pytest.raises(UsageError, match=r"The optimizer lacks encoder\..*, which would not be trained"):
        trainer.train(loaders(), loaders(), 1)
    trainer = frozen(lambda params: torch.optim.SGD(params, lr=0.1))
    trainer.model.requires_grad_(True)
    before = [param.clone() for param in trainer.model.parameters()]
    trainer.train(loaders(), loaders(), 1)
    assert all(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))
