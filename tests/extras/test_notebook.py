"""In a notebook the progress is a widget, and no cell has control codes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CELL = """
import fastmtl.cli
assert fastmtl.cli.main(["train", "--encoder", "conv", "--train-size", "64", "--batch-size", "16", "--limit-batches",
                         "2", "--no-plot", "--no-tensorboard", "--run-dir", RUN]) == 0
"""


def test_a_cell_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    run = tmp_path / "run"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"RUN = {str(run)!r}\n{CELL}")])
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    printed = "".join(output.get("text", "") for output in outputs)
    assert "Epoch: 0000 | TRAIN:" in printed
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert "application/vnd.jupyter.widget-view+json" in kinds
    assert "\\x1b" not in repr(outputs)
    assert "\x1b" not in (run / "train.log").read_text()
