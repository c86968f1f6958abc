"""Checkpoints: written atomically, read safely, refused with a sentence when they do not fit."""

from __future__ import annotations

import contextlib
import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastmtl.errors import CheckpointError
from fastmtl.support.kinds import State
from fastmtl.trainer.setup.tasks import loss_names, loss_weights

__all__ = [
    "Saved",
    "by_module",
    "differences",
    "load_model_state",
    "model_state",
    "read_checkpoint",
    "rng_state",
    "save_atomically",
    "set_rng_state",
    "without_weights",
]

_OF_WEIGHTS = re.compile(r"loss_fn_*\..*\b(weight|pos_weight)")
# What a checkpoint holds, by name: tensors and plain values.
Saved = State


def save_atomically(content: object, path: Path) -> None:
    """Write ``content`` with ``torch.save`` so that ``path`` holds the old or the new file, never a part of one."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        cause = _system_error(error)
        if cause is None:
            raise
        raise CheckpointError(f"The checkpoint {path} cannot be written: {cause.strerror or cause}.") from error


def _system_error(error: BaseException | None) -> OSError | None:
    """Return what the system said; torch.save puts an error of its own on top when a disk is full."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def read_checkpoint(path: Path, device: torch.device) -> object:
    """Return what ``torch.save`` wrote to ``path``, tensors and plain values only.

    Raises:
        CheckpointError: The file is missing or is no checkpoint.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"There is no checkpoint {path}.") from None
    except OSError as cause:
        raise CheckpointError(f"The checkpoint {path} cannot be read: {cause.strerror or cause}.") from cause
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as cause:
        # The bytes of any other file are read as a pickle, which fails in as many ways as there are bytes.
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read: it is damaged, or holds more than tensors and plain values."
        ) from cause


def model_state(content: object, path: Path) -> Mapping[str, torch.Tensor]:
    """Return the ``state_dict`` that was read from a file; one in a dictionary, as other trainers write it, too.

    Raises:
        CheckpointError: The file holds something else.
    """
    if isinstance(content, Mapping) and "model" in content and "names" in content:
        raise CheckpointError(
            f"{path} is a last.pt, which a run goes on from (resume): to start from it, use its best.pt."
        )
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{path} does not hold the parameters of a model.")
    return content


def by_module(names: Iterable[str]) -> Counter[str]:
    """Return how many of the names of tensors each part of a model has: a decoder, or what else has a name in it."""
    return Counter(".".join(name.split(".")[: 2 if name.startswith("decoders.") else 1]) for name in names)


def differences(current: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[str]:
    """Return what keeps a state from being that of a model with the state ``current``, difference by difference."""
    return [
        *(f"{name} is missing" for name in _absent(current, state)),
        *(f"{name} is not in the model" for name in _absent(state, current)),
        *(
            f"{key} has shape {tuple(state[key].shape)} in place of {tuple(value.shape)}"
            for key, value in current.items()
            if key in state and state[key].shape != value.shape
        ),
    ]


def _absent(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return the names that are not among others; those of a part that lacks all of them as one."""
    there = set(others)
    parts = by_module(there)
    absent: dict[str, None] = {}
    for name in names:
        if name not in there:
            (part,) = by_module([name])
            absent[name if part in parts else part] = None
    return list(absent)


def load_model_state(model: nn.Module, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Load a ``state_dict`` whose keys and shapes are those of ``model``.

    What the strategy remembers, and the parameters of losses, may be missing, as in older checkpoints: they then start
    anew. Weights of torch's losses, no parameters, stay those of this run; a line tells where they differ.

    Raises:
        CheckpointError: They are not; the message names the first differences.
    """
    current, weights = model.state_dict(), loss_weights(model)
    state = without_weights(state, current, weights)
    remembered: list[str] = [*getattr(model, "remembered", list)(), *loss_names(model)]
    told = differences({key: value for key, value in current.items() if key in state or key not in remembered}, state)
    if told:
        more = f" and {len(told) - 2} more differences" if len(told) > 2 else ""
        raise CheckpointError(f"The checkpoint {path} is of another model: {'; '.join(told[:2])}{more}.")
    model.load_state_dict({key: state.get(key, value) for key, value in current.items()})


def without_weights(
    state: Mapping[str, torch.Tensor], current: Mapping[str, torch.Tensor], weights: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return a state without weights of torch's losses, which are settings: a run has those that it is given.

    Prints where they differ.

    Args:
        state: What a file holds.
        current: What the model holds.
        weights: The names in the model of such weights.
    """
    others = [key for key in state if key not in current and _OF_WEIGHTS.fullmatch(key) and state[key].dim() < 2]
    differing = [key for key in weights if key in state and not _are_equal(state[key], current[key])]
    if differing or others:
        print(f"Weights of losses are this run's, not the file's: {', '.join([*differing, *others])}")
    return {key: current[key] if key in weights else value for key, value in state.items() if key not in others}


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other), other)


def rng_state(generators: Sequence[torch.Generator] = ()) -> Saved:
    """Return the state of Python's, numpy's and torch's random generators, and of further ones, in plain values."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "generators": [generator.get_state() for generator in generators],
    }


def set_rng_state(state: Saved, generators: Sequence[torch.Generator] = ()) -> None:
    """Undo what happened to the random generators since ``rng_state``, called with as many further ones."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([gpu_state.cpu() for gpu_state in state["cuda"]])
    for generator, saved in zip(generators, state["generators"], strict=False):
        generator.set_state(saved.cpu())
