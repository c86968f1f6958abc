"""Scalarizers: their formulas, gradients, memories and errors, and TorchJD's values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtl import Stateful, scalarization
from fastmtl.errors import UsageError
from fastmtl.scalarization import COSMOS, DWA, FAMO, IMTLL, PBI, STCH, UW, Constant, GeometricMean, Mean, Random, Sum

VALUES = torch.tensor([1.0, 2.0, 4.0])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])


def values() -> Tensor:
    return VALUES.clone().requires_grad_()


MAKERS: dict[str, Callable[[Any], Any]] = {
    "Constant": lambda m: m.Constant(WEIGHTS),
    "COSMOS": lambda m: m.COSMOS(2.0, WEIGHTS),
    "DWA": lambda m: m.DWA(1.5),
    "FAMO": lambda m: m.FAMO(3, min_losses=torch.tensor([0.0, 0.5, 0.0]), lr=0.1),
    "GeometricMean": lambda m: m.GeometricMean(),
    "IMTLL": lambda m: m.IMTLL(3),
    "Mean": lambda m: m.Mean(),
    "PBI": lambda m: m.PBI(5.0, WEIGHTS, torch.tensor([0.1, 0.2, 0.3])),
    "STCH": lambda m: m.STCH(0.01, WEIGHTS, torch.tensor([0.1, 0.2, 0.3])),
    "STCH-plain": lambda m: m.STCH(0.5),
    "Sum": lambda m: m.Sum(),
    "UW": lambda m: m.UW(3),
}


@pytest.mark.parametrize("name", MAKERS)
def test_values_and_gradients_are_torchjds(name: str) -> None:
    theirs = pytest.importorskip("torchjd.scalarization")
    ours, reference = MAKERS[name](scalarization), MAKERS[name](theirs)
    for step in range(4):
        results = []
        for scalarizer in (ours, reference):
            losses = (VALUES * (1 + 0.3 * step) ** torch.tensor([1.0, -1.0, 0.5])).requires_grad_()
            loss = scalarizer(losses)
            loss.backward()
            if isinstance(scalarizer, FAMO | theirs.FAMO):
                scalarizer.update(losses.detach() * torch.tensor([0.9, 0.99, 0.5]))
            if isinstance(scalarizer, DWA | theirs.DWA):
                scalarizer.step()
            results += [loss.detach(), losses.grad]
        torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=0)
        torch.testing.assert_close(results[1], results[3], rtol=1e-5, atol=0)
    for own, other in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own, other)
    assert set(ours.state_dict()) == set(reference.state_dict())


def test_all_names_are_there() -> None:
    theirs = pytest.importorskip("torchjd.scalarization")
    assert set(theirs.__all__) == set(scalarization.__all__)


def test_formulas() -> None:
    assert Sum()(VALUES) == 7
    assert Mean()(VALUES.reshape(1, 3)) == pytest.approx(7 / 3)
    assert GeometricMean()(VALUES) == pytest.approx(2)
    assert Constant(WEIGHTS)(VALUES) == pytest.approx(1.9)
    assert STCH(1e-4)(VALUES) == pytest.approx(4 / 3)
    assert PBI(3.0, VALUES)(2 * VALUES) == pytest.approx(2 * float(VALUES.norm()), abs=1e-4)
    assert 1 <= float(Random()(VALUES)) <= 4


def test_learned_scales_balance_the_losses() -> None:
    for scalarizer, optimum in ((UW(3), VALUES.log()), (IMTLL(3), -VALUES.log())):
        optimizer = torch.optim.SGD(scalarizer.parameters(), lr=0.5)
        for _ in range(300):
            optimizer.zero_grad()
            scalarizer(VALUES).backward()
            optimizer.step()
        torch.testing.assert_close(next(scalarizer.parameters()).detach(), optimum, rtol=1e-3, atol=1e-3)
        scalarizer.reset()
        assert not next(scalarizer.parameters()).any()


def test_famo_gives_weight_to_what_falls_slowly_by_itself() -> None:
    famo = FAMO(2, lr=0.1)
    for _ in range(5):
        famo(torch.tensor([1.0, 1.0]))
        famo.update(torch.tensor([1.0, 0.5]))
    losses = torch.tensor([1.0, 1.0], requires_grad=True)
    famo(losses).backward()
    assert losses.grad[0] > losses.grad[1]
    torch.testing.assert_close(losses.grad.sum(), torch.tensor(1.0))
    famo.reset()
    with pytest.raises(UsageError, match="update"):
        famo.update(torch.ones(2))


def test_famo_does_not_learn_from_nan() -> None:
    famo = FAMO(2, lr=0.1)
    famo(torch.ones(2))
    famo.update(torch.tensor([torch.nan, 0.5]))
    assert not next(famo.parameters()).any()
    famo(torch.ones(2))
    famo.update(torch.tensor([1.0, 0.5]))
    logits = next(famo.parameters()).detach().clone()
    assert logits[1] < 0 < logits[0]
    famo(torch.ones(2))
    famo.update(torch.tensor([torch.inf, 0.5]))
    assert torch.equal(next(famo.parameters()), logits)


def test_dwa_compares_the_means_of_two_epochs() -> None:
    dwa = DWA(1.0)
    for epoch in (torch.tensor([2.0, 2.0]), torch.tensor([1.0, 2.0])):
        dwa(epoch - 0.5)
        dwa(epoch + 0.5)
        dwa.step()
    losses = torch.ones(2, requires_grad=True)
    dwa(losses).backward()
    torch.testing.assert_close(losses.grad, 2 * torch.softmax(torch.tensor([0.5, 1.0]), 0))
    with pytest.raises(UsageError, match="reset"):
        dwa(torch.ones(3))
    dwa.reset()
    assert dwa(torch.ones(3)) == 3
    assert isinstance(dwa, Stateful)


def test_hooks_see_losses_and_scalar() -> None:
    seen: list[Any] = []
    scalarizer = Mean()
    scalarizer.register_forward_hook(lambda module, args, out: seen.append((args[0].shape, float(out))))
    scalarizer(VALUES)
    assert seen == [((3,), pytest.approx(7 / 3))]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Constant(WEIGHTS)(torch.ones(2)), "weights"),
        (lambda: UW(2)(VALUES), "values"),
        (lambda: STCH(0.0), "mu"),
        (lambda: PBI(-1.0, WEIGHTS), "theta"),
        (lambda: COSMOS(-1.0, WEIGHTS), "lambda_"),
        (lambda: DWA(0.0), "temperature"),
        (lambda: FAMO(2, lr=-1.0), "lr"),
        (lambda: FAMO(2, min_losses=torch.zeros(3)), "min_losses"),
        (lambda: GeometricMean()(-VALUES), "at least 0"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        call()


def test_weights_that_are_parameters_are_trained() -> None:
    for scalarizer in (Constant(torch.nn.Parameter(WEIGHTS.clone())), STCH(0.5, torch.nn.Parameter(WEIGHTS.clone()))):
        (weights,) = scalarizer.parameters()
        scalarizer(VALUES).backward()
        assert scalarizer.weights is weights
        assert weights.grad.all()
