"""Errors that users can act on; a message names the argument, the value and what is allowed."""

from __future__ import annotations

__all__ = ["BackendError", "CheckpointError", "FastmtlError", "NonFiniteError", "PeerError", "UsageError"]


class FastmtlError(Exception):
    """Base of all deliberate errors; the command line prints them without a traceback."""


class UsageError(FastmtlError, ValueError):
    """An argument, configuration or data set cannot be used as given."""


class BackendError(FastmtlError, RuntimeError):
    """A forced backend or device is not available."""


class CheckpointError(FastmtlError, RuntimeError):
    """A checkpoint is missing, damaged or belongs to another model."""


class PeerError(FastmtlError, RuntimeError):
    """Another process of the group has ended or does not answer."""


class NonFiniteError(FastmtlError, FloatingPointError):
    """A loss or a gradient became NaN or infinite during training."""
