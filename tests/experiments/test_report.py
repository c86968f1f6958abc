"""The report's files: complete, without anything from the network, and honest about what is missing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from fastmtl.cli import main
from fastmtl.errors import UsageError
from fastmtl.experiments.experiment import load_experiment
from fastmtl.experiments.report import FILES, write_report
from fastmtl.experiments.statistics import Selection
from fastmtl.experiments.summary import name_methods, summarize
from fastmtl.experiments.tables import shown
from tests.experiments.made import write_run

_VOID = frozenset(("meta", "link", "img"))
GRAM = np.array([[1.0, -0.5], [-0.5, 4.0]])


class _Page(HTMLParser):
    """Reads a page: what is open, ids, links and pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.alts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in _VOID:
            self.open.append(tag)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        self.targets += [str(found[name]) for name in ("src", "href", "srcset", "action") if found.get(name)]
        if tag == "img":
            self.alts.append(found.get("alt") or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the report of three methods, two seeds each."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    for name, (arch, weighting) in {"stl": ("STL", "EW"), "ew": ("HPS", "EW"), "mgda": ("HPS", "MGDA")}.items():
        for seed in range(2):
            write_run(
                folder / f"{name}-{seed}",
                arch=arch,
                weighting=weighting,
                seed=seed,
                scores=rng.uniform(0.5, 1.5, (3, 3)).tolist(),
                gram=GRAM if weighting == "MGDA" else None,
            )
    write_report(load_experiment([folder]), Selection())
    return folder


def test_all_files_are_there(folder: Path) -> None:
    assert all((folder / name).stat().st_size for name in FILES)


def test_the_page_is_whole_and_asks_for_nothing(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = _Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert all(target.startswith(("data:", "#")) for target in page.targets)
    assert {target[1:] for target in page.targets if target.startswith("#")} <= set(page.ids)
    assert not re.search(r"@import|url\(|<script", text)


def test_every_figure_is_described(folder: Path) -> None:
    alts = _Page((folder / "report.html").read_text()).alts
    # Two tasks against each other, two curves a task, MGDA's weights and its matrices.
    assert len(alts) == 7
    assert all(len(alt) > 40 for alt in alts)
    assert any("Lowest cosine: kind:size, -0.25" in alt for alt in alts)


def test_costs_stand_apart_from_the_metrics(folder: Path) -> None:
    text = (folder / "results.md").read_text()
    # Steps of a quarter of a second, passes of two.
    assert re.search(r"\| MGDA \| 250\.0 \| 2\.00 \| \d+\.\d \|", text)
    assert "ms/step" not in (folder / "table.tex").read_text()


def test_strategies_without_gradients_have_no_cosines(folder: Path) -> None:
    text = (folder / "results.md").read_text()
    assert "| EW | - | - | - |" in text
    assert "| MGDA | -0.250 | -0.250 (kind:size) | 100.0 % |" in text


def test_the_spreadsheet_has_a_row_per_run(folder: Path) -> None:
    rows = pd.read_csv(folder / "results.csv")
    assert len(rows) == 6
    assert set(rows["status"]) == {"done"}
    runs = {run.path.name: run for run in load_experiment([folder]).runs}
    for _, row in rows.iterrows():
        assert row["kind/Acc"] == runs[row["run"]].scores["test"]["kind", "Acc"].mean()


def test_the_same_runs_give_the_same_files(folder: Path, tmp_path: Path) -> None:
    write_report(load_experiment([folder]), Selection(), folder=tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_text() == (folder / name).read_text()


def test_best_and_second_best_are_marked(folder: Path) -> None:
    tex = (folder / "table.tex").read_text()
    ew, mgda = (next(line for line in tex.splitlines() if line.startswith(name)) for name in ("EW", "MGDA"))
    assert all(("mathbf" in a) != ("mathbf" in b) for a, b in zip(ew.split("&")[1:], mgda.split("&")[1:], strict=True))
    assert "underline" in ew + mgda
    assert "mathbf" not in next(line for line in tex.splitlines() if line.startswith("STL"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_the_table_compiles(folder: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "a_b", metrics={"a_b": ["<30", "x%&#$~^\\{}"]}, better={"a_b": [1, 0]}, scores=[[1.0, 2.0]])
    write_report(load_experiment([tmp_path / "a_b"]), Selection())
    for path in (folder, tmp_path / "a_b"):
        shutil.copy(path / "table.tex", tmp_path / "table.tex")
        (tmp_path / "paper.tex").write_text(
            "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\\input{table}\\end{document}\n"
        )
        done = subprocess.run(
            ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper"], cwd=tmp_path, capture_output=True
        )
        assert done.returncode == 0, done.stdout.decode()[-2000:]


@pytest.mark.usefixtures("undrawn")
def test_what_is_missing_is_a_row_with_its_reason(tmp_path: Path) -> None:
    write_run(tmp_path / "cells" / "hps-ew-s0")
    write_run(tmp_path / "cells" / "hps-ew-s1", seed=1, done=False)
    cells = [
        {
            "name": f"hps-{name}-s{seed}",
            "arch": "HPS",
            "weighting": name.upper(),
            "args": {},
            "seed": seed,
            "method": name,
        }
        for name, seed in (("ew", 0), ("ew", 1), ("mgda", 0), ("uw", 0))
    ]
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump({"commands": ["fastmtl compare"], "cells": cells}))
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "cells-hps-mgda-s0.json").write_text(json.dumps({"reason": "NaN & co.", "again": False}))
    write_report(load_experiment([tmp_path]), Selection())
    rows = pd.read_csv(tmp_path / "results.csv")
    assert "NaN &amp; co." in (tmp_path / "report.html").read_text()
    assert rows["status"].tolist() == ["done", "missing", "missing", "missing"]
    told = dict(zip(rows["weighting"] + rows["seed"].astype(str), rows["reason"], strict=True))
    assert told["EW1"] == "unfinished: 1 of 2 epochs are done"
    assert told["MGDA0"] == "NaN & co."
    assert told["UW0"] == "not run yet"


def test_runs_of_one_method_are_told_apart_by_their_settings(tmp_path: Path) -> None:
    for lr in (0.1, 0.01):
        write_run(tmp_path / f"lr{lr}", lr=lr)
    assert set(name_methods(load_experiment([tmp_path]).runs)) == {"EW (lr=0.1)", "EW (lr=0.01)"}


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        ({"dataset": "other"}, "Runs of different data sets cannot be compared: made"),
        ({"metrics": {"a": ["Acc"]}, "better": {"a": [1]}, "scores": [[1.0]]}, "Runs of different tasks or metrics"),
        ({"seed": 0}, "are the same run twice: leave one out"),
    ],
)
def test_runs_that_do_not_fit_together_are_refused(
    second: dict[str, object], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", **{"seed": 1, **second})
    assert main(["report", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err


def test_two_baselines_are_refused(tmp_path: Path) -> None:
    for lr in (0.1, 0.01):
        write_run(tmp_path / f"lr{lr}", arch="STL", lr=lr)
    with pytest.raises(UsageError, match="2 single-task baselines"):
        summarize(load_experiment([tmp_path]), Selection())


def test_folders_without_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for path, sentence in (("empty", "holds no run"), ("absent", "There is no folder")):
        assert main(["report", str(tmp_path / path)]) == 2
        assert sentence in capsys.readouterr().err
    write_run(tmp_path / "half", done=False)
    assert main(["report", str(tmp_path / "half")]) == 2
    assert "holds no finished run: unfinished: 1 of 2 epochs are done." in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_the_command_writes_and_tells(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), "--out", str(tmp_path / "here"), "--last", "1"]) == 0
    told = capsys.readouterr().out
    assert "The mean test metrics of the last epoch." in told
    assert (tmp_path / "here" / "report.html").exists()
    assert main(["report", str(folder), "--best"]) == 2
    assert "has no validation split" in capsys.readouterr().err


def test_numbers_have_the_decimals_of_their_size() -> None:
    assert [shown(value) for value in (0.12345, 12.345, 123.45, float("nan"))] == ["0.1235", "12.35", "123.5", "-"]
    assert shown(0.5, like=20.0) == "0.50"
    assert shown(-1e-9) == "0.0000"
