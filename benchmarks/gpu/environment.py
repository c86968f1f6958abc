"""`python -m fastmtl.benchmarks.gpu.environment cuda FILE`: writes what a result must be compared under, as JSON."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from fastmtl.benchmarks.machine import facts

__all__ = ["environment"]


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, the commit and, on a GPU, its properties."""
    known: dict[str, Any] = {**facts(device), "cuda": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known["capability"] = f"{properties.major}.{properties.minor}"
        known["processors"] = properties.multi_processor_count
        known["memory_bytes"] = properties.total_memory
        known["l2_bytes"] = properties.L2_cache_size
        if shutil.which("nvidia-smi"):
            query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
            done = subprocess.run(
                ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                check=False,
            )
            known[query] = done.stdout.strip()
    return known


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(environment(torch.device(sys.argv[1])), indent=1) + "\n")
