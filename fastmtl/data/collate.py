"""Batches of rows: as torch makes them, of texts as an encoder wants them, of graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate

from fastmtl.errors import UsageError
from fastmtl.model.info import EncoderInfo

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
    """Makes a batch (inputs, labels by task) of rows (inputs, labels by task)."""

    tokenize: Tokenize | None = None

    @classmethod
    def of(cls, encoder: EncoderInfo | None) -> Collate:
        """Return what makes the batches that an encoder reads."""
        return cls(None if encoder is None else encoder.tokenize)

    def __call__(self, rows: Sequence[Any]) -> Any:
        """Return the batch."""
        if isinstance(rows[0], list | tuple) and len(rows[0]) == 2:
            return join_inputs([row[0] for row in rows], self.tokenize), default_collate([row[1] for row in rows])
        return default_collate(list(rows))
