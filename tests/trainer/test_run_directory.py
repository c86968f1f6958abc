"""Run directories do not overwrite each other, and keep what was printed."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from datetime import datetime
from pathlib import Path

import pytest

from fastmtl.errors import UsageError
from fastmtl.trainer.run.directory import RunDirectory, Tee, write_atomically

NOW = datetime(2026, 3, 4, 5, 6, 7)


def test_name_says_what_is_run_and_when_and_is_never_taken_twice(tmp_path: Path) -> None:
    names = [RunDirectory.create_named("multimnist", "MTAN", "MGDA", NOW, tmp_path).path.name for _ in range(3)]
    first = "multimnist-mtan-mgda-20260304-050607"
    assert names == [first, f"{first}-2", f"{first}-3"]


@pytest.mark.parametrize("held", ["last.pt", "best.pt", "config.yaml", "metrics.jsonl"])
def test_a_run_is_not_overwritten(tmp_path: Path, held: str) -> None:
    (tmp_path / held).touch()
    with pytest.raises(UsageError, match=r"already holds a run .*--resume"):
        RunDirectory.create(tmp_path)


def test_a_folder_without_a_run_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert RunDirectory.create(tmp_path).last == tmp_path / "last.pt"
    assert RunDirectory.create(tmp_path / "new" / "run").path.is_dir()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be made"):
        RunDirectory.create(tmp_path / "file" / "run")
    with pytest.raises(UsageError, match="cannot be made"):
        RunDirectory.create_named("a", "b", "c", NOW, tmp_path / "file")


@pytest.mark.parametrize("name", ["train.log", "config.yaml.part", "last.pt.part", "curves.png"])
def test_a_folder_in_the_place_of_a_file_is_found_at_once(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=f"needs {name} as a file, but it is a folder"):
        RunDirectory.create(tmp_path)


def test_a_folder_that_cannot_be_written_to_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The superuser, who may run the tests, can write to every folder.
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == tmp_path and mode & os.W_OK))
    with pytest.raises(UsageError, match="cannot be written to"):
        RunDirectory.create(tmp_path)


def test_open_wants_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run directory"):
        RunDirectory.open(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"no config\.yaml"):
        RunDirectory.open(tmp_path)


def test_discard_takes_away_only_what_the_run_made(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    run.log.touch()
    run.discard()
    assert not run.path.exists()
    kept = RunDirectory.create(tmp_path)
    (tmp_path / "notes.txt").touch()
    kept.discard()
    assert (tmp_path / "notes.txt").exists()


def test_write_atomically_leaves_the_old_text_if_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"


def test_recording_keeps_stdout_and_stderr_and_gives_them_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sys.stdout, sys.stderr
    log = tmp_path / "train.log"
    with contextlib.suppress(KeyboardInterrupt), Tee.recording(log):
        print("one")
        print("two", file=sys.stderr)
        raise KeyboardInterrupt
    assert (sys.stdout, sys.stderr) == before
    with Tee.recording(log):
        print("three")
    assert log.read_text() == "one\ntwo\nthree\n"
    assert capsys.readouterr() == ("one\nthree\n", "two\n")


def test_tee_may_change_where_it_shows() -> None:
    first, second, log = io.StringIO(), io.StringIO(), io.StringIO()
    tee = Tee(first, log)
    tee.write("a")
    tee.stream = second
    tee.write("b")
    assert (first.getvalue(), second.getvalue(), log.getvalue()) == ("a", "b", "ab")
