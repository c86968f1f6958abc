"""``python -m fastmtl`` is the `fastmtl` command."""

from __future__ import annotations

import os
import sys

from fastmtl.cli import main

if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Torch keeps the process group of shards (FSDP2) after it was left. One of its threads that lets go of a tensor
        # while the interpreter ends would abort the process, which torchrun takes for a failure.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
