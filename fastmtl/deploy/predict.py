"""`fastmtl predict`: the predictions of a model for files, one line per example, with pictures of maps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmtl.data.images import IMAGE_SUFFIXES, as_image, is_image, open_image
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
    and shown together beside the image in ``<input>.png``, with a number behind the name where an input before has the
    same. Relative paths in a table begin in the folder that it is in.

    Args:
        model: The model.
        inputs: An image, a folder of images, a ``.parquet`` or ``.jsonl`` file of columns.
        out: Folder to write to, which is made; it cannot be that of the inputs. What is in it is no input.
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
    folder = inputs if inputs.is_dir() else inputs.parent
    if out.resolve() == folder.resolve():
        raise UsageError(f"out must be another folder than that of the inputs, {folder}, whose files it could replace.")
    names = [resolve_name(task, {name: name for name in model.tasks}, "task") for task in tasks]
    out.mkdir(parents=True, exist_ok=True)
    count = drawn = 0
    part = out / f"{PREDICTIONS}.part"
    names_of_files = _FileNames()
    try:
        with part.open("w", encoding="utf-8") as file:
            for batch in _batches(_examples(inputs, out), batch_size):
                predictions = model.predict([example.row for example in batch], names or None, folder)
                for place, example in enumerate(batch):
                    of_example = {task: pred[place].float().cpu() for task, pred in predictions.items()}
                    line: dict[str, Any] = {"input": example.name}
                    maps, stem = {}, names_of_files.of(example.name)
                    for task, pred in of_example.items():
                        if not _is_map(pred, model.tasks[task]):
                            line[task] = said_of(pred, model.tasks[task])
                        else:
                            maps[task] = _as_map(pred, model.tasks[task])
                            line[task] = {"map": f"{stem}.{task}.npy"}
                            np.save(out / line[task]["map"], maps[task])
                    if maps and pictures:
                        from fastmtl.deploy.pictures import draw

                        draw(out / f"{stem}.png", _image(example.row, model, folder), maps, model.tasks)
                        drawn += 1
                    file.write(json.dumps(line, allow_nan=False) + "\n")
                count += len(batch)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    part.replace(out / PREDICTIONS)
    return count, drawn


def said_of(pred: Tensor, about: TaskFacts) -> Any:
    """Return the prediction for one example, which is no map, as JSON has it.

    For classes it has ``class`` (the name, if there are names), ``probability`` and the ``probabilities`` of few
    classes; for yes or no, ``probability`` and ``yes``, lists where there are several outputs; otherwise it is a number
    or a list of them. What is no finite number is None.
    """
    if about.kind == "classes":
        shares = pred.softmax(0)
        best = int(shares.argmax())
        known = bool(shares.isfinite().all())
        said: dict[str, Any] = {
            "class": (about.labels[best] if about.labels else best) if known else None,
            "probability": _round(float(shares[best])),
        }
        if len(shares) <= _FEW:
            said["probabilities"] = [_round(value) for value in shares.tolist()]
        return said
    if about.kind == "binary":
        probabilities = pred.flatten().sigmoid().tolist()
        said = {
            "probability": [_round(value) for value in probabilities],
            "yes": [value >= 0.5 if math.isfinite(value) else None for value in probabilities],
        }
        return {name: _one(values) for name, values in said.items()}
    return _one([_round(value) for value in pred.flatten().tolist()])


def _is_map(pred: Tensor, about: TaskFacts) -> bool:
    """Return whether a prediction is a map, or has more numbers than fit into a line."""
    if about.kind == "classes" and pred.dim() == 1:
        return False
    return pred.numel() > _FEW or (pred.dim() >= 2 and not (about.kind == "binary" and pred.numel() == 1))


def _one(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _round(value: float) -> float | None:
    """Return a number with seven digits, None for NaN and infinity, which JSON does not have."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _as_map(pred: Tensor, about: TaskFacts) -> np.ndarray:
    """Return what a map shows: classes (h, w), or numbers (channels, h, w), which are probabilities or unit normals."""
    if about.kind == "segmentation":
        return pred.argmax(0).to(torch.uint8 if about.outputs < 256 else torch.int64).numpy()
    if about.kind == "binary":
        pred = pred.sigmoid()
    if about.kind == "normals":
        pred = torch.nn.functional.normalize(pred, dim=0)
    return pred.squeeze(0).numpy() if pred.dim() == 3 and len(pred) == 1 else pred.numpy()


def _image(row: Mapping[str, Any], model: RunModel, folder: Path) -> Any:
    """Return the image of a row, None if it has none."""
    facts = model.facts.data
    columns = [*(facts.get("inputs", []) if facts.get("kind") == "image" else []), "image"]
    values = [row[column] for column in columns if row.get(column) is not None]
    found = next((value for value in values if isinstance(value, np.ndarray) or is_image(value, folder)), None)
    return found if found is None or isinstance(found, np.ndarray) else as_image(found, folder)


def _examples(inputs: Path, out: Path) -> Iterator[_Example]:
    if inputs.is_dir():
        written = out.resolve()
        files = sorted(
            file
            for file in inputs.rglob("*")
            # Pictures of an earlier call.
            if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file() and written not in file.resolve().parents
        )
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


class _FileNames:
    """Names of files for examples, no two of them the same."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def of(self, name: str) -> str:
        """Return the name of an example as that of a file, without a suffix: folders become a part of it."""
        path = Path(name)
        stem = "_".join((path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path).parts)
        found, number = stem, 1
        # Some file systems do not tell capitals from small letters.
        while found.lower() in self._taken:
            number += 1
            found = f"{stem}-{number}"
        self._taken.add(found.lower())
        return found
