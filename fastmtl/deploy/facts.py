"""What a run knows of its model besides the weights: the form of its inputs, its tasks, facts of the data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmtl.data.tasks import kind_of
from fastmtl.errors import CheckpointError
from fastmtl.support.kinds import Tree
from fastmtl.trainer.run.directory import write_atomically

__all__ = ["ModelFacts", "TaskFacts", "example_of", "facts_of"]

# Tells other readers of the file how it is made.
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """What the predictions of a task are.

    Attributes:
        kind: ``classes``, ``binary``, ``regression``, ``segmentation``, ``depth``, ``normals`` or ``other``.
        outputs: Number of outputs of its decoder.
        labels: Names of its classes, where they have any.
    """

    kind: str
    outputs: int
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What is known of a model.

    Attributes:
        tasks: Its tasks.
        inputs: The form of its inputs, without rows: a tensor is ``{"shape": ..., "dtype": ..., "high": ...}``, with
            the greatest integer that was seen; None for what is no tensor.
        data: Facts of the data, see `fastmtl.data.Splits`.
        builds_encoder: Whether the encoder is made of the data, which have to be there for it.
    """

    tasks: dict[str, TaskFacts]
    inputs: Any
    data: dict[str, Any] = field(default_factory=dict)
    builds_encoder: bool = False

    def write(self, path: Path) -> None:
        """Write the facts as JSON."""
        write_atomically(path, json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> ModelFacts:
        """Return the facts in a file.

        Raises:
            CheckpointError: It is missing, or was written by something else.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            tasks = {
                name: TaskFacts(kind=about["kind"], outputs=about["outputs"], labels=tuple(about["labels"]))
                for name, about in content["tasks"].items()
            }
            return cls(
                tasks=tasks,
                inputs=content["inputs"],
                data=content["data"],
                builds_encoder=content.get("builds_encoder", False),
            )
        except FileNotFoundError:
            raise CheckpointError(
                f"There is no {path}, which `fastmtl train` writes: a run of another program has none."
            ) from None
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {error}.") from error


def facts_of(
    task_dict: Mapping[str, Mapping[str, Any]],
    outputs: Mapping[str, int],
    labels: Mapping[str, tuple[str, ...]],
    kinds: Mapping[str, str],
    inputs: Tree,
    data: Mapping[str, Any],
) -> ModelFacts:
    """Return what is known of a model.

    Args:
        task_dict: Its tasks, as the trainer takes them.
        outputs: Outputs of each task's decoder.
        labels: Names of the classes of tasks that have them.
        kinds: What each task is by its data set, for losses that do not tell.
        inputs: Those of a batch.
        data: Facts of the data.
    """
    by_loss = {name: kind_of(about) for name, about in task_dict.items()}
    tasks = {
        name: TaskFacts(
            kind=kinds[name] if by_loss[name] == "other" else by_loss[name],
            outputs=outputs[name],
            labels=labels.get(name, ()),
        )
        for name in task_dict
    }
    return ModelFacts(tasks=tasks, inputs=_form(inputs), data=dict(data))


def _form(tree: Tree) -> Any:
    if isinstance(tree, Tensor):
        form: dict[str, Any] = {"shape": list(tree.shape[1:]), "dtype": str(tree.dtype).removeprefix("torch.")}
        return form if tree.is_floating_point() or not tree.numel() else {**form, "high": int(tree.max())}
    if isinstance(tree, Mapping):
        return {"entries": {str(key): _form(value) for key, value in tree.items()}}
    return None


def example_of(form: Any, rows: int, seed: int = 0, length: int | None = None) -> Tree:
    """Return inputs of a form for some rows: normally distributed, integers up to those that were seen.

    Args:
        form: As of `ModelFacts`.
        rows: Number of rows.
        seed: Draws the numbers.
        length: Length of sequences of integers, in place of the one that was seen.

    Raises:
        CheckpointError: The inputs are no tensors.
    """
    if form is None:
        raise CheckpointError("The inputs of this model are no tensors, so that no example can be made of them.")
    if "entries" in form:
        return {
            key: example_of(entry, rows, seed + place, length)
            for place, (key, entry) in enumerate(form["entries"].items())
        }
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, form["dtype"])
    shape = (rows, *form["shape"])
    if "high" not in form:
        return torch.randn(shape, generator=generator).to(dtype)
    if length is not None and len(shape) == 2:
        shape = (rows, length)
    if form["high"] <= 1:
        # A mask, or a kind of token.
        values = torch.full(shape, form["high"], dtype=dtype)
        if rows > 1 and len(shape) > 1:
            # One row is padded, so that a mask counts.
            values[0, ..., -1:] = 0
        return values
    return torch.randint(1, form["high"] + 1, shape, generator=generator).to(dtype)
