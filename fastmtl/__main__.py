"""``python -m fastmtl`` is the `fastmtl` command."""

from __future__ import annotations

import os
import sys

from fastmtl.cli import main

if __name__ == "__main__":
    code = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A thread of the collectives' library that still lets go of a tensor while the interpreter ends aborts the
        # process, which torchrun would take for a failure.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
