"""Losses: the weighted mean LibMTL computes, without waiting for the device."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl._loss.base import Complete
from fastmtl.engine.labels import are_complete
from fastmtl.errors import UsageError
from fastmtl.loss import AbsLoss, BCELoss, CELoss, HuberLoss, KLDivLoss, L1Loss, MSELoss, SegLoss
from fastmtl.trainer.setup.losses import as_loss
from tests.host_reads import NoHostRead


class Scaled(AbsLoss):
    """As a user of LibMTL writes it."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        return self.scale * (pred - gt).pow(2).mean()


def _batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 3, generator=generator), torch.randn(n, 3, generator=generator)) for n in (7, 4, 1)]


def test_the_guard_of_these_tests_works() -> None:
    with pytest.raises(AssertionError, match="read on the host"), NoHostRead():
        torch.ones(()).item()


@pytest.mark.parametrize("loss", [MSELoss(), L1Loss(), Scaled(0.5)], ids=lambda loss: type(loss).__name__)
def test_average_is_weighted_by_batch_size(loss: AbsLoss) -> None:
    batches = _batches(0)
    for _ in range(2):
        with NoHostRead():
            values = [loss._update_loss(pred.requires_grad_(), gt) for pred, gt in batches]
        assert all(value.requires_grad for value in values)
        record = np.array([value.item() for value in values])
        assert loss._average_loss() == pytest.approx((record * [7, 4, 1]).sum() / 12, rel=1e-12)
        loss._reinit()


def test_values_are_torch_losses() -> None:
    pred, gt = _batches(1)[0]
    classes = torch.tensor([0, 2, 1, 1, 0, 2, 2])
    assert torch.equal(CELoss().compute_loss(pred, classes), F.cross_entropy(pred, classes))
    assert torch.equal(L1Loss().compute_loss(pred, gt), (pred - gt).abs().mean())
    assert torch.equal(MSELoss().compute_loss(pred, gt), (pred - gt).square().mean())
    p, q = gt.softmax(1), pred.log_softmax(1)
    torch.testing.assert_close(KLDivLoss().compute_loss(q, p), (p * (p.log() - q)).mean())


def test_long_sums_keep_their_digits() -> None:
    loss = MSELoss()
    for _ in range(20_000):
        loss.accumulate(torch.tensor(0.1), 1)
    assert loss._average_loss() == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_accumulating_does_not_keep_the_graph() -> None:
    loss = MSELoss()
    loss.accumulate(torch.ones(1, requires_grad=True).sum(), 3)
    assert loss._running._total is not None
    assert not loss._running._total.requires_grad


def test_nothing_to_average_is_an_error() -> None:
    loss = CELoss()
    with pytest.raises(UsageError, match=r"CELoss.*empty"):
        loss._average_loss()
    loss.accumulate(torch.tensor(1.0), 2)
    loss._reinit()
    with pytest.raises(UsageError, match="empty"):
        loss._average_loss()


def test_a_loss_that_is_no_scalar_is_an_error() -> None:
    class PerRow(AbsLoss):
        def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
            return (pred - gt).abs().mean(1)

    with pytest.raises(UsageError, match=r"PerRow.*\(4,\)"):
        PerRow()._update_loss(torch.ones(4, 2), torch.ones(4, 2))


def test_a_subclass_that_keeps_its_own_record_is_averaged() -> None:
    class Recording(MSELoss):
        def _update_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
            loss = self.compute_loss(pred, gt)
            self.record.append(loss.item())
            self.bs.append(len(pred))
            return loss

    loss, plain = Recording(), MSELoss()
    for pred, gt in _batches(2):
        loss._update_loss(pred, gt)
        plain._update_loss(pred, gt)
    assert loss._average_loss() == pytest.approx(plain._average_loss(), rel=1e-12)
    loss._reinit()
    assert loss.record == []


def test_a_subclass_that_leaves_out_the_constructor_of_its_base() -> None:
    class Bare(AbsLoss):
        def __init__(self) -> None:
            self.record, self.bs = [], []

        def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
            return F.mse_loss(pred, gt)

    bare, plain = copy.deepcopy(Bare()), MSELoss()
    for pred, gt in _batches(2):
        bare._update_loss(pred, gt)
        plain._update_loss(pred, gt)
    assert bare._average_loss() == plain._average_loss()


def test_compute_loss_compiles_whole() -> None:
    loss = Scaled(3.0)
    pred, gt = _batches(3)[0]
    compiled = torch.compile(loss.compute_loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(pred, gt), loss.compute_loss(pred, gt))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("loss", "classes"),
    [
        (CELoss(), True),
        (CELoss(weight=[1, 2, 0]), True),
        (as_loss(nn.CrossEntropyLoss(), "loss_fn"), True),
        (as_loss(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5])), "loss_fn"), True),
        (as_loss(nn.CrossEntropyLoss(reduction="sum"), "loss_fn"), True),
        (as_loss(nn.SmoothL1Loss(), "loss_fn"), False),
        (as_loss(nn.MSELoss(reduction="sum"), "loss_fn"), False),
        (L1Loss(), False),
        (MSELoss(), False),
        (HuberLoss(), False),
        (BCELoss(pos_weight=[2.0, 1.0, 3.0]), False),
    ],
)
def test_labels_known_to_be_complete_change_nothing(loss: AbsLoss, classes: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    pred = torch.randn(7, 3, generator=generator).to(dtype).requires_grad_()
    gt = torch.randint(0, 3, (7,), generator=generator) if classes else torch.rand(7, 3, generator=generator).to(dtype)
    found = []
    for known in ([], [(loss, gt)]):
        with Complete(known):
            value = loss.compute_loss(pred, gt)
        found.append((value, *torch.autograd.grad(value, pred)))
    torch.testing.assert_close(found[0], found[1])


def test_labels_are_known_to_be_complete_in_the_block_alone() -> None:
    """A batch without any label of which nothing is known has the loss 0, not the NaN of torch's mean."""
    pred, gt = torch.randn(2, 3), torch.full((2,), -100)
    with Complete([(CELoss(), torch.zeros(2).long())]):
        assert CELoss().compute_loss(pred, gt) == 0
    assert CELoss().compute_loss(pred, gt) == 0


def test_labels_are_complete_for_the_loss_that_said_so_alone() -> None:
    pred, gt = torch.randn(4, 3), torch.tensor([2, 2, 2, 2])
    with Complete([(CELoss(), gt)]):
        # To another loss the same labels are missing.
        assert CELoss(ignore_index=2).compute_loss(pred, gt) == 0
        assert CELoss().compute_loss(pred, gt) > 0
        gt.fill_(-100)
        assert CELoss().compute_loss(pred, gt) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8, torch.uint16, torch.bool, torch.complex64])
def test_labels_of_any_dtype_can_be_looked_at(dtype: torch.dtype) -> None:
    labels = {"task": torch.ones(3).to(dtype)}
    assert are_complete({"task": AbsLoss()}, labels) == (dtype != torch.complex64)
    # Its float labels are missing where they are -1.
    assert not are_complete({"task": SegLoss()}, {"task": torch.full((2, 2), -1.0)})


def test_weights_of_a_torch_loss_are_followed() -> None:
    module = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))
    loss, pred, gt = as_loss(module, "loss_fn"), torch.randn(4, 3), torch.tensor([0, 1, 2, 2])
    before = loss.compute_loss(pred, gt)
    assert loss.compute_loss(pred, gt) == before
    assert module.weight is not None
    module.weight[2] = 5
    torch.testing.assert_close(
        loss.compute_loss(pred, gt), nn.functional.cross_entropy(pred, gt, weight=module.weight.float())
    )
