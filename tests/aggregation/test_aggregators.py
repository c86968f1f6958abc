"""Aggregators and weightings by themselves: their promises, states, settings and errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtl import Stateful
from fastmtl.aggregation import (
    IMTLG,
    MGDA,
    PCD,
    Aggregator,
    AlignedMTL,
    CAGrad,
    ConFIG,
    Constant,
    ConstantWeighting,
    CRMOGMWeighting,
    DualProj,
    ExcessMTL,
    FairGrad,
    GradDrop,
    GradVac,
    GradVacWeighting,
    GramianWeightedAggregator,
    Krum,
    KrumWeighting,
    Mean,
    MGDAWeighting,
    MoDoWeighting,
    NashMTL,
    PCGrad,
    Random,
    SDMGradWeighting,
    Sum,
    TrimmedMean,
    UPGrad,
    UPGradWeighting,
)
from fastmtl.errors import UsageError
from fastmtl.linalg import DualConeProjector, QuadprogProjector

ALL = [
    AlignedMTL(),
    CAGrad(0.5),
    ConFIG(),
    DualProj(),
    ExcessMTL(),
    FairGrad(1.0),
    GradDrop(),
    GradVac(),
    IMTLG(),
    Krum(0),
    Mean(),
    MGDA(),
    NashMTL(3),
    PCD(),
    PCGrad(),
    Random(),
    Sum(),
    TrimmedMean(1),
    UPGrad(),
]


def rows(seed: int = 0, tasks: int = 3) -> Tensor:
    return torch.randn(tasks, 7, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [0.0, 1e-10, 1e10])
@pytest.mark.parametrize("aggregator", ALL, ids=str)
def test_one_finite_gradient_of_the_rows_dtype(aggregator: Aggregator, scale: float) -> None:
    found = aggregator(scale * rows())
    assert found.shape == (7,)
    assert found.dtype == torch.float32
    assert found.isfinite().all()


@pytest.mark.parametrize("aggregator", [UPGrad(), DualProj(), MGDA(), CAGrad(2.0), FairGrad(1.0), NashMTL(3)], ids=str)
def test_no_task_is_harmed(aggregator: Aggregator) -> None:
    if isinstance(aggregator, UPGrad | DualProj):
        aggregator.projector = QuadprogProjector(reg_eps=0.0)
    for seed in range(20):
        matrix = rows(seed).double()
        products = matrix @ aggregator(matrix)
        assert (products >= -1e-9 * matrix.norm() ** 2).all()


@pytest.mark.parametrize(
    "aggregator", [aggregator for aggregator in ALL if str(aggregator) not in ("Mean", "Sum")], ids=str
)
def test_solved_weights_have_no_graph(aggregator: Aggregator) -> None:
    if isinstance(aggregator, TrimmedMean | Random):
        pytest.skip("plain operators")
    assert not aggregator(rows().requires_grad_()).requires_grad


def test_plain_sums_can_be_differentiated() -> None:
    matrix = rows().requires_grad_()
    Constant(torch.tensor([1.0, 2.0, 3.0]))(matrix).sum().backward()
    assert torch.equal(matrix.grad, torch.tensor([[1.0], [2.0], [3.0]]).expand(3, 7))


@pytest.mark.parametrize("aggregator", [each for each in ALL if isinstance(each, Stateful)], ids=str)
def test_reset_forgets(aggregator: Any) -> None:
    aggregator.reset()
    first = aggregator(rows(tasks=3)[:, :2].contiguous())
    aggregator(rows(1)[:, :2].contiguous())
    aggregator.reset()
    again = aggregator(rows(tasks=3)[:, :2].contiguous())
    if not isinstance(aggregator, GradVac):
        torch.testing.assert_close(again, first)
    else:
        aggregator.reset()
        assert aggregator.gramian_weighting._phi_t is None


STATEFUL: dict[str, Callable[[], Any]] = {
    "CRMOGM": lambda: CRMOGMWeighting(UPGradWeighting()),
    "ExcessMTL": lambda: ExcessMTL(0.5),
    "ExcessMTL-warmup": lambda: ExcessMTL(0.5, n_warmup_steps=1),
    "GradVac": GradVac,
    "MoDo": lambda: MoDoWeighting(gamma=0.5),
    "NashMTL": lambda: NashMTL(3),
    "PCD": PCD,
    "SDMGrad": SDMGradWeighting,
}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_call_that_is_not_finite_is_forgotten(name: str, place: int, bad: float) -> None:
    def run(calls: list[Tensor]) -> list[Tensor]:
        made, found = STATEFUL[name](), []
        for matrix in calls:
            torch.manual_seed(0)
            found.append(made(matrix if isinstance(made, Aggregator) else matrix @ matrix.T))
        return found

    good = [rows(seed) for seed in range(3)]
    wrong = rows(9)
    wrong[1, 2] = bad
    found = run([*good[:place], wrong, *good[place:]])
    assert not found.pop(place).isfinite().all()
    if name == "ExcessMTL-warmup" and place == 0:
        # The call counts as one of the warm-up, which then has no risks to compare with.
        name = "ExcessMTL"
    torch.testing.assert_close(found, run(good), rtol=1e-6, atol=1e-6)


def test_excess_risks_of_tensors_without_elements() -> None:
    assert ExcessMTL()(torch.ones(3, 0)).shape == (0,)


def test_smoothed_weights() -> None:
    gram = [rows(seed) @ rows(seed).T for seed in range(2)]
    plain = [UPGradWeighting()(each) for each in gram]
    smoothed = CRMOGMWeighting(UPGradWeighting(), alpha=0.9)
    torch.testing.assert_close(smoothed(gram[0]), plain[0])
    torch.testing.assert_close(smoothed(gram[1]), 0.9 * plain[0] + 0.1 * plain[1])
    started = CRMOGMWeighting(UPGradWeighting(), 0.5, torch.ones(3))
    torch.testing.assert_close(started(gram[0]), 0.5 + 0.5 * plain[0])
    inner = GradVacWeighting()
    outer = CRMOGMWeighting(inner)
    outer(gram[0])
    outer.reset()
    assert inner._phi_t is None
    with pytest.raises(UsageError, match="number of objectives"):
        smoothed(torch.eye(2))
    with pytest.raises(UsageError, match="initial_weights"):
        CRMOGMWeighting(UPGradWeighting(), initial_weights=torch.ones(2))(gram[0])


def test_weights_stay_on_the_simplex() -> None:
    for weighting in (MoDoWeighting(gamma=5.0), SDMGradWeighting(lambda_=0.0)):
        for seed in range(5):
            weights = weighting(rows(seed) @ rows(seed + 9).T)
            assert (weights >= 0).all()
            torch.testing.assert_close(weights.sum(), torch.tensor(1.0))


def test_the_bargain_is_kept_between_updates_and_capped() -> None:
    aggregator = NashMTL(3, max_norm=0.1, update_weights_every=2)
    assert aggregator(rows()).norm() == pytest.approx(0.1)
    free = NashMTL(3, max_norm=0.0, update_weights_every=2)
    first = free.weighting(rows())
    assert torch.equal(free.weighting(rows(1)), first)
    assert not torch.equal(free.weighting(rows(2)), first)


def test_graddrop_keeps_one_sign_per_column_and_leaks() -> None:
    matrix = torch.tensor([[1.0, -2.0, 3.0], [-4.0, -1.0, 5.0]])
    torch.manual_seed(0)
    for _ in range(20):
        found = GradDrop()(matrix)
        assert found[0] in (1.0, -4.0)
        assert torch.equal(found[1:], torch.tensor([-3.0, 8.0]))
    assert torch.equal(GradDrop(leak=torch.ones(2))(matrix), matrix.sum(0))
    with pytest.raises(UsageError, match="leak"):
        GradDrop(leak=torch.ones(3))(matrix)


def test_krum_leaves_the_outlier_out() -> None:
    matrix = torch.cat([torch.ones(4, 5) + 0.01 * rows(tasks=4)[:, :5], torch.full((1, 5), 1e6)])
    weights = KrumWeighting(1, 4)(matrix @ matrix.T)
    assert torch.equal(weights, torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0]))
    with pytest.raises(UsageError, match="at least 4 rows"):
        Krum(1)(rows())


def test_preferences_weigh_the_projections() -> None:
    matrix = torch.eye(3)
    wanted = torch.tensor([1.0, 2.0, 3.0])
    for aggregator in (UPGrad(wanted), DualProj(wanted), AlignedMTL(wanted)):
        torch.testing.assert_close(aggregator(matrix), wanted)
    aggregator = UPGrad()
    aggregator.pref_vector = wanted
    assert isinstance(aggregator.gramian_weighting.weighting, ConstantWeighting)
    with pytest.raises(UsageError, match="pref_vector"):
        aggregator.pref_vector = torch.ones(2, 2)


def test_a_projector_of_ones_own() -> None:
    class Keep(DualConeProjector):
        def __call__(self, U: Tensor, G: Tensor) -> Tensor:
            return 2 * U

    torch.testing.assert_close(UPGrad(projector=Keep())(rows()), 2 * rows().mean(0))
    torch.testing.assert_close(DualProj(projector=Keep())(rows()), 2 * rows().mean(0))


@pytest.mark.parametrize(
    ("make", "name", "bad"),
    [
        (lambda: CAGrad(0.5), "c", -1.0),
        (lambda: CAGrad(0.5), "norm_eps", -1.0),
        (MGDA, "epsilon", 0.0),
        (MGDA, "max_iters", 0),
        (GradVac, "beta", 1.5),
        (lambda: Krum(1), "n_selected", 0),
        (lambda: TrimmedMean(1), "trim_number", -1),
        (lambda: NashMTL(2), "n_tasks", 0),
        (ExcessMTL, "robust_step_size", 0.0),
        (PCD, "tau", 2.0),
        (PCD, "beta", 1.0),
        (lambda: FairGrad(1.0), "alpha", -1.0),
        (MoDoWeighting, "gamma", 0.0),
        (SDMGradWeighting, "momentum", 1.0),
        (QuadprogProjector, "reg_eps", -1.0),
    ],
)
def test_settings_are_checked_whenever_they_are_set(make: Any, name: str, bad: float) -> None:
    made = make()
    before = getattr(made, name)
    with pytest.raises(UsageError, match=name):
        setattr(made, name, bad)
    assert getattr(made, name) == before


def test_settings_of_an_aggregator_are_its_weightings() -> None:
    aggregator = MGDA(epsilon=0.5)
    aggregator.max_iters = 7
    assert isinstance(aggregator.gramian_weighting, MGDAWeighting)
    assert (aggregator.gramian_weighting.epsilon, aggregator.gramian_weighting.max_iters) == (0.5, 7)
    assert repr(aggregator) == "MGDA(epsilon=0.5, max_iters=7)"
    assert str(UPGrad(torch.tensor([1.0, 0.25]))) == "UPGrad([1., 0.25])"


def test_a_matrix_is_asked_for() -> None:
    with pytest.raises(UsageError, match="matrix"):
        UPGrad()(torch.ones(3))
    with pytest.raises(UsageError, match="3 rows"):
        Constant(torch.ones(3))(rows(tasks=2))


def test_classes_of_ones_own_derive_from_those_of_the_package() -> None:
    class Halved(MGDAWeighting):
        def weigh(self, gram: Tensor) -> Tensor:
            return super().weigh(gram) / 2

    class Named(UPGrad):
        def __init__(self, name: str) -> None:
            super().__init__(projector=QuadprogProjector(reg_eps=0.0))
            self.name = name

    class Plain(GramianWeightedAggregator[Halved]):
        pass

    assert Halved(max_iters=7).max_iters == 7
    torch.testing.assert_close(Plain(Halved())(rows()), MGDA()(rows()) / 2)
    mine = Named("mine")
    assert (mine.name, mine.projector.reg_eps, mine.pref_vector) == ("mine", 0.0, None)


@pytest.mark.parametrize("aggregator", ALL, ids=str)
def test_copies_go_on_alike(aggregator: Aggregator) -> None:
    if isinstance(aggregator, GradDrop):
        aggregator = GradDrop(f=torch.nn.Identity())
    aggregator(rows())
    for other in (copy.deepcopy(aggregator), pickle.loads(pickle.dumps(aggregator))):
        results = []
        for same in (copy.deepcopy(aggregator), other):
            torch.manual_seed(0)
            results.append(same(rows(1)))
        assert torch.equal(*results)
        assert repr(other) == repr(aggregator) or isinstance(aggregator, GradDrop)
