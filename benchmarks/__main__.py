"""`python -m fastmtl.benchmarks kernels --op gram --csv gram.csv`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from fastmtl.benchmarks.registry import BENCHES
from fastmtl.benchmarks.runner import run_kernels


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m fastmtl.benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)
    kernels = commands.add_parser("kernels", help="time the ops")
    kernels.add_argument("--op", action="append", choices=list(BENCHES), help="op to time; all without it")
    kernels.add_argument("--device", default="cpu", type=torch.device)
    kernels.add_argument("--csv", type=Path, help="file the rows are written to")
    kernels.add_argument("--quick", action="store_true", help="few cases, little time")
    kernels.add_argument("--threads", type=int, help="CPU threads; torch's default without it")
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    run_kernels(given.op, given.device, given.csv, given.quick)


if __name__ == "__main__":
    main()
