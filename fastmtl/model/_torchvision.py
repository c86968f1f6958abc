"""Import torchvision beside a torch that cannot load its C++ operators."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

from fastmtl.errors import BackendError

__all__ = ["import_torchvision"]

# torchvision's Python code registers fake implementations for these two at import and fails where they are unknown.
_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# A library's definitions live as long as the object.
_library: torch.library.Library | None = None


def _load_operators(folder: Path) -> None:
    for path in folder.glob("_C*"):
        try:
            torch.ops.load_library(str(path))
        except OSError:
            # Built for another torch (CUDA operators beside a CPU torch): the models need none of its operators.
            continue


def _define_missing_schemas() -> None:
    global _library
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        _library = _library or torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            _library.define(name + _SCHEMAS[name])


def import_torchvision() -> ModuleType:
    """Return the torchvision module, importable also where its compiled operators cannot be loaded.

    The wheel on PyPI is linked against CUDA; beside a CPU torch its operators stay unknown and its import fails. The
    models and transforms are plain Python and work all the same, once the schemas that its import asks for exist.
    Where the operators do load, nothing is defined here.

    Raises:
        BackendError: torchvision is not installed.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise BackendError("This encoder needs torchvision, which is not installed: pip install torchvision.")
    _load_operators(Path(spec.origin).parent)
    _define_missing_schemas()
    return importlib.import_module("torchvision")
