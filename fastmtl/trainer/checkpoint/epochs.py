"""What must not change for a run to go on within an epoch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmtl.engine.trees import leaves
from fastmtl.errors import CheckpointError
from fastmtl.trainer.checkpoint.files import Saved, rng_state, set_rng_state

__all__ = ["check_batches", "is_random"]


def check_batches(before: Saved, now: Saved) -> None:
    """Refuse batches of other rows than those of the checkpoint, whose rest would not be the rest of the epoch.

    Args:
        before: ``processes``, ``rows`` of a batch of all processes and number of ``batches`` by loader, None where it
            is not known, and whether :func:`fastmtl.distributed.shard` has ``divided`` the batches; in the checkpoint.
        now: The same of this run.

    Raises:
        CheckpointError: The batches are others, or it cannot be told with another number of processes.
    """
    for what in ("rows", "batches"):
        known = None not in (*before[what], *now[what])
        if known and before[what] != now[what]:
            of = "batches have" if what == "rows" else "epochs have"
            raise CheckpointError(
                f"Within an epoch a run goes on with the batches that it had: its {of} {_listed(before[what])} {what} "
                f"in the checkpoint, {_listed(now[what])} in this run, over all {now['processes']} processes."
            )
    if before["processes"] == now["processes"]:
        return
    parts = [each["divided"] for each in (before, now) if each["processes"] > 1]
    if not all(parts) or None in (*before["rows"], *now["rows"]):
        raise CheckpointError(
            f"Within an epoch a run goes on with {now['processes']} processes in place of {before['processes']} only "
            "if fastmtl.distributed.shard divides the batches of train_dataloaders, which have a batch size."
        )


def is_random(loader: object) -> bool:
    """Return whether reading a row of a loader's data set draws random numbers, or gives another row the second time.

    The random numbers of Python, numpy and torch are left as they were.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if not hasattr(dataset, "__getitem__"):
        return False
    read = getattr(dataset, "__getitems__", lambda rows: [dataset[row] for row in rows])
    collate = getattr(loader, "collate_fn", None) or list
    before = rng_state()
    try:
        once, *others = (collate(read([0])) for _ in range(4))
        return not (_are_equal(rng_state(), before) and all(_are_equal(once, other) for other in others))
    except Exception as error:
        raise CheckpointError(
            "Within an epoch a run goes on with another number of processes only where rows are not changed at random, "
            f"which could not be found out: reading a row alone failed ({type(error).__name__}: {error})."
        ) from error
    finally:
        set_rng_state(before)


def _are_equal(one: object, other: object) -> bool:
    """Return whether trees have equal numbers and arrays; other leaves may be new objects each time."""
    pairs = list(zip(leaves(one), leaves(other), strict=False))
    if any(isinstance(a, int | float | str) and a != b and a == a for a, b in pairs):
        return False
    return all(_same_array(a, b) for a, b in pairs if isinstance(a, Tensor | np.ndarray))


def _same_array(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")
    return bool(one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num()))


def _listed(numbers: Iterable[int]) -> str:
    return " and ".join(map(str, numbers))
