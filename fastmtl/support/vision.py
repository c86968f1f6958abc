"""Let torchvision be imported beside a torch that cannot load its compiled operators.

The wheel on PyPI is linked against CUDA; beside a CPU torch its operators stay unknown and its import fails, and with
it that of torchmetrics and of whatever else imports torchvision. The models and transforms are plain Python and work
all the same, once the schemas that its import asks for exist.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["repair_at_import", "supply_operators"]

# torchvision's Python code registers fake implementations for these two at import and fails where they are unknown.
_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# A library's definitions live as long as the object.
_library: Any = None


def supply_operators(folder: Path) -> None:
    """Load the operators of the torchvision in a folder, and define the schemas of those that its import needs.

    Where the operators do load, nothing is defined here.
    """
    _load_operators(folder)
    _define_missing_schemas()


def _load_operators(folder: Path) -> None:
    import torch

    for path in folder.glob("_C*"):
        try:
            torch.ops.load_library(str(path))
        except OSError:
            # Built for another torch (CUDA operators beside a CPU torch): the models need none of its operators.
            continue


def _define_missing_schemas() -> None:
    import torch

    global _library
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        _library = _library or torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            _library.define(name + _SCHEMAS[name])


class _Repair(MetaPathFinder):
    """Finds torchvision where Python does, and has its operators supplied before its code runs."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None or spec.loader is None:
            return None
        folder, run = Path(spec.origin).parent, spec.loader.exec_module

        def supply_and_run(module: ModuleType) -> None:
            supply_operators(folder)
            run(module)

        spec.loader.exec_module = supply_and_run  # type: ignore[method-assign]
        return spec


def repair_at_import() -> None:
    """Have torchvision's operators supplied whenever it is imported, by whomever; nothing is imported now."""
    if not any(isinstance(finder, _Repair) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Repair())
