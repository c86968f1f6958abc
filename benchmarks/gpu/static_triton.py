"""What Triton's compiler makes of every launch, without a GPU: registers, stack, shared memory, widths of loads.

    python benchmarks/gpu/static_triton.py            compare what is launched with static_triton.csv, and the rules
    python benchmarks/gpu/static_triton.py --write    compile what the table lacks, take what is launched as the table

The table is that of one Triton release, named in it. A row holds for the launch that has its digest: kernel, dtypes,
alignments and constants.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import triton
from fastmtl.benchmarks.gpu.sass import count_instructions
from fastmtl.benchmarks.gpu.static import Row, StaticError, run_tool, tool
from fastmtl.benchmarks.gpu.triton_launches import Launch, record

TABLE = Path(__file__).with_suffix(".csv")
COLUMNS = (
    *("triton", "kernel", "launch", "arch", "registers", "stack", "shared", "warps"),
    *("loads", "loads_128", "stores_128", "local", "digest"),
)
_INSTRUCTIONS = ("loads", "loads_128", "stores_128", "local")
# Kernels whose time is that of the memory they read, and those whose lanes also write whole vectors.
_STREAMS, _WRITERS = ("gram_", "combine_", "graddrop_"), ("combine_",)


def measure(launch: Launch) -> Row:
    """Return the row of one launch.

    Raises:
        StaticError: A tool is missing.
    """
    compiled = launch.compile()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = run_tool([tool("cuobjdump"), "--dump-resource-usage", "--dump-sass", file.name])
    used = dict(re.findall(r"\b(REG|STACK):(\d+)", said))
    (instructions,) = count_instructions(said).values()
    return {
        "triton": triton.__version__,
        "kernel": launch.kernel.__name__,
        "launch": launch.label,
        "arch": str(launch.capability),
        "registers": used["REG"],
        "stack": used["STACK"],
        "shared": str(compiled.metadata.shared),
        "warps": str(launch.warps),
        **{kind: str(instructions[kind]) for kind in _INSTRUCTIONS},
        "digest": launch.digest,
    }


def broken_rules(rows: Sequence[Row]) -> list[str]:
    """Return what no launch may do, a sentence for each that does."""
    faults = []
    for row in rows:
        name = f"{row['kernel']} ({row['launch']}) for sm_{row['arch']}"
        if int(row["stack"]) or int(row["local"]):
            faults.append(f"{name} spills registers.")
        if re.search(r"%16|ALIGNED=False|\bnumel=1\b", row["launch"]):
            continue
        if row["kernel"].startswith(_STREAMS) and not int(row["loads_128"]):
            faults.append(f"{name} has no loads of 128 bits.")
        if row["kernel"].startswith(_WRITERS) and not int(row["stores_128"]):
            faults.append(f"{name} has no stores of 128 bits.")
    return faults


def read_table() -> list[Row]:
    """Return the committed table."""
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def differences(launches: Sequence[Launch], table: Sequence[Row]) -> list[str]:
    """Return which launches a table of this Triton release lacks or has too many; nothing for another release's."""
    if table[0]["triton"] != triton.__version__:
        return []
    now = {launch.digest: launch for launch in launches}
    before = {row["digest"]: row for row in table}
    said = [f"{now[d].kernel.__name__} ({now[d].label}) is not in the table." for d in now.keys() - before.keys()]
    said += [f"{before[d]['kernel']} ({before[d]['launch']}) is gone." for d in before.keys() - now.keys()]
    return sorted(said)


# What the processes of a pool measure, by number: kernels cannot be sent to a process, which is forked with them.
_pending: list[Launch] = []


def _measure_pending(number: int) -> Row:
    return measure(_pending[number])


def measured(launches: Sequence[Launch], table: Sequence[Row], jobs: int) -> list[Row]:
    """Return the rows of launches: those of the table where they hold, others by compiling, ``jobs`` side by side."""
    rows = [row for row in table if row["triton"] == triton.__version__]
    known = {row["digest"]: row for row in rows}
    missing = [launch for launch in launches if launch.digest not in known]
    if missing:
        with multiprocessing.get_context("fork").Pool(jobs, _pending.extend, (missing,)) as pool:
            known |= {row["digest"]: row for row in pool.imap_unordered(_measure_pending, range(len(missing)))}
    rows = [known[launch.digest] for launch in launches]
    return sorted(rows, key=lambda row: (row["kernel"], row["arch"], row["launch"]))


def main() -> None:
    """Compare or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="take what is launched now as the table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers run side by side")
    options = parser.parse_args()
    launches = record()
    table = read_table() if TABLE.is_file() else []
    try:
        if options.write:
            table = measured(launches, table, options.jobs)
            with TABLE.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(table)
    except StaticError as error:
        raise SystemExit(str(error)) from error
    faults = broken_rules(table) + differences(launches, table)
    print(f"{len(table)} launches")
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
