"""Published rows (`fastmtl/published`): read, and with delta-m and mean rank computed from their own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml

from fastmtl.errors import UsageError
from fastmtl.experiments.reading import Run, pandas
from fastmtl.experiments.statistics import delta_m, mean_rank
from fastmtl.support.names import resolve_name

if TYPE_CHECKING:
    from pandas import DataFrame, Series

__all__ = ["Published", "in_units_of", "load_published", "names_of_published"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """The published rows of a data set.

    Attributes:
        name: Its name.
        about: Title, network, epochs, selection and so on.
        sources: Short name of a source to what it is.
        values: (methods, K) metrics by (task, metric), the baseline among the methods.
        better: (K,) 1 where higher is better.
        per_unit: (K,) units of the table in one of fastmtl's.
        source: Method to the short name of its source.
        elsewhere: (method, task, metric) to other values that copies of the table have.
    """

    name: str
    about: dict[str, Any]
    sources: dict[str, str]
    values: DataFrame
    better: Series
    per_unit: Series
    source: dict[str, str]
    elsewhere: dict[tuple[str, str, str], str]

    @property
    def baseline(self) -> str:
        """The method that delta-m is relative to."""
        return str(self.about["baseline"])

    def table(self) -> DataFrame:
        """Return (methods, 2) ``delta_m`` in percent and ``mean_rank``, computed from the values.

        The baseline is not ranked: it is no multi-task method.
        """
        deltas = delta_m(self.values, self.values.loc[self.baseline], self.better)
        ranks = mean_rank(self.values.drop(index=self.baseline), self.better)
        return pandas().DataFrame({"delta_m": deltas, "mean_rank": ranks}).loc[self.values.index]

    def notes(self) -> list[str]:
        """Return what must be known of the rows, a sentence or two each."""
        about = self.about
        setting = f"{about['network']}; {about['epochs']} epochs, batch {about['batch_size']}, {about['optimizer']}"
        used = {name: text.replace("{data set}", _folder(self.name)) for name, text in self.sources.items()}
        return [
            f"{about['title']}: {setting}. Selection: {about['selection']}.",
            str(about["note"]).strip(),
            *(f"{name}: {text}." for name, text in used.items()),
        ]


def _folder(name: str) -> str:
    return {"qm9": "quantum_chemistry"}.get(name, name)


def names_of_published() -> list[str]:
    """Return the data sets that there are published rows of."""
    return list(_about()["datasets"])


def _about() -> dict[str, Any]:
    about: dict[str, Any] = yaml.safe_load((files("fastmtl.published") / "sources.yaml").read_text(encoding="utf-8"))
    return about


def load_published(name: str) -> Published:
    """Return the published rows of a data set, by its name in any case.

    Raises:
        UsageError: There are none of it.
    """
    about = _about()
    name = resolve_name(name, {known: known for known in about["datasets"]}, "table of published rows")
    with (files("fastmtl.published") / f"{name}.csv").open(encoding="utf-8") as file:
        rows = pandas().read_csv(file, dtype={"elsewhere": str}, keep_default_na=False)
    metrics = rows.drop_duplicates(["task", "metric"]).set_index(["task", "metric"])
    values = rows.pivot(index="method", columns=["task", "metric"], values="value")
    values = values.loc[list(dict.fromkeys(rows["method"])), list(metrics.index)]
    return Published(
        name=name,
        about=about["datasets"][name],
        sources={source: " ".join(about["sources"][source].split()) for source in dict.fromkeys(rows["source"])},
        values=values,
        better=metrics["higher_is_better"],
        per_unit=metrics["per_unit"],
        source=dict(zip(rows["method"], rows["source"], strict=True)),
        elsewhere={
            (row["method"], row["task"], row["metric"]): row["elsewhere"]
            for _, row in rows.iterrows()
            if row["elsewhere"]
        },
    )


def in_units_of(published: Published, means: DataFrame, runs: Sequence[Run]) -> DataFrame:
    """Return the means of own methods in the units of published rows.

    Raises:
        UsageError: The runs have other tasks or metrics.
    """
    wanted = list(published.values.columns)
    if set(means.columns) != set(wanted):
        listed = [", ".join(f"{task} {metric}" for task, metric in columns) for columns in (wanted, runs[0].metrics)]
        raise UsageError(f"The published rows of {published.name} have {listed[0]}, but the runs have {listed[1]}.")
    return means[wanted] * published.per_unit
