"""The step benchmark: what it compares is the same step, and a wrong one gets no time."""

from __future__ import annotations

import csv
import math
import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fastmtl.benchmarks import step as bench
from fastmtl.benchmarks.apart import Apart
from fastmtl.benchmarks.contender import LocalContender
from fastmtl.benchmarks.gate import distances
from fastmtl.benchmarks.machine import Probes
from fastmtl.benchmarks.peers import torchjd_step
from fastmtl.benchmarks.work import Work
from torch import Tensor

from fastmtl import ops
from fastmtl.architecture import ARCHITECTURES, AbsArchitecture
from fastmtl.errors import UsageError
from fastmtl.support.memory import keep_freed_memory

SMALL: dict[str, Any] = {"net": "mlp", "batch": 4, "seconds": 0.0, "tasks": [2]}


@pytest.mark.slow
def test_rows_of_all_contenders(tmp_path: Path) -> None:
    table, picture = tmp_path / "rows.csv", tmp_path / "rows.png"
    rows = bench.run_step(["mgda", "EW"], csv_path=table, plot_path=picture, **SMALL)
    assert [(row["strategy"], row["library"]) for row in rows] == [
        (name, library) for name in ("MGDA", "EW") for library in ("fastmtl", "floor", "sum")
    ]
    for row in rows:
        assert row["median_ms"] > 0
        assert row["times_floor"] > 0
    with table.open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert picture.stat().st_size > 0
    # Parameters have gradients of their own size at least.
    parameters = sum(param.numel() for param in Work(**_work()).modules()[0].parameters())
    assert all(row["peak_mb"] > 4e-6 * parameters for row in rows)


def _work() -> dict[str, Any]:
    return {"net": "mlp", "arch": "HPS", "count": 2, "batch": 4, "size": 1, "device": torch.device("cpu")}


SPLIT = sorted({name for name, each in ARCHITECTURES.items() if each.forward is AbsArchitecture.forward} - {"STL"})


@pytest.mark.slow
@pytest.mark.parametrize("arch", SPLIT)
def test_architectures_with_a_trunk_have_a_floor(arch: str) -> None:
    net = "resnet18" if arch in ("HPS", "LTB") else "resnet50" if arch == "MTAN" else "mlp"
    work = Work(net=net, arch=arch, count=2, batch=2, size="32x64", device=torch.device("cpu"))
    assert net == "mlp" or work.inputs.shape == (2, 3, 32, 64)
    for tasks_apart in (True, False):
        floor = bench.floor_step(work, "parameters" if tasks_apart else "sum")
        assert floor.update().isfinite().all()
        ours = bench.trainer_step(work, "EW", "fp32").shared
        assert [param.shape for param in floor.shared] == [param.shape for param in ours]


@pytest.mark.slow
def test_an_architecture_without_a_trunk_has_no_floor() -> None:
    rows = bench.run_step(["MGDA"], arch="PLE", **SMALL | {"net": "resnet18", "size": 32})
    assert [row["library"] for row in rows] == ["fastmtl"]


def test_updates_agree_with_torchjds() -> None:
    pytest.importorskip("torchjd")
    rows = bench.run_step(["MGDA", "UPGrad"], ["torchjd"], **SMALL)
    assert all(row["distance"] < 1e-2 for row in rows if row["library"] == "TorchJD")


def test_a_wrong_update_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchjd")

    def wrong(gram: Tensor) -> Tensor:
        return torch.arange(len(gram), dtype=gram.dtype)

    monkeypatch.setattr(ops, "min_norm", wrong)
    rows = bench.run_step(["MGDA"], ["torchjd"], **SMALL)
    assert ["median_ms" in row for row in rows if row["library"] == "fastmtl"] == [False]


def _fake(scale: float) -> LocalContender:
    """A step of made-up size."""
    param = torch.nn.Parameter(torch.ones(10))

    def run() -> None:
        with torch.no_grad():
            param.sub_(scale * torch.arange(10.0))

    return LocalContender(run=run, shared=[param])


class _Unpicklable(Exception):
    """An exception that cannot be sent to another process."""

    def __reduce__(self) -> Any:
        raise TypeError


def _fail(kind: type[Exception], args: Any) -> LocalContender:
    raise kind(*args)


def _die() -> LocalContender:
    def run() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return LocalContender(run=run, shared=[torch.nn.Parameter(torch.ones(1))])


def _settings_of_the_c_library() -> LocalContender:
    """A step whose update says whether the process was told to keep what is freed."""
    param = torch.nn.Parameter(torch.zeros(1))

    def run() -> None:
        with torch.no_grad():
            param.sub_(float(keep_freed_memory.cache_info().currsize))

    return LocalContender(run=run, shared=[param])


@pytest.mark.slow
def test_a_peer_has_a_process_of_its_own() -> None:
    keep_freed_memory()
    assert _settings_of_the_c_library().update() == 1
    apart = Apart("peer", _settings_of_the_c_library)
    assert apart.update() == 0
    assert apart.seconds(3) > 0
    assert Apart("peer", partial(_fake, 2.0)).peak_bytes() > 0


def test_peers_have_processes_of_their_own_on_the_cpu() -> None:
    for device, apart in (("cpu", True), ("meta", False)):
        work = Work(**_work() | {"device": torch.device(device)})
        make: Any = bench.peer_steps(work, "MGDA", ["torchjd"], None)["TorchJD"]
        assert (make.func is Apart) == apart


@pytest.mark.slow
def test_the_process_of_a_peer_ends_with_it() -> None:
    before = set(multiprocessing.active_children())
    apart = Apart("peer", partial(_fake, 1.0))
    (process,) = set(multiprocessing.active_children()) - before
    assert process.is_alive()
    del apart
    assert not process.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UsageError("TorchJD is not installed."), "^TorchJD is not installed.$"),
        (KeyError("width"), "^peer failed: KeyError: 'width'\n"),
        (_Unpicklable("width"), "^peer failed: _Unpicklable: width\n"),
    ],
)
def test_what_fails_in_a_peers_process_is_said_here(error: Exception, message: str) -> None:
    kind = UsageError if isinstance(error, UsageError) else RuntimeError
    with pytest.raises(kind, match=message) as caught:
        Apart("peer", partial(_fail, type(error), error.args))
    assert (kind is RuntimeError) == ("_fail" in "".join(getattr(caught.value, "__notes__", [])))


@pytest.mark.slow
def test_a_peer_that_is_killed_is_missed_each_time() -> None:
    apart = Apart("peer", _die)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the process of peer ended before its step did"):
            apart()


@pytest.fixture
def no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory's rate is made up, as measuring it takes a while."""
    monkeypatch.setattr(bench, "probes", lambda device: Probes([lambda: 1e9], [lambda: 1e9]))


@pytest.mark.usefixtures("no_probes")
@pytest.mark.parametrize(
    ("scales", "untimed", "others"),
    [
        ({"fastmtl": 1.0, "fastmtl compiled": 1.001, "TorchJD": 1.0}, [], []),
        ({"fastmtl": 1.0, "fastmtl compiled": -3.0, "TorchJD": 1.0}, ["fastmtl compiled"], ["fastmtl compiled"]),
        ({"fastmtl": 1.0, "fastmtl compiled": 1.1}, ["fastmtl compiled"], ["fastmtl compiled"]),
        ({"fastmtl": 1.0, "fastmtl compiled": math.nan}, ["fastmtl compiled"], ["fastmtl compiled"]),
        ({"fastmtl": 5.0, "fastmtl compiled": 5.0, "TorchJD": 1.0}, ["fastmtl", "fastmtl compiled"], ["TorchJD"]),
        ({"fastmtl": 5.0, "LibMTL": 5.0, "TorchJD": 1.0}, [], ["TorchJD"]),
    ],
    ids=["right", "compiled", "no peer", "nan", "both", "one of two"],
)
def test_every_step_of_ours_is_gated_and_other_updates_are_marked(
    scales: dict[str, float], untimed: list[str], others: list[str]
) -> None:
    make = {library: partial(_fake, scale) for library, scale in scales.items()}
    rows = bench._compare("PCGrad", Work(**_work()), make, {}, 0.0)
    assert [row["library"] for row in rows if "median_ms" not in row] == untimed
    assert [row["library"] for row in rows if row["update"] == "another"] == others
    for row in rows:
        line = bench._line(row)
        assert ("WRONG: " in line) == (row["library"] in untimed)
        assert line.endswith("ANOTHER UPDATE") == (row["library"] in others and row["library"] not in untimed)


@pytest.mark.usefixtures("no_probes")
def test_with_another_precision_the_gate_sees_our_step_in_fp32() -> None:
    make = {"fastmtl": partial(_fake, 1.4), "TorchJD": partial(_fake, 1.0)}
    rows = bench._compare("CAGrad", Work(**_work()), make, {"fastmtl": partial(_fake, 1.0)}, 0.0)
    assert all("median_ms" in row and row["update"] == "same" for row in rows)
    rows = bench.run_step(["EW"], precision="bf16", **SMALL)
    assert [row["distance"] for row in rows] == [0.0, None, None]


@pytest.mark.parametrize("name", ["PCGrad", "GradVac", "RLW"])
def test_random_choices_are_the_same_for_all(name: str) -> None:
    work = Work(**_work() | {"count": 6})
    steps = {library: bench.trainer_step(work, name, "fp32", compile=False) for library in ("fastmtl", "again")}
    torch.rand(3)
    assert distances(steps)["again"] == 0


@pytest.mark.parametrize("name", ["PCGrad", "GradVac"])
def test_tasks_meet_in_torchjds_order(name: str) -> None:
    pytest.importorskip("torchjd")
    work = Work(**_work() | {"count": 6})
    ours, theirs = bench.trainer_step(work, name, "fp32", compile=False), torchjd_step(work, name)
    # Another order of six tasks moves the update by 8e-4.
    assert distances({"fastmtl": ours, "TorchJD": theirs})["TorchJD"] < 2e-4


def test_the_step_reads_which_tasks_have_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(bench, "are_complete", lambda losses, labels: False)
    monkeypatch.setattr(bench, "present_tasks", lambda losses, labels: asked.append(labels))
    work = Work(**_work())
    bench.trainer_step(work, "MGDA", "fp32", compile=False).run()
    assert asked == [[work.labels]]


@pytest.mark.slow
def test_a_peer_without_the_strategy_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "LibMTL").mkdir()
    rows = bench.run_step(["SI"], ["libmtl", "torchjd"], tmp_path, **SMALL)
    assert [row["library"] for row in rows] == ["fastmtl", "floor", "sum"]
    printed = capsys.readouterr().out
    assert "libmtl has no such step on HPS" in printed
    assert "torchjd has no such step on HPS" in printed


def test_rows_outlive_an_interruption(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compare = bench._compare

    def once(name: str, *args: Any) -> list[Any]:
        if name == "EW":
            raise KeyboardInterrupt
        return compare(name, *args)

    monkeypatch.setattr(bench, "_compare", once)
    with pytest.raises(KeyboardInterrupt):
        bench.run_step(["MGDA", "EW"], csv_path=tmp_path / "rows.csv", **SMALL)
    with (tmp_path / "rows.csv").open() as file:
        assert {row["strategy"] for row in csv.DictReader(file)} == {"MGDA"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peers": ["libmtl"]}, "needs the folder of a LibMTL checkout"),
        ({"peers": ["libmtl"], "libmtl": Path("nowhere")}, "There is no LibMTL in nowhere"),
        ({"peers": ["torchjdd"]}, "peer"),
        ({"net": "vgg"}, "net must be one of resnet18, resnet50, mlp"),
        ({"arch": "HPPS"}, "architecture"),
        ({"arch": "STL"}, "STL has none"),
        ({"arch": "STL", "weightings": ["EW"]}, "STL shares no parameters, so that there is no update to compare"),
        ({"net": "resnet18", "size": "64x"}, "size must be a number, or height and width as 288x384, got '64x'"),
        ({"cuda_graph": True}, "cuda_graph needs a CUDA GPU, got the device cpu"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench.run_step(**{"weightings": ["MGDA"], **SMALL, **options})
