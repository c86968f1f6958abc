"""What is built and installed: the build's parameters, the source archive, wheels with and without a compiler."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fastmtl
from fastmtl.support import env
from tests import check_wheel

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "runs", "*.so", "*.egg-info", ".*_cache", "_build.json"
)


def package_data() -> set[str]:
    """Return published rows and the report's template, as files of the repository."""
    files = [*(ROOT / "fastmtl" / "published").glob("*.[cy]*"), *(ROOT / "fastmtl").rglob("templates/*")]
    found = {str(path.relative_to(ROOT)) for path in files if path.is_file()}
    assert len(found) > 4
    return found


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """Return setup.py as a module."""
    spec = importlib.util.spec_from_file_location("fastmtl_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_source_named_is_there(build: ModuleType) -> None:
    for extension in build.get_build_parameters(build.find_torch(), build.pybind11_include()):
        assert [path for path in extension.sources if not (ROOT / path).is_file()] == []


def test_every_kernel_source_is_named(build: ModuleType) -> None:
    extensions = build.get_build_parameters(build.find_torch(), build.pybind11_include())
    named = {path for extension in extensions for path in extension.sources}
    there = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("kernels/*.cu")]}
    assert named == there


def test_code_is_compiled_for_any_machine(build: ModuleType) -> None:
    for extension in build.get_build_parameters(build.find_torch(), build.pybind11_include()):
        flags = " ".join(extension.extra_compile_args)
        assert "-march" not in flags
        assert "fast-math" not in flags
        assert "fast_math" not in flags


def test_torch_is_found_without_importing_it(build: ModuleType) -> None:
    found = build.find_torch()
    assert found.root == Path(torch.__file__).parent
    assert found.version == torch.__version__
    assert found.cuda == torch.version.cuda


def test_torch_is_found_behind_build_isolation(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(Path(torch.__file__).parents[1]))
    assert build.find_torch().root == Path(torch.__file__).parent


@pytest.mark.parametrize("name", ["FASTMTL_BUILD_CPP", "FASTMTL_BUILD_CUDA"])
def test_build_switches_are_checked(build: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for value, meaning in {"0": False, "1": True, "auto": None, "": None}.items():
        monkeypatch.setenv(name, value)
        assert build.wish(name) is meaning
    monkeypatch.setenv(name, "maybe")
    with pytest.raises(SystemExit, match=f"{name} must be 0, 1 or auto, got 'maybe'"):
        build.wish(name)


def test_all_packages_are_installed(build: ModuleType) -> None:
    folders = {"fastmtl": "fastmtl", **build.PACKAGE_DIRS}
    there = {
        ".".join([name, *path.parent.relative_to(ROOT / folder).parts])
        for name, folder in folders.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert set(build.packages()) == there


@pytest.mark.parametrize("name", ["fastmtl.kernels", "fastmtl.benchmarks"])
def test_packages_beside_fastmtl_are_imported_by_their_installed_name(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__name__ == name


def test_constraints_pin_every_dependency() -> None:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, filter(None, lines))}
    project = PYPROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in groups for text in group):
        if requirement.name == project["name"]:
            continue
        pin = next(iter(pins[canonicalize_name(requirement.name)].specifier))
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version)


def test_torchvision_is_pinned_to_what_goes_with_torch() -> None:
    text = (ROOT / "constraints.txt").read_text()
    torch_pin, vision_pin = (re.search(rf"^{name}==(\S+)$", text, re.MULTILINE)[1] for name in ("torch", "torchvision"))
    if importlib.metadata.version("torchvision").partition("+")[0] != vision_pin:
        pytest.skip("another torchvision is installed")
    needed = [Requirement(each) for each in importlib.metadata.requires("torchvision") or ()]
    (needs_torch,) = (each for each in needed if each.name == "torch")
    assert needs_torch.specifier.contains(torch_pin)


def test_version_is_the_installed_one() -> None:
    assert importlib.metadata.version("fastmtl-torch") == fastmtl.__version__


def test_environment_variables_are_documented() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    elsewhere = {
        "FASTMTL_BUILD_CPP",
        "FASTMTL_BUILD_CUDA",
        "FASTMTL_BUILD_TORCH",
        "FASTMTL_EXTRAS",
        "FASTMTL_GOLDEN",
        "FASTMTL_LIBMTL",
        "FASTMTL_TEST_LARGE",
        "MAX_JOBS",
    }
    named = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert named == {*env.VARIABLES, *elsewhere}


@dataclass(frozen=True)
class Installed:
    """A wheel unpacked where a fresh interpreter finds it, with the torch of this environment behind it."""

    python: Path
    site: Path
    wheel: Path
    log: str

    def run(self, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.python), *arguments], cwd=folder, capture_output=True, text=True, env=clean_environment()
        )


def clean_environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FASTMTL_", "PYTHON"))}
    return {**kept, **changes}


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    tree = shutil.copytree(ROOT, folder / "tree", ignore=NOT_SOURCE)
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, tree]
    subprocess.run(command, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def unpacked(sdist: Path, folder: Path) -> Path:
    """Return the folder of a source archive, with the objects of this checkout that are newer than their sources."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    shutil.copytree(ROOT / "build" / "objects", source / "build" / "objects", dirs_exist_ok=True)
    # One source is compiled again, with the headers of the archive.
    for kept in (source / "build" / "objects").glob("*/excess_risk.cpp.o"):
        kept.unlink()
    return source


def install(sdist: Path, folder: Path, **environment: str) -> Installed:
    """Build a wheel from the source archive, or its folder, and unpack it in a new virtual environment."""
    pip = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    done = subprocess.run(
        [*pip, "--wheel-dir", folder, sdist], env=clean_environment(**environment), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # A path, not a site directory: the packages of this environment are seen, its editable fastmtl is not.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Installed(folder / "venv" / "bin" / "python", site, wheel, done.stdout + done.stderr)


@pytest.fixture(scope="session")
def compiled(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    source = unpacked(sdist, tmp_path_factory.mktemp("source"))
    return install(source, tmp_path_factory.mktemp("compiled"), FASTMTL_BUILD_CPP="1", FASTMTL_BUILD_CUDA="0")


@pytest.fixture(scope="session")
def plain(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("plain")
    (folder / "bin").mkdir()
    return install(sdist, folder, PATH=str(folder / "bin"), CXX="")


def few_steps(installed: Installed, folder: Path) -> subprocess.CompletedProcess[str]:
    choice = ["--arch", "hps", "--weighting", "mgda", "--device", "cpu", "--run-dir", "run"]
    size = ["--epochs", "1", "--limit-batches", "2", "--batch-size", "8"]
    return installed.run("-m", "fastmtl", "train", *choice, *size, folder=folder)


def record(installed: Installed) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((installed.site / "fastmtl" / "_build.json").read_text())
    return facts


@pytest.mark.slow
def test_sdist_holds_all_that_is_built_from(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("fastmtl", "kernels", "benchmarks", "csrc")
    kinds = {".py", ".pyi", ".cpp", ".h", ".cu", ".npz"}
    there = {str(p.relative_to(ROOT)) for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in kinds}
    assert there - held == set()
    assert {"LICENSE", "README.md", "CMakeLists.txt", "constraints.txt", *package_data()} <= held


@pytest.mark.slow
def test_a_wheel_holds_the_whole_package(compiled: Installed) -> None:
    with zipfile.ZipFile(compiled.wheel) as archive:
        held = set(archive.namelist())
    there = {
        str(Path(installed) / path.relative_to(ROOT / folder))
        for installed, folder in {
            "fastmtl": "fastmtl",
            "fastmtl/kernels": "kernels",
            "fastmtl/benchmarks": "benchmarks",
        }.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".pyi", ".npz") or path.name == "py.typed"
    }
    assert there - held == set()
    assert {"fastmtl/_C.abi3.so", "fastmtl/_build.json", *package_data()} <= held
    assert not [name for name in held if not name.startswith(("fastmtl/", "fastmtl_torch-"))]


def repaired(wheel: Path, folder: Path) -> Path:
    """Return the wheel as `make wheel` leaves it: with its manylinux tag, without torch's libraries."""
    named = re.search(r"^EXCLUDED := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    excluded = [option for library in named for option in ("--exclude", library)]
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", folder, *excluded, wheel]
    subprocess.run(command, check=True, capture_output=True, env=clean_environment(PATH=programs))
    (result,) = folder.glob("*.whl")
    return result


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="manylinux is Linux's")
def test_a_wheel_trains_the_main_job_without_a_compiler(compiled: Installed, tmp_path: Path) -> None:
    assert {"fastmtl._C", "fastmtl._host"} <= record(compiled)["built"].keys()
    (tmp_path / "wheel").mkdir()
    wheel = repaired(compiled.wheel, tmp_path / "wheel")
    assert re.search(r"-manylinux_2_\d+_x86_64\.whl$", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
    assert len(libraries) == 2
    assert all(re.match(r"fastmtl/(_C\.abi3|_host\.cpython-\d+-\S+)\.so$", name) for name in libraries), libraries
    log = check_wheel.check(wheel, tmp_path, Path(sysconfig.get_path("purelib")))
    assert "compile: the step runs eagerly" in log


@pytest.mark.slow
def test_without_a_compiler_it_installs_trains_and_says_so_once(plain: Installed, tmp_path: Path) -> None:
    assert plain.log.count("installing without the C++ kernels") == 1
    assert record(plain)["built"] == {}
    assert list(plain.site.rglob("*.so")) == []
    done = few_steps(plain, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("Plain torch operators are used") == 1
    assert "no C++ compiler was found" in done.stdout + done.stderr


@pytest.mark.slow
def test_kernels_that_were_asked_for_and_cannot_be_built_fail_the_build(sdist: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    done = subprocess.run(
        [*pip, "--wheel-dir", tmp_path, sdist],
        env=clean_environment(PATH=str(tmp_path), CXX="", FASTMTL_BUILD_CPP="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "was asked for but cannot be built: no C++ compiler was found" in done.stdout + done.stderr
