"""Going on with a run gives the run that was never interrupted."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from fastmtl.errors import CheckpointError
from fastmtl.trainer.checkpoint.files import read_checkpoint, save_atomically
from fastmtl.trainer.log.logger import Logger, StepRecords
from tests.trainer.toy import flat, loaders, make_trainer

OPTIONS: dict[str, Any] = {
    "optim_param": {"optim": "adam", "lr": 1e-2},
    "scheduler_param": {"scheduler": "exp", "gamma": 0.9},
    "log_every": 1,
}


class InterruptAt(Logger):
    """Sends Ctrl-C to this process after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_steps(self, records: StepRecords) -> None:
        if records.first_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def _uninterrupted(epochs: int) -> torch.Tensor:
    trainer = make_trainer(**OPTIONS)
    torch.manual_seed(5)
    trainer.train(loaders(shuffle=True), loaders(), epochs)
    return flat(trainer.model.parameters())


def test_after_an_epoch(tmp_path: Path) -> None:
    first = make_trainer(save_path=str(tmp_path), **OPTIONS)
    torch.manual_seed(5)
    first.train(loaders(shuffle=True), loaders(), 2)
    second = make_trainer(resume=str(tmp_path / "last.pt"), **OPTIONS)
    second.train(loaders(shuffle=True), loaders(), 4)
    assert torch.equal(flat(second.model.parameters()), _uninterrupted(4))
    assert second.meter.base_result == first.meter.base_result


@pytest.mark.parametrize("multi_input", [False, True])
def test_loaders_with_generators_of_their_own(multi_input: bool, tmp_path: Path) -> None:
    def data() -> Any:
        return loaders(shuffle=True, multi_input=multi_input, generator=torch.Generator().manual_seed(7))

    options = OPTIONS | {"multi_input": multi_input}
    whole = make_trainer(**options)
    whole.train(data(), loaders(multi_input=multi_input), 3)
    first = make_trainer(save_path=str(tmp_path), logger=InterruptAt(4), **options)
    with pytest.raises(KeyboardInterrupt):
        first.train(data(), loaders(multi_input=multi_input), 3)
    second = make_trainer(resume=str(tmp_path / "last.pt"), **options)
    second.train(data(), loaders(multi_input=multi_input), 3)
    assert torch.equal(flat(second.model.parameters()), flat(whole.model.parameters()))


def _with_workers(workers: int, **options: Any) -> Any:
    """Return a loader of three batches, whose generator draws the order."""
    drawn_by = torch.Generator().manual_seed(7)
    return DataLoader(loaders().dataset, 8, shuffle=True, generator=drawn_by, num_workers=workers, **options)


def _run(data: Any, epochs: int = 3, **options: Any) -> torch.Tensor:
    trainer = make_trainer(**OPTIONS | options)
    trainer.train(data, loaders(), epochs)
    return flat(trainer.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_loaders_with_workers(persistent: bool, tmp_path: Path) -> None:
    """Workers that persist are seeded, from the numbers that draw the order too, in their first epoch alone."""
    options = {"workers": 1, "persistent_workers": persistent}
    wanted = _run(_with_workers(**options))
    for name in ("within", "after"):
        (tmp_path / name).mkdir()
    with pytest.raises(KeyboardInterrupt):
        _run(_with_workers(**options), save_path=str(tmp_path / "within"), logger=InterruptAt(4))
    _run(_with_workers(**options), 2, save_path=str(tmp_path / "after"))
    for name in ("within", "after"):
        assert torch.equal(_run(_with_workers(**options), resume=str(tmp_path / name)), wanted), name
    if persistent:
        with pytest.raises(CheckpointError, match="workers that last for several epochs drew the order"):
            _run(_with_workers(0), resume=str(tmp_path / "within"))


class _Counting:
    """A loader of three batches that knows how far it is; the rows are those of toy's, in order."""

    def __init__(self, rows: Any = None) -> None:
        self.rows = loaders() if rows is None else rows
        self.begins = self.begun = self.taken = self.loaded = 0

    def __iter__(self) -> Iterator[object]:
        self.taken, self.begins = self.begins, 0
        for batch in islice(self.rows, self.taken, None):
            self.taken += 1
            self.loaded += 1
            yield batch

    def __len__(self) -> int:
        return 3

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begins = self.begun = state["taken"]


def test_a_loader_that_knows_its_place_skips_nothing(tmp_path: Path) -> None:
    wanted = _run(_Counting())
    with pytest.raises(KeyboardInterrupt):
        _run(_Counting(), save_path=str(tmp_path), logger=InterruptAt(4))
    data = _Counting()
    assert torch.equal(_run(data, resume=str(tmp_path)), wanted)
    # One of the second epoch and three of the third.
    assert data.loaded == 1 + 3
    with pytest.raises(CheckpointError, match="the checkpoint has state of train_dataloaders"):
        _run(loaders(), resume=str(tmp_path))


def test_after_a_refusal_the_run_goes_on_where_it_was(tmp_path: Path) -> None:
    wanted = _run(_Counting())
    with pytest.raises(KeyboardInterrupt):
        _run(_Counting(), save_path=str(tmp_path), logger=InterruptAt(4))
    trainer = make_trainer(resume=str(tmp_path), **OPTIONS)
    with pytest.raises(CheckpointError, match="the checkpoint has state of train_dataloaders"):
        trainer.train(loaders(), loaders(), 3)
    trainer.train(_Counting(), loaders(), 3)
    assert torch.equal(flat(trainer.model.parameters()), wanted)


def test_states_of_loaders_are_known_by_their_tasks(tmp_path: Path) -> None:
    def data(*names: str) -> Any:
        given = loaders(multi_input=True)
        return {name: _Counting(given[name]) for name in names}

    options, names = OPTIONS | {"multi_input": True}, ("task0", "task1")
    first = make_trainer(save_path=str(tmp_path), logger=InterruptAt(4), **options)
    with pytest.raises(KeyboardInterrupt):
        first.train(data(*names), loaders(multi_input=True), 3)
    saved = torch.load(tmp_path / "last.pt", weights_only=False)
    assert [state["taken"] for state in saved["data"]["each"][0]["loaders"]] == [2, 2]
    saved["data"]["each"][0]["loaders"][0]["taken"] = 1
    torch.save(saved, tmp_path / "last.pt")
    given = data(*reversed(names))
    make_trainer(resume=str(tmp_path), **options).train(given, loaders(multi_input=True), 2)
    assert [given[name].begun for name in names] == [1, 2]


@pytest.mark.parametrize("step", [4, 5])
@pytest.mark.parametrize("weighting", ["DWA", "GradNorm"])
def test_strategies_that_read_the_losses_of_epochs(weighting: str, step: int, tmp_path: Path) -> None:
    """A step within the second of three epochs of three steps, and its last one."""
    torch.manual_seed(5)
    whole = make_trainer(weighting, **OPTIONS)
    whole.train(loaders(), loaders(), 4)
    first = make_trainer(weighting, save_path=str(tmp_path), logger=InterruptAt(step), **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        first.train(loaders(), loaders(), 4)
    second = make_trainer(weighting, resume=str(tmp_path / "last.pt"), **OPTIONS)
    second.train(loaders(), loaders(), 4)
    assert (second.model.train_loss_buffer == whole.model.train_loss_buffer).all()
    assert torch.equal(flat(second.model.parameters()), flat(whole.model.parameters()))


@pytest.mark.parametrize("step", [1, 3, 5])
def test_after_ctrl_c_in_mid_epoch(step: int, tmp_path: Path) -> None:
    first = make_trainer(save_path=str(tmp_path), logger=InterruptAt(step), **OPTIONS)
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        first.train(loaders(shuffle=True), loaders(), 3)
    torch.manual_seed(1234)
    second = make_trainer(resume=str(tmp_path / "last.pt"), **OPTIONS)
    second.train(loaders(shuffle=True), loaders(), 3)
    assert torch.equal(flat(second.model.parameters()), _uninterrupted(3))


def test_the_first_ctrl_c_is_answered(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_trainer(logger=InterruptAt(1), **OPTIONS).train(loaders(), loaders(), 1)
    assert capfd.readouterr().err == "\ninterrupted: saving after this step or evaluation; once more to stop at once\n"


def test_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(save_path=str(tmp_path), **OPTIONS)
    trainer.train(loaders(), loaders(), 1)
    before = (tmp_path / "last.pt").read_bytes()

    def full_disk(*args: Any) -> None:
        args[1].write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(RuntimeError, match="cannot be written: No space left on device"):
        trainer.train(loaders(), loaders(), 2)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt"]


def test_a_disk_that_fills_up_is_one_sentence_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """Torch reports it as an error of its own, as of torch.save's archive."""
    path = tmp_path / "last.pt"
    save_atomically({"a": torch.zeros(3)}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python turns the signal off, so that a write beyond the limit fails as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"last\.pt cannot be written: File too large\."):
            save_atomically({"a": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_checkpoint(path, torch.device("cpu"))["a"].shape == (3,)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_finished_run_says_that_nothing_is_left(
    epochs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(save_path=str(tmp_path), **OPTIONS).train(loaders(), loaders(), 2)
    capsys.readouterr()
    again = make_trainer(resume=str(tmp_path / "last.pt"), **OPTIONS)
    again.train(loaders(), loaders(), epochs)
    assert f"Nothing is left to train: 2 of {epochs} epochs are done; raise epochs" in capsys.readouterr().out


@pytest.mark.parametrize(("before", "after"), [({"fused": False}, {}), ({}, {"fused": False}), ({"foreach": True}, {})])
def test_how_the_optimizer_does_its_work_is_this_runs_own(
    before: dict[str, Any], after: dict[str, Any], tmp_path: Path
) -> None:
    given = {"optim": "adam", "lr": 1e-2}
    first = make_trainer(optim_param=given | before, save_path=str(tmp_path))
    first.train(loaders(), loaders(), 1)
    second = make_trainer(optim_param=given | after, resume=str(tmp_path / "last.pt"))
    fresh = make_trainer(optim_param=given | after)
    assert second.optimizer.param_groups[0]["fused"] == fresh.optimizer.param_groups[0]["fused"]
    second.train(loaders(), loaders(), 2)
    first.train(loaders(), loaders(), 1)
    torch.testing.assert_close(flat(second.model.parameters()), flat(first.model.parameters()))


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from fastmtl.trainer.checkpoint.files import save_atomically
path = Path(sys.argv[1])
save_atomically({"epoch": 1, "weights": torch.ones(1000)}, path)
save = torch.save
def half(content, file):
    save(content, file)
    file.truncate(file.tell() // 2)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
save_atomically({"epoch": 2, "weights": torch.zeros(1000)}, path)
"""


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    # Half of the next one lies beside it, which nothing reads, and the one after takes its place.
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.pt", "last.pt.part"]
    assert read_checkpoint(path, torch.device("cpu"))["epoch"] == 1
    with pytest.raises(CheckpointError, match="is not a checkpoint that can be read"):
        read_checkpoint(tmp_path / "last.pt.part", torch.device("cpu"))
    save_atomically({"epoch": 3}, path)
    assert read_checkpoint(path, torch.device("cpu"))["epoch"] == 3
    assert list(tmp_path.iterdir()) == [path]
