"""`fastmtl predict`: the predictions of a model for files, one line per example, with pictures of maps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmtl.data.images import IMAGE_SUFFIXES, open_image
from fastmtl.data.sources import read_table
from fastmtl.deploy.facts import TaskFacts
from fastmtl.deploy.model import RunModel
from fastmtl.errors import UsageError
from fastmtl.support.names import resolve_name

__all__ = ["PREDICTIONS", "predict", "said_of"]

PREDICTIONS = "predictions.jsonl"
# Numbers of an example that fit into a line; more become a file.
_FEW = 64


@dataclass(frozen=True)
class _Example:
    name: str
    row: Mapping[str, Any]


def predict(
    model: RunModel, inputs: Path, out: Path, *, batch_size: int = 32, tasks: Sequence[str] = (), pictures: bool = True
) -> tuple[int, int]:
    """Write the predictions for all examples in ``inputs`` to ``out / "predictions.jsonl"``.

    A line has the ``input`` and, for each task, what :func:`said_of` says. Maps are written as ``<input>.<task>.npy``,
    and shown together beside the image in ``<input>.png``.

    Args:
        model: The model.
        inputs: An image, a folder of images, a ``.parquet`` or ``.jsonl`` file of columns.
        out: Folder to write to, which is made.
        batch_size: Examples at a time.
        tasks: Names of tasks; all if empty.
        pictures: Whether to draw pictures of maps.

    Returns:
        The numbers of examples and of pictures.

    Raises:
        UsageError: There are no such inputs, or they are not what the model reads.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}.")
    names = [resolve_name(task, {name: name for name in model.tasks}, "task") for task in tasks]
    out.mkdir(parents=True, exist_ok=True)
    count = drawn = 0
    part = out / f"{PREDICTIONS}.part"
    with part.open("w", encoding="utf-8") as file:
        for batch in _batches(_examples(inputs), batch_size):
            predictions = model.predict([example.row for example in batch], names or None)
            for place, example in enumerate(batch):
                of_example = {task: pred[place].float().cpu() for task, pred in predictions.items()}
                line: dict[str, Any] = {"input": example.name}
                maps = {}
                for task, pred in of_example.items():
                    line[task] = said_of(pred, model.tasks[task])
                    if line[task] is None:
                        maps[task] = _as_map(pred, model.tasks[task])
                        path = out / f"{_file_name(example.name)}.{task}.npy"
                        np.save(path, maps[task])
                        line[task] = {"map": path.name}
                if maps and pictures:
                    from fastmtl.deploy.pictures import draw

                    draw(out / f"{_file_name(example.name)}.png", example.row.get("image"), maps, model.tasks)
                    drawn += 1
                file.write(json.dumps(line) + "\n")
            count += len(batch)
    part.replace(out / PREDICTIONS)
    return count, drawn


def said_of(pred: Tensor, about: TaskFacts) -> Any:
    """Return the prediction for one example as JSON has it; None for a map.

    For classes it has ``class`` (the name, if there are names), ``probability`` and the ``probabilities`` of few
    classes; for yes or no, ``probability``; otherwise a number or a list of them.
    """
    if about.kind == "classes" and pred.dim() == 1:
        shares = pred.softmax(0)
        best = int(shares.argmax())
        said: dict[str, Any] = {
            "class": about.labels[best] if about.labels else best,
            "probability": _round(float(shares[best])),
        }
        if len(shares) <= _FEW:
            said["probabilities"] = [_round(value) for value in shares.tolist()]
        return said
    if about.kind == "binary" and pred.numel() == 1:
        probability = float(pred.flatten().sigmoid())
        return {"probability": _round(probability), "yes": probability >= 0.5}
    if pred.dim() >= 2 or pred.numel() > _FEW:
        return None
    values = [_round(value) for value in pred.flatten().tolist()]
    return values[0] if len(values) == 1 else values


def _round(value: float) -> float:
    return float(f"{value:.7g}")


def _as_map(pred: Tensor, about: TaskFacts) -> np.ndarray:
    """Return what a map shows: the class of each pixel (h, w), or the numbers (channels, h, w), unit normals."""
    if about.kind == "segmentation":
        return pred.argmax(0).to(torch.uint8 if about.outputs < 256 else torch.int64).numpy()
    if about.kind == "normals":
        pred = torch.nn.functional.normalize(pred, dim=0)
    return pred.squeeze(0).numpy() if pred.dim() == 3 and len(pred) == 1 else pred.numpy()


def _examples(inputs: Path) -> Iterator[_Example]:
    if inputs.is_dir():
        files = sorted(file for file in inputs.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        if not files:
            raise UsageError(f"{inputs} has no images ({', '.join(IMAGE_SUFFIXES)}).")
        for file in files:
            yield _Example(str(file.relative_to(inputs)), {"image": open_image(file)})
        return
    if not inputs.is_file():
        raise UsageError(f"There is no file or folder {inputs}.")
    if inputs.suffix.lower() in IMAGE_SUFFIXES:
        yield _Example(inputs.name, {"image": open_image(inputs)})
        return
    if inputs.suffix.lower() not in (".parquet", ".jsonl"):
        raise UsageError(f"{inputs} must be a folder of images, an image, a .parquet or a .jsonl file.")
    rows = read_table(inputs)
    if not len(rows):
        raise UsageError(f"{inputs} has no rows.")
    width = len(str(len(rows) - 1))
    for index in range(len(rows)):
        yield _Example(f"{index:0{width}d}", rows.row(index))


def _batches(examples: Iterator[_Example], size: int) -> Iterator[list[_Example]]:
    batch: list[_Example] = []
    for example in examples:
        batch.append(example)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _file_name(name: str) -> str:
    """Return the name of an example as that of a file: folders become a part of it."""
    path = Path(name)
    stem = path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path
    return "_".join(stem.parts)
