"""Published rows: every number has a source, and delta-m and mean rank follow from the numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fastmtl.cli import main
from fastmtl.errors import UsageError
from fastmtl.experiments.experiment import load_experiment
from fastmtl.experiments.published import load_published, names_of_published
from fastmtl.experiments.report import write_report
from fastmtl.experiments.statistics import Selection
from tests.experiments.made import write_run

# As the papers and their successors print delta-m.
PRINTED = {
    "nyuv2": {"Nash-MTL": -4.05, "FAMO": -4.10, "FairGrad": -4.66, "PCGrad": 3.97, "MGDA": 1.38, "STL": 0.0},
    "cityscapes": {"FairGrad": 5.12, "MGDA": 44.14, "Nash-MTL": 6.72},
    "qm9": {"LS (EW)": 178.6, "FAMO": 58.3, "PSMGD": 91.2},
}


# The areas that MTReclib prints in boldface, of clicks and conversions.
BOLD = {
    "aliexpress-nl": {"click": ("PLE", 0.7292), "conversion": ("MetaHeac", 0.8615)},
    "aliexpress-es": {"click": ("MetaHeac", 0.7299), "conversion": ("PLE", 0.8913)},
    "aliexpress-fr": {"click": ("PLE", 0.7276), "conversion": ("MetaHeac", 0.8813)},
    "aliexpress-us": {"click": ("PLE", 0.7138), "conversion": ("MMoE", 0.8758)},
}


def test_there_are_rows_of_seven_data_sets() -> None:
    assert names_of_published() == [*PRINTED, *BOLD]


@pytest.mark.parametrize("name", BOLD)
def test_the_best_areas_are_those_in_boldface(name: str) -> None:
    rows = load_published(name)
    assert list(rows.values.index) == ["SingleTask", "Shared-Bottom", "OMoE", "MMoE", "PLE", "AITM", "MetaHeac"]
    for task, (method, area) in BOLD[name].items():
        assert rows.values[task, "AUC"].idxmax() == method
        assert rows.values.loc[method, (task, "AUC")] == area


@pytest.mark.parametrize("name", PRINTED)
def test_delta_m_is_what_papers_print(name: str) -> None:
    deltas = load_published(name).table()["delta_m"]
    for method, printed in PRINTED[name].items():
        assert deltas[method] == pytest.approx(printed, abs=0.051)


@pytest.mark.parametrize("name", [*PRINTED, *BOLD])
def test_mean_ranks_are_scipys(name: str) -> None:
    rows = load_published(name)
    ranked = rows.values.drop(index=rows.baseline)
    sign = np.where(rows.better == 1, -1, 1)
    expected = stats.rankdata(ranked.to_numpy() * sign, axis=0).mean(1)
    np.testing.assert_allclose(rows.table()["mean_rank"].drop(rows.baseline), expected)


@pytest.mark.parametrize("name", [*PRINTED, *BOLD])
def test_every_number_has_a_known_source(name: str) -> None:
    rows = load_published(name)
    assert set(rows.source) == set(rows.values.index)
    assert set(rows.source.values()) <= set(rows.sources)
    assert rows.values.notna().all(axis=None)
    assert all(rows.about[key] for key in ("network", "epochs", "selection", "note"))


def test_numbers_that_differ_between_copies_are_marked() -> None:
    rows = load_published("nyuv2")
    assert rows.elsewhere["Nash-MTL", "normal", "median"] == "20.58"
    assert ("FAMO", "normal", "median") not in rows.elsewhere


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["published", "NYUv2"]) == 0
    told = capsys.readouterr().out
    assert "-4.66" in told
    assert "MarcuXu/PSMG" in told
    assert "Nash-MTL normal median 20.58" in " ".join(told.split())
    assert main(["published", "nyu"]) == 2
    assert "Did you mean 'nyuv2'?" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_they_stand_beside_own_rows_in_their_units(tmp_path: Path) -> None:
    metrics = {
        "segmentation": ["mIoU", "pixAcc"],
        "depth": ["abs_err", "rel_err"],
        "normal": ["mean", "median", "<11.25", "<22.5", "<30"],
    }
    better = {"segmentation": [1, 1], "depth": [0, 0], "normal": [0, 0, 1, 1, 1]}
    # FAMO's row in the units of this package.
    scores = [[0.3888, 0.6490, 0.5474, 0.2194, 25.06, 19.57, 0.2921, 0.5661, 0.6898]]
    write_run(tmp_path / "run", weighting="FAMO", scores=scores, metrics=metrics, better=better, dataset="nyuv2")
    write_report(load_experiment([tmp_path]), Selection(), published=load_published("nyuv2"))
    lines = (tmp_path / "results.md").read_text().splitlines()
    own, published = (
        [cell.strip("* †") for cell in next(line for line in lines if line.startswith(name)).split("|")[2:-2]]
        for name in ("| fastmtl: FAMO |", "| FAMO (source")
    )
    assert own == published
    assert "-4.10" in own


def test_rows_of_other_metrics_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    with pytest.raises(UsageError, match="published rows of qm9 have mu MAE"):
        write_report(load_experiment([tmp_path]), Selection(), published=load_published("qm9"))
