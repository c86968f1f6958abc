"""The numbers of a report: one frame of runs, one of methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastmtl.errors import UsageError
from fastmtl.experiments.experiment import Experiment
from fastmtl.experiments.reading import Run, pandas
from fastmtl.experiments.statistics import Selection, compare_with, delta_m, mean_rank, selected

if TYPE_CHECKING:
    from pandas import DataFrame, Series

__all__ = ["Method", "Summary", "name_methods", "summarize"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """The runs of one method, which differ in their seeds.

    Attributes:
        name: How the tables call it.
        arch: Architecture.
        weighting: Strategy.
        runs: Its runs by seed.
    """

    name: str
    arch: str
    weighting: str
    runs: dict[int, Run]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a report says in numbers.

    Attributes:
        methods: The methods in order, by name.
        baseline: Name of the single-task baseline; None without one.
        better: (K,) 1 for metrics where higher is better.
        values: A row per run, by (method, seed): its metrics.
        means: (methods, K) means over the seeds.
        stds: (methods, K) standard deviations over the seeds, ``ddof=1``; NaN for one seed.
        delta_m: By (method, seed), in percent against the baseline; NaN without one.
        mean_rank: By method; NaN for the baseline.
        tests: See `compare_with`.
        tested: What was tested, in words.
        costs: By method: seconds per step and per epoch, peak memory in bytes.
    """

    methods: dict[str, Method]
    baseline: str | None
    better: Series
    values: DataFrame
    means: DataFrame
    stds: DataFrame
    delta_m: Series
    mean_rank: Series
    tests: DataFrame
    tested: str
    costs: DataFrame

    @property
    def runs(self) -> list[Run]:
        """All runs."""
        return [run for method in self.methods.values() for run in method.runs.values()]

    def delta_of(self, method: str) -> Series:
        """Return delta-m of a method's runs by seed."""
        return self.delta_m.xs(method, level="method")


def summarize(experiment: Experiment, selection: Selection) -> Summary:
    """Return the numbers of a report.

    Raises:
        UsageError: Two baselines, the same run twice, or a run without the split that is asked for.
    """
    pd = pandas()
    methods = name_methods(experiment.runs)
    baselines = [name for name, method in methods.items() if method.arch == "STL"]
    if len(baselines) > 1:
        raise UsageError(f"There are {len(baselines)} single-task baselines ({', '.join(baselines)}): leave one.")
    baseline = next(iter(baselines), None)
    runs = {(name, seed): run for name, method in methods.items() for seed, run in method.runs.items()}
    values = pd.DataFrame([selected(run, selection) for run in runs.values()])
    values.index = pd.MultiIndex.from_tuples(list(runs), names=["method", "seed"])
    better = pd.Series(experiment.runs[0].better, index=values.columns)
    by_method = values.groupby(level="method", sort=False)
    means, stds = by_method.mean().loc[list(methods)], by_method.std(ddof=1).loc[list(methods)]
    if baseline is None:
        deltas = pd.Series(float("nan"), index=values.index)
    else:
        deltas = delta_m(values, means.loc[baseline], better)
    ranked = means.drop(index=[baseline] if baseline else [])
    scores, bases, tested = _scores(methods, values, deltas, better, baseline)
    return Summary(
        methods=methods,
        baseline=baseline,
        better=better,
        values=values,
        means=means,
        stds=stds,
        delta_m=deltas.rename("delta_m"),
        mean_rank=mean_rank(ranked, better).reindex(list(methods)),
        tests=compare_with(scores, bases),
        tested=tested,
        costs=_costs(methods),
    )


def name_methods(runs: Sequence[Run]) -> dict[str, Method]:
    """Return the runs by method: those that only differ in the seed; a name tells what tells a method apart.

    Raises:
        UsageError: The same run twice.
    """
    several_archs = len({run.arch for run in runs if not run.is_baseline}) > 1
    groups: dict[tuple[str, str], dict[str, list[Run]]] = {}
    for run in runs:
        alike = groups.setdefault((run.arch, run.weighting), {})
        alike.setdefault(repr(sorted(run.settings().items(), key=str)), []).append(run)
    named: dict[str, Method] = {}
    for (arch, weighting), alike in groups.items():
        settings = [of_method[0].settings() for of_method in alike.values()]
        differing = [name for name in settings[0] if len({repr(each.get(name)) for each in settings}) > 1]
        for each, of_method in zip(settings, alike.values(), strict=True):
            name = "STL" if arch == "STL" else f"{arch} {weighting}" if several_archs else weighting
            if differing:
                name += f" ({', '.join(f'{key}={each.get(key)}' for key in differing)})"
            by_seed: dict[int, Run] = {}
            for run in sorted(of_method, key=lambda run: run.seed):
                if run.seed in by_seed:
                    raise UsageError(f"{by_seed[run.seed].path} and {run.path} are the same run twice: leave one out.")
                by_seed[run.seed] = run
            named[name] = Method(name=name, arch=arch, weighting=weighting, runs=by_seed)
    return named


def _scores(
    methods: dict[str, Method], values: DataFrame, deltas: Series, better: Series, baseline: str | None
) -> tuple[dict[str, Series], dict[str, str | None], str]:
    """Return each method's score by seed, the method that it is tested against, and what the score is."""
    equal = {method.arch: name for name, method in methods.items() if method.weighting == "EW" and name != baseline}
    bases = {name: None if name == baseline else equal.get(method.arch) for name, method in methods.items()}
    if baseline is not None:
        scores = {name: deltas.xs(name, level="method") for name in methods}
        return scores, bases, "delta-m against STL"
    scores = {}
    for name in methods:
        of_method = values.xs(name, level="method")
        base = bases[name]
        reference = of_method.mean() if base is None else values.xs(base, level="method").mean()
        scores[name] = delta_m(of_method, reference, better)
    return scores, bases, "mean relative difference from EW's means"


def _costs(methods: dict[str, Method]) -> DataFrame:
    rows: dict[str, dict[str, Any]] = {}
    for name, method in methods.items():
        runs = list(method.runs.values())
        of_runs = pandas().DataFrame(
            {
                "step": [run.seconds_per_step for run in runs],
                "epoch": [run.seconds_per_epoch for run in runs],
                "memory": [run.peak_memory for run in runs],
            },
            dtype=float,
        )
        rows[name] = of_runs.mean().to_dict()
    return pandas().DataFrame.from_dict(rows, orient="index")
