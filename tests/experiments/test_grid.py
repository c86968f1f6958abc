"""The grid: which cells an experiment has, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastmtl.cli import main
from fastmtl.errors import UsageError
from fastmtl.experiments.experiment import check_data
from fastmtl.experiments.grid import Grid, read_seeds, read_tuned
from fastmtl.support.named import short_name
from fastmtl.weighting import find_weighting


def _grid(**changes: Any) -> Grid:
    about: dict[str, Any] = {
        "archs": ["hps"],
        "weightings": ["ew", "mgda"],
        "seeds": [0, 1],
        "settings": {"dataset": "multimnist", "epochs": 2},
    }
    return Grid.of(**{**about, **changes})


def test_seeds_are_a_number_or_themselves() -> None:
    assert read_seeds(3) == read_seeds("3") == (0, 1, 2)
    assert read_seeds([3]) == (3,)
    assert read_seeds(["5", "7"]) == (5, 7)
    for wrong in (0, "x", [1, 1], [-1], []):
        with pytest.raises(UsageError, match="seeds must be"):
            read_seeds(wrong)


def test_cells_are_methods_times_seeds_with_the_baseline_first() -> None:
    grid = _grid()
    cells = grid.cells(Path("out"), {method.name: {} for method in grid.methods})
    assert [cell.name for cell in cells] == [
        *("stl-ew-s0", "hps-ew-s0", "hps-mgda-s0"),
        *("stl-ew-s1", "hps-ew-s1", "hps-mgda-s1"),
    ]
    assert {cell.config.epochs for cell in cells} == {2}
    assert cells[2].config.weight_args == {"mgda_gn": "none"}
    assert [method.arch for method in _grid(baseline=False).methods] == ["HPS", "HPS"]


def test_hyper_parameters_go_to_the_methods_that_have_them() -> None:
    grid = _grid(weightings=["EW", "CAGrad", {"name": "CAGrad", "calpha": 0.2}], hyper={"calpha": 0.7})
    given = {method.name: grid.config_of(method, 0, {}).weight_args.get("calpha") for method in grid.methods}
    assert given == {"stl-ew": None, "hps-ew": None, "hps-cagrad": 0.7, "hps-cagrad-calpha=0.2": 0.2}


RULE = """
from fastmtl.weighting import AbsWeighting

class New(AbsWeighting):
    needs = "losses"
"""


def test_rules_of_one_name_in_two_files_share_no_folder(tmp_path: Path) -> None:
    rules = [tmp_path / "one_of_test.py", tmp_path / "two_of_test.py"]
    for file in rules:
        file.write_text(RULE)
    specs = [f"{file}:New" for file in rules]
    one, two = (_grid(weightings=[spec], baseline=False) for spec in specs)
    assert one.default_folder() != two.default_folder()
    assert one.default_folder() == _grid(weightings=[specs[0]], baseline=False).default_folder()
    cells = _grid(weightings=specs, baseline=False).cells(Path("out"), {one.methods[0].name: {}})
    assert [cell.config.weighting for cell in cells] == [specs[0]] * 2
    # The same of classes that are given themselves.
    classes = [find_weighting(spec).value for spec in specs]
    named = [_grid(weightings=[kind], baseline=False).methods[0] for kind in classes]
    assert named[0].name != named[1].name
    assert short_name(named[0].weighting) == "New"
    assert len(_grid(weightings=classes, baseline=False).methods) == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"weightings": ["MGAD"]}, "Did you mean 'MGDA'"),
        ({"archs": ["HSP"]}, "Unknown architecture 'HSP'"),
        ({"weightings": ["EW", "ew"]}, "in the grid twice"),
        ({"weightings": []}, "nothing to compare"),
        ({"hyper": {"calpha": 0.5}}, "calpha is a hyper-parameter of CAGrad, which is not in the grid"),
        ({"weightings": [{"name": "EW", "calpha": 1.0}]}, "calpha is a hyper-parameter of CAGrad"),
        ({"settings": {"epochs": 0}}, "epochs must be at least 1"),
        ({"settings": {"epochz": 1}}, "Unknown setting 'epochz'. Did you mean 'epochs'"),
        ({"settings": {"seed": 1}}, "seed cannot be a setting of all cells"),
        ({"tune": {"calpha": [0.1, 0.2]}}, "every method gets the same tuning budget, but calpha is of CAGrad alone"),
        ({"tune": {"lr": [0.1]}}, "tune needs at least two values of lr"),
        ({"tune": {"lr": [0.1, -1.0]}}, "lr must be above 0"),
        ({"tune": {"lr": [0.1, 0.2]}, "settings": {"validate": False}}, "leave validate on"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        _grid(**changes)


def test_tuning_gives_every_method_the_same_runs_with_a_seed_of_their_own() -> None:
    grid = _grid(tune=read_tuned("lr=1e-4,1e-3,weight_decay=0,0.1"))
    cells = grid.tuning_cells(Path("out"))
    assert len(cells) == 3 * 4
    assert {cell.config.seed for cell in cells} == {2}
    assert {(cell.config.lr, cell.config.weight_decay) for cell in cells} == {
        *((1e-4, 0.0), (1e-4, 0.1), (1e-3, 0.0), (1e-3, 0.1))
    }
    with pytest.raises(UsageError, match="tune must be NAME=VALUE"):
        read_tuned("1e-4,1e-3")


def test_tuning_needs_a_validation_split() -> None:
    with pytest.raises(UsageError, match="validation split, which the data set rooms does not have"):
        check_data(_grid(settings={"dataset": "rooms"}, tune={"lr": [1e-3, 1e-4]}))


def test_the_default_folder_follows_from_the_grid() -> None:
    folder = _grid().default_folder()
    assert folder.name.startswith("compare-multimnist-")
    assert folder == _grid(settings={"dataset": "multimnist", "epochs": 2, "plot": True}).default_folder()
    assert folder != _grid(seeds=[0]).default_folder()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--weighting", "EW", "PCgard"], "Did you mean 'PCGrad'"),
        (["--dataset", "multimnits"], "Did you mean 'multimnist'"),
        (["--published", "cifar"], "Unknown table of published rows 'cifar'"),
        (["--seeds", "x"], "seeds must be a number"),
        (["--jobs", "-1"], "jobs must be at least 0"),
        (["--epoch", "2"], "--epochs"),
        (["--config", "absent.yaml"], "absent.yaml cannot be read"),
    ],
)
def test_the_command_says_in_a_sentence_what_is_wrong(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert len(told.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_has_the_grid_and_flags_win(tmp_path: Path) -> None:
    from fastmtl.cli.compare import _grid as read_grid

    (tmp_path / "grid.yaml").write_text(
        "dataset: multimnist\nepochs: 3\nweighting:\n- EW\n- {name: CAGrad, calpha: 0.2}\nseeds: [4, 5]\n"
        "tune: {lr: [1e-3, 1e-4]}\nstl: false\n"
    )
    given = {"arch": None, "weighting": None, "stl": None, "tune": None, "values": {"epochs": 1}}
    grid = read_grid(tmp_path / "grid.yaml", seeds=None, **given)
    assert [method.name for method in grid.methods] == ["hps-ew", "hps-cagrad-calpha=0.2"]
    assert (grid.seeds, grid.base.epochs, grid.tune) == ((4, 5), 1, {"lr": [1e-3, 1e-4]})
    assert read_grid(tmp_path / "grid.yaml", seeds="1,2,3", **given).seeds == (1, 2, 3)
