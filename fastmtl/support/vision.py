"""Make torchvision importable with a torch that cannot load its compiled operators.

The wheel on PyPI is linked against CUDA. With a CPU build of torch its operators are missing, so that importing it, or
torchmetrics, fails. Models and transforms are plain Python and work once the schemas exist that the import needs.
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

# torchvision's Python code registers fake implementations for these two at import, which fails without schemas.
_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# Definitions are removed with their library object.
_library: Any = None


def supply_operators(folder: Path) -> None:
    """Load the operators of the torchvision in a folder, and define missing schemas that its import needs."""
    import torch

    global _library
    for path in folder.glob("_C*"):
        try:
            torch.ops.load_library(str(path))
        except OSError:
            # Built for another torch; the models need none of its operators.
            continue
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        _library = _library or torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            _library.define(name + _SCHEMAS[name])


class _Repair(MetaPathFinder):
    """Finds torchvision as Python does, and supplies its operators before its code runs."""

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
    """Supply torchvision's operators at its next import, from anywhere; imports nothing."""
    if not any(isinstance(finder, _Repair) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Repair())
