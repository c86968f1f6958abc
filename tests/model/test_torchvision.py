"""torchvision can be imported whatever torch it was built for, and only what is missing is defined."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmtl.errors import BackendError
from fastmtl.model import _torchvision
from fastmtl.support import vision


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_import_in_a_fresh_process() -> None:
    out = _run(
        "from fastmtl.model._torchvision import import_torchvision\n"
        "torchvision = import_torchvision()\n"
        "assert import_torchvision() is torchvision\n"
        "import torch\n"
        "print(torchvision.models.resnet18(num_classes=3)(torch.zeros(2, 3, 32, 32)).shape)"
    )
    assert out == "torch.Size([2, 3])"


@pytest.mark.slow
def test_torchmetrics_after_fastmtl() -> None:
    out = _run(
        "from fastmtl.metrics import TorchMetric\n"
        "import torchmetrics, torch\n"
        "metric = TorchMetric(torchmetrics.classification.BinaryAccuracy())\n"
        "metric.update_fun(torch.tensor([0.9, 0.2, 0.7, 0.1]), torch.tensor([1, 0, 0, 0]))\n"
        "print(metric.score_fun())"
    )
    assert out == "[0.75]"


@pytest.mark.slow
def test_an_import_that_failed_before_fastmtl_works_after_it() -> None:
    out = _run(
        "try:\n"
        "    import torchvision\n"
        "except RuntimeError:\n"
        "    pass\n"
        "import fastmtl, torchvision\n"
        "from torchvision.models import resnet18\n"
        "print(resnet18.__name__)"
    )
    assert out == "resnet18"


def test_looking_for_torchvision_loads_nothing() -> None:
    out = _run(
        "import fastmtl, importlib.util, sys\n"
        "found = importlib.util.find_spec('torchvision') is not None\n"
        "print(found, 'torch' in sys.modules, 'torchvision' in sys.modules)"
    )
    assert out == "True False False"


@pytest.mark.slow
def test_importing_the_package_leaves_torchvision_alone() -> None:
    assert _run("import sys, fastmtl.model, fastmtl.data; print('torchvision' in sys.modules)") == "False"


def test_schemas_that_exist_are_not_defined_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _torchvision.import_torchvision()

    def refuse(*args: object) -> None:
        raise AssertionError("defined a schema that exists")

    monkeypatch.setattr(torch.library.Library, "define", refuse)
    vision.supply_operators(tmp_path)


def test_without_torchvision_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torchvision, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="pip install torchvision"):
        _torchvision.import_torchvision()
