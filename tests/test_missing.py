"""Metrics see labelled entries only: ours, those of torchmetrics and those of a user."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastmtl._metrics.missing import labelled_part
from fastmtl.errors import UsageError
from fastmtl.loss import AbsLoss, BCELoss, CELoss, DepthLoss, L1Loss, MSELoss, NormalLoss, SegLoss
from fastmtl.metrics import AbsMetric, AccMetric, DepthMetric, F1Metric, L1Metric, NormalMetric, SegMetric, TorchMetric
from fastmtl.model._torchvision import import_torchvision
from fastmtl.trainer.log.meter import PerformanceMeter

NAN = math.nan

# torchmetrics imports torchvision, which beside a CPU torch needs help, and warns of what it lacks.
pytestmark = pytest.mark.filterwarnings("ignore")


class Seen(AbsMetric):
    """As a user writes it: it keeps what it is shown and would count a missing label."""

    def update_fun(self, pred: Any, gt: Any) -> None:
        self.record.append((pred, gt))

    def score_fun(self) -> list[float]:
        return [float(len(self.record))]


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _meter(loss: AbsLoss, metric: AbsMetric, scores: int = 1) -> PerformanceMeter:
    about = {"metrics": ["m"] * scores, "metrics_fn": metric, "loss_fn": loss, "weight": [1] * scores}
    meter = PerformanceMeter({"task": about})
    meter.begin()
    return meter


def _scores(loss: AbsLoss, metric: AbsMetric, batches: list[tuple[Any, Any]], scores: int = 1) -> list[float]:
    meter = _meter(loss, metric, scores)
    for pred, gt in batches:
        meter.update({"task": torch.zeros(())}, {"task": pred}, {"task": gt})
    meter.end()
    return meter.results["task"]


def _theirs(name: str, **options: Any) -> Any:
    import_torchvision()
    import torchmetrics

    where = torchmetrics.classification if hasattr(torchmetrics.classification, name) else torchmetrics
    return getattr(where, name)(**options)


def _pairs(pred: Tensor, gt: Tensor) -> float:
    """The area under the ROC curve, by counting the pairs in the right order."""
    pairs = [(a, b) for a, one in zip(pred, gt, strict=True) for b, two in zip(pred, gt, strict=True) if one > two]
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("shape", [(24,), (24, 1), (12, 2)], ids=str)
@pytest.mark.parametrize("size", [1, 5, 24])
def test_area_under_the_curve_by_counting_pairs(shape: tuple[int, ...], size: int) -> None:
    pred, gt = _draw(*shape), (_draw(*shape, seed=1) > 0).double()
    gt[_draw(*shape, seed=2) > 0] = NAN
    known = ~gt.isnan()
    assert 0 < known.sum() < known.numel()
    expected = _pairs(pred[known], gt[known])
    metric = TorchMetric(_theirs("BinaryAUROC"))
    # Logits of small batches may all look like probabilities.
    assert _scores(BCELoss(), metric, list(zip(pred.split(size), gt.split(size), strict=True))) == pytest.approx(
        [expected]
    )
    metric.reinit()
    metric.update_fun(pred, gt)
    assert metric.score_fun() == pytest.approx([expected])


def test_probabilities_stay_what_they_are() -> None:
    pred, gt = _draw(20).sigmoid(), (_draw(20, seed=1) > 0).long()
    batches = list(zip(pred.split(3), gt.split(3), strict=True))
    right = ((pred > 0.5) == (gt == 1)).double().mean().item()
    assert _scores(BCELoss(), TorchMetric(_theirs("BinaryAccuracy")), batches) == pytest.approx([right])
    logits = [(torch.logit(each), labels) for each, labels in batches]
    assert _scores(BCELoss(), TorchMetric(_theirs("BinaryAccuracy")), logits) == pytest.approx([right])


@pytest.mark.parametrize("ignore", [-100, 7])
@pytest.mark.parametrize("shape", [(9,), (9, 1), (3, 4, 5)], ids=str)
def test_classes_that_the_loss_ignores(ignore: int, shape: tuple[int, ...]) -> None:
    pred = _draw(shape[0], 3, *(shape[1:] if len(shape) > 2 else ()))
    gt = torch.randint(3, shape, generator=torch.Generator().manual_seed(0))
    missing = _draw(*shape, seed=3) > 0
    labels = gt.masked_fill(missing, ignore)
    chosen = pred.argmax(1).reshape(shape)
    right = (chosen == gt)[~missing].double().mean().item()
    loss = CELoss(ignore_index=ignore)
    metrics = [
        AccMetric(),
        F1Metric(3, "micro"),
        TorchMetric(_theirs("MulticlassAccuracy", num_classes=3, average="micro")),
    ]
    for metric in metrics:
        assert _scores(loss, metric, [(pred, labels)]) == pytest.approx([right]), type(metric).__name__


def test_a_void_class_of_the_loss_is_void_for_the_metric() -> None:
    pred, gt = _draw(2, 3, 4, 4), torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    known = gt != 0
    right = (pred.argmax(1) == gt)[known].double().mean().item()
    assert _scores(SegLoss(ignore_index=0), SegMetric(3), [(pred, gt)], 2)[1] == pytest.approx(right)


@pytest.mark.parametrize("shape", [(8,), (8, 1), (8, 3)], ids=str)
def test_errors_of_what_is_labelled(shape: tuple[int, ...]) -> None:
    pred, gt = _draw(*shape), _draw(*shape, seed=1)
    gt[_draw(*shape, seed=2) > 0.3] = NAN
    known = ~gt.isnan()
    expected = (pred - gt)[known].abs().mean().item()
    for metric in (L1Metric(), TorchMetric(_theirs("MeanAbsoluteError"))):
        assert _scores(MSELoss(), metric, [(pred[:3], gt[:3]), (pred[3:], gt[3:])]) == pytest.approx(
            [expected], rel=1e-6
        )


def test_integers_to_regress_are_no_missing_labels() -> None:
    gt = torch.tensor([-100, 3, 2**40])
    pred = gt.double() + torch.tensor([1.0, 2.0, 6.0])
    assert _scores(L1Loss(), L1Metric(), [(pred, gt)]) == [3.0]
    assert _scores(L1Loss(), TorchMetric(_theirs("MeanAbsoluteError")), [(pred, gt.double())]) == pytest.approx([3.0])
    seen = Seen()
    _scores(L1Loss(), seen, [(pred, gt)])
    assert torch.equal(seen.record[0][1], gt)


def test_a_metric_of_the_users_sees_whole_rows_where_it_can() -> None:
    seen, pred = Seen(), _draw(4, 3)
    gt = torch.tensor([0, -100, 2, 1])
    _scores(CELoss(), seen, [(pred, gt), (pred, torch.full((4,), -100)), (pred, gt.clamp(min=0))])
    assert len(seen.record) == 2
    assert torch.equal(seen.record[0][0], pred[[0, 2, 3]])
    assert seen.record[0][1].tolist() == [0, 2, 1]
    assert seen.record[1][0] is pred


@pytest.mark.parametrize("containers", [dict, tuple])
def test_predictions_in_containers_lose_the_same_rows(containers: type) -> None:
    seen = Seen()
    pred: Any = {"mean": _draw(3, 2), "names": "abc"} if containers is dict else (_draw(3, 2), "abc")
    _scores(MSELoss(), seen, [(pred, torch.tensor([[1.0, 2.0], [NAN, NAN], [3.0, 4.0]]))])
    shown = seen.record[0][0]
    first = shown["mean"] if containers is dict else shown[0]
    assert torch.equal(first, _draw(3, 2)[[0, 2]])
    assert "abc" in (shown.values() if containers is dict else shown)


def test_a_metric_of_the_users_sees_entries_where_rows_have_some_labels() -> None:
    seen, pred, gt = Seen(), _draw(2, 2), torch.tensor([[1.0, NAN], [NAN, 4.0]])
    _scores(MSELoss(), seen, [(pred, gt)])
    assert torch.equal(seen.record[0][0], pred[[0, 1], [0, 1]])
    assert seen.record[0][1].tolist() == [1.0, 4.0]


@pytest.mark.parametrize(
    ("loss", "pred", "gt", "known"),
    [
        (NormalLoss(), (2, 3, 2, 2), (2, 3, 2, 2), (2, 2, 2)),
        (DepthLoss(), (2, 1, 2, 2), (2, 1, 2, 2), (2, 1, 2, 2)),
        (DepthLoss(), (2, 2, 2), (2, 1, 2, 2), (2, 1, 2, 2)),
        (SegLoss(), (2, 3, 2, 2), (2, 2, 2), (2, 2, 2)),
    ],
)
def test_pixels_of_maps(loss: AbsLoss, pred: Any, gt: Any, known: Any) -> None:
    known = torch.ones(known, dtype=torch.bool)
    known[0, ..., 0, 1] = False
    found = labelled_part(_draw(*pred), _draw(*gt), known)
    channels = (3,) if 3 in pred else ()
    assert found[0].shape == (7, *channels)
    assert found[1].shape == (7, *(channels if 3 in gt else ()))
    if channels:
        assert torch.equal(found[0][1], _draw(*pred)[0, :, 1, 0])


def test_containers_of_labels_come_as_they_are() -> None:
    seen, boxes = Seen(), [{"boxes": torch.full((2, 4), NAN)}, {"boxes": torch.zeros(1, 4)}]
    _scores(AbsLoss(), seen, [("anything", boxes)])
    assert seen.record == [("anything", boxes)]


class Greater(AccMetric):
    """Overrides what AccMetric does, and so does not skip what it skips."""

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        assert (gt != -100).all()
        super().update_fun(pred, gt)


class Careful(AbsMetric):
    """Skips a label by itself."""

    missing = -7

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        self.record.append((gt == -7).sum().item())

    def score_fun(self) -> list[float]:
        return [float(sum(self.record))]


def test_what_a_metric_skips_is_said_by_the_class_that_defines_its_update() -> None:
    pred, gt = _draw(4, 3), torch.tensor([0, -100, 2, 1])
    assert [kind.missing for kind in (Greater, AccMetric, Careful)] == [None, -100, -7]
    assert _scores(CELoss(), Greater(), [(pred, gt)]) == _scores(CELoss(), AccMetric(), [(pred, gt)])
    assert _scores(CELoss(), Careful(), [(pred, gt)]) == [1.0]


@pytest.mark.parametrize(
    ("loss", "metric", "pred", "gt", "scores"),
    [
        (CELoss(), AccMetric(), _draw(4, 2), torch.full((4,), -100), 1),
        (CELoss(), F1Metric(2, "binary"), _draw(4, 2), torch.full((4,), -100), 1),
        (CELoss(), F1Metric(2, "macro"), _draw(4, 2), torch.full((4,), -100), 1),
        (MSELoss(), L1Metric(), _draw(4, 1), torch.full((4, 1), NAN), 1),
        (BCELoss(), TorchMetric(_theirs("BinaryAUROC")), _draw(4, 1), torch.full((4, 1), NAN), 1),
        (BCELoss(), TorchMetric(_theirs("BinaryAccuracy")), _draw(4), torch.full((4,), NAN), 1),
        (MSELoss(), Seen(), _draw(4), torch.full((4,), NAN), 1),
        (DepthLoss(), DepthMetric(), _draw(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), 2),
        (NormalLoss(), NormalMetric(), _draw(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), 5),
        (SegLoss(), SegMetric(3), _draw(1, 3, 2, 2), torch.full((1, 2, 2), -1), 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, AbsMetric) else "",
)
def test_no_label_no_score(loss: AbsLoss, metric: AbsMetric, pred: Tensor, gt: Tensor, scores: int) -> None:
    assert all(math.isnan(score) for score in _scores(loss, metric, [(pred, gt), (pred, gt)], scores))


def test_columns_with_missing_entries() -> None:
    pred, gt = _draw(12, 2), (_draw(12, 2, seed=1) > 0).double()
    gt[::3, 0] = gt[1::4, 1] = NAN
    columns = [
        _pairs(each[~labels.isnan()], labels[~labels.isnan()]) for each, labels in zip(pred.T, gt.T, strict=True)
    ]
    told = TorchMetric(_theirs("MultilabelAUROC", num_labels=2, ignore_index=-1))
    assert _scores(BCELoss(), told, [(pred, gt)]) == pytest.approx([sum(columns) / 2])
    with pytest.raises(UsageError, match=r"MultilabelAUROC scores each column.*ignore_index"):
        _scores(BCELoss(), TorchMetric(_theirs("MultilabelAUROC", num_labels=2)), [(pred, gt)])
    with pytest.raises(UsageError, match=r"MeanSquaredError .*\(12, 2\).*MultioutputWrapper"):
        _scores(MSELoss(), TorchMetric(_theirs("MeanSquaredError", num_outputs=2)), [(pred, gt)])
    # Rows that lack all labels leave the columns as they are.
    whole = gt.clone()
    whole[gt.isnan().any(1)] = NAN
    rows = ~whole.isnan().any(1)
    expected = [_pairs(each, labels) for each, labels in zip(pred[rows].T, whole[rows].T, strict=True)]
    found = _scores(BCELoss(), TorchMetric(_theirs("MultilabelAUROC", num_labels=2)), [(pred, whole)])
    assert found == pytest.approx([sum(expected) / 2])


def test_a_refusal_of_torchmetrics_is_a_sentence() -> None:
    with pytest.raises(
        UsageError, match=r"BinaryAccuracy of torchmetrics does not take .* \(3,\) and \(3,\): Detected"
    ):
        TorchMetric(_theirs("BinaryAccuracy")).update_fun(_draw(3), torch.tensor([0, 1, 5]))
    metric = TorchMetric(_theirs("R2Score"))
    metric.update_fun(_draw(1), _draw(1))
    with pytest.raises(UsageError, match=r"R2Score of torchmetrics cannot be computed .*: Needs at least two samples"):
        metric.score_fun()


def test_predictions_in_a_named_tuple_lose_their_missing_rows() -> None:
    class Both(NamedTuple):
        mean: Tensor
        scale: Tensor

    class OfMeans(Seen):
        def score_fun(self) -> list[float]:
            return [float((pred.mean - gt).abs().mean()) for pred, gt in self.record]

    class Loss(AbsLoss):
        def compute_loss(self, pred: Both, gt: Tensor) -> Tensor:
            return pred.mean.sum()

    gt = torch.tensor([1.0, NAN, 3.0])
    pred = Both(torch.tensor([2.0, 9.0, 5.0]), torch.ones(3))
    assert _scores(Loss(), OfMeans(), [(pred, gt)]) == [1.5]


def test_metrics_of_several_scores() -> None:
    gt = torch.tensor([[1.0, 2.0], [3.0, NAN]])
    pred = torch.tensor([[2.0, 4.0], [6.0, 9.0]])
    whole = gt.nan_to_num(5.0)
    two = TorchMetric(_theirs("MeanSquaredError", num_outputs=2))
    # (1 + 9) / 2 and (4 + 16) / 2
    assert _scores(MSELoss(), two, [(pred, whole)], 2) == [5.0, 10.0]
    import torchmetrics

    wrapped = TorchMetric(torchmetrics.MultioutputWrapper(torchmetrics.MeanSquaredError(), 2))
    assert _scores(MSELoss(), wrapped, [(pred, gt)], 2) == [5.0, 4.0]
    parts = [torchmetrics.MeanSquaredError(), torchmetrics.MeanAbsoluteError()]
    collected = TorchMetric(torchmetrics.MetricCollection(parts), torchmetrics.MeanSquaredError())
    # Squares 1 4 9, errors 1 2 3; a collection orders its metrics by name.
    by_name = {"MeanSquaredError": 14 / 3, "MeanAbsoluteError": 2.0}
    expected = [by_name[name] for name in torchmetrics.MetricCollection(parts)]
    assert _scores(MSELoss(), collected, [(pred, gt)], 3) == pytest.approx([*expected, 14 / 3])
    with pytest.raises(UsageError, match="one score per metric of 'task', 1 in all, got"):
        _scores(MSELoss(), TorchMetric(_theirs("MeanSquaredError", num_outputs=2)), [(pred, whole)])


def test_metrics_of_whole_rows_refuse_parts_of_them() -> None:
    pred, gt = _draw(3, 4, 2), torch.tensor([[0, 1], [-100, 2], [3, 0]])
    exact = _theirs("MulticlassExactMatch", num_classes=4)
    with pytest.raises(UsageError, match="MulticlassExactMatch scores whole rows"):
        _scores(CELoss(), TorchMetric(exact), [(pred, gt)])
    chosen = pred.argmax(1) == gt
    expected = (chosen | (gt == -100)).all(1).double().mean().item()
    told = TorchMetric(_theirs("MulticlassExactMatch", num_classes=4, ignore_index=-100))
    assert _scores(CELoss(), told, [(pred, gt)]) == pytest.approx([expected])
    real = _draw(3, 4)
    real[0, 1] = NAN
    with pytest.raises(UsageError, match="CosineSimilarity scores whole rows"):
        _scores(MSELoss(), TorchMetric(_theirs("CosineSimilarity")), [(_draw(3, 4, seed=1), real)])


def test_booleans_to_regress() -> None:
    pred, gt = torch.tensor([0.25, 0.5]), torch.tensor([True, False])
    assert _scores(L1Loss(), TorchMetric(_theirs("MeanAbsoluteError")), [(pred, gt)]) == [0.625]


def test_lists_without_any_label_are_no_batch_of_a_metric() -> None:
    seen = Seen()
    boxes = [{"boxes": torch.ones(2, 4)}, None]
    scores = _scores(AbsLoss(), seen, [(torch.zeros(2), boxes), (torch.zeros(2), [None, None])])
    assert scores == [1.0]
    assert seen.record[0][1] is boxes
