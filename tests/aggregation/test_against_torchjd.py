"""Values of TorchJD's aggregators on random matrices, and objectives where its solvers stop early."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtl import aggregation, linalg

theirs = pytest.importorskip("torchjd.aggregation")
their_linalg = pytest.importorskip("torchjd.linalg")

SIZES = [2, 3, 5, 8, 16]


def matrix(tasks: int, columns: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * tasks + seed)
    rows = torch.randn(tasks, columns, generator=generator, dtype=torch.float64)
    # Lengths apart by up to a factor of 100, and a common part so that not all gradients are orthogonal.
    return rows * torch.logspace(-1, 1, tasks, dtype=torch.float64)[:, None] + 0.3 * rows[:1]


def preference(tasks: int) -> Tensor:
    return torch.linspace(0.5, 2.0, tasks, dtype=torch.float64)


def assert_alike(ours: Tensor, reference: Tensor) -> None:
    assert ours.dtype == reference.dtype
    assert (ours - reference).norm() <= 1e-5 * reference.norm()


CLOSED: dict[str, Callable[[Any, int], Any]] = {
    "AlignedMTL": lambda m, t: m.AlignedMTL(),
    "AlignedMTL-median": lambda m, t: m.AlignedMTL(scale_mode="median"),
    "AlignedMTL-rmse": lambda m, t: m.AlignedMTL(preference(t), "rmse"),
    "AlignedMTL-preference": lambda m, t: m.AlignedMTL(preference(t)),
    "CAGrad-0": lambda m, t: m.CAGrad(c=0.0),
    "ConFIG": lambda m, t: m.ConFIG(),
    "ConFIG-preference": lambda m, t: m.ConFIG(preference(t)),
    "Constant": lambda m, t: m.Constant(preference(t)),
    "DualProj": lambda m, t: m.DualProj(),
    "DualProj-preference": lambda m, t: m.DualProj(preference(t)),
    "IMTLG": lambda m, t: m.IMTLG(),
    "Krum": lambda m, t: m.Krum(n_byzantine=1, n_selected=2),
    "Mean": lambda m, t: m.Mean(),
    "PCD": lambda m, t: m.PCD(tau=0.3),
    "Sum": lambda m, t: m.Sum(),
    "TrimmedMean": lambda m, t: m.TrimmedMean(1),
    "UPGrad": lambda m, t: m.UPGrad(),
    "UPGrad-preference": lambda m, t: m.UPGrad(preference(t)),
}


@pytest.mark.parametrize("tasks", SIZES)
@pytest.mark.parametrize("name", CLOSED)
def test_aggregations_agree(name: str, tasks: int) -> None:
    if tasks < 5 and name in ("Krum", "TrimmedMean"):
        pytest.skip("needs more rows")
    for seed in range(5):
        rows = matrix(tasks, seed=seed)
        assert_alike(CLOSED[name](aggregation, tasks)(rows), CLOSED[name](theirs, tasks)(rows))


@pytest.mark.parametrize("tasks", SIZES)
def test_other_projectors_agree(tasks: int) -> None:
    rows = matrix(tasks)
    ours = aggregation.UPGrad(projector=linalg.QuadprogProjector(norm_eps=0.0, reg_eps=1e-7))
    reference = theirs.UPGrad(projector=their_linalg.QuadprogProjector(norm_eps=0.0, reg_eps=1e-7))
    assert_alike(ours(rows), reference(rows))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["PCGrad", "GradVac"])
def test_surgery_of_two_gradients_needs_no_order(name: str, seed: int) -> None:
    ours, reference = getattr(aggregation, name)(), getattr(theirs, name)()
    for step in range(3):
        rows = matrix(2, 4, seed=10 * seed + step)
        assert_alike(ours(rows), reference(rows))


@pytest.mark.parametrize("tasks", SIZES)
def test_min_norm_is_not_longer(tasks: int) -> None:
    rows = matrix(tasks)
    assert aggregation.MGDA()(rows).norm() <= theirs.MGDA()(rows).norm() * (1 + 1e-9)


@pytest.mark.parametrize("tasks", SIZES)
def test_conflict_averse_weights_have_no_worse_objective(tasks: int) -> None:
    c = 0.4
    for seed in range(5):
        rows = matrix(tasks, seed=seed)
        gram = rows @ rows.T
        gram = gram / gram.trace()
        mean = torch.full_like(gram[0], 1 / tasks)

        def objective(weighting: Any, gram: Tensor = gram, mean: Tensor = mean) -> Tensor:
            dual = weighting(gram) - mean
            weights = dual / dual.sum()
            assert (weights >= -1e-9).all()
            return weights @ gram @ mean + c * (mean @ gram @ mean).sqrt() * (weights @ gram @ weights).sqrt()

        assert objective(aggregation.CAGradWeighting(c)) <= objective(theirs.CAGradWeighting(c)) + 1e-9


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("tasks", SIZES)
def test_fair_weights_agree(tasks: int, alpha: float) -> None:
    rows = matrix(tasks)
    assert_alike(aggregation.FairGrad(alpha)(rows), theirs.FairGrad(alpha)(rows))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tasks", SIZES)
def test_the_bargain_is_solved_at_least_as_well(tasks: int) -> None:
    pytest.importorskip("ecos")
    rows = matrix(tasks)
    gram = rows @ rows.T

    def residual(module: Any) -> Tensor:
        weights = module.NashMTL(tasks, max_norm=0.0).weighting(rows)
        return (gram @ weights * weights - 1).norm()

    assert residual(aggregation) <= residual(theirs) + 1e-9


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_bargains_agree_at_any_length_of_the_gradients(scale: float, max_norm: float) -> None:
    pytest.importorskip("ecos")
    rows = scale * matrix(3)
    assert_alike(aggregation.NashMTL(3, max_norm=max_norm)(rows), theirs.NashMTL(3, max_norm=max_norm)(rows))


STATEFUL: dict[str, Callable[[Any], Any]] = {
    "CRMOGM": lambda m: m.GramianWeightedAggregator(m.CRMOGMWeighting(m.UPGradWeighting(), alpha=0.7)),
    "ExcessMTL": lambda m: m.ExcessMTL(0.5),
    "ExcessMTL-warmup": lambda m: m.ExcessMTL(n_warmup_steps=2),
    "MoDo": lambda m: m.MoDoWeighting(gamma=0.3, rho=0.2),
    "PCD": lambda m: m.PCD(torch.tensor([0.1, 0.0, 0.9, 0.5]), beta=0.9),
    "SDMGrad": lambda m: m.SDMGradWeighting(lr=2.0, lambda_=0.5),
    "SDMGrad-preference": lambda m: m.SDMGradWeighting(pref_vector=preference(5)),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_sequences_agree(name: str) -> None:
    ours, reference = STATEFUL[name](aggregation), STATEFUL[name](theirs)
    for step in range(5):
        given = matrix(5, seed=step)
        if name.startswith(("MoDo", "SDMGrad")):
            given = given @ matrix(5, seed=50 + step).T
        assert_alike(ours(given), reference(given))


def test_states_are_saved_under_their_names() -> None:
    for name in ("GradVac", "ExcessMTL", "PCD"):
        ours, reference = getattr(aggregation, name)(), getattr(theirs, name)()
        ours(matrix(4))
        reference(matrix(4))
        assert set(ours.state_dict()) <= set(reference.state_dict()), name


def test_all_names_are_there() -> None:
    assert set(theirs.__all__) <= set(aggregation.__all__)
    assert set(their_linalg.__all__) <= set(linalg.__all__)


@pytest.mark.parametrize("name", [n for n in theirs.__all__ if n not in ("Weighting", "Aggregator")])
def test_signatures_agree(name: str) -> None:
    from inspect import signature

    ours, reference = (list(signature(getattr(module, name)).parameters) for module in (aggregation, theirs))
    assert ours == reference
