"""What a loss tells of labels, brought in line with them: by rows, without channels or coordinates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.loss import L1Loss, NormalLoss
from fastmtl.metrics import AbsMetric, L1Metric, NormalMetric, TorchMetric
from tests.test_missing import Seen, _draw, _scores, _theirs


class _Points(L1Loss):
    """Key points (batch, points, 3), of which -999 is missing, told by one number for each point."""

    def __init__(self, keeps: bool = False) -> None:
        super().__init__()
        self.keeps = keeps

    def labelled(self, gt: Tensor) -> Tensor:
        known = gt[..., :1] >= 0
        return known if self.keeps else known.squeeze(-1)


def _points(points: int) -> tuple[Tensor, Tensor]:
    gt = _draw(2, points, 3).abs()
    pred = gt + 1
    gt[0, 1], gt[1, 0] = -999, -999
    return pred, gt


@pytest.mark.parametrize(("points", "keeps"), [(4, False), (4, True), (3, True), (2, False)])
def test_points_without_their_coordinates(points: int, keeps: bool) -> None:
    pred, gt = _points(points)
    # Every coordinate is 1 too large.
    assert _Points(keeps).compute_loss(pred, gt).item() == pytest.approx(1.0)
    assert _scores(_Points(keeps), L1Metric(), [(pred, gt)]) == pytest.approx([1.0])
    theirs = TorchMetric(_theirs("MeanAbsoluteError"))
    assert _scores(_Points(keeps), theirs, [(pred, gt)]) == pytest.approx([1.0])
    seen = Seen()
    _scores(_Points(keeps), seen, [(pred, gt)])
    ((shown, labels),) = seen.record
    assert labels.shape == shown.shape == (2 * points - 2, 3)
    torch.testing.assert_close(shown, labels + 1)


def test_points_that_could_be_two_things_are_refused() -> None:
    pred, gt = _points(3)
    with pytest.raises(UsageError, match=r"shape \(2, 3\) for labels of shape \(2, 3, 3\)"):
        _Points().compute_loss(pred, gt)
    for metric in (L1Metric(), Seen()):
        with pytest.raises(UsageError, match=r"shape \(2, 3\) for labels of shape \(2, 3, 3\).*such as \(2, 3, 1\)"):
            _scores(_Points(), metric, [(pred, gt)])


def test_what_is_labelled_must_go_with_the_labels() -> None:
    class Halves(L1Loss):
        def labelled(self, gt: Tensor) -> Tensor:
            return gt[:, :2] > 0

    with pytest.raises(UsageError, match=r"shape \(4, 2\), which does not match labels of shape \(4, 6\)"):
        _scores(Halves(), L1Metric(), [(_draw(4, 6), _draw(4, 6))])


@pytest.mark.parametrize("metric", [NormalMetric(), Seen()], ids=lambda metric: type(metric).__name__)
def test_normals_of_a_small_map_have_their_channels_first(metric: AbsMetric) -> None:
    gt = torch.nn.functional.normalize(_draw(2, 3, 3, 3), dim=1)
    gt[0, :, 1, 2] = 0
    pred = gt.clone()
    pred[0, :, 1, 2] = 1
    scores = _scores(NormalLoss(), metric, [(pred, gt)], 5 if isinstance(metric, NormalMetric) else 1)
    if isinstance(metric, Seen):
        assert metric.record[0][1].shape == (17, 3)
        torch.testing.assert_close(metric.record[0][0], metric.record[0][1])
    else:
        assert scores[0] == pytest.approx(0.0, abs=1e-4)
