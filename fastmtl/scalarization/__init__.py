"""Scalarizers: one loss from several, by TorchJD's names.

Calling one gives a scalar for ``backward()``. All are modules: forward hooks see the losses and the scalar. Those
derived from ``Stateful`` remember something from call to call; ``reset()`` forgets it.
"""

from __future__ import annotations

from fastmtl.scalarization import fixed, remembering
from fastmtl.scalarization.base import Scalarizer
from fastmtl.scalarization.fixed import *
from fastmtl.scalarization.remembering import *

__all__ = ["Scalarizer", *fixed.__all__, *remembering.__all__]
