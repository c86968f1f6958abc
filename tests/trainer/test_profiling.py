"""Where a step went: the ranges, the table and the trace."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmtl import data
from fastmtl.data.loading import _default_workers
from fastmtl.data.registry import DATASETS
from fastmtl.errors import UsageError
from fastmtl.support import profiling
from fastmtl.support.profiling import PARTS, StepProfiler, part
from fastmtl.weighting import WEIGHTINGS
from tests.trainer.toy import flat, loaders, make_trainer


def _table(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"^  (\w+) +([\d.]+) ms", text, re.MULTILINE)}


def test_writes_a_trace_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer("MGDA", profile=tmp_path / "run" / "trace.json")
    trainer.train(loaders(rows=80), loaders(), 1)
    printed = capsys.readouterr().out
    table = _table(printed)
    assert list(table) == [*(name for name in PARTS if name != "traced"), "other"]
    assert "mean of 5 steps" in printed
    assert all(table[name] > 0 for name in ("forward", "VJPs", "gram", "solver", "combine", "optimizer"))
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("fastmtl step") == names.count("fastmtl gram") == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
def test_no_part_lies_within_another(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    class Watched(StepProfiler):
        def range(self, name: str) -> Any:
            outer = super().range(name)

            class Range:
                def __enter__(self) -> None:
                    assert not opened or name == "step" or opened == ["step"], opened
                    opened.append(name)
                    outer.__enter__()

                def __exit__(self, *exc: Any) -> None:
                    opened.pop()
                    outer.__exit__(*exc)

            return Range()

    trainer = make_trainer(name, rep_grad=WEIGHTINGS[name].needs == "reps")
    trainer.profiler = Watched(tmp_path / "trace.json", torch.device("cpu"), steps=1, warm=1)
    trainer.train(loaders(rows=24), loaders(), 1)
    assert trainer.profiler.done


def test_costs_nothing_when_off() -> None:
    assert part("gram") is part("forward")
    trainer = make_trainer("MGDA")
    trainer.train(loaders(), loaders(), 1)
    assert profiling._running is None


def test_changes_no_number(tmp_path: Path) -> None:
    plain, profiled = make_trainer("MGDA"), make_trainer("MGDA", profile=tmp_path / "trace.json")
    for trainer in (plain, profiled):
        trainer.train(loaders(rows=64), loaders(), 1)
    assert torch.equal(flat(plain.model.parameters()), flat(profiled.model.parameters()))


def test_an_error_in_a_profiled_step_ends_the_profile(tmp_path: Path) -> None:
    trainer = make_trainer("EW", profile=tmp_path / "trace.json")

    def batches() -> Any:
        yield from [next(iter(loaders()))] * 4
        raise RuntimeError("no more")

    class Loader:
        __iter__ = staticmethod(batches)

        def __len__(self) -> int:
            return 6

    with pytest.raises(RuntimeError, match="no more"):
        trainer.train(Loader(), loaders(), 1)
    assert profiling._running is None


def test_workers() -> None:
    multimnist, rooms = DATASETS["multimnist"], DATASETS["rooms"]
    assert _default_workers(multimnist, True) == 0
    assert _default_workers(rooms, False) == 0
    assert 0 <= _default_workers(rooms, True) <= 4
    with pytest.raises(UsageError, match="num_workers must be at least 0"):
        data.load("multimnist", num_workers=-1)
    bundle = data.load("multimnist", n_train=128, num_workers=1)
    assert bundle.train.num_workers == 1
    alone = data.load("multimnist", n_train=128)
    for (x, y), (same_x, same_y) in zip(bundle.train, alone.train, strict=True):
        assert torch.equal(x, same_x)
        assert all(torch.equal(y[task], same_y[task]) for task in y)
