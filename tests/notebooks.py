"""Runs the notebooks of examples/; ``python -m tests.notebooks`` stores what they print and draw in them."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["NOTEBOOKS", "cells", "masked", "run"]

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.ipynb"))
Output = dict[str, Any]


def cells(notebook: Path) -> list[dict[str, Any]]:
    """Return the cells of code."""
    content = json.loads(notebook.read_text())
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def run(notebook: Path) -> list[list[Output]]:
    """Run a notebook as one module in an empty folder; return the outputs of each of its cells, in nbformat's form."""
    names: dict[str, Any] = {"__name__": notebook.stem}
    results = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for number, cell in enumerate(cells(notebook)):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), f"{notebook.name}[{number}]", "exec"), names)
            text = printed.getvalue().splitlines(keepends=True)
            outputs = [{"output_type": "stream", "name": "stdout", "text": text}] if text else []
            results.append([*outputs, *map(_picture, _figures())])
    return results


def _figures() -> list[bytes]:
    """Return the figures that a cell has drawn, as PNG, and close them."""
    from matplotlib import pyplot

    images = []
    for number in pyplot.get_fignums():
        buffer = io.BytesIO()
        pyplot.figure(number).savefig(buffer, dpi=110, metadata={"Software": None})
        images.append(buffer.getvalue())
    pyplot.close("all")
    return images


def _picture(image: bytes) -> Output:
    data = {"image/png": base64.b64encode(image).decode()}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def masked(outputs: list[Output]) -> list[str]:
    """Return what outputs show, without what another machine changes: numbers, blanks, the order of lines."""

    def of(output: Output) -> str:
        if output["output_type"] != "stream":
            return "picture"
        text = re.sub(r"[-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?", "0", "".join(output["text"]))
        return "\n".join(sorted(" ".join(line.split()) for line in text.splitlines()))

    return [of(output) for output in outputs]


def main() -> None:
    """Store the outputs of all notebooks."""
    os.environ["MPLBACKEND"] = "agg"
    for notebook in NOTEBOOKS:
        content = json.loads(notebook.read_text())
        codes = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
        for number, (cell, outputs) in enumerate(zip(codes, run(notebook), strict=True), 1):
            cell["outputs"], cell["execution_count"] = outputs, number
        notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
