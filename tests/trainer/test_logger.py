"""Records derive cosines and norms; the JSON and TensorBoard loggers write what can be read back."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmtl.errors import UsageError
from fastmtl.trainer.log.jsonl import JsonlLogger, read_jsonl
from fastmtl.trainer.log.logger import Logger, LoggerList, StepRecords, as_logger, pair_names
from tests.trainer.runs import play, run_info, step_records


def _records(gram: np.ndarray) -> StepRecords:
    losses = np.zeros(gram.shape[:2])
    return StepRecords(epoch=0, first_step=0, losses=losses, weights=None, gram=gram, seconds=1.0)


@pytest.mark.parametrize("scale", [1e-150, 1e-15, 1.0, 1e15])
def test_cosines_and_norms_come_from_the_gram_matrix_at_any_scale(scale: float) -> None:
    rows = np.random.default_rng(0).standard_normal((4, 3, 7))
    records = _records((scale * rows) @ (scale * rows).transpose(0, 2, 1))
    norms = np.linalg.norm(rows, axis=2)
    expected = [
        np.sum(rows[:, i] * rows[:, j], axis=1) / norms[:, i] / norms[:, j] for i, j in [(0, 1), (0, 2), (1, 2)]
    ]
    assert records.norms is not None
    assert records.cosines is not None
    np.testing.assert_allclose(records.norms, scale * norms, rtol=1e-12)
    np.testing.assert_allclose(records.cosines, np.stack(expected, axis=1), rtol=1e-9)


def test_cosine_with_a_zero_gradient_is_nan_and_left_out_of_the_mean() -> None:
    gram = np.stack([np.diag([0.0, 1.0]), np.ones((2, 2))])
    records = _records(gram)
    assert records.cosines is not None
    np.testing.assert_array_equal(records.cosines, [[np.nan], [1.0]])
    assert records.means(["a", "b"])["cosine"] == {"a:b": 1.0}


def test_means_name_what_the_strategy_has_and_nothing_else() -> None:
    means = step_records(0, 3, gram=False, weights=False).means(["a", "b"])
    assert means == {"loss": {"a": 1.0, "b": 2.0}}


def test_single_task_has_no_pairs() -> None:
    records = step_records(0, 2, tasks=1)
    assert pair_names(["a"]) == []
    assert records.means(["a"])["cosine"] == {}


def test_as_logger_takes_none_one_or_several() -> None:
    class Counting(Logger):
        steps = 0

        def on_steps(self, records: StepRecords) -> None:
            self.steps += records.count

    first, second = Counting(), Counting()
    play(as_logger(None), run_info())
    play(as_logger([first, second]), run_info())
    play(as_logger(second), run_info())
    assert (first.steps, second.steps) == (20, 40)
    assert isinstance(as_logger((first,)), LoggerList)


@pytest.mark.parametrize("wrong", [3, "metrics.jsonl", [Logger(), 3]])
def test_as_logger_refuses_what_is_no_logger(wrong: Any) -> None:
    with pytest.raises(UsageError, match="logger must be a Logger"):
        as_logger(wrong)


def test_jsonl_holds_the_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    play(JsonlLogger(path), run_info())
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["event"] for row in rows] == ["run", *(["steps"] * 2 + ["epoch"] * 2) * 2, "end"]
    assert rows[2] == {
        "event": "steps",
        "epoch": 0,
        "step": 10,
        "count": 5,
        "steps_per_second": 4.0,
        "loss": {"left": 7.0, "right": 8.0},
        "weight": {"left": 0.5, "right": 0.5},
        "norm": {"left": 2.0, "right": 2.0},
        "cosine": {"left:right": 0.5},
        "conflict": {"share": 0.0, "left:right": 0.0},
    }
    assert rows[3]["metric"] == {"left": {"Acc": 0.5}, "right": {"Acc": 0.5}}
    assert rows[3]["mode"] == "train"
    assert rows[-1]["best_epoch"] == 1


def test_jsonl_lines_are_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    logger.on_start(run_info())
    logger.on_steps(step_records(0, 5))
    assert len(read_jsonl(path)) == 2
    logger.on_end(0, {})


def test_jsonl_writes_null_for_what_json_cannot_say(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    logger.on_start(run_info())
    logger.on_epoch(0, "train", {"left": math.nan, "right": math.inf}, {"left": [math.nan], "right": [1.0]}, 1.0)
    logger.on_end(0, {})
    assert read_jsonl(path)[-2]["loss"] == {"left": None, "right": None}
    assert "NaN" not in path.read_text()


def test_jsonl_goes_on_without_what_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    play(JsonlLogger(path), run_info(epochs=2))
    with path.open("a") as file:
        file.write('{"event": "steps", "ep')
    play(JsonlLogger(path), run_info(epochs=3, start_epoch=1))
    rows = read_jsonl(path)
    assert [row["step"] for row in rows if row["event"] == "steps"] == [5, 10, 15, 20, 25, 30]
    assert [row["epoch"] for row in rows if row["event"] == "epoch"] == [0, 0, 1, 1, 2, 2]
    assert [row["step"] for row in rows if row["event"] == "run"] == [0, 10]
    assert [row["event"] for row in rows].count("end") == 1


def test_jsonl_of_a_new_run_replaces_the_old(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        play(JsonlLogger(path), run_info())
    assert [row["event"] for row in read_jsonl(path)].count("run") == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_events_hold_the_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from fastmtl.trainer.log.tensorboard import TensorBoardLogger

    play(TensorBoardLogger(tmp_path), run_info())
    events = EventAccumulator(str(tmp_path)).Reload()
    losses = {event.step: event.value for event in events.Scalars("step_loss/right")}
    assert losses == {5: 3.0, 10: 8.0, 15: 13.0, 20: 18.0}
    assert {event.value for event in events.Scalars("step_cosine/left:right")} == {0.5}
    assert {event.value for event in events.Scalars("steps_per_second")} == {4.0}
    accuracy = [(event.step, round(event.value, 6)) for event in events.Scalars("test_Acc/left")]
    assert accuracy == [(10, 0.5), (20, 0.6)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_hides_what_is_done_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from fastmtl.trainer.log.tensorboard import TensorBoardLogger

    play(TensorBoardLogger(tmp_path), run_info())
    # Event files are in the order of the second they begin in.
    time.sleep(1)
    play(TensorBoardLogger(tmp_path), run_info(epochs=3, start_epoch=1))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("step_loss/left")] == [5, 10, 15, 20, 25, 30]


def test_missing_tensorboard_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from fastmtl.trainer.log.tensorboard import TensorBoardLogger

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="pip install tensorboard"):
        TensorBoardLogger(tmp_path)


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "run"}\n5\nnull\n[1]\n\xff\xfe\n{"no": 1}\n{"event": "end"}\n{"event": "st')
    assert [row["event"] for row in read_jsonl(path)] == ["run", "end"]
