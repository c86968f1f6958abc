"""Tests of what needs optional packages; they are skipped without these, unless FASTMTL_EXTRAS says they must run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

PACKAGES = {
    "test_timm": ("timm",),
    "test_hf": ("transformers", "tokenizers", "onnxruntime", "onnxscript"),
    "test_adapters": ("peft", "transformers", "accelerate", "lightning"),
    "test_lora": ("peft",),
    "test_graphs": ("torch_geometric",),
    "test_qm9": ("torch_geometric", "rdkit"),
    "test_columns": ("pyarrow", "datasets"),
    "test_row_groups": ("pyarrow",),
    "test_streamed": ("pyarrow",),
    "test_onnx": ("onnxruntime", "onnxscript"),
    "test_stateful": ("torchdata",),
    "test_services": ("wandb", "mlflow"),
    "test_notebook": ("ipywidgets", "nbclient", "ipykernel"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        needed = PACKAGES.get(Path(str(item.path)).stem, ())
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing and not os.environ.get("FASTMTL_EXTRAS"):
            item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(missing)}: make test-extras"))
        item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture
def blobs(tmp_path: Path) -> Callable[[], Path]:
    """Return what makes a folder of images, discs and squares."""

    def make() -> Path:
        import numpy as np
        from PIL import Image

        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for index in range(24):
            pixels = rng.integers(0, 60, (20, 20, 3), dtype=np.uint8)
            pixels[4 : 8 + index % 8, 4:12] += np.uint8(150 if index % 2 else 60)
            Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        return folder

    return make
