"""Aggregators, which turn a Jacobian into a gradient, and weightings, which turn its Gram matrix into weights.

By TorchJD's names and arguments, over the solvers of :mod:`fastmtl.ops` that the trainer's strategies use. All are
modules: a forward hook on an aggregator, on its ``weighting`` or ``gramian_weighting`` sees what goes in and comes out.
Those derived from ``Stateful`` remember something from call to call; ``reset()`` forgets it.
"""

from __future__ import annotations

from fastmtl.aggregation.base import Aggregator, GramianWeightedAggregator, WeightedAggregator, Weighting
from fastmtl.aggregation.columns import GradDrop, TrimmedMean
from fastmtl.aggregation.constant import (
    Constant,
    ConstantWeighting,
    Mean,
    MeanWeighting,
    Random,
    RandomWeighting,
    Sum,
    SumWeighting,
)
from fastmtl.aggregation.preferring import (
    AlignedMTL,
    AlignedMTLWeighting,
    ConFIG,
    DualProj,
    DualProjWeighting,
    UPGrad,
    UPGradWeighting,
)
from fastmtl.aggregation.remembering import (
    PCD,
    ExcessMTL,
    ExcessMTLWeighting,
    GradVac,
    GradVacWeighting,
    NashMTL,
    NashMTLWeighting,
    PCDWeighting,
)
from fastmtl.aggregation.solvers import (
    IMTLG,
    MGDA,
    CAGrad,
    CAGradWeighting,
    FairGrad,
    FairGradWeighting,
    IMTLGWeighting,
    Krum,
    KrumWeighting,
    MGDAWeighting,
    PCGrad,
    PCGradWeighting,
)
from fastmtl.aggregation.stochastic import CRMOGMWeighting, MoDoWeighting, SDMGradWeighting

__all__ = [
    "IMTLG",
    "MGDA",
    "PCD",
    "Aggregator",
    "AlignedMTL",
    "AlignedMTLWeighting",
    "CAGrad",
    "CAGradWeighting",
    "CRMOGMWeighting",
    "ConFIG",
    "Constant",
    "ConstantWeighting",
    "DualProj",
    "DualProjWeighting",
    "ExcessMTL",
    "ExcessMTLWeighting",
    "FairGrad",
    "FairGradWeighting",
    "GradDrop",
    "GradVac",
    "GradVacWeighting",
    "GramianWeightedAggregator",
    "IMTLGWeighting",
    "Krum",
    "KrumWeighting",
    "MGDAWeighting",
    "Mean",
    "MeanWeighting",
    "MoDoWeighting",
    "NashMTL",
    "NashMTLWeighting",
    "PCDWeighting",
    "PCGrad",
    "PCGradWeighting",
    "Random",
    "RandomWeighting",
    "SDMGradWeighting",
    "Sum",
    "SumWeighting",
    "TrimmedMean",
    "UPGrad",
    "UPGradWeighting",
    "WeightedAggregator",
    "Weighting",
]
