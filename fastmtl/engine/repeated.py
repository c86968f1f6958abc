"""What a compiled function needs to be differentiated several times."""

from __future__ import annotations

from typing import Any

__all__ = ["allow_repeated_backwards"]


# Part of the key of torch's caches.
_TAG = "fastmtl.repeated-backwards"


def allow_repeated_backwards() -> None:
    """Let compiled backward passes run several times: forbid them to write into the saved activations.

    A shared network's backward pass runs once per task over the same activations; with donated buffers the second
    task's gradient would be computed from overwritten memory, or torch would refuse. What was compiled before stays as
    it is. Torch's caches on disk do not tell backward passes with donated buffers from others, so that those of other
    programs, of which the second gradient would be silently wrong, are kept apart by a tag.
    """
    import torch._functorch.config as functorch_config
    import torch.compiler.config as compiler_config

    _set(functorch_config, "donated_buffer", False)
    tag = compiler_config.cache_key_tag
    if _TAG not in tag:
        _set(compiler_config, "cache_key_tag", tag + _TAG)


def _set(config: Any, name: str, value: Any) -> None:
    setattr(config, name, value)
    # From torch 2.12 on a setting belongs to the thread that made it, and the backward pass has threads of its own.
    entry: Any = getattr(config, "_config", {}).get(name)
    if hasattr(entry, "default"):
        entry.default = value
