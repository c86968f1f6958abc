"""What the compiler made of every CUDA kernel, without a GPU: registers, spills, memory, occupancy, widths of loads.

    python benchmarks/gpu/static.py            compile what changed, hold it against static.csv and the rules
    python benchmarks/gpu/static.py --write    compile all, take what is there now as the table

The table is that of one nvcc release, named in it; with another one the rules alone are checked. Its rows hold for the
sources whose digest they have, with all that those include from here: what has not changed is not compiled again.
Objects are kept in build/static.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastmtl.benchmarks.gpu.sass import count_instructions, loads_under_way

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_suffix(".csv")
# What the oldest supported torch has of what the kernels take from torch; see symbols.py.
SYMBOLS = Path(__file__).with_name("symbols.csv")
BUILD = ROOT / "build" / "static"
ARCHITECTURES = ("80", "90a")
COLUMNS = (
    *("nvcc", "source", "arch", "kernel", "registers", "stack", "spill_stores", "spill_loads", "shared", "threads"),
    *("warps", "loads", "loads_128", "stores_128", "local", "float64", "matrix", "under_way", "unresolved", "digest"),
)
_INSTRUCTIONS = ("loads", "loads_128", "stores_128", "local", "float64", "matrix")

_INCLUDE = ("csrc", "csrc/include", "kernels")
_FLAGS = (
    *("-O3", "-std=c++20", "-DNDEBUG", "-Xcompiler=-fPIC", "--expt-relaxed-constexpr", "-Xptxas=-v"),
    *("-DUSE_CUDA", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
    *("-DPy_LIMITED_API=0x030B0000", *(f"-I{folder}" for folder in _INCLUDE)),
)

# Per processor, the same for sm_80 and sm_90.
_REGISTERS, _WARPS, _BLOCKS = 65536, 64, 32
_SHARED = {"80": 164 * 1024, "90a": 228 * 1024}
_THREADS = {
    "solve_by_warp": 32,
    "gram_tile_kernel": 128,
    "gram_matrix_kernel": 128,
    "gram_reduce_kernel": 256,
    "combine_kernel": 256,
    "graddrop_kernel": 256,
    "graddrop_rows_kernel": 256,
    "ema_kernel": 256,
    "ema_gram_tile_kernel": 128,
    "excess_risk_kernel": 256,
    "risk_reduce_kernel": 256,
    "sort_by_key": 128,
    "add_rows": 128,
    "sum_rows_kernel": 128,
}

# Kernels whose time is that of the memory they read, and those of them that write as much as one row.
_STREAMS = ("gram_tile", "gram_matrix", "combine", "graddrop", "ema", "excess_risk")
_WRITERS = re.compile(r"combine_kernel<\w+, true>|graddrop_.*|ema_.*|excess_risk_kernel.*")
# Those of them that compute in float64: sums over many elements, where float32 runs end; results wider than the rows;
# float64 itself. GradDrop's purities are the sums over the batch or the tasks.
_IN_FLOAT64 = re.compile(r"(ema_)?gram_.*|excess_risk_.*|graddrop_.*|combine_kernel<\w+, false>|.*\bdouble\b.*")

# Bytes that a processor's loads must have under way: what one of 132 takes of 4.3 TB/s in 600 ns, memory's latency.
_ENOUGH_UNDER_WAY = 20 * 1024
# Of 16-bit state beside float64 rows, which are read element by element, half of the loads are not counted.
_HALF_COUNTED = re.compile(r"(ema|excess_risk)_kernel<(Bf|F)16, double>")

Row = dict[str, str]


class StaticError(Exception):
    """A tool is missing or failed; the message says which."""


def tool(name: str) -> str:
    """Return the path of one of CUDA's tools, which Triton's wheel brings too."""
    path = shutil.which(name)
    if path is None:
        spec = importlib.util.find_spec("triton")
        inside = Path(spec.origin).parent / "backends/nvidia/bin" / name if spec and spec.origin else None
        path = str(inside) if inside is not None and inside.is_file() else None
    if path is None:
        raise StaticError(f"{name} was not found.")
    return path


def run_tool(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StaticError(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[:2000]}")
    return done.stdout + done.stderr


def _flags() -> list[str]:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise StaticError("torch is not installed.")
    include = Path(spec.origin).parent / "include"
    system = (include, include / "torch/csrc/api/include", sysconfig.get_path("include"))
    return [*_FLAGS, *(f"-isystem={path}" for path in system)]


def _included(source: Path) -> set[Path]:
    """Return a source and every file of the repository that it includes, directly or not."""
    included, pending = {source}, [source]
    while pending:
        path = pending.pop()
        for name in re.findall(r'^ *# *include +"(.+)"', path.read_text(), re.MULTILINE):
            for folder in (path.parent, *map(ROOT.joinpath, _INCLUDE)):
                inner = (folder / name).resolve()
                if inner.is_file() and inner not in included:
                    included.add(inner)
                    pending.append(inner)
    return included


def _digest(source: Path) -> str:
    """Return a digest of a source, of every file of the repository that it includes, and of the flags."""
    digest = hashlib.sha256(json.dumps(_FLAGS).encode())
    for path in sorted(_included(source)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def compile_source(source: Path, arch: str) -> tuple[Path, str]:
    """Return the object of one source and what ptxas said, from the last build where nothing changed since."""
    command = [tool("nvcc"), "-c", str(source), *_flags(), f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    digest = hashlib.sha256(json.dumps([*command, _digest(source)]).encode())
    result = BUILD / f"{source.stem}.sm_{arch}.{digest.hexdigest()[:12]}.o"
    log = result.with_suffix(".log")
    if not log.is_file():
        for old in BUILD.glob(f"{source.stem}.sm_{arch}.*"):
            old.unlink()
        said = run_tool([*command, "-o", str(result)])
        log.write_text(said)
    return result, log.read_text()


def taken_from_torch(binary: Path) -> set[str]:
    """Return the symbols that an object or a shared library takes from torch's libraries."""
    dynamic = ["-D"] if binary.suffix == ".so" else []
    said = run_tool([tool("nm"), *dynamic, "--undefined-only", "--format=posix", str(binary)])
    names = {line.split(" ", 1)[0] for line in said.splitlines()}
    # Names of the kernels' own functions hold those of torch's types.
    return {name for name in names if re.search(r"torch|c10", name) and not re.match(r"_ZNK?7fastmtl", name)}


def _resources(log: str) -> Iterator[tuple[str, Row]]:
    """Yield each kernel's mangled name and what ptxas says that it uses."""
    for part in log.split("Compiling entry function '")[1:]:
        name = part.split("'", 1)[0]
        properties = part.split("Function properties for")[1]
        row = {"shared": "0"}
        for key, pattern in (
            ("stack", r"(\d+) bytes stack frame"),
            ("spill_stores", r"(\d+) bytes spill stores"),
            ("spill_loads", r"(\d+) bytes spill loads"),
        ):
            found = re.search(pattern, properties)
            row[key] = found[1] if found else "0"
        for key, pattern in (("registers", r"Used (\d+) registers"), ("shared", r"(\d+) bytes smem")):
            found = re.search(pattern, part)
            row[key] = found[1] if found else row.get(key, "")
        yield name, row


def _short(demangled: str) -> str:
    """Return a kernel's name without namespaces, return type and arguments."""
    name = re.sub(r"\(anonymous namespace\)::|fastmtl::|^void ", "", demangled)
    return name.split("(", 1)[0]


def _occupancy(row: Row) -> int:
    """Return the warps that one processor holds at a time."""
    warps = -(-int(row["threads"]) // 32)
    by_warp = -(-int(row["registers"]) * 32 // 256) * 256
    by_registers = _REGISTERS // by_warp // warps
    by_shared = _SHARED[row["arch"]] // (int(row["shared"]) + 1024)
    return min(_BLOCKS, _WARPS // warps, by_registers, by_shared) * warps


def measure(jobs: int = 1, table: Sequence[Row] = ()) -> list[Row]:
    """Return one row per kernel and architecture.

    Args:
        jobs: Compilers that run side by side.
        table: Rows that hold where source and nvcc release are theirs; only other sources are compiled.

    Raises:
        StaticError: A tool is missing, or a source does not compile.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    found = re.search(r"release ([\d.]+)", run_tool([tool("nvcc"), "--version"]))
    release = found[1] if found else "unknown"
    # It has no kernels.
    sources = sorted(set((ROOT / "kernels").glob("*.cu")) - {ROOT / "kernels" / "register.cu"})
    digests = {source.name: _digest(source) for source in sources}
    rows = [row for row in table if (row["nvcc"], row["digest"]) == (release, digests.get(row["source"]))]
    known = {(row["source"], row["arch"]) for row in rows}
    pairs = [(source, arch) for source in sources for arch in ARCHITECTURES if (source.name, arch) not in known]
    # The longest first.
    with ThreadPoolExecutor(jobs) as pool:
        pending = {p: pool.submit(compile_source, *p) for p in sorted(pairs, key=lambda p: -p[0].stat().st_size)}
        compiled = [pending[pair].result() for pair in pairs]
    with SYMBOLS.open(newline="") as file:
        in_torch = {row["symbol"] for row in csv.DictReader(file)}
    for (source, arch), (result, log) in zip(pairs, compiled, strict=True):
        unresolved = " ".join(sorted(taken_from_torch(result) - in_torch))
        sass = run_tool([tool("cuobjdump"), "-sass", str(result)])
        instructions, under_way = count_instructions(sass), loads_under_way(sass)
        for mangled, row in _resources(log):
            kernel = _short(run_tool(["c++filt", mangled]).strip())
            row |= {"nvcc": release, "source": source.name, "arch": arch, "kernel": kernel}
            block = re.fullmatch(r"solve_by_block<.*, (\d+)>", kernel)
            row["threads"] = block[1] if block else str(_THREADS[kernel.split("<", 1)[0]])
            row["warps"] = str(_occupancy(row))
            row |= {kind: str(instructions[mangled][kind]) for kind in _INSTRUCTIONS}
            row["under_way"] = str(under_way[mangled] * 16 * 32 * int(row["warps"]))
            row |= {"unresolved": unresolved, "digest": digests[source.name]}
            rows.append({column: row[column] for column in COLUMNS})
    return sorted(rows, key=lambda row: (row["source"], row["kernel"], row["arch"]))


def broken_rules(rows: list[Row]) -> list[str]:
    """Return what no kernel may do, a sentence for each that does."""
    faults = []
    for row in rows:
        name = f"{row['kernel']} for sm_{row['arch']}"
        streams = row["kernel"].startswith(_STREAMS)
        if row["unresolved"]:
            faults.append(f"{row['source']} takes from torch what symbols.csv has not: {row['unresolved']}.")
        if int(row["spill_stores"]) or int(row["spill_loads"]):
            faults.append(f"{name} spills registers.")
        if streams and (int(row["local"]) or int(row["stack"])):
            faults.append(f"{name} uses local memory.")
        if streams and not int(row["loads_128"]):
            faults.append(f"{name} has no loads of 128 bits.")
        enough = _ENOUGH_UNDER_WAY // (2 if _HALF_COUNTED.fullmatch(row["kernel"]) else 1)
        if streams and int(row["under_way"]) < enough:
            faults.append(f"{name} has only {row['under_way']} bytes of loads under way.")
        if _WRITERS.fullmatch(row["kernel"]) and not int(row["stores_128"]):
            faults.append(f"{name} has no stores of 128 bits.")
        if streams and int(row["float64"]) and not _IN_FLOAT64.fullmatch(row["kernel"]):
            faults.append(f"{name} computes in float64.")
        # By mma.sync on sm_90a too: wgmma takes its operands from shared memory, these lie in registers.
        if row["kernel"].startswith("gram_matrix") and not int(row["matrix"]):
            faults.append(f"{name} does not use the tensor cores.")
    return faults


def read_table() -> list[Row]:
    """Return the committed table."""
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def differences(rows: list[Row], table: list[Row]) -> list[str]:
    """Return how rows differ from a table of the same nvcc release, a sentence for each kernel; nothing for another."""
    if rows[0]["nvcc"] != table[0]["nvcc"]:
        return []

    def key(row: Row) -> tuple[str, str, str]:
        return row["source"], row["kernel"], row["arch"]

    now, before = {key(row): row for row in rows}, {key(row): row for row in table}
    said = [f"{kernel} for sm_{arch} is not in the table." for _, kernel, arch in now.keys() - before.keys()]
    said += [f"{kernel} for sm_{arch} is gone." for _, kernel, arch in before.keys() - now.keys()]
    for kept in now.keys() & before.keys():
        measured = [column for column in COLUMNS if column != "digest"]
        changed = [f"{c} {before[kept][c]} -> {now[kept][c]}" for c in measured if before[kept][c] != now[kept][c]]
        if changed:
            said.append(f"{kept[1]} for sm_{kept[2]}: {', '.join(changed)}.")
    return sorted(said)


def main() -> None:
    """Measure, and compare or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="take what is there now as the table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers run side by side")
    options = parser.parse_args()
    try:
        rows = measure(options.jobs, () if options.write else read_table())
    except StaticError as error:
        raise SystemExit(str(error)) from error
    faults = broken_rules(rows)
    if options.write:
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    else:
        faults += differences(rows, read_table())
    print(f"{len(rows)} kernels")
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
