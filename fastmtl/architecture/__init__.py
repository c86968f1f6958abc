"""Multi-task architectures, by LibMTL's names."""

from __future__ import annotations

from fastmtl.architecture.abstract_arch import AbsArchitecture
from fastmtl.architecture.AITM import AITM
from fastmtl.architecture.CGC import CGC
from fastmtl.architecture.Cross_stitch import Cross_stitch
from fastmtl.architecture.DSelect_k import DSelect_k
from fastmtl.architecture.ESMM import ESMM
from fastmtl.architecture.HPS import HPS
from fastmtl.architecture.LTB import LTB
from fastmtl.architecture.MMoE import MMoE
from fastmtl.architecture.MTAN import MTAN
from fastmtl.architecture.PLE import PLE
from fastmtl.architecture.STL import STL
from fastmtl.support.hyper import Hyper
from fastmtl.support.named import Found, Kind

__all__ = [
    "AITM",
    "ARCHITECTURES",
    "CGC",
    "ESMM",
    "HPS",
    "LTB",
    "MTAN",
    "PLE",
    "STL",
    "AbsArchitecture",
    "Cross_stitch",
    "DSelect_k",
    "Hyper",
    "MMoE",
    "find_architecture",
]

ARCHITECTURES: dict[str, type[AbsArchitecture]] = {
    architecture.__name__: architecture
    for architecture in (HPS, MTAN, Cross_stitch, MMoE, CGC, PLE, DSelect_k, LTB, STL, ESMM, AITM)
}


def find_architecture(name: str) -> Found[type[AbsArchitecture]]:
    """Return the class of an architecture's name.

    It is one of ``ARCHITECTURES``, of an entry point of the group ``fastmtl.architectures``, ``module:class`` or
    ``file.py:class``.

    Raises:
        UsageError: There is no such name, or it is no architecture.
    """
    return Kind("architecture", "fastmtl.architectures").find_class(name, ARCHITECTURES, AbsArchitecture)
