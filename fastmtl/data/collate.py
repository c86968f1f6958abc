"""Batches of rows: as torch makes them, of texts as an encoder wants them, of graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Subset, default_collate

from fastmtl.errors import UsageError
from fastmtl.model.info import EncoderInfo
from fastmtl.support.named import own_place

__all__ = ["Collate", "join_inputs"]

Tokenize = Callable[[Sequence[Any]], dict[str, Tensor]]


def join_inputs(rows: Sequence[Any], tokenize: Tokenize | None) -> Any:
    """Return the inputs of a batch, given those of each row; texts, or pairs of texts, are tokenized.

    Raises:
        UsageError: They are texts, and the encoder takes none.
    """
    first = rows[0]
    pair = isinstance(first, tuple) and len(first) == 2 and all(isinstance(text, str) for text in first)
    if isinstance(first, str) or pair:
        if tokenize is None:
            raise UsageError("The inputs are texts, which need an encoder of texts, such as hf:<name or folder>.")
        return tokenize(rows)
    if any(kind.__module__.startswith("torch_geometric.") for kind in type(first).__mro__):
        from torch_geometric.data import Batch

        return Batch.from_data_list(list(rows))
    return default_collate(list(rows))


@dataclass(frozen=True)
class Collate:
    """Makes a batch (inputs, labels by task) of rows (inputs, labels by task).

    Attributes:
        tokenize: Makes tokens of texts.
        place: File and line of the data set, where it is the user's, for messages.
    """

    tokenize: Tokenize | None = None
    place: str = ""

    @classmethod
    def of(cls, encoder: EncoderInfo | None, dataset: Dataset[Any], place: str = "") -> Collate:
        """Return what makes the batches of a data set that an encoder reads; ``place`` is that of its maker."""
        while isinstance(dataset, Subset):
            dataset = dataset.dataset
        return cls(None if encoder is None else encoder.tokenize, own_place(type(dataset)) or place)

    def __call__(self, rows: Sequence[Any]) -> Any:
        """Return the batch.

        Raises:
            UsageError: The rows cannot be joined.
        """
        if not isinstance(rows[0], list | tuple) or len(rows[0]) != 2:
            return self._joined("rows", default_collate, rows)
        inputs = self._joined("inputs", partial(join_inputs, tokenize=self.tokenize), [row[0] for row in rows])
        labels = [row[1] for row in rows]
        if not isinstance(labels[0], Mapping):
            return inputs, self._joined("labels", default_collate, labels)
        return inputs, {
            task: self._joined(f"labels of {task}", default_collate, self._of_task(task, labels)) for task in labels[0]
        }

    def _of_task(self, task: Any, labels: Sequence[Mapping[Any, Any]]) -> list[Any]:
        if any(task not in of_row for of_row in labels):
            raise UsageError(
                f"{self.place}Some rows of a batch have no label of {task}, others have: a missing one is NaN, or -100 "
                "for a class."
            )
        return [of_row[task] for of_row in labels]

    def _joined(self, what: str, join: Callable[[list[Any]], Any], values: Sequence[Any]) -> Any:
        try:
            return join(list(values))
        except (TypeError, RuntimeError) as error:
            kinds = sorted({_form(value) for value in values})
            raise UsageError(
                f"{self.place}The {what} of a batch cannot be joined, as they must be tensors of one shape: they are "
                f"{', '.join(kinds[:3])}{', ...' if len(kinds) > 3 else ''}."
            ) from error


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensors of shape {tuple(value.shape)}"
    return "None" if value is None else f"of type {type(value).__name__}"
