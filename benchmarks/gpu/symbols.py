"""Links the CUDA extension with the libraries of a CUDA build of torch, and writes what it takes from which.

    python benchmarks/gpu/symbols.py FOLDER

FOLDER is the package of the oldest torch that is supported, such as `torch` in its unpacked wheel. No GPU is needed,
nor the libraries that torch itself needs. static.py holds every source that it compiles against `symbols.csv`.
"""

from __future__ import annotations

import argparse
import csv
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastmtl.benchmarks.gpu.static import BUILD, ROOT, SYMBOLS, compile_source, run_tool, taken_from_torch, tool

_LIBRARIES = ("torch", "torch_cpu", "torch_cuda", "c10")


def _defined(library: Path) -> set[str]:
    """Return the symbols that a shared library has."""
    said = run_tool([tool("nm"), "-D", "--defined-only", "--format=posix", str(library)])
    return {line.split(" ", 1)[0].split("@")[0] for line in said.splitlines()}


def link(torch: Path, jobs: int = 1) -> Path:
    """Return the CUDA extension, for sm_90a, linked with a torch so that a symbol nobody has is an error.

    Raises:
        StaticError: A tool is missing, or a symbol.
    """
    sources = sorted((ROOT / "kernels").glob("*.cu"))
    with ThreadPoolExecutor(jobs) as pool:
        objects = [str(result) for result, _ in pool.map(lambda source: compile_source(source, "90a"), sources)]
    target = BUILD / "_CUDA.abi3.so"
    # The libraries that torch itself needs may be missing.
    strict = "-Xlinker=-z,defs,--allow-shlib-undefined"
    libraries = [f"-L{torch / 'lib'}", *(f"-l{name}" for name in _LIBRARIES)]
    run_tool([tool("nvcc"), "-shared", "--cudart=shared", strict, "-o", str(target), *objects, *libraries])
    return target


def main() -> None:
    """Link and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("torch", type=Path, help="a torch package with CUDA")
    parser.add_argument("--jobs", type=int, default=1, help="compilers run side by side")
    options = parser.parse_args()
    found = re.search(r"__version__ = '(.+?)'", (options.torch / "version.py").read_text())
    version = found[1] if found else "unknown"
    taken = taken_from_torch(link(options.torch, options.jobs))
    rows = []
    for name in _LIBRARIES:
        defined = _defined(options.torch / "lib" / f"lib{name}.so")
        rows += [{"torch": version, "library": name, "symbol": symbol} for symbol in sorted(taken & defined)]
    with SYMBOLS.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("torch", "library", "symbol"), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} symbols of torch {version}")


if __name__ == "__main__":
    main()
