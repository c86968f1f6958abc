"""``python -m fastmtl`` is the `fastmtl` command."""

from __future__ import annotations

import sys

from fastmtl.cli import main

if __name__ == "__main__":
    sys.exit(main())
