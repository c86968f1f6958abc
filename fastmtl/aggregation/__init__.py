"""Aggregators, which turn a Jacobian into a gradient, and weightings, which turn its Gram matrix into weights.

By TorchJD's names and arguments, over the solvers of :mod:`fastmtl.ops` that the trainer's strategies use. All are
modules: a forward hook on an aggregator, on its ``weighting`` or ``gramian_weighting`` sees what goes in and comes out.
Those derived from ``Stateful`` remember something from call to call; ``reset()`` forgets it. A call whose gradients are
NaN or infinite returns such numbers and changes nothing that is remembered.
"""

from __future__ import annotations

from fastmtl.aggregation import columns, constant, preferring, remembering, solvers, stochastic
from fastmtl.aggregation.base import Aggregator, GramianWeightedAggregator, WeightedAggregator, Weighting
from fastmtl.aggregation.columns import *
from fastmtl.aggregation.constant import *
from fastmtl.aggregation.preferring import *
from fastmtl.aggregation.remembering import *
from fastmtl.aggregation.solvers import *
from fastmtl.aggregation.stochastic import *

__all__ = [
    "Aggregator",
    "GramianWeightedAggregator",
    "WeightedAggregator",
    "Weighting",
    *columns.__all__,
    *constant.__all__,
    *preferring.__all__,
    *remembering.__all__,
    *solvers.__all__,
    *stochastic.__all__,
]
