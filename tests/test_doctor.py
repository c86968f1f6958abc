"""The doctor tells what is there and what is not, and never fails itself."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastmtl
from fastmtl.cli import doctor

SECTIONS = ("versions", "build", "devices", "ops", "memory", "compile")


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return doctor.report(seconds=0)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes the import of the named modules fail."""

    def hide(*names: str) -> None:
        real = importlib.import_module

        def refuse(name: str, package: str | None = None) -> Any:
            if name in names:
                raise ImportError(f"{name} is hidden")
            return real(name, package)

        monkeypatch.setattr(importlib, "import_module", refuse)

    return hide


def test_report_is_plain_data(facts: dict[str, Any]) -> None:
    assert json.loads(json.dumps(facts)) == facts
    assert not [name for name in SECTIONS if isinstance(facts[name], dict) and "error" in facts[name]]


def test_versions_are_those_running(facts: dict[str, Any]) -> None:
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["python"] == sys.version.split()[0].rstrip("+")


def test_what_was_built_is_told(facts: dict[str, Any]) -> None:
    record = Path(fastmtl.__file__).with_name("_build.json")
    assert facts["build"]["record"] == (json.loads(record.read_text()) if record.is_file() else None)
    assert ("this copy was not installed" in doctor.render(facts)) is not record.is_file()


def test_every_op_has_a_backend_on_the_cpu(facts: dict[str, Any]) -> None:
    on_cpu = {row["op"]: row["backend"] for row in facts["ops"] if row["device"] == "cpu"}
    assert {"gram", "combine", "combine_", "min_norm"} <= on_cpu.keys()
    assert set(on_cpu.values()) <= {"reference", "cpp"}


def test_bandwidth_is_that_of_a_memory(facts: dict[str, Any]) -> None:
    for kind in ("read", "copy"):
        assert 1e8 < facts["memory"][f"{kind}_bytes_per_second"] < 1e14


def test_render_shows_every_section(facts: dict[str, Any]) -> None:
    lines = doctor.render(facts).splitlines()
    assert [name for name in SECTIONS if name not in lines] == []
    assert any("gram on cpu" in line for line in lines)


def test_ops_on_a_gpu_are_told_where_there_is_one(facts: dict[str, Any]) -> None:
    cpu = {"device": "cpu", "name": "one", "threads": 1, "cores": 1, "isa": None}
    without = doctor.render({**facts, "devices": [cpu]})
    assert re.findall(r"\w+ on cuda", without) == ["all on cuda"]
    with_one = doctor.render({**facts, "devices": [cpu, {"device": "cuda:0", "name": "two"}]})
    assert "gram on cuda" in with_one
    assert "all on cuda" not in with_one


def test_a_missing_host_module_leaves_a_measurement(without: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_FALLBACK_BYTES", 1 << 20)
    without("fastmtl._host")
    facts = doctor.report(seconds=0)
    assert "fastmtl._host is hidden" in facts["memory"]["method"]
    assert facts["memory"]["read_bytes_per_second"] > 0
    assert "instructions unknown" in doctor.render(facts)


def test_a_section_that_cannot_be_gathered_says_why(without: Any) -> None:
    without("fastmtl.ops", "torch._functorch.config", "torch._inductor.cpp_builder")
    facts = doctor.report(seconds=0)
    assert facts["ops"] == {"error": "ImportError: fastmtl.ops is hidden"}
    assert "fastmtl.ops is hidden" in doctor.render(facts)


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cpp_builder = importlib.import_module("torch._inductor.cpp_builder")

    def none() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    facts = doctor.report(seconds=0)
    assert facts["compile"]["cpu"] is False
    assert "Inductor finds no C++ compiler" in doctor.render(facts)


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PACKAGES", ("torch", "no-such-package"))
    rendered = doctor.render(doctor.report(seconds=0))
    assert any(line.split() == ["no-such-package", "not", "installed"] for line in rendered.splitlines())


def test_an_uninstalled_copy_is_said(facts: dict[str, Any]) -> None:
    assert "was not installed" in doctor.render({**facts, "build": {"record": None}})


def test_environment_shows_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMTL_ISA", "portable")
    assert doctor.report(seconds=0)["environment"] == {"FASTMTL_ISA": "portable"}


class TestHost:
    """The compiled module ``fastmtl._host``."""

    @pytest.fixture
    def host(self) -> Any:
        return pytest.importorskip("fastmtl._host", reason="fastmtl._host was not built")

    @pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
    def test_the_instruction_set_can_be_lowered_but_not_raised(self, host: Any, isa: str) -> None:
        code = (
            "from fastmtl import _host; "
            "print(_host.isa(), _host.read_bandwidth(1 << 20, 1, 0) > 0, _host.multiply_add_rate(1) > 0)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "FASTMTL_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        )
        order = ["portable", "avx2", "avx512"]
        expected = min(isa, host.supported_isa(), key=order.index)
        assert done.stdout.split() == [expected, "True", "True"]

    @pytest.mark.parametrize("measure", ["read_bandwidth", "copy_bandwidth"])
    @pytest.mark.parametrize(("nbytes", "threads"), [(1, 1), (4097, 3), (1 << 20, 2)])
    def test_odd_sizes_are_measured(self, host: Any, measure: str, nbytes: int, threads: int) -> None:
        assert getattr(host, measure)(nbytes, threads, 0) > 0

    @pytest.mark.parametrize("threads", [1, 3])
    def test_a_plain_pass_copies_and_reads(self, host: Any, threads: int) -> None:
        source, target = torch.rand(70_001), torch.zeros(70_001)
        read = torch.rand(33)
        sources, targets = ([(t.data_ptr(), t.nbytes) for t in some] for some in ((source, read), (target,)))
        assert host.plain_pass(sources, targets, threads) > 0
        whole = len(source) - 64
        assert torch.equal(target[:whole], source[:whole])
        with pytest.raises(ValueError, match="a source for each target"):
            host.plain_pass([], targets, threads)

    @pytest.mark.parametrize("arguments", [(-1, 1, 0), (1, -1, 0), (1, 1, -1), (1, 1, float("nan"))])
    def test_bad_arguments_are_refused(self, host: Any, arguments: tuple[int, int, float]) -> None:
        with pytest.raises(ValueError, match=r"must be 0 .*or more"):
            host.read_bandwidth(*arguments)
        with pytest.raises(ValueError, match="threads must be 0"):
            host.multiply_add_rate(-1)

    def test_cache_is_the_one_the_system_names(self, host: Any) -> None:
        sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        one = max((int(path.read_text().strip().rstrip("K")) * 1024 for path in sizes), default=0)
        assert host.last_level_cache() >= one
        assert host.last_level_cache() % max(one, 1) == 0
