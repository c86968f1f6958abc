"""The step of a recipe beside plain torch, and the gate of MGDA's exact solution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fastmtl.benchmarks.gate import min_norm_gap, wrong_steps
from fastmtl.benchmarks.recipe import run_recipe_step

from fastmtl import ops
from fastmtl.errors import UsageError
from tests.data.test_office import make_office


def test_the_step_of_a_recipe_stands_beside_plain_torch() -> None:
    rows = run_recipe_step("burgers", ["ew"], seconds=0.0)
    assert [row["library"] for row in rows] == ["fastmtl", "floor", "sum"]
    assert all(row["times_floor"] > 0 for row in rows)


RECIPE = """
title: Photographs
paper: none
about: Three domains, each a task.
settings: {dataset: office-31, encoder: resnet18, epochs: 1, batch_size: 2, optim: sgd}
"""


@pytest.mark.slow
def test_tasks_with_inputs_of_their_own_have_a_floor_too(tmp_path: Path) -> None:
    recipe = tmp_path / "photographs.yaml"
    recipe.write_text(RECIPE)
    folder = make_office(tmp_path / "data", "office-31")
    rows = run_recipe_step(str(recipe), ["MGDA"], dataset_path=str(folder), seconds=0.0)
    assert [row["library"] for row in rows] == ["fastmtl", "floor", "sum"]


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(UsageError, match="multimnist"):
        run_recipe_step("multimnits", ["EW"])


def test_only_the_shortest_vector_of_the_hull_passes() -> None:
    rows = torch.randn(5, 40, dtype=torch.float64) + 0.3
    exact = ops.min_norm(rows @ rows.T) @ rows
    assert min_norm_gap(0.01 * exact, rows) < 1e-6
    assert min_norm_gap(rows.mean(0), rows) > 0.01
    assert min_norm_gap(exact + 0.1 * torch.randn(40, dtype=torch.float64), rows) > 0.01
    # A peer far away counts no more once the exact conditions are known.
    assert wrong_steps({"fastmtl": 0.0, "LibMTL": 0.5}, gap=1e-6) == {}
    assert "exact solution" in wrong_steps({"fastmtl": 0.0, "LibMTL": 0.0}, gap=0.1)["fastmtl"]
