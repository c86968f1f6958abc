"""Weighting strategies, by LibMTL's names."""

from __future__ import annotations

from fastmtl.support.named import Found, Kind
from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper, Rows, Weights
from fastmtl.weighting.Aligned_MTL import Aligned_MTL as Aligned_MTL
from fastmtl.weighting.AutoLambda import AutoLambda as AutoLambda
from fastmtl.weighting.CAGrad import CAGrad as CAGrad
from fastmtl.weighting.ConFIG import ConFIG as ConFIG
from fastmtl.weighting.DB_MTL import DB_MTL as DB_MTL
from fastmtl.weighting.DualProj import DualProj as DualProj
from fastmtl.weighting.DWA import DWA as DWA
from fastmtl.weighting.EW import EW as EW
from fastmtl.weighting.ExcessMTL import ExcessMTL as ExcessMTL
from fastmtl.weighting.FairGrad import FairGrad as FairGrad
from fastmtl.weighting.FAMO import FAMO as FAMO
from fastmtl.weighting.FORUM import FORUM as FORUM
from fastmtl.weighting.GLS import GLS as GLS
from fastmtl.weighting.GO4Align import GO4Align as GO4Align
from fastmtl.weighting.GradDrop import GradDrop as GradDrop
from fastmtl.weighting.GradNorm import GradNorm as GradNorm
from fastmtl.weighting.GradVac import GradVac as GradVac
from fastmtl.weighting.IMTL import IMTL as IMTL
from fastmtl.weighting.MConFIG import MConFIG as MConFIG
from fastmtl.weighting.MGDA import MGDA as MGDA
from fastmtl.weighting.MoCo import MoCo as MoCo
from fastmtl.weighting.MoDo import MoDo as MoDo
from fastmtl.weighting.MOML import MOML as MOML
from fastmtl.weighting.Nash_MTL import Nash_MTL as Nash_MTL
from fastmtl.weighting.PCD import PCD as PCD
from fastmtl.weighting.PCGrad import PCGrad as PCGrad
from fastmtl.weighting.RLW import RLW as RLW
from fastmtl.weighting.SDMGrad import SDMGrad as SDMGrad
from fastmtl.weighting.SI import SI as SI
from fastmtl.weighting.STCH import STCH as STCH
from fastmtl.weighting.UPGrad import UPGrad as UPGrad
from fastmtl.weighting.UW import UW as UW

WEIGHTINGS: dict[str, type[AbsWeighting]] = {
    name: strategy
    for name, strategy in sorted(vars().items(), key=lambda item: item[0].lower())
    if isinstance(strategy, type) and issubclass(strategy, AbsWeighting) and strategy is not AbsWeighting
}

__all__ = ["WEIGHTINGS", "AbsWeighting", "Hyper", "Rows", "Weights", "find_weighting", *WEIGHTINGS]


def find_weighting(name: str) -> Found[type[AbsWeighting]]:
    """Return the class of a strategy's name.

    It is one of ``WEIGHTINGS``, of an entry point of the group ``fastmtl.weightings``, ``module:class`` or
    ``file.py:class``.

    Raises:
        UsageError: There is no such name, or it is no strategy.
    """
    return Kind("weighting", "fastmtl.weightings").find_class(name, WEIGHTINGS, AbsWeighting)
