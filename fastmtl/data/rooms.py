"""Rooms: rendered indoor scenes in the folders of LibMTL's NYUv2, made on request.

The scenes are synthetic: boxes and balls in an empty room, with exact segmentation (NYUv2's 13 classes), depth and
surface normals. They serve to try out dense multi-task learning; results do not carry over to real images.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastmtl.data.rooms_render import View, draw_view
from fastmtl.errors import UsageError
from fastmtl.support import env

__all__ = ["SIZE", "default_folder", "make_rooms"]

SIZE = (72, 96)
# Records the size and seed of a folder's scenes, so that different ones are never mixed.
_ABOUT = "rooms.json"
_SPLITS = ("train", "val")
# In the order they are written: a scene is complete once its image exists.
_KINDS = ("label", "depth", "normal", "image")


def default_folder(size: tuple[int, int] = SIZE, seed: int = 0) -> Path:
    """Return the folder in fastmtl's cache for scenes of this size and seed."""
    return Path(env.read("FASTMTL_CACHE")).expanduser() / f"rooms-{size[0]}x{size[1]}-seed{seed}"


def make_rooms(
    folder: str | Path,
    *,
    train: int,
    test: int,
    size: tuple[int, int] = SIZE,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write scenes to ``folder/{train,val}/{image,label,depth,normal}/<number>.npy`` and return how many were missing.

    A scene depends on the seed, the split and its number alone, so that folders can be extended and interrupted calls
    repeated.

    Args:
        folder: The folder, created if it does not exist.
        train: Scenes in ``train``.
        test: Scenes in ``val``, which is what LibMTL tests on.
        size: Height and width in pixels, at least 8 each.
        seed: Seed of the scenes.
        progress: Called after each scene with the numbers of scenes written and to write.

    Raises:
        UsageError: A number is out of range, or the folder has other contents.
    """
    folder = Path(folder).expanduser()
    for name, value, least in (("train", train, 1), ("test", test, 1), ("seed", seed, 0), ("size", min(size), 8)):
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}.")
    _claim(folder, size, seed)
    missing = []
    for number, (split, count) in enumerate(zip(_SPLITS, (train, test), strict=True)):
        for kind in _KINDS:
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        missing += [(number, split, i) for i in range(count) if not (folder / split / "image" / f"{i}.npy").exists()]
    for done, (number, split, index) in enumerate(missing, 1):
        view = draw_view(np.random.default_rng((seed, number, index)), *size)
        for kind in _KINDS:
            _save(folder / split / kind / f"{index}.npy", view, kind)
        if progress is not None:
            progress(done, len(missing))
    return len(missing)


def _claim(folder: Path, size: tuple[int, int], seed: int) -> None:
    """Write the folder's record, or check it."""
    about = {"height": size[0], "width": size[1], "seed": seed}
    path = folder / _ABOUT
    if path.is_file():
        try:
            made_with = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            made_with = "something else"
        if made_with != about:
            raise UsageError(f"{str(folder)!r} holds rooms of {made_with}, not of {about}: give another path.")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{str(folder)!r} is not empty and holds no rooms: give another path.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"Rooms cannot be written to {str(folder)!r} ({error}): give another path.") from error


def _save(path: Path, view: View, kind: str) -> None:
    # Atomic, as another process may write or read the same scene.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        np.save(file, getattr(view, kind))
    partial.replace(path)
