"""What holds for every strategy, and the combinations of options it runs in."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmtl.errors import UsageError
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.trainer.setup.loaders import to_device
from fastmtl.weighting import WEIGHTINGS
from fastmtl.weighting.rules import project_simplex
from tests.host_reads import NoHostRead, no_waits
from tests.trainer.toy import encoder, flat, loaders, make_trainer

GRAM = sorted(name for name, rule in WEIGHTINGS.items() if rule.needs == "gram" and rule.samples == 1)


def _trainer(name: str, **options: Any) -> Any:
    options.setdefault("rep_grad", WEIGHTINGS[name].needs == "reps")
    return make_trainer(name, count=3, **options)


def _batches(trainer: Any, multi_input: bool = False) -> list[Any]:
    given = loaders(3, multi_input=multi_input)
    if not multi_input:
        return list(given)[:1] * trainer.step.batches
    firsts = {task: next(iter(loader)) for task, loader in given.items()}
    batch = {task: x for task, (x, _) in firsts.items()}, {task: y for task, (_, y) in firsts.items()}
    return [batch] * trainer.step.batches


@pytest.mark.parametrize("rep_grad", [False, True], ids=["params", "rep"])
@pytest.mark.parametrize("multi_input", [False, True], ids=["single", "multi"])
@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
def test_trains_every_parameter_or_says_why_not(name: str, multi_input: bool, rep_grad: bool) -> None:
    rule = WEIGHTINGS[name]
    if rep_grad and not rule.allows_rep_grad:
        with pytest.raises(UsageError, match=f"{name} .* rep_grad must be False"):
            _trainer(name, multi_input=multi_input, rep_grad=rep_grad)
        return
    if not rep_grad and rule.needs == "reps":
        with pytest.raises(UsageError, match=f"{name} .* rep_grad must be True"):
            _trainer(name, multi_input=multi_input, rep_grad=rep_grad)
        return
    trainer = _trainer(name, multi_input=multi_input, rep_grad=rep_grad)
    before = {key: value.clone() for key, value in trainer.model.named_parameters()}
    data = loaders(3, multi_input=multi_input)
    trainer.train(data, data, 2)
    still = [key for key, value in trainer.model.named_parameters() if torch.equal(value, before[key])]
    assert still == []
    assert all(value.isfinite().all() for value in trainer.model.parameters())


@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
def test_methods_have_the_defaults_of_the_hyper_parameters(name: str) -> None:
    rule = WEIGHTINGS[name]
    methods = [method for owner in rule.__mro__ for method in vars(owner).values() if inspect.isfunction(method)]
    for method in methods:
        arguments = inspect.signature(method).parameters
        for argument in arguments.values() if "hyper" in arguments else ():
            if argument.name in rule.hyper:
                assert argument.default == rule.hyper[argument.name].default, (method.__name__, argument.name)


@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
def test_reads_nothing_on_the_host(name: str) -> None:
    trainer = _trainer(name)
    trainer.model.epoch, trainer.model.epochs = 0, 1
    batches, buffer = _batches(trainer), StepBuffer()
    trainer.step(batches, buffer)
    with NoHostRead():
        trainer.step(batches, buffer)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
def test_resumes_exactly(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim_param": {"optim": "adam", "lr": 1e-2}}
    data = loaders(3)

    def run(epochs: int, **more: Any) -> torch.Tensor:
        trainer = _trainer(name, **options, **more)
        if "resume" not in more:
            torch.manual_seed(5)
        trainer.train(data, data, epochs)
        return flat([*trainer.model.parameters(), *trainer.model.buffers()])

    run(2, save_path=str(tmp_path))
    assert torch.equal(run(4, resume=str(tmp_path / "last.pt")), run(4))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
def test_best_checkpoint_holds_parameters_alone(name: str, tmp_path: Path) -> None:
    trainer = _trainer(name, save_path=str(tmp_path))
    trainer.train(loaders(3), loaders(3), 1)
    saved = torch.load(tmp_path / "best.pt", weights_only=True)
    assert set(saved) == set(trainer.model.state_dict()) - set(trainer.model.remembered())
    again = _trainer(name, load_path=str(tmp_path))
    assert torch.equal(flat(again.model.parameters()), flat(trainer.model.parameters()))


@pytest.mark.parametrize("architecture", ["HPS", "whole"])
@pytest.mark.parametrize("name", GRAM)
def test_held_weights_give_the_step_of_the_full_one(name: str, architecture: str) -> None:
    from fastmtl.architecture import HPS

    class OnePiece(HPS):
        def forward(self, inputs: Any, task_name: str | None = None) -> Any:
            return super().forward(inputs, task_name)

    network = HPS if architecture == "HPS" else OnePiece
    held = _trainer(name, architecture=network, update_weights_every=3)
    assert held.model.splits == (architecture == "HPS")
    held.model.epoch = full_epoch = 1
    batches = _batches(held)
    held.step(batches, StepBuffer())
    weights = held.step.weights.kept
    full = _trainer(name, architecture=network)
    full.model.epoch = full_epoch
    full.model.load_state_dict(held.model.state_dict())
    frozen = weights.shared.clone(), None if weights.heads is None else weights.heads.clone()
    full.model.weigh = lambda *args, **kwargs: type(weights)(
        shared=frozen[0], heads=frozen[1], max_norm=weights.max_norm
    )
    held.step(batches, StepBuffer())
    full.step(batches, StepBuffer())
    for one, other in zip(held.model.parameters(), full.model.parameters(), strict=True):
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=2e-5, atol=1e-7)
    # The third step holds too, the fourth solves again.
    held.step(batches, StepBuffer())
    assert held.step.weights.kept is weights
    held.step(batches, StepBuffer())
    assert held.step.weights.kept is not weights


@pytest.mark.parametrize(
    ("name", "args"), [("GradVac", {"GradVac_group_type": 2}), ("MoDo", {"MoDo_gamma": 0.5}), ("SDMGrad", {})]
)
def test_held_weights_of_groups_and_samples(name: str, args: dict[str, Any], tmp_path: Path) -> None:
    data = loaders(3)
    options: dict[str, Any] = {"weight_args": args, "update_weights_every": 2}

    def run(epochs: int, **more: Any) -> tuple[torch.Tensor, Any]:
        trainer = _trainer(name, **options, **more)
        if "resume" not in more:
            torch.manual_seed(5)
        weights = trainer.train(data, data, epochs, return_weight=True)
        return flat([*trainer.model.parameters(), *trainer.model.buffers()]), weights

    run(1, save_path=str(tmp_path))
    resumed, _ = run(4, resume=str(tmp_path / "last.pt"))
    whole, weights = run(4)
    assert torch.equal(resumed, whole)
    steps = weights.reshape(3, -1)
    assert (steps[:, 0::2][:, : steps.shape[1] // 2] == steps[:, 1::2]).all()
    # Within one step, held weights give what the solve that found them gave.
    held, full = _trainer(name, **options), _trainer(name, weight_args=args)
    batches = _batches(held)
    held.step(batches, StepBuffer())
    full.model.load_state_dict(held.model.state_dict())
    weights = held.step.weights.kept
    full.model.weigh = lambda *args, **kwargs: weights
    for trainer in (held, full):
        trainer.step(batches, StepBuffer())
    for one, other in zip(held.model.parameters(), full.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    # A step of some tasks has their part of the weights.
    x, labels = batches[0]
    again = _trainer(name, **options)
    some = [(x, {key: labels[key] for key in ("task0", "task2")})] * again.step.batches
    again.step(batches, StepBuffer())
    again.step(some, StepBuffer(), [0, 2])
    assert again.latest.weights.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["EW", "MoCo", "GradDrop", "MOML"])
def test_weights_that_cannot_be_held_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"update_weights_every must be 1 for {name}"):
        _trainer(name, update_weights_every=2)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_nash_solves_the_bargain_of_the_gradients_as_they_are(scale: float) -> None:
    rows = scale * torch.randn(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = rows @ rows.T
    weights = _trainer("Nash_MTL").model.weigh(torch.ones(3), gram).shared
    torch.testing.assert_close(gram @ weights * weights, torch.ones(3, dtype=torch.float64))


def test_nash_has_the_option_as_its_own() -> None:
    trainer = _trainer("Nash_MTL", weight_args={"update_weights_every": 5})
    assert trainer.step.options.update_weights_every == 5


@pytest.mark.parametrize("name", ["MGDA", "FairGrad", "EW"])
def test_momentum_averages_the_weights(name: str) -> None:
    plain, smooth = _trainer(name), _trainer(name, weight_momentum=0.75)
    batches = _batches(plain)
    first, second = StepBuffer(), StepBuffer()
    for trainer, buffer in ((plain, first), (smooth, second)):
        trainer.step(batches, buffer)
    torch.testing.assert_close(first._steps[0].weights, second._steps[0].weights)
    # From equal parameters on: the second weights of the one are the mean of both of the other.
    plain.model.load_state_dict(smooth.model.state_dict())
    for trainer, buffer in ((plain, first), (smooth, second)):
        trainer.step(batches, buffer)
    want = 0.75 * second._steps[0].weights + 0.25 * first._steps[1].weights
    torch.testing.assert_close(second._steps[1].weights, want)


def test_momentum_of_groups_is_logged_as_their_mean() -> None:
    trainer = _trainer("GradVac", weight_momentum=0.5, weight_args={"GradVac_group_type": 2})
    x, labels = next(iter(loaders(3)))
    trainer.train([(x, labels), (x, {key: labels[key] for key in ("task0", "task2")})], loaders(3), 2)
    assert trainer.latest.weights.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["MoDo", "SDMGrad", "GradDrop", "FORUM"])
def test_momentum_without_weights_of_a_step_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"weight_momentum must be 0 for {name}"):
        _trainer(name, weight_momentum=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name in WEIGHTINGS if name != "GradDrop"))
def test_a_task_whose_gradient_is_zero_leaves_everything_finite_and_its_decoder_learning(name: str) -> None:
    trainer = _trainer(name)
    decoder = trainer.model.decoders["task0"].weight
    with torch.no_grad():
        decoder.zero_()
    trainer.train(loaders(3), loaders(3), 3)
    assert flat([*trainer.model.parameters(), *trainer.model.buffers()]).isfinite().all()
    assert decoder.any()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name in WEIGHTINGS if name != "GradDrop"))
def test_decoders_learn_beside_a_frozen_encoder(name: str) -> None:
    trainer = _trainer(name, encoder_class=lambda: encoder().requires_grad_(False))
    before = {key: value.clone() for key, value in trainer.model.named_parameters()}
    trainer.train(loaders(3), loaders(3), 2)
    for key, value in trainer.model.named_parameters():
        if key.startswith(("encoder", "decoders")):
            assert torch.equal(value, before[key]) == key.startswith("encoder"), key


def test_signals_of_the_last_step_are_on_the_device() -> None:
    trainer, buffer = _trainer("MGDA"), StepBuffer()
    batches = _batches(trainer)
    # The first step looks at the network.
    trainer.step(batches, StepBuffer())
    with NoHostRead():
        trainer.step(batches, buffer)
        signals = trainer.latest
        shown = [signals.losses, signals.weights, signals.gram, signals.norms, signals.cosines, signals.conflict_rate]
    records = buffer.flush(0, 1)
    upper = torch.triu_indices(3, 3, 1)
    wanted = [records.losses, records.weights, records.gram, records.norms, records.cosines, records.conflicts]
    for key, (found, want) in enumerate(zip(shown, wanted, strict=True)):
        found = found[upper[0], upper[1]] if key == 4 else found
        assert np.allclose(found.numpy(), want[0])


def test_excessmtl_meets_a_task_late() -> None:
    trainer = _trainer("ExcessMTL", weight_args={"robust_step_size": 1.0})
    x, labels = next(iter(loaders(3)))
    some = {key: labels[key] for key in ("task0", "task1")}
    trainer.train([(x, some), (x, some), (x, labels), (x, labels)], loaders(3), 2)
    weights = trainer.model.loss_weight
    assert weights.isfinite().all()
    assert (trainer.model.initial_w > 0).all()
    torch.testing.assert_close(weights.sum(), torch.tensor(3.0))
    assert weights.std() > 0


@pytest.mark.parametrize("scale", [1.0, 1e8, 1e30])
def test_the_simplex_keeps_its_sum_at_any_scale(scale: float) -> None:
    point = scale * torch.tensor([3.0, -1.0, 2.9999])
    found = project_simplex(point)
    exact = project_simplex(point.double())
    assert found.sum() == pytest.approx(1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("STCH", {"STCH_warmup_epoch": -1}, "STCH_warmup_epoch of STCH must be at least 0, got -1"),
        ("DWA", {"T": 0}, "T of DWA must be above 0, got 0"),
        ("CAGrad", {"calpha": "0.5"}, "calpha of CAGrad must be a number, got '0.5'"),
        ("Nash_MTL", {"update_weights_every": 0}, "update_weights_every of Nash_MTL must be at least 1"),
        ("Nash_MTL", {"update_weights_every": 1.5}, "update_weights_every of Nash_MTL must be a whole number"),
        ("MGDA", {"mgda_gn": "l3"}, "mgda_gn of MGDA must be one of"),
    ],
    ids=str,
)
def test_hyper_parameters_outside_their_range_are_refused(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        _trainer(name, weight_args=args)


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_outside_its_range_is_refused(momentum: float) -> None:
    with pytest.raises(UsageError, match=r"weight_momentum must be (at least 0|below 1)"):
        _trainer("EW", weight_momentum=momentum)


def test_constant_weights_scale_the_gradients() -> None:
    plain = _trainer("EW")
    halved = _trainer("EW", weight_args={"loss_weights": ["task1=0.5", "task2=0"]})
    batches, buffer = _batches(plain), StepBuffer()
    plain.step(batches, StepBuffer())
    halved.step(batches, buffer)
    assert buffer._steps[0].weights.tolist() == [1.0, 0.5, 0.0]
    decoders = [trainer.model.decoders for trainer in (plain, halved)]
    torch.testing.assert_close(decoders[1]["task1"].weight.grad, 0.5 * decoders[0]["task1"].weight.grad)
    assert not decoders[1]["task2"].weight.grad.any()


@pytest.mark.parametrize(("given", "message"), [("taks1=2", "task1"), ("task1=two", "task=number")])
def test_bad_constant_weights_are_refused(given: str, message: str) -> None:
    trainer = _trainer("EW", weight_args={"loss_weights": [given]})
    with pytest.raises(UsageError, match=message):
        trainer.step(_batches(trainer), StepBuffer())


@pytest.mark.parametrize("name", ["MGDA", "UPGrad"])
def test_steps_with_held_weights_are_logged(name: str) -> None:
    trainer = _trainer(name, update_weights_every=2, log_every=3)
    seen: list[Any] = []
    trainer.logger.on_steps = seen.append
    trainer.train(loaders(3), loaders(3), 1)
    records = seen[0]
    assert records.count == 3
    assert not np.isnan(records.weights).any()
    assert np.isnan(records.gram).all(axis=(1, 2)).tolist() == [False, True, False]
    assert np.isnan(records.conflicts).tolist() == [False, True, False]
    assert set(records.means(trainer.task_name)["conflict"]) == {"share"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
def test_does_not_wait_for_the_gpu(name: str) -> None:
    trainer = _trainer(name, device="cuda")
    trainer.model.epoch, trainer.model.epochs = 0, 1
    batches = to_device(_batches(trainer), torch.device("cuda"))
    buffer = StepBuffer()
    trainer.step(batches, buffer)
    with no_waits():
        trainer.step(batches, buffer)


@pytest.mark.parametrize("name", ["Nash_MTL", "PCD", "GradVac", "MoCo", "ExcessMTL", "GO4Align"])
def test_a_loop_of_ones_own_goes_on_after_a_step_with_nan(name: str) -> None:
    x, labels = next(iter(loaders(3)))

    def run(factors: tuple[float, ...]) -> torch.Tensor:
        trainer = _trainer(name)
        for factor in factors:
            preds = trainer.model(x)
            losses = torch.stack(
                [factor * trainer.meter.losses[task].compute_loss(preds[task], labels[task]) for task in preds]
            )
            trainer.model.zero_grad()
            torch.manual_seed(1)
            trainer.model.backward(losses, **trainer.step.hyper)
        return flat([*(param.grad for param in trainer.model.get_share_params()), *trainer.model.buffers()])

    assert torch.equal(run((1.0, torch.nan, 1.0)), run((1.0, 1.0)))
