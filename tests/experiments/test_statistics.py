"""The numbers of a report agree with independent computations."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fastmtl.errors import UsageError
from fastmtl.experiments.experiment import load_experiment
from fastmtl.experiments.statistics import (
    Selection,
    compare_with,
    delta_m,
    describe_selection,
    holm,
    mean_rank,
    selected,
)
from fastmtl.experiments.summary import Summary, summarize
from tests.experiments.made import write_run

SEEDS = 6


def _frame(rows: dict[str, list[float]]) -> pd.DataFrame:
    return pd.DataFrame.from_dict(rows, orient="index", columns=["up", "down"])


BETTER = pd.Series([1, 0], index=["up", "down"])


def test_delta_m_by_hand() -> None:
    values = _frame({"a": [60.0, 1.0], "b": [40.0, 3.0]})
    base = pd.Series([50.0, 2.0], index=["up", "down"])
    # a: 20 % and 50 % better; b: 20 % and 50 % worse.
    assert delta_m(values, base, BETTER).to_dict() == pytest.approx({"a": -35.0, "b": 35.0})


def test_delta_m_is_unknown_where_a_metric_or_the_baseline_is() -> None:
    base = pd.Series([50.0, 0.0], index=["up", "down"])
    assert delta_m(_frame({"a": [60.0, 1.0]}), base, BETTER).isna().all()
    assert delta_m(_frame({"a": [math.nan, 1.0]}), base + 1, BETTER).isna().all()


def test_mean_rank_counts_ties_in_the_middle() -> None:
    means = _frame({"a": [0.9, 1.0], "b": [0.9, 2.0], "c": [0.1, 3.0]})
    expected = np.mean([stats.rankdata([-0.9, -0.9, -0.1]), stats.rankdata([1.0, 2.0, 3.0])], axis=0)
    assert mean_rank(means, BETTER).tolist() == expected.tolist()


def test_holm_by_its_definition() -> None:
    p = pd.Series([0.01, 0.04, 0.03, math.nan, 0.005], index=list("abcde"))
    known = p.dropna()
    for name, value in known.items():
        # The largest of (m - rank) p over all p up to this one.
        smaller = sorted(other for other in known if other <= value)
        expected = max((len(known) - rank) * other for rank, other in enumerate(smaller))
        assert holm(p)[name] == pytest.approx(min(1.0, expected))
    assert math.isnan(holm(p)["d"])


def test_p_values_are_scipys() -> None:
    rng = np.random.default_rng(0)
    scores = {name: pd.Series(rng.normal(mean, 1.0, SEEDS)) for name, mean in {"EW": 0.0, "a": 3.0, "b": 0.1}.items()}
    tests = compare_with(scores, {"EW": "EW", "a": "EW", "b": "EW"})
    raw = {name: stats.ttest_rel(scores[name], scores["EW"]).pvalue for name in ("a", "b")}
    assert tests["p"].to_dict() == pytest.approx(raw)
    assert tests.loc["a", "p_holm"] == pytest.approx(2 * raw["a"])
    assert tests.loc["a", "verdict"] == "worse than EW"
    assert tests.loc["b", "verdict"] == "within noise of EW"


def test_below_five_seeds_nothing_is_claimed() -> None:
    scores = {"EW": pd.Series([0.0] * 4), "a": pd.Series([-9.0] * 4), "b": pd.Series([1.0, -1.0, 1.0, 1.0])}
    tests = compare_with(scores, dict.fromkeys(scores, "EW"))
    assert tests[["p", "p_holm"]].isna().all(axis=None)
    assert tests.loc["a", "verdict"] == "better in all seeds; 4 seeds, not tested"
    assert tests.loc["b", "verdict"] == "within noise of EW; 4 seeds, not tested"


def test_equal_runs_are_within_noise() -> None:
    scores = {"EW": pd.Series(range(5), dtype=float), "a": pd.Series(range(5), dtype=float)}
    assert compare_with(scores, {"a": "EW"}).loc["a", "verdict"] == "within noise of EW"


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """Return the numbers of three methods with six seeds and two epochs."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(3)
    for method, (arch, weighting) in {"stl": ("STL", "EW"), "ew": ("HPS", "EW"), "mgda": ("HPS", "MGDA")}.items():
        for seed in range(SEEDS):
            scores = rng.uniform(0.5, 1.5, (2, 3)).tolist()
            write_run(folder / f"{method}-{seed}", arch=arch, weighting=weighting, seed=seed, scores=scores, val=True)
    return summarize(load_experiment([folder]), Selection())


def test_a_report_agrees_with_numpy_on_its_own_runs(summary: Summary) -> None:
    raw = {
        name: np.array([run.scores["test"].to_numpy().mean(0) for run in method.runs.values()])
        for name, method in summary.methods.items()
    }
    sign = np.array([-1.0, 1.0, 1.0])
    base = raw["STL"].mean(0)
    deltas = {name: 100 * ((values - base) / base * sign).mean(1) for name, values in raw.items()}
    for name, values in raw.items():
        np.testing.assert_allclose(summary.means.loc[name], values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(summary.stds.loc[name], values.std(0, ddof=1), rtol=1e-12)
        np.testing.assert_allclose(summary.delta_of(name), deltas[name], rtol=1e-9, atol=1e-12)
    p = stats.ttest_rel(deltas["MGDA"], deltas["EW"]).pvalue
    assert summary.tests.loc["MGDA", "p"] == pytest.approx(p)
    ranks = stats.rankdata(np.array([raw["EW"].mean(0), raw["MGDA"].mean(0)]) * sign, axis=0).mean(1)
    assert summary.mean_rank[["EW", "MGDA"]].tolist() == ranks.tolist()
    assert math.isnan(summary.mean_rank["STL"])


def test_times_and_memory_are_the_runs_own(summary: Summary) -> None:
    # Two steps in half a second, passes of two seconds.
    assert summary.costs["step"].tolist() == [0.25] * 3
    assert summary.costs["epoch"].tolist() == [2.0] * 3
    assert (summary.costs["memory"] > 1e6).all()


def test_without_a_baseline_the_difference_from_equal_weights_is_tested(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    values = rng.uniform(0.5, 1.5, (2, SEEDS, 3))
    for row, weighting in enumerate(("EW", "UW")):
        for seed in range(SEEDS):
            scores = [values[row, seed].tolist()]
            write_run(tmp_path / f"{weighting}-{seed}", weighting=weighting, seed=seed, scores=scores)
    summary = summarize(load_experiment([tmp_path]), Selection())
    sign, base = np.array([-1.0, 1.0, 1.0]), values[0].mean(0)
    scores = 100 * ((values - base) / base * sign).mean(2)
    assert summary.delta_m.isna().all()
    # The log keeps seven digits.
    assert summary.tests.loc["UW", "p"] == pytest.approx(stats.ttest_rel(scores[1], scores[0]).pvalue, rel=1e-4)


def test_epochs_are_selected_as_said(tmp_path: Path) -> None:
    scores = [[float(epoch)] * 3 for epoch in range(4)]
    write_run(tmp_path / "run", scores=scores, val=True)
    experiment = load_experiment([tmp_path])
    run = experiment.runs[0]
    assert selected(run, Selection(last=2)).tolist() == [2.5] * 3
    assert selected(run, Selection()).tolist() == [1.5] * 3
    assert selected(run, Selection(best=True)).tolist() == [0.0] * 3
    assert describe_selection([run], Selection(last=2)) == "mean test metrics of the last 2 epochs"
    assert describe_selection([run], Selection()).endswith("last 4 epochs, all there are (10 were asked for)")


def test_the_best_epoch_needs_a_validation_split(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    run = load_experiment([tmp_path]).runs[0]
    with pytest.raises(UsageError, match="has no validation split"):
        selected(run, Selection(best=True))
