"""What papers report of several runs: means over seeds, delta-m, mean rank, paired tests.

Tables are frames with a row per run or method and a column per (task, metric). A series ``better`` has 1 for the
columns where higher is better, else 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastmtl.errors import UsageError
from fastmtl.experiments.reading import Run, pandas
from fastmtl.support.extras import need

if TYPE_CHECKING:
    from pandas import DataFrame, Series

__all__ = [
    "FEWEST_SEEDS",
    "LEVEL",
    "Selection",
    "compare_with",
    "delta_m",
    "describe_selection",
    "holm",
    "mean_rank",
    "selected",
    "signs",
]

# Below it, a test over seeds says next to nothing, and no significance is claimed.
FEWEST_SEEDS = 5
LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which epochs of a run count: the mean of the ``last`` ones, or with ``best`` the best by the validation split."""

    last: int = 10
    best: bool = False

    def __post_init__(self) -> None:
        if self.last < 1:
            raise UsageError(f"last must be at least 1, got {self.last}.")


def selected(run: Run, selection: Selection, split: str = "test") -> Series:
    """Return the metrics of a run by (task, metric).

    Raises:
        UsageError: The best epoch is asked for of a run without validation split.
    """
    scores = run.scores[split]
    if not selection.best:
        return scores.tail(selection.last).mean(skipna=False)
    if run.best_epoch is None:
        raise UsageError(
            f"{run.path} has no validation split to choose its best epoch by: take the mean of the last epochs, --last."
        )
    return scores.loc[run.best_epoch]


def describe_selection(runs: Sequence[Run], selection: Selection) -> str:
    """Return in words which epochs the metrics are of."""
    if selection.best:
        return (
            "test metrics of the epoch that is best on the validation split, by the mean relative improvement over the "
            "first epoch"
        )
    counts = sorted({min(len(run.scores["test"]), selection.last) for run in runs})
    which = "epoch" if counts == [1] else f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} epochs"
    asked = "" if counts == [selection.last] else f", all there are ({selection.last} were asked for)"
    return f"mean test metrics of the last {which}{asked}"


def signs(better: Series) -> Series:
    """Return -1 for metrics where higher is better, else 1, so that a signed value is better when lower."""
    return 1 - 2 * better


def delta_m(values: DataFrame, base: Series, better: Series) -> Series:
    """Return the mean relative change against a baseline in percent, negative where better.

    ``delta_m = 100 / K sum_k (-1)^(1 - l_k) (M_k - B_k) / |B_k|`` with l_k = 1 where lower is better, over all K
    metrics of all tasks: Maninis et al., "Attentive single-tasking of multiple tasks", CVPR 2019. NaN where a metric is
    unknown or the baseline is 0.

    Args:
        values: (runs or methods, K) metrics M.
        base: (K,) metrics B of the baseline.
        better: (K,) 1 where higher is better.
    """
    relative = (values - base) / base.abs().where(base != 0) * signs(better)
    return 100 * relative.mean(axis=1, skipna=False)


def mean_rank(means: DataFrame, better: Series) -> Series:
    """Return each method's rank, 1 for the best and the mean one of ties, averaged over the metrics.

    NaN for a method of which a metric is unknown.
    """
    return (means * signs(better)).rank(axis=0, method="average").mean(axis=1, skipna=False)


def holm(p: Series) -> Series:
    """Return Holm's step-down adjusted p-values of a family of tests; NaN stays NaN and does not count.

    Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 1979.
    """
    known = p.dropna().sort_values()
    factors = range(len(known), 0, -1)
    return (known * list(factors)).cummax().clip(upper=1.0).reindex(p.index)


def compare_with(scores: Mapping[str, Series], baseline: Mapping[str, str | None]) -> DataFrame:
    """Compare each method with its baseline by paired t-tests over seeds, adjusted by Holm's method over all of them.

    Args:
        scores: Method to its score by seed, lower is better.
        baseline: Method to the method that it is compared with, None for none.

    Returns:
        A row per method: ``n`` seeds in common, ``difference`` (mean over seeds, negative is better), ``p``, ``p_holm``
        (NaN below `FEWEST_SEEDS`) and ``verdict`` in words.
    """
    rows: dict[str, dict[str, Any]] = {}
    for method, of_method in scores.items():
        base = baseline.get(method)
        if base is None or base == method:
            continue
        difference = (of_method - scores[base]).dropna()
        rows[method] = {"n": len(difference), "difference": difference.mean(), "p": _paired_p(difference)}
        rows[method]["same_sign"] = bool((difference > 0).all() or (difference < 0).all())
    frame = pandas().DataFrame.from_dict(rows, orient="index", columns=["n", "difference", "p", "same_sign"])
    frame["p_holm"] = holm(frame["p"].astype(float))
    frame["verdict"] = [_verdict(row) for _, row in frame.iterrows()]
    return frame.drop(columns="same_sign")


def _paired_p(difference: Series) -> float:
    if len(difference) < FEWEST_SEEDS:
        return float("nan")
    if (difference == 0).all():
        return 1.0
    stats = need("scipy.stats", "experiments", "A test over seeds")
    with warnings.catch_warnings():
        # Differences that are the same to the last digits: scipy warns that p is then only roughly 0.
        warnings.simplefilter("ignore", RuntimeWarning)
        # The paired t-test is the one-sample test of the differences.
        return float(stats.ttest_1samp(difference, 0.0).pvalue)


def _verdict(row: Series) -> str:
    if row["n"] == 0:
        return "no seed in common"
    better = "better" if row["difference"] < 0 else "worse"
    if row["n"] < FEWEST_SEEDS:
        noise = "within noise of EW" if row["n"] > 1 and not row["same_sign"] else f"{better} in all seeds"
        few = f"{row['n']} seed" + ("" if row["n"] == 1 else "s")
        return f"{noise}; {few}, not tested" if row["n"] > 1 else f"{few}, not tested"
    return "within noise of EW" if not row["p_holm"] < LEVEL else f"{better} than EW"
