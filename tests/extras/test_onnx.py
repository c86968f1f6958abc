"""Programs of ONNX give the model's numbers, with other batch sizes than they were exported with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmtl import load
from fastmtl.cli import main

SMALL = ["--encoder", "conv", "--train-size", "64", "--batch-size", "16", "--limit-batches", "2", "--no-plot"]


@pytest.mark.parametrize("arch", ["hps", "mtan"])
def test_a_run_as_onnx(arch: str, tmp_path: Path) -> None:
    import onnxruntime

    run, out = tmp_path / "run", tmp_path / "run" / "export"
    assert (
        main(["train", "--arch", arch, "--weighting", "mgda", *SMALL, "--no-tensorboard", "--run-dir", str(run)]) == 0
    )
    assert main(["export", str(run), "--format", "onnx"]) == 0
    assert main(["export", str(run), "--format", "onnx", "--parts", "apart"]) == 0
    model = load(run)
    for rows in (1, 7):
        images = torch.randn(rows, 3, 32, 32)
        with torch.no_grad():
            wanted = model(images)
        whole: Any = onnxruntime.InferenceSession(out / "model.onnx")
        names = [entry.name for entry in whole.get_outputs()]
        got = dict(zip(names, whole.run(None, {"input": images.numpy()}), strict=True))
        assert names == ["left", "right"]
        backbone: Any = onnxruntime.InferenceSession(out / "backbone.onnx")
        features = dict(
            zip((o.name for o in backbone.get_outputs()), backbone.run(None, {"input": images.numpy()}), strict=True)
        )
        for task in names:
            np.testing.assert_allclose(got[task], wanted[task], rtol=1e-5, atol=1e-5)
            head: Any = onnxruntime.InferenceSession(out / f"head-{task}.onnx")
            feed = {entry.name: features[entry.name] for entry in head.get_inputs()}
            np.testing.assert_allclose(head.run(None, feed)[0], wanted[task], rtol=1e-5, atol=1e-5)
