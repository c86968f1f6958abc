"""Build of fastmtl: the Python packages, and the compiled extensions where a toolchain is at hand.

Torch is located, never imported: the kernels use LibTorch's stable ABI, so its headers and libraries are all that is
needed. Nothing here looks at the hardware or the network; what is built follows from the tools and the variables
``FASTMTL_BUILD_CPP`` and ``FASTMTL_BUILD_CUDA`` (0 never, 1 must, unset where possible) and ``FASTMTL_BUILD_TORCH`` (a
torch elsewhere) alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
TORCH_TARGET = "0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)
# Sources of both extensions: csrc/<stem>.cpp and kernels/<stem>.cu; those that take longest to compile come first.
KERNELS = (
    *("combine", "graddrop", "ema_gram", "gram", "excess_risk", "register"),
    *("aligned", "cagrad", "config", "dual_cone", "fairgrad", "gradvac", "imtl", "min_norm", "nash", "nonneg_qp"),
    *("pcgrad", "upgrad", "watch", "famo", "moco", "cap_norm", "tables"),
)
PACKAGE_DIRS = {"fastmtl.kernels": "kernels", "fastmtl.benchmarks": "benchmarks"}


class BuildError(Exception):
    """An extension cannot be built; the message says why in one line."""


@dataclass(frozen=True)
class Torch:
    """An installed torch, read from its files."""

    root: Path
    version: str
    cuda: str | None


def wish(name: str) -> bool | None:
    """Return what ``FASTMTL_BUILD_*`` asks for: True must, False never, None where possible."""
    value = os.environ.get(name, "").strip().lower()
    if value in ("", "auto"):
        return None
    if value in ("0", "1"):
        return value == "1"
    raise SystemExit(f"{name} must be 0, 1 or auto, got {value!r}.")


def torch_candidates() -> Iterator[Path]:
    """Yield where torch may be; pip's build isolation hides the environment it installs into from sys.path."""
    if os.environ.get("FASTMTL_BUILD_TORCH"):
        yield Path(os.environ["FASTMTL_BUILD_TORCH"])
        return
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    yield Path(sysconfig.get_path("platlib")) / "torch"
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for prefix in (os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"), sys.base_prefix):
        if prefix:
            yield Path(prefix) / "lib" / python / "site-packages" / "torch"


def find_torch() -> Torch | None:
    """Return the torch of the environment being installed into, or None."""
    for root in torch_candidates():
        if not (root / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            continue
        facts = dict(re.findall(r"^(__version__|cuda)\b[^=]*= *(.+)$", (root / "version.py").read_text(), re.MULTILINE))
        torch_version = facts["__version__"].strip("'\"")
        cuda = facts.get("cuda", "None").strip("'\"")
        if tuple(map(int, torch_version.split(".")[:2])) >= OLDEST_TORCH:
            return Torch(root, torch_version, None if cuda == "None" else cuda)
    return None


def find_compiler() -> list[str] | None:
    """Return the C++ compiler's command (``CXX`` first), or None."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def pybind11_include() -> str | None:
    """Return pybind11's header directory, or None."""
    spec = importlib.util.find_spec("pybind11")
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parent / "include")


def get_build_parameters(torch: Torch | None, pybind11: str | None) -> list[Extension]:
    """Return every extension there is, with all its sources, directories, flags and libraries."""
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    cxx_flags = ["-O3", "-std=c++20", "-fPIC", "-DNDEBUG", "-fvisibility=hidden", *openmp]
    nvcc_flags = [
        "-O3",
        "-std=c++20",
        "-DNDEBUG",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        "--expt-relaxed-constexpr",
        "-gencode=arch=compute_80,code=[sm_80,compute_80]",
        "-gencode=arch=compute_90a,code=sm_90a",
        # Both at once.
        "--threads=2",
    ]
    headers = sorted(str(p.relative_to(ROOT)) for d in ("csrc", "kernels") for p in (ROOT / d).rglob("*.*h"))
    stable_abi = [("TORCH_TARGET_VERSION", TORCH_TARGET), ("Py_LIMITED_API", "0x030B0000")]
    torch_root = torch.root if torch else Path("torch-not-found")
    torch_include = [str(torch_root / "include"), str(torch_root / "include/torch/csrc/api/include")]
    return [
        Extension(
            "fastmtl._host",
            sources=["csrc/host.cpp"],
            depends=headers,
            include_dirs=["csrc/include", pybind11 or "pybind11-not-found"],
            extra_compile_args=cxx_flags,
            extra_link_args=openmp,
        ),
        Extension(
            "fastmtl._C",
            sources=[f"csrc/{stem}.cpp" for stem in KERNELS],
            depends=headers,
            include_dirs=["csrc/include", "csrc", *torch_include],
            define_macros=stable_abi,
            extra_compile_args=cxx_flags,
            extra_link_args=openmp,
            library_dirs=[str(torch_root / "lib")],
            libraries=["torch", "torch_cpu", "c10"],
            py_limited_api=True,
        ),
        Extension(
            "fastmtl._CUDA",
            sources=[f"kernels/{stem}.cu" for stem in KERNELS],
            depends=headers,
            include_dirs=["csrc/include", "csrc", "kernels", *torch_include],
            define_macros=[*stable_abi, ("USE_CUDA", None)],
            extra_compile_args=nvcc_flags,
            extra_link_args=["--cudart=shared"],
            library_dirs=[str(torch_root / "lib")],
            libraries=["torch", "torch_cpu", "torch_cuda", "c10"],
            py_limited_api=True,
        ),
    ]


def switch_of(extension: Extension) -> str:
    """Return the variable that decides whether this extension is built."""
    return "FASTMTL_BUILD_CUDA" if extension.name == "fastmtl._CUDA" else "FASTMTL_BUILD_CPP"


class Build(build):
    """Build into an empty folder: what an earlier build left there would go into the wheel."""

    def run(self) -> None:
        """Build everything."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildExtensions(build_ext):
    """Compile the extensions in parallel, keep their objects between builds, and say what was left out and why."""

    def build_extensions(self) -> None:
        """Build what can be built; raise where a build was asked for and failed."""
        self.torch = find_torch()
        self.compiler_command = find_compiler()
        built: dict[str, str] = {}
        missing: dict[str, str] = {}
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(max_workers=jobs) as pool:
            objects: dict[str, list[Future[Path]]] = {}
            for extension in self.extensions:
                try:
                    self.check(extension)
                    objects[extension.name] = self.compile(extension, pool)
                except BuildError as error:
                    self.leave_out(extension, error, missing)
            for extension in self.extensions:
                if extension.name not in objects:
                    continue
                try:
                    self.link(extension, [str(done.result()) for done in objects[extension.name]])
                    built[extension.name] = " ".join(extension.extra_compile_args)
                except BuildError as error:
                    self.leave_out(extension, error, missing)
        if "fastmtl._C" in missing:
            reason = missing["fastmtl._C"]
            print(f"fastmtl: installing without the C++ kernels, plain torch operators take their place: {reason}")
        torch = self.torch.version if self.torch else None
        self.write_record({"torch": torch, "python": sys.version.split()[0], "built": built, "missing": missing})

    def leave_out(self, extension: Extension, error: BuildError, missing: dict[str, str]) -> None:
        """Note why an extension is missing; end the build where it was asked for."""
        Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        missing[extension.name] = str(error)
        if wish(switch_of(extension)) is True:
            raise SystemExit(f"fastmtl: {extension.name} was asked for but cannot be built: {error}") from error

    def check(self, extension: Extension) -> None:
        """Raise BuildError where this extension is not wanted or lacks a tool."""
        switch = switch_of(extension)
        if wish(switch) is False:
            raise BuildError(f"{switch}=0 was set")
        if sys.platform not in ("linux", "darwin"):
            raise BuildError(f"compiled kernels are built on Linux and macOS, not on {sys.platform}")
        if self.compiler_command is None:
            raise BuildError("no C++ compiler was found (looked for CXX, c++, g++, clang++)")
        if extension.name == "fastmtl._host":
            if pybind11_include() is None:
                raise BuildError("pybind11 is not installed")
        elif self.torch is None:
            raise BuildError(
                "the build found no torch 2.11 or newer; with torch installed, "
                "pip install --no-build-isolation --no-deps --force-reinstall . adds them"
            )
        if extension.name == "fastmtl._CUDA":
            if shutil.which("nvcc") is None:
                raise BuildError("nvcc was not found")
            if self.torch.cuda is None:
                raise BuildError(f"torch {self.torch.version} is built without CUDA")

    def tool(self, extension: Extension) -> list[str]:
        """Return the command that compiles and links an extension."""
        return [shutil.which("nvcc")] if extension.name == "fastmtl._CUDA" else self.compiler_command

    def compile(self, extension: Extension, pool: ThreadPoolExecutor) -> list[Future[Path]]:
        """Start to compile the sources of an extension side by side; return their objects to come."""
        cuda = extension.name == "fastmtl._CUDA"
        tool = self.tool(extension)
        includes = [*extension.include_dirs, sysconfig.get_path("include")]
        common = [
            *extension.extra_compile_args,
            # Headers of others are system headers: their warnings are not ours to see.
            *(flag for path in includes for flag in ("-isystem" if os.path.isabs(path) else "-I", path)),
            *(f"-D{name}" if value is None else f"-D{name}={value}" for name, value in extension.define_macros),
            *([] if cuda else shlex.split(os.environ.get("CXXFLAGS", ""))),
        ]
        if extension.name == "fastmtl._host":
            common.append(f"-DFASTMTL_BUILD_FLAGS={json.dumps(' '.join(extension.extra_compile_args))}")
        # Objects of the stable ABI are those of every Python; torch's version says which headers they were made with.
        shared = [flag for flag in common if not os.path.isabs(flag)] if extension.py_limited_api else common
        key = hashlib.sha256(json.dumps([tool, shared, self.torch and self.torch.version]).encode()).hexdigest()[:12]
        folder = ROOT / "build" / "objects" / f"{extension.name}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        newest_header = max((os.path.getmtime(ROOT / path) for path in extension.depends), default=0.0)

        def changed(source: str) -> float:
            return os.path.getmtime(ROOT / source) if (ROOT / source).is_file() else float("inf")

        def compile_one(source: str) -> Path:
            result = folder / (Path(source).name + ".o")
            newest = max(newest_header, changed(source), changed(f"csrc/{Path(source).stem}.cpp"))
            if not result.is_file() or result.stat().st_mtime <= newest:
                partial = result.with_suffix(f".{os.getpid()}.part.o")
                run([*tool, "-c", source, "-o", str(partial), *common])
                partial.replace(result)
            return result

        return [pool.submit(compile_one, source) for source in extension.sources]

    def link(self, extension: Extension, objects: list[str]) -> None:
        """Link an extension's objects."""
        cuda = extension.name == "fastmtl._CUDA"
        target = Path(self.get_ext_fullpath(extension.name))
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        target.parent.mkdir(parents=True, exist_ok=True)
        run(
            [
                *self.tool(extension),
                *shared,
                *objects,
                "-o",
                str(target),
                *extension.extra_link_args,
                *(f"-L{path}" for path in extension.library_dirs),
                *(f"-l{name}" for name in extension.libraries),
                *([] if cuda else shlex.split(os.environ.get("LDFLAGS", ""))),
            ]
        )

    def write_record(self, record: dict[str, object]) -> None:
        """Leave what was built, and what was not and why, for `fastmtl doctor` and the loader."""
        path = Path(self.build_lib) / "fastmtl" / "_build.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")

    def copy_extensions_to_source(self) -> None:
        """Place the extensions and the record in the source tree, as an editable install runs from there."""
        for extension in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(extension.name)
            placed = ROOT / self.get_ext_filename(extension.name)
            placed.unlink(missing_ok=True)
            if built.is_file():
                shutil.copy2(built, placed)
        shutil.copy2(Path(self.build_lib) / "fastmtl" / "_build.json", ROOT / "fastmtl" / "_build.json")


def run(command: list[str]) -> None:
    """Run one tool; its first error line becomes the BuildError, its whole output goes to the build's log."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.stdout or done.stderr:
        print(done.stdout + done.stderr, file=sys.stderr)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{Path(command[0]).name} failed: {reason.strip()}")


def packages() -> list[str]:
    """Return all packages: `fastmtl`, and the two kept beside it in the repository."""
    found = find_packages(str(ROOT), include=["fastmtl", "fastmtl.*"])
    for name, folder in PACKAGE_DIRS.items():
        found += [name, *(f"{name}.{inner}" for inner in find_packages(str(ROOT / folder)))]
    return sorted(set(found))


if __name__ == "__main__":
    setup(
        packages=packages(),
        package_dir=PACKAGE_DIRS,
        ext_modules=get_build_parameters(find_torch(), pybind11_include()),
        cmdclass={"build": Build, "build_ext": BuildExtensions},
    )
