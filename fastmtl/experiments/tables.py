"""The results as tables: for people, for spreadsheets, for Markdown and for LaTeX."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmtl.experiments.experiment import Experiment
from fastmtl.experiments.reading import pandas
from fastmtl.experiments.summary import Summary

if TYPE_CHECKING:
    from pandas import DataFrame, Series

__all__ = [
    "Cell",
    "Column",
    "ResultTable",
    "cost_table",
    "latex",
    "markdown",
    "places",
    "result_table",
    "results_csv",
    "shown",
]

_MEGABYTE = 1e6


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of a table: its text, the text behind the plus-minus sign, and 1 or 2 if it is best or second best."""

    text: str
    spread: str = ""
    place: int = 0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: the group of columns it is in, its own name, ``"up"`` or ``"down"`` for what is better, or neither."""

    group: str
    name: str
    better: str = ""


@dataclass(frozen=True, kw_only=True)
class ResultTable:
    """A table of methods, the first column of which has their names.

    Attributes:
        columns: The others.
        rows: Name and cells of each method; the baseline first.
        baseline: Name of the baseline.
        marks: Method to what is said behind its name.
    """

    columns: list[Column]
    rows: list[tuple[str, list[Cell]]]
    baseline: str | None = None
    marks: dict[str, str] = field(default_factory=dict)

    def groups(self) -> list[tuple[str, int]]:
        """Return the groups of columns that stand together, with their numbers of columns."""
        groups: list[tuple[str, int]] = []
        for column in self.columns:
            if groups and groups[-1][0] == column.group:
                groups[-1] = (column.group, groups[-1][1] + 1)
            else:
                groups.append((column.group, 1))
        return groups


def shown(value: float, like: float | None = None) -> str:
    """Return a number with as many decimals as fit the size of ``like``, itself if not given; "-" for NaN."""
    if math.isnan(value):
        return "-"
    size = abs(value if like is None or math.isnan(like) else like)
    return f"{value:z.{4 if size < 1 else 2 if size < 100 else 1}f}"


def _in_percent(value: float, like: float | None = None) -> str:
    # What rounds to zero has no sign.
    return "-" if math.isnan(value) else f"{value:z.2f}"


def places(values: Series, better: int, among: Iterable[str]) -> dict[str, int]:
    """Return the methods that are best (1) and second best (2); several where they are equal."""
    ranks = (values.loc[list(among)].dropna() * (1 - 2 * better)).rank(method="min")
    if len(ranks) < 2:
        return {}
    first = [str(name) for name in ranks.index[ranks == 1]]
    second = [str(name) for name in ranks.index[ranks == 2]] if len(first) == 1 else []
    return dict.fromkeys(first, 1) | dict.fromkeys(second, 2)


def cost_table(summary: Summary) -> ResultTable:
    """Return the table of times and memory, means over the seeds."""
    costs = summary.costs
    columns = {"ms/step": 1e3 * costs["step"], "s/epoch": costs["epoch"], "peak MB": costs["memory"] / _MEGABYTE}
    return ResultTable(
        columns=[Column(group="Cost", name=name) for name in columns],
        rows=[(name, [Cell(text=shown(values[name])) for values in columns.values()]) for name in _in_order(summary)],
        baseline=summary.baseline,
    )


def _in_order(summary: Summary) -> list[str]:
    """Return the methods, the baseline first."""
    return sorted(summary.methods, key=lambda name: name != summary.baseline)


def result_table(summary: Summary) -> ResultTable:
    """Return the table of all metrics, delta-m and mean rank."""
    ranked = [name for name in summary.methods if name != summary.baseline]
    columns: list[Column] = []
    cells: dict[str, list[Cell]] = {name: [] for name in summary.methods}

    def add(group: str, name: str, means: Series, stds: Series | None, better: int) -> None:
        columns.append(Column(group=group, name=name, better="up" if better else "down"))
        placed = places(means, better, ranked)
        text = _in_percent if group == "Overall" else shown
        for method in summary.methods:
            std = math.nan if stds is None else stds[method]
            spread = "" if math.isnan(std) else text(std, means[method])
            cells[method].append(Cell(text=text(means[method]), spread=spread, place=placed.get(method, 0)))

    for key in summary.means.columns:
        add(key[0], key[1], summary.means[key], summary.stds[key], int(summary.better[key]))
    if summary.baseline is not None:
        by_method = summary.delta_m.groupby(level="method", sort=False)
        add("Overall", "delta-m %", by_method.mean(), by_method.std(ddof=1), 0)
    if len(ranked) > 1:
        add("Overall", "mean rank", summary.mean_rank, None, 0)
    counts = {name: len(method.runs) for name, method in summary.methods.items()}
    usual = max(counts.values())
    return ResultTable(
        columns=columns,
        rows=[(name, cells[name]) for name in _in_order(summary)],
        baseline=summary.baseline,
        marks={name: f"{count} of {usual} seeds" for name, count in counts.items() if count < usual},
    )


def results_csv(experiment: Experiment, summary: Summary) -> DataFrame:
    """Return a row per run, those that failed and that are missing included."""
    rows: list[dict[str, Any]] = []
    for name, method in summary.methods.items():
        for seed, run in method.runs.items():
            values = summary.values.loc[(name, seed)]
            rows.append(
                {
                    "method": name,
                    "arch": run.arch,
                    "weighting": run.weighting,
                    "seed": seed,
                    "status": "done",
                    "reason": "",
                    **{f"{task}/{metric}": values[task, metric] for task, metric in run.metrics},
                    "delta_m": summary.delta_m.loc[(name, seed)],
                    "seconds_per_step": run.seconds_per_step,
                    "seconds_per_epoch": run.seconds_per_epoch,
                    "peak_memory_mb": math.nan if run.peak_memory is None else run.peak_memory / _MEGABYTE,
                    "run": _below(run.path, experiment.folder),
                }
            )
    for entry in experiment.missing:
        about = {"method": entry.weighting, "arch": entry.arch, "weighting": entry.weighting, "seed": entry.seed}
        rows.append({**about, "status": "missing", "reason": entry.reason})
    return pandas().DataFrame(rows)


def _below(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def markdown(table: ResultTable) -> str:
    """Return a table in Markdown, best values bold, second best in italics."""
    arrows = {"up": " ↑", "down": " ↓", "": ""}
    heads = ["method", *(_of_group(column) + arrows[column.better] for column in table.columns)]
    lines = ["| " + " | ".join(map(_in_markdown, heads)) + " |", "|---" + "|---:" * len(table.columns) + "|"]
    for name, cells in table.rows:
        marked = name + (f" ({table.marks[name]})" if name in table.marks else "")
        texts = [{0: "{}", 1: "**{}**", 2: "*{}*"}[cell.place].format(_with_spread(cell)) for cell in cells]
        lines.append("| " + " | ".join([_in_markdown(marked), *texts]) + " |")
    return "\n".join(lines) + "\n"


def _of_group(column: Column) -> str:
    return column.name if column.group in ("Overall", "Cost") else f"{column.group} {column.name}"


def _with_spread(cell: Cell) -> str:
    return cell.text + (f" ± {cell.spread}" if cell.spread else "") + cell.note


def _in_markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")


def latex(table: ResultTable, caption: str) -> str:
    """Return a table for LaTeX with the package booktabs: best values bold, second best underlined."""
    groups = table.groups()
    arrows = {"up": r" $\uparrow$", "down": r" $\downarrow$", "": ""}
    heads = " & ".join(rf"\multicolumn{{{count}}}{{c}}{{{_in_latex(group)}}}" for group, count in groups)
    rules, start = [], 2
    for _, count in groups:
        rules.append(rf"\cmidrule(lr){{{start}-{start + count - 1}}}")
        start += count
    names = " & ".join(_column_in_latex(column) + arrows[column.better] for column in table.columns)
    lines = [
        f"% {caption}",
        "% Needs \\usepackage{booktabs}.",
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"\toprule",
        rf"& {heads} \\",
        "".join(rules),
        rf"Method & {names} \\",
        r"\midrule",
    ]
    for name, cells in table.rows:
        lines.append(" & ".join([_in_latex(name), *map(_cell_in_latex, cells)]) + r" \\")
        if name == table.baseline and len(table.rows) > 1:
            lines.append(r"\midrule")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _column_in_latex(column: Column) -> str:
    return {"delta-m %": r"$\Delta_m$\,\%"}.get(column.name) or _in_latex(column.name)


def _cell_in_latex(cell: Cell) -> str:
    if cell.text == "-":
        return "--"
    bold = {0: "{}", 1: r"\mathbf{{{}}}", 2: "{}"}[cell.place].format(cell.text)
    inner = f"${bold}" + (rf" \pm {cell.spread}$" if cell.spread else "$")
    return rf"\underline{{{inner}}}" if cell.place == 2 else inner


_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "<": "$<$",
    ">": "$>$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}


def _in_latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)
