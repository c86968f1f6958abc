"""What a compiled function needs to be differentiated several times."""

from __future__ import annotations

from typing import Any

__all__ = ["allow_repeated_backwards"]


def allow_repeated_backwards() -> None:
    """Let compiled backward passes run several times: forbid them to write into the saved activations.

    A shared network's backward pass runs once per task over the same activations; with donated buffers the second
    task's gradient would be computed from overwritten memory, or torch would refuse. What was compiled before stays as
    it is.
    """
    import torch._functorch.config as functorch_config

    functorch_config.donated_buffer = False
    # From torch 2.12 on a setting belongs to the thread that made it, and the backward pass has threads of its own.
    entry: Any = getattr(functorch_config, "_config", {}).get("donated_buffer")
    if hasattr(entry, "default"):
        entry.default = False
