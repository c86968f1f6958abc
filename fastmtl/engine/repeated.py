"""Settings for compiled functions that are differentiated several times."""

from __future__ import annotations

from typing import Any

__all__ = ["allow_repeated_backwards"]


# Part of the key of torch's caches.
_TAG = "fastmtl.repeated-backwards"


def allow_repeated_backwards() -> None:
    """Turn donated buffers off, so that compiled backward passes can run several times.

    A shared network's backward pass runs once per task over the same activations. With donated buffers it may overwrite
    them, so that the second task's gradient would be wrong. Functions compiled earlier are not affected. Torch's caches
    on disk do not distinguish backward passes by this setting; a tag in their keys does.
    """
    import torch._functorch.config as functorch_config
    import torch.compiler.config as compiler_config

    _set(functorch_config, "donated_buffer", False)
    tag = compiler_config.cache_key_tag
    if _TAG not in tag:
        _set(compiler_config, "cache_key_tag", tag + _TAG)


def _set(config: Any, name: str, value: Any) -> None:
    setattr(config, name, value)
    # From torch 2.12 on settings are per thread, and backward passes run in other threads.
    entry: Any = getattr(config, "_config", {}).get(name)
    if hasattr(entry, "default"):
        entry.default = value
