"""Seeds, devices, counts and the improvement over a baseline."""

from __future__ import annotations

import math
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastmtl
from fastmtl.errors import UsageError
from fastmtl.utils import count_improvement, count_parameters, get_root_dir, set_device, set_param, set_random_seed


def _draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def test_a_seed_fixes_all_three_generators() -> None:
    set_random_seed(5)
    first = _draw()
    set_random_seed(5)
    assert _draw() == first
    set_random_seed(6)
    assert all(a != b for a, b in zip(_draw(), first, strict=True))


def test_root_holds_the_package() -> None:
    assert Path(get_root_dir(), "fastmtl", "__init__.py").samefile(fastmtl.__file__)


def test_root_of_a_script_among_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "examples" / "office" / "main.py"
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    assert Path(get_root_dir()) == tmp_path.resolve()


def test_set_device_chooses_what_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    set_device("1")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


def test_set_device_after_cuda_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    set_device("0")
    with pytest.raises(UsageError, match="too late"):
        set_device("1")


def test_parameters_are_counted_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[1].requires_grad_(False)
    count_parameters(model)
    assert capsys.readouterr().out == (
        "=" * 40 + "\nTotal Params: 26\nTrainable Params: 16\nNon-trainable Params: 10\n"
    )


def test_a_parameter_is_replaced_by_its_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1)))
    weight = torch.ones(1, 2, requires_grad=True) * 3
    set_param(model, "1.0.weight", weight)
    assert set_param(model, "1.0.weight", mode="get") is weight
    assert model(torch.ones(1, 2)).grad_fn is not None
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "1.0.bias"]
    replaced = nn.Parameter(torch.zeros(2))
    set_param(model, "0.bias", replaced)
    assert dict(model.named_parameters())["0.bias"] is replaced
    for name in ("2.bias", "0.scale"):
        with pytest.raises(UsageError, match=f"Sequential has no parameter '{name}'"):
            set_param(model, name, mode="get")
    with pytest.raises(UsageError, match="mode must be update or get"):
        set_param(model, "0.bias", mode="set")


def test_improvement_of_the_documented_example() -> None:
    improvement = count_improvement({"A": [96, 98], "B": [0.2]}, {"A": [93, 99], "B": [0.5]}, {"A": [1, 0], "B": [1]})
    assert improvement == pytest.approx((((93 - 96) / 96 + (98 - 99) / 98) / 2 + (0.5 - 0.2) / 0.2) / 2)


def test_better_is_positive_whatever_the_sign_of_the_baseline() -> None:
    assert count_improvement({"a": [-0.5]}, {"a": [-0.25]}, {"a": [1]}) == pytest.approx(0.5)
    assert count_improvement({"a": [-0.5]}, {"a": [-0.25]}, {"a": [0]}) == pytest.approx(-0.5)


def test_a_baseline_of_zero_counts_the_difference() -> None:
    assert count_improvement({"a": [0.0]}, {"a": [0.3]}, {"a": [1]}) == pytest.approx(0.3)
    assert count_improvement({"a": [0.0]}, {"a": [0.0]}, {"a": [0]}) == 0


@pytest.mark.parametrize(
    ("new", "weight", "message"),
    [({"b": [1]}, {"a": [1]}, "'a' is missing"), ({"a": [1, 2]}, {"a": [1]}, "equally many")],
)
def test_results_must_match(new: dict[str, list[float]], weight: dict[str, list[int]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        count_improvement({"a": [1.0]}, new, weight)


def test_a_baseline_that_is_no_number_is_left_out() -> None:
    nan = math.nan
    weight = {"A": [1, 0], "B": [1]}
    base = {"A": [nan, 4.0], "B": [nan]}
    assert count_improvement(base, {"A": [1.0, 3.0], "B": [nan]}, weight) == pytest.approx(0.25)
    assert math.isnan(count_improvement(base, {"A": [1.0, nan], "B": [1.0]}, weight))
    assert math.isnan(count_improvement({"B": [nan]}, {"B": [1.0]}, weight))


def test_no_tasks_is_an_error() -> None:
    with pytest.raises(UsageError, match="no tasks"):
        count_improvement({}, {}, {})
