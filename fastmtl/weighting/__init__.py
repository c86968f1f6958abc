"""Weighting strategies, by LibMTL's names."""

from __future__ import annotations

from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper, Rows, Weights
from fastmtl.weighting.Aligned_MTL import Aligned_MTL
from fastmtl.weighting.AutoLambda import AutoLambda
from fastmtl.weighting.CAGrad import CAGrad
from fastmtl.weighting.ConFIG import ConFIG
from fastmtl.weighting.DB_MTL import DB_MTL
from fastmtl.weighting.DualProj import DualProj
from fastmtl.weighting.DWA import DWA
from fastmtl.weighting.EW import EW
from fastmtl.weighting.ExcessMTL import ExcessMTL
from fastmtl.weighting.FairGrad import FairGrad
from fastmtl.weighting.FAMO import FAMO
from fastmtl.weighting.FORUM import FORUM
from fastmtl.weighting.GLS import GLS
from fastmtl.weighting.GO4Align import GO4Align
from fastmtl.weighting.GradDrop import GradDrop
from fastmtl.weighting.GradNorm import GradNorm
from fastmtl.weighting.GradVac import GradVac
from fastmtl.weighting.IMTL import IMTL
from fastmtl.weighting.MGDA import MGDA
from fastmtl.weighting.MoCo import MoCo
from fastmtl.weighting.MoDo import MoDo
from fastmtl.weighting.MOML import MOML
from fastmtl.weighting.Nash_MTL import Nash_MTL
from fastmtl.weighting.PCD import PCD
from fastmtl.weighting.PCGrad import PCGrad
from fastmtl.weighting.RLW import RLW
from fastmtl.weighting.SDMGrad import SDMGrad
from fastmtl.weighting.SI import SI
from fastmtl.weighting.STCH import STCH
from fastmtl.weighting.UPGrad import UPGrad
from fastmtl.weighting.UW import UW

__all__ = [
    "DB_MTL",
    "DWA",
    "EW",
    "FAMO",
    "FORUM",
    "GLS",
    "IMTL",
    "MGDA",
    "MOML",
    "PCD",
    "RLW",
    "SI",
    "STCH",
    "UW",
    "WEIGHTINGS",
    "AbsWeighting",
    "Aligned_MTL",
    "AutoLambda",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "ExcessMTL",
    "FairGrad",
    "GO4Align",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "Hyper",
    "MoCo",
    "MoDo",
    "Nash_MTL",
    "PCGrad",
    "Rows",
    "SDMGrad",
    "UPGrad",
    "Weights",
]

WEIGHTINGS: dict[str, type[AbsWeighting]] = {
    name: found
    for name, found in sorted(vars().items(), key=lambda item: item[0].lower())
    if isinstance(found, type) and issubclass(found, AbsWeighting) and found is not AbsWeighting
}
