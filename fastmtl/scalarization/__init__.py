"""Scalarizers: one loss from several, by TorchJD's names.

Calling one gives a scalar for ``backward()``. All are modules: forward hooks see the losses and the scalar. Those
derived from ``Stateful`` remember something from call to call; ``reset()`` forgets it.
"""

from __future__ import annotations

from fastmtl.scalarization.base import Scalarizer
from fastmtl.scalarization.fixed import COSMOS, PBI, STCH, Constant, GeometricMean, Mean, Random, Sum
from fastmtl.scalarization.remembering import DWA, FAMO, IMTLL, UW

__all__ = [
    "COSMOS",
    "DWA",
    "FAMO",
    "IMTLL",
    "PBI",
    "STCH",
    "UW",
    "Constant",
    "GeometricMean",
    "Mean",
    "Random",
    "Scalarizer",
    "Sum",
]
