"""Processes that are lost: the others go on from the last checkpoint, or end with a sentence."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmtl.distributed import elastic, join
from fastmtl.errors import UsageError
from fastmtl.trainer.run.directory import RunDirectory
from tests.distributed.doomed import OPTIONS, ROOT, environment, launch
from tests.trainer.toy import loaders, make_trainer

SCRIPT = str(Path(__file__).with_name("doomed.py"))


def _check_same(run: dict[str, Any], whole: dict[str, Any]) -> None:
    assert run["epoch"] == whole["epoch"] == 3
    for name, wanted in whole["model"].items():
        assert torch.equal(run["model"][name], wanted), name


@pytest.mark.slow
def test_a_killed_process_changes_nothing(tmp_path: Path) -> None:
    whole, _, _ = launch(tmp_path / "whole", "SIGKILL:0")
    once, printed, _ = launch(tmp_path / "once", "SIGKILL:7", restarts=1)
    # The epochs' lines are printed once, but for the one that was cut off.
    assert printed.count("Epoch: 0000 | TRAIN:") == 1
    _check_same(once, whole)


@pytest.mark.slow
def test_random_deaths_change_nothing_with_shards(tmp_path: Path) -> None:
    """Random ranks are killed before a message, which the others wait for."""
    options = ("--shard", "fsdp")
    whole, _, _ = launch(tmp_path / "whole", "SIGKILL:0", *options)
    often, _, deaths = launch(tmp_path / "often", "random:1:2", *options, restarts=2)
    assert len(deaths) == 2, deaths
    _check_same(often, whole)


def _lead(command: list[str], **more: str) -> tuple[int, str]:
    """Return the exit code and what the leading one of two processes, started without ``torchrun``, says of errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", **more}
    ranks = [
        subprocess.Popen(
            command,
            env=environment(RANK=str(rank), **place),
            cwd=ROOT,
            text=True,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    try:
        # Only a step that hangs takes this long, on a busy machine too.
        _, said = ranks[0].communicate(timeout=400)
    finally:
        for each in ranks:
            each.send_signal(signal.SIGKILL)
            each.communicate()
    return ranks[0].returncode, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("doom", "shard"),
    [
        ("SIGKILL:3", "none"),
        ("SIGSTOP:3", "none"),
        # In FSDP's own all-gather of the parameters, and in the backward pass.
        ("SIGKILL:4:gather", "fsdp"),
        ("SIGSTOP:4:gather", "fsdp"),
        ("SIGKILL:8:scatter", "fsdp"),
    ],
)
def test_a_lost_process_ends_the_other_with_a_sentence(tmp_path: Path, doom: str, shard: str) -> None:
    options = (*OPTIONS.format(timeout=15).split(), str(tmp_path / "run"), "--shard", shard)
    code, said = _lead([sys.executable, SCRIPT, *options], DOOM=doom)
    assert code == 2, said
    assert "error: Another process has ended, or did not answer in time" in said


LEAVES = """
import sys
from pathlib import Path
from fastmtl.distributed import join, leave
def threads():
    found = set()
    for file in Path("/proc/self/task").glob("*/comm"):
        try:
            found.add(file.read_text().strip())
        except OSError:
            pass  # It ended meanwhile.
    return found
peers = join()
import torch._dynamo
assert peers.all_reduce_any([True]) == [True]
assert any("gloo" in name for name in threads()), threads()
leave()
sys.exit(str(threads()) if any("gloo" in name for name in threads()) else 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are seen under /proc")
def test_no_thread_of_the_group_outlives_it() -> None:
    code, said = _lead([sys.executable, "-c", LEAVES])
    assert code == 0, said


def test_checkpoints_within_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(save_path=str(tmp_path), checkpoint_every=2)
    seen = []
    save = trainer.checkpoints.save_last

    def noted(epoch: int, batch: int) -> None:
        seen.append((epoch, batch))
        save(epoch, batch)

    monkeypatch.setattr(trainer.checkpoints, "save_last", noted)
    trainer.train(loaders(rows=40), loaders(), 2)
    assert seen == [(0, 2), (0, 4), (1, 0), (1, 2), (1, 4), (2, 0)]


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(UsageError, match="checkpoint_every must be at least 1, got 0"):
        make_trainer(checkpoint_every=0)
    with pytest.raises(UsageError, match="timeout must be above 0 seconds, got 0"):
        join(0)


@pytest.mark.parametrize("launch", ["abc", "none"])
def test_only_a_restart_of_the_same_launch_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: str
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    elastic.mark(tmp_path)
    assert not elastic.was_restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
    elastic.mark(tmp_path)
    assert elastic.was_restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not elastic.was_restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert not elastic.was_restarted(tmp_path)


def test_a_run_that_saved_nothing_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert RunDirectory.create_again(tmp_path).path == tmp_path
    assert not (tmp_path / "config.yaml").exists()
    (tmp_path / "best.pt").touch()
    with pytest.raises(UsageError, match="already holds a run"):
        RunDirectory.create_again(tmp_path)
