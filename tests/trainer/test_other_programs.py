"""Programs of users as they are found in public: each trains right, or is told in one sentence what to change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastmtl import Trainer
from fastmtl.errors import NonFiniteError, UsageError
from fastmtl.loss import AbsLoss, BCELoss, CELoss, MSELoss
from fastmtl.metrics import AbsMetric, AccMetric, L1Metric, TorchMetric
from fastmtl.model import MLPEncoder
from tests.trainer.toy import flat

Rows = list[tuple[Any, dict[str, Any]]]


class _NoMetric(AbsMetric):
    def update_fun(self, pred: Any, gt: Any) -> None:
        """Keep nothing."""

    def score_fun(self) -> list[float]:
        return [0.0]


def _task(loss: Any, metric: AbsMetric | None = None) -> dict[str, Any]:
    return {"metrics": ["M"], "metrics_fn": metric or _NoMetric(), "loss_fn": loss, "weight": [1]}


def _trainer(
    tasks: Mapping[str, Any],
    decoders: Callable[[], dict[str, nn.Module]],
    encoder: Callable[[], nn.Module] = lambda: MLPEncoder(6, [8]),
    weighting: str = "MGDA",
    **options: Any,
) -> Trainer:
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "rep_grad": False,
        "multi_input": False,
        "optim_param": {"optim": "sgd", "lr": 0.1},
        "scheduler_param": None,
        "device": "cpu",
    }
    made = nn.ModuleDict(decoders())
    return Trainer(dict(tasks), weighting, "HPS", encoder, made, **(given | options))


def _rows(count: int, label: Callable[[int, Tensor, torch.Generator], dict[str, Any]]) -> Rows:
    generator = torch.Generator().manual_seed(1)
    found: Rows = []
    for index in range(count):
        x = torch.randn(6, generator=generator)
        found.append((x, label(index, x, generator)))
    return found


def _linear(*widths: int) -> Callable[[], dict[str, nn.Module]]:
    return lambda: {name: nn.Linear(8, width) for name, width in zip("ab", widths, strict=True)}


def test_the_area_under_the_curve_counts_batches_of_one_class() -> None:
    classification = pytest.importorskip("torchmetrics.classification")
    rows = _rows(32, lambda i, x, g: {"a": torch.tensor([float(i >= 24)]), "b": x[:1]})
    tasks = {"a": _task(BCELoss(), TorchMetric(classification.BinaryAUROC())), "b": _task(MSELoss())}
    trainer = _trainer(tasks, _linear(1, 1))
    trainer.train(DataLoader(rows, 8, shuffle=True), DataLoader(rows, 8), 1)
    with torch.no_grad():
        scores = trainer.model(torch.stack([x for x, _ in rows]))["a"].flatten()
    differences = scores[24:, None] - scores[None, :24]
    want = ((differences > 0).double() + 0.5 * (differences == 0)).mean().item()
    assert trainer.meter.results["a"] == pytest.approx([want], abs=1e-6)


class _Ctc(AbsLoss):
    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        frames, labels = (torch.full((len(pred),), each.shape[1]) for each in (pred, gt))
        return nn.functional.ctc_loss(pred.log_softmax(-1).transpose(0, 1), gt, frames, labels)


def test_transcripts_longer_than_their_speech_are_told() -> None:
    rows = _rows(8, lambda i, x, g: {"a": torch.randint(1, 5, (9,), generator=g), "b": x[:1]})
    trainer = _trainer(
        {"a": _task(_Ctc()), "b": _task(MSELoss())},
        lambda: {"a": nn.Sequential(nn.Linear(8, 20), nn.Unflatten(1, (4, 5))), "b": nn.Linear(8, 1)},
    )
    before = flat(trainer.model.parameters()).clone()
    with pytest.raises(NonFiniteError, match="The loss of a became NaN or infinite in training step 0"):
        trainer.train(DataLoader(rows, 4), DataLoader(rows, 4), 1)
    assert torch.equal(flat(trainer.model.parameters()), before)


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_that_are_no_class_are_told(label: int) -> None:
    rows = _rows(8, lambda i, x, g: {"a": torch.tensor(label if i == 5 else i % 3), "b": x[:1]})
    trainer = _trainer({"a": _task(CELoss(), AccMetric()), "b": _task(MSELoss())}, _linear(3, 1))
    with pytest.raises(UsageError, match=f"labels must be from 0 to 2 .*Target {label} is out of bounds"):
        trainer.train(DataLoader(rows, 4), DataLoader(rows, 4), 1)


class _Gru(nn.Module):
    """Packs padded sequences and pads them again, to the longest of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 8, batch_first=True)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        x, lengths = inputs
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0]


class _Frames(AbsLoss):
    """The mean over all frames of a batch."""

    def compute_loss(self, pred: Tensor, gt: Mapping[str, Tensor]) -> Tensor:
        known = torch.arange(pred.shape[1]) < gt["length"][:, None]
        return nn.functional.cross_entropy(pred[known], gt["frames"][:, : pred.shape[1]][known])


@pytest.mark.parametrize("name", ["MGDA", "EW", "MoDo", "FORUM"])
def test_padded_sequences_of_many_lengths(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    speech = [
        tuple(
            torch.randint(0, classes, (2 + i % 4,), generator=generator)
            if classes
            else torch.randn(2 + i % 4, 3, generator=generator)
            for classes in (0, 3, 2)
        )
        for i in range(16)
    ]

    def collate(rows: Any) -> Any:
        lengths = torch.tensor([len(row[0]) for row in rows])
        x, a, b = (nn.utils.rnn.pad_sequence(column, batch_first=True) for column in zip(*rows, strict=True))
        return (x, lengths), {"a": {"frames": a, "length": lengths}, "b": {"frames": b, "length": lengths}}

    loader: Any = DataLoader(speech, 4, collate_fn=collate)
    trainer = _trainer({"a": _task(_Frames()), "b": _task(_Frames())}, _linear(3, 2), _Gru, name)
    before = flat(trainer.model.parameters()).clone()
    trainer.train(loader, loader, 2)
    assert (flat(trainer.model.encoder.parameters()) != before[: sum(p.numel() for p in _Gru().parameters())]).all()


class _Lora(nn.Module):
    """A frozen layer and an adapter that begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(6, 8), nn.Linear(6, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.base.requires_grad_(False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + self.up(self.down(x)))


@pytest.mark.parametrize("name", ["MGDA", "Nash_MTL", "UPGrad", "IMTL", "Aligned_MTL", "MoCo", "EW"])
def test_adapters_of_a_frozen_network_are_trained(name: str) -> None:
    rows = _rows(32, lambda i, x, g: {"a": x[:1].abs(), "b": x[1:2]})
    trainer = _trainer({"a": _task(MSELoss()), "b": _task(MSELoss())}, _linear(1, 1), _Lora, name)
    adapter: Any = trainer.model.encoder
    down, base = adapter.down.weight.detach().clone(), adapter.base.weight.detach().clone()
    trainer.train(DataLoader(rows, 4), DataLoader(rows, 4), 1)
    assert (adapter.up.weight != 0).all()
    assert (adapter.down.weight != down).all()
    assert torch.equal(adapter.base.weight, base)


class _Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        self.x = x.detach().requires_grad_()
        result: Tensor = self.layers(self.x)
        return result


class _Curvature(AbsLoss):
    """The residual of u'' = f at collocation points."""

    def __init__(self, field: _Field) -> None:
        super().__init__()
        self.field = field

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(pred.sum(), self.field.x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), self.field.x, create_graph=True)
        return (curvature - gt).square().mean()


@pytest.mark.parametrize("name", ["MGDA", "ConFIG", "EW", "FAMO", "MOML"])
def test_equations_and_boundaries_with_points_of_their_own(name: str) -> None:
    points = torch.linspace(0, 1, 16)[:, None]
    torch.manual_seed(0)
    field = _Field()
    trainer = _trainer(
        {"a": _task(_Curvature(field)), "b": _task(MSELoss())},
        _linear(1, 1),
        lambda: field,
        name,
        multi_input=True,
    )
    loaders: dict[str, Any] = {
        "a": DataLoader([(x, -x) for x in points], 8),
        "b": DataLoader([(points[15 * (i % 2)], torch.zeros(1)) for i in range(16)], 8),
    }
    with torch.enable_grad():
        x = points.clone().requires_grad_()
        u = trainer.model.decoders["a"](field.layers(x))
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        want = (torch.autograd.grad(slope.sum(), x)[0] + points).square().mean().item()
    trainer.test(loaders)
    assert float(trainer.meter.loss_item[0]) == pytest.approx(want, rel=1e-5)
    trainer.train(loaders, loaders, 1)


def test_detectors_that_give_losses_in_training_and_boxes_in_evaluation() -> None:
    class Boxes(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            found = super().forward(x)
            return {"boxes": found} if self.training else [{"boxes": box[None]} for box in found]

    class BoxLoss(AbsLoss):
        def compute_loss(self, pred: Any, gt: Any) -> Tensor:
            boxes = pred["boxes"] if isinstance(pred, dict) else torch.cat([image["boxes"] for image in pred])
            errors = [(box - image["boxes"]).abs().mean() for box, image in zip(boxes, gt, strict=True)]
            return torch.stack(errors).mean()

    def collate(rows: Rows) -> Any:
        labels = {"a": [label["a"] for _, label in rows], "b": torch.stack([label["b"] for _, label in rows])}
        return torch.stack([x for x, _ in rows]), labels

    rows = _rows(12, lambda i, x, g: {"a": {"boxes": torch.rand(1 + i % 3, 4, generator=g)}, "b": x[:1]})
    trainer = _trainer({"a": _task(BoxLoss()), "b": _task(MSELoss())}, lambda: {"a": Boxes(8, 4), "b": nn.Linear(8, 1)})
    found = []
    for size in (12, 5):
        trainer.test(DataLoader(rows, size, collate_fn=collate))
        found.append(float(trainer.meter.loss_item[0]))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    loader: Any = DataLoader(rows, 4, collate_fn=collate)
    trainer.train(loader, loader, 1)


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(11, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x).tanh()
        return result


class _PerToken(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(1, 2)


def test_tokens_of_accumulated_batches_count_alike() -> None:
    """Batches have different numbers of tokens: the mean of their means is another one."""
    generator = torch.Generator().manual_seed(0)
    rows: Rows = []
    for i in range(8):
        x, a, b = torch.zeros(8, dtype=torch.long), torch.full((8,), -100), torch.full((8,), -100)
        count = 2 + 5 * i % 6
        x[:count] = torch.randint(1, 11, (count,), generator=generator)
        a[:count], b[: count // 2] = (torch.randint(0, 3, (size,), generator=generator) for size in (count, count // 2))
        rows.append((x, {"a": a, "b": b}))
    found = []
    for size, accumulate in ((8, 1), (2, 4)):
        trainer = _trainer(
            {"a": _task(CELoss()), "b": _task(CELoss())},
            lambda: {"a": _PerToken(8, 3), "b": _PerToken(8, 3)},
            _Tokens,
            "UPGrad",
            accumulate=accumulate,
        )
        trainer.train(DataLoader(rows, size), DataLoader(rows, 3), 2)
        found.append((flat(trainer.model.parameters()), [float(loss) for loss in trainer.meter.loss_item]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


@dataclass
class _Output:
    last: Tensor
    pooled: Tensor | None = None


def test_encoders_that_return_dataclasses() -> None:
    class Encoder(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            found = super().forward(x)
            return _Output(found, found.tanh())

    class Head(nn.Linear):
        def forward(self, x: Any) -> Tensor:
            return super().forward(x.pooled)

    class Plain(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    rows = _rows(16, lambda i, x, g: {"a": x[:1], "b": x[1:2]})
    found = []
    for encoder, head in ((Encoder, Head), (Plain, nn.Linear)):
        trainer = _trainer(
            {"a": _task(MSELoss(), L1Metric()), "b": _task(MSELoss(), L1Metric())},
            lambda head=head: {"a": head(8, 1), "b": head(8, 1)},
            lambda encoder=encoder: encoder(6, 8),
        )
        trainer.train(DataLoader(rows, 4), DataLoader(rows, 4), 2)
        found.append(flat(trainer.model.parameters()))
    torch.testing.assert_close(*found)


def test_loaders_without_a_length_are_told() -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(_rows(8, lambda i, x, g: {"a": x[:1], "b": x[1:2]}))

    trainer = _trainer({"a": _task(MSELoss()), "b": _task(MSELoss())}, _linear(1, 1))
    with pytest.raises(match="train_dataloaders must be a loader of known length"):
        trainer.train(DataLoader(Endless(), 4), None, 1)
