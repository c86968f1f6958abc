"""The report of an experiment: one HTML page without anything from the network, and the same tables as files."""

from __future__ import annotations

import html
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmtl.experiments import figures
from fastmtl.experiments.experiment import Experiment
from fastmtl.experiments.figures import Picture
from fastmtl.experiments.published import Published, in_units_of
from fastmtl.experiments.reading import Run, pandas
from fastmtl.experiments.statistics import (
    FEWEST_SEEDS,
    LEVEL,
    Selection,
    delta_m,
    describe_selection,
    mean_rank,
)
from fastmtl.experiments.summary import Summary, summarize
from fastmtl.experiments.tables import (
    Cell,
    Column,
    ResultTable,
    cost_table,
    latex,
    markdown,
    places,
    result_table,
    results_csv,
    shown,
)
from fastmtl.support.extras import need
from fastmtl.trainer.run.directory import write_atomically

__all__ = ["FILES", "PlainTable", "Section", "check_packages", "page", "published_table", "write_report"]

FILES = ("report.html", "results.csv", "results.md", "table.tex")
# Runs that differ in these settings are of different methods, which the page says by their names.
_SHOWN_SETTINGS = (
    "encoder",
    "epochs",
    "batch_size",
    "train_size",
    "optim",
    "lr",
    "weight_decay",
    "scheduler",
    "precision",
)


@dataclass(frozen=True, kw_only=True)
class PlainTable:
    """A table of texts."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


@dataclass(kw_only=True)
class Section:
    """A section of the page: its title, sentences, tables and figures."""

    title: str
    text: list[str] = field(default_factory=list)
    results: list[tuple[ResultTable, str]] = field(default_factory=list)
    tables: list[PlainTable] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def check_packages() -> None:
    """Find out before hours of training whether a report can be made.

    Raises:
        UsageError: A package is missing.
    """
    for package in ("pandas", "scipy.stats", "jinja2", "matplotlib.figure"):
        need(package, "experiments", "A report")


def write_report(
    experiment: Experiment, selection: Selection, *, folder: Path | None = None, published: Published | None = None
) -> Summary:
    """Write ``report.html``, ``results.csv``, ``results.md`` and ``table.tex``; return the numbers.

    Raises:
        UsageError: The runs do not fit together, a package is missing, or the metrics are not those of the published
            rows.
    """
    folder = experiment.folder if folder is None else folder
    summary = summarize(experiment, selection)
    described = describe_selection(summary.runs, selection)
    table = result_table(summary)
    sections = [
        _results(experiment, summary, table, described),
        *([] if published is None else [_beside(summary, published)]),
        _tests(summary),
        _pictures(summary),
        *_signals(summary),
        *([] if experiment.tuning is None else [_tuning(experiment)]),
        _what_was_run(experiment, summary),
    ]
    title = f"{summary.runs[0].dataset}: {len(summary.methods)} methods compared"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.html", page(title, sections))
    write_atomically(folder / "results.csv", results_csv(experiment, summary).to_csv(index=False))
    write_atomically(folder / "results.md", _markdown(title, sections))
    write_atomically(folder / "table.tex", latex(table, f"{title}: {described}"))
    return summary


def page(title: str, sections: Sequence[Section]) -> str:
    """Return the page of a report."""
    jinja = need("jinja2", "experiments", "A report")
    environment = jinja.Environment(
        loader=jinja.PackageLoader("fastmtl.experiments", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja.StrictUndefined,
    )
    text: str = environment.get_template("report.html").render(title=title, sections=sections)
    return text


def _results(experiment: Experiment, summary: Summary, table: ResultTable, described: str) -> Section:
    section = Section(title="Results")
    counts = sorted({len(method.runs) for method in summary.methods.values()})
    seeds = (
        f"{counts[0]} seed{'s' if counts[0] > 1 else ''}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    )
    section.text.append(
        f"The {described}; mean ± standard deviation over {seeds} (one seed has none). Best values of the multi-task "
        "methods are bold, second best underlined."
    )
    if summary.baseline is not None:
        section.text.append(
            "delta-m is the mean relative change of all metrics against single-task learning (STL: one network per "
            "task, trained with the same budget), in percent, negative where better; its standard deviation leaves "
            "that of STL out. The mean rank is over all metrics, without STL."
        )
    else:
        section.text.append(
            "There is no single-task baseline, so there is no delta-m. The mean rank is over all metrics."
        )
    section.results.append((table, "All metrics of all tasks on the test split"))
    section.results.append((cost_table(summary), "Time and memory, means over the seeds"))
    if experiment.missing:
        rows = [
            [entry.arch, _with_args(entry.weighting, entry.args), str(entry.seed), entry.reason]
            for entry in experiment.missing
        ]
        section.tables.append(
            PlainTable(heads=["architecture", "strategy", "seed", "why"], rows=rows, caption="Runs without results")
        )
    return section


def _with_args(name: str, args: Mapping[str, Any]) -> str:
    return name + (f" ({', '.join(f'{key}={value}' for key, value in args.items())})" if args else "")


def _tests(summary: Summary) -> Section:
    section = Section(title="Against equal weights")
    if summary.tests.empty:
        section.text.append("There is no run of EW with the same architecture to compare with.")
        return section
    section.text.append(
        f"Paired t-tests over the seeds of {summary.tested}, adjusted for the number of methods by Holm's method; "
        f"significant at {LEVEL:g}. Below {FEWEST_SEEDS} seeds nothing is tested and no significance is claimed: "
        "“within noise of EW” then means that the sign of the difference is not the same in all seeds."
    )
    rows = [
        [
            name,
            row["verdict"],
            str(row["n"]),
            shown(row["difference"]),
            "-" if row["p"] != row["p"] else f"{row['p']:.3g}",
            "-" if row["p_holm"] != row["p_holm"] else f"{row['p_holm']:.3g}",
        ]
        for name, row in summary.tests.iterrows()
    ]
    heads = ["method", "verdict", "seeds", "difference", "p", "p (Holm)"]
    caption = f"Difference of {summary.tested} from that of EW; negative is better"
    section.tables.append(PlainTable(heads=heads, rows=rows, caption=caption))
    return section


def _pictures(summary: Summary) -> Section:
    section = Section(title="Curves")
    scatter = figures.trade_off(summary)
    section.pictures += [*([] if scatter is None else [scatter]), *figures.curves(summary)]
    return section


def _signals(summary: Summary) -> list[Section]:
    weights = Section(title="Task weights", pictures=figures.task_weights(summary))
    if not weights.pictures:
        weights.text.append("No method has task weights that change.")
    conflicts = Section(title="Do the tasks' gradients conflict?")
    rows = []
    for name, method in summary.methods.items():
        runs = list(method.runs.values())
        cosines, shares = (figures.signal_of(runs, kind) for kind in ("cosine", "conflict"))
        if cosines.empty:
            rows.append([name, "-", "-", "-"])
            continue
        means = cosines.mean()
        rows.append(
            [
                name,
                f"{means.mean():.3f}",
                f"{means.min():.3f} ({means.idxmin()})",
                f"{100 * shares['share'].mean():.1f} %",
            ]
        )
        picture = figures.conflict_matrices(name, runs)
        if picture is not None:
            conflicts.pictures.append(picture)
    conflicts.text.append(
        "Cosines and shares are means over all training steps and seeds. A strategy that reads no gradients has “-” "
        "unless it was run with --cosines, which looks at one step of each log interval."
    )
    heads = ["method", "mean cosine", "lowest pair", "pairs in conflict"]
    conflicts.tables.append(PlainTable(heads=heads, rows=rows, caption="Inner products of the task gradients"))
    return [weights, conflicts]


def _tuning(experiment: Experiment) -> Section:
    tuning = experiment.tuning
    assert tuning is not None
    tried = "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in tuning.settings.items())
    budget = 1
    for values in tuning.settings.values():
        budget *= len(values)
    section = Section(title="Tuning")
    section.text.append(
        f"Every method got the same tuning budget: {budget} runs of full length with seed {tuning.seed}, "
        f"which is not among the seeds compared. Tried: {tried}. The best on the validation split was taken, by the "
        "mean relative difference from the mean of a method's tries."
    )
    rows = []
    for method, about in tuning.methods.items():
        scores = ", ".join(
            f"{'/'.join(str(row[name]) for name in tuning.settings)}: "
            + ("failed" if row["score"] is None else f"{row['score']:+.2f} %")
            for row in about["tried"]
        )
        chosen = (
            about["reason"] if about["chosen"] is None else ", ".join(f"{k}={v}" for k, v in about["chosen"].items())
        )
        rows.append([method, chosen, scores])
    section.tables.append(PlainTable(heads=["method", "chosen", "tried"], rows=rows, caption="Chosen settings"))
    return section


def _what_was_run(experiment: Experiment, summary: Summary) -> Section:
    section = Section(title="What was run")
    runs = summary.runs
    rows = [["data set", runs[0].dataset], *([["command", command] for command in experiment.commands])]
    rows += [[name.replace("_", " "), value] for name in _SHOWN_SETTINGS if (value := _values(runs, name))]
    rows.append(["seeds", ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))])
    for name in ("fastmtl", "commit", "torch", "python", "machine", "threads"):
        values = dict.fromkeys(str(run.made_with.get(name)) for run in runs if run.made_with.get(name) is not None)
        if values:
            rows.append([name, ", ".join(values)])
    rows.append(["runs", f"{len(runs)} finished, {len(experiment.missing)} without results"])
    section.tables.append(PlainTable(heads=["what", "value"], rows=rows, caption="Settings, versions and machine"))
    section.text.append(
        "Time per step is the median over the log intervals, time per epoch the mean of the training passes; both are "
        "of runs that may have shared the machine. Peak memory is that of a whole process, on CUDA that of the tensors "
        "on the device."
    )
    return section


def _values(runs: Sequence[Run], name: str) -> str:
    values = dict.fromkeys(str(run.config[name]) for run in runs if run.config.get(name) is not None)
    return ", ".join(values)


def published_table(published: Published, own: Any = None, marks: Mapping[str, str] | None = None) -> ResultTable:
    """Return published rows as a table, with ``own`` rows (methods, K) in the same units below them.

    delta-m of the own rows is against the published baseline too; the ranks are of all rows but baselines.
    """
    pd = pandas()
    values = published.values
    baselines = [published.baseline]
    if own is not None:
        own = own.rename(index=lambda name: f"fastmtl: {name}")
        values = pd.concat([values, own])
        baselines += [name for name in own.index if name == "fastmtl: STL"]
    columns = [
        Column(group=task, name=metric, better="up" if published.better[task, metric] else "down")
        for task, metric in values.columns
    ]
    columns += [
        Column(group="Overall", name="delta-m %", better="down"),
        Column(group="Overall", name="mean rank", better="down"),
    ]
    deltas = delta_m(values, published.values.loc[published.baseline], published.better)
    ranks = mean_rank(values.drop(index=baselines), published.better).reindex(values.index)
    ranked = [name for name in values.index if name not in baselines]
    rows: dict[str, list[Cell]] = {str(name): [] for name in values.index}
    for key in values.columns:
        placed = places(values[key], int(published.better[key]), ranked)
        for name in values.index:
            note = "†" if (name, *key) in published.elsewhere else ""
            text = f"{values.loc[name, key]:.4g}" if key[1] == "MAE" else shown(values.loc[name, key])
            rows[name].append(Cell(text=text, place=placed.get(name, 0), note=note))
    for column in (deltas, ranks):
        placed = places(column, 0, ranked)
        for name in values.index:
            text = "-" if column[name] != column[name] else f"{column[name]:z.2f}"
            rows[name].append(Cell(text=text, place=placed.get(name, 0)))
    return ResultTable(columns=columns, rows=list(rows.items()), baseline=published.baseline, marks=dict(marks or {}))


def elsewhere_of(published: Published) -> str:
    """Return a sentence of the values that copies of the table have in other digits."""
    if not published.elsewhere:
        return ""
    listed = "; ".join(
        f"{method} {task} {metric} {other}" for (method, task, metric), other in published.elsewhere.items()
    )
    return f"† Another copy of the table has another value: {listed}."


def _beside(summary: Summary, published: Published) -> Section:
    own = in_units_of(published, summary.means, summary.runs)
    section = Section(title=f"Beside published rows of {published.name}")
    section.text += [
        "Published rows are of other code, and of another network, budget or data split unless yours are the same; "
        "delta-m is against the published single-task baseline for all rows, and the mean rank is over all rows. Both "
        "are computed from the numbers shown.",
        *published.notes(),
    ]
    if published.elsewhere:
        section.text.append(elsewhere_of(published))
    sources = {name: f"source: {source}" for name, source in published.source.items()}
    section.results.append(
        (published_table(published, own, sources), "Published rows and own rows, in the published units")
    )
    return section


def _markdown(title: str, sections: Sequence[Section]) -> str:
    parts = [f"# {title}", ""]
    for section in sections:
        parts += [f"## {section.title}", ""]
        parts += [line for text in section.text for line in (text, "")]
        for table, caption in section.results:
            parts += [f"{caption}:", "", markdown(table)]
        for plain in section.tables:
            heads = "| " + " | ".join(head or " " for head in plain.heads) + " |"
            rows = [
                "| " + " | ".join(html.escape(text, quote=False).replace("|", "\\|") for text in row) + " |"
                for row in plain.rows
            ]
            parts += [f"{plain.caption}:", "", heads, "|" + "---|" * len(plain.heads), *rows, ""]
    return "\n".join(parts)


def command_line(words: Sequence[str]) -> str:
    """Return a command line as it is typed."""
    return " ".join(shlex.quote(word) for word in words)
