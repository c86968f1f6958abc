"""Furnished rooms, drawn at random: boxes and balls with a class each, and a place to look from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["CLASSES", "COLOURS", "Ball", "Box", "Scene", "draw_scene"]

# The 13 classes of NYUv2, in the order its labels count them, and the mean colour of each.
COLOURS = {
    "bed": (0.70, 0.50, 0.50),
    "books": (0.60, 0.30, 0.20),
    "ceiling": (0.90, 0.90, 0.88),
    "chair": (0.50, 0.35, 0.20),
    "floor": (0.55, 0.45, 0.35),
    "furniture": (0.50, 0.40, 0.30),
    "objects": (0.50, 0.50, 0.50),
    "picture": (0.50, 0.50, 0.60),
    "sofa": (0.40, 0.40, 0.55),
    "table": (0.60, 0.45, 0.30),
    "tv": (0.08, 0.08, 0.10),
    "wall": (0.80, 0.78, 0.70),
    "window": (0.75, 0.85, 0.95),
}
CLASSES = tuple(COLOURS)
_LABEL = {name: label for label, name in enumerate(CLASSES)}

# Width, depth and height in metres of what stands on the floor; of a table, those of its top.
_FURNITURE = {
    "bed": (1.5, 2.0, 0.5),
    "chair": (0.45, 0.45, 0.45),
    "furniture": (1.0, 0.45, 1.5),
    "sofa": (1.8, 0.8, 0.4),
    "table": (1.2, 0.7, 0.04),
}
_STOCK = ("bed", "chair", "chair", "furniture", "sofa", "table")
_ON_WALLS = ("picture", "window", "tv")


class Box(NamedTuple):
    """An upright box: centre ``(3,)`` in metres (z upwards), half its extent ``(3,)``, turn in radians, and class."""

    centre: np.ndarray
    half: np.ndarray
    yaw: float
    label: int


class Ball(NamedTuple):
    """A ball: centre ``(3,)`` and radius in metres, and its class."""

    centre: np.ndarray
    radius: float
    label: int


@dataclass(kw_only=True, slots=True, frozen=True)
class Scene:
    """A room, its extent ``(3,)`` around x = y = 0 with the floor at z = 0, and what is in it.

    The camera is at ``eye`` and looks at ``target``, the light is at ``lamp``, all ``(3,)``.
    """

    room: np.ndarray
    boxes: list[Box]
    balls: list[Ball]
    eye: np.ndarray
    target: np.ndarray
    lamp: np.ndarray


def draw_scene(rng: np.random.Generator) -> Scene:
    """Return a random scene; the camera stands near a corner and looks across the room."""
    room = rng.uniform((3.5, 3.5, 2.4), (6.0, 6.0, 3.0))
    boxes: list[Box] = []
    for index in rng.permutation(len(_STOCK))[: rng.integers(3, len(_STOCK) + 1)]:
        boxes += _piece(_STOCK[index], room, rng)
    boxes += [_on_wall(room, rng) for _ in range(rng.integers(1, 4))]
    radii = rng.uniform(0.1, 0.3, rng.integers(0, 4))
    balls = [Ball(np.array([*_place(room, r, r, rng), r]), float(r), _LABEL["objects"]) for r in radii]
    corner = rng.choice((-1, 1), 2) * rng.uniform(0.32, 0.45, 2) * room[:2]
    return Scene(
        room=room,
        boxes=boxes,
        balls=balls,
        eye=np.array([*corner, rng.uniform(1.2, 1.9)]),
        target=np.array([*(rng.uniform(-0.2, 0.2, 2) * room[:2]), rng.uniform(0.4, 1.1)]),
        lamp=np.array([*(rng.uniform(-0.3, 0.3, 2) * room[:2]), room[2] - 0.1]),
    )


def _place(room: np.ndarray, width: float, depth: float, rng: np.random.Generator) -> np.ndarray:
    reach = (room[:2] - (width, depth)) / 2
    return rng.uniform(-reach, reach)


def _piece(name: str, room: np.ndarray, rng: np.random.Generator) -> list[Box]:
    """Return the boxes of a piece of furniture somewhere in the room, turned at random."""
    width, depth, height = size = np.array(_FURNITURE[name]) * rng.uniform(0.8, 1.2, 3)
    yaw = rng.uniform(0, np.pi)
    place = _place(room, width, depth, rng)
    turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])

    def part(offset: tuple[float, float], extent: np.ndarray, z: float, label: str = name) -> Box:
        return Box(np.array([*(place + turn @ np.array(offset)), z]), extent / 2, float(yaw), _LABEL[label])

    if name == "table":
        top = rng.uniform(0.5, 0.8)
        leg = np.array([0.06, 0.06, top])
        legs = [part((x * width, y * depth), leg, top / 2) for x in (-0.45, 0.45) for y in (-0.45, 0.45)]
        things = []
        for _ in range(rng.integers(0, 3)):
            extent = rng.uniform(0.1, 0.25, 3)
            x, y = rng.uniform(-0.4, 0.4, 2) * (width, depth)
            label = ("books", "objects")[rng.integers(2)]
            things.append(part((x, y), extent, top + (height + extent[2]) / 2, label))
        return [part((0, 0), size, top), *legs, *things]
    body = part((0, 0), size, height / 2)
    if name in ("chair", "sofa"):
        return [body, part((0, 0.45 * depth), np.array([width, 0.1, 2 * height]), height)]
    if name == "bed":
        return [body, part((0, 0.42 * depth), np.array([0.8 * width, 0.35, 0.12]), height + 0.06)]
    return [body]


def _on_wall(room: np.ndarray, rng: np.random.Generator) -> Box:
    label = _LABEL[_ON_WALLS[rng.integers(len(_ON_WALLS))]]
    width, height = rng.uniform((0.6, 0.5), (1.5, 1.1))
    axis, side, along = rng.integers(2), rng.choice((-1, 1)), rng.uniform(-0.3, 0.3)
    thin = 0.04
    centre, half = np.empty(3), np.empty(3)
    centre[2], half[2] = rng.uniform(1.2, room[2] - 0.7), height / 2
    centre[axis], half[axis] = side * (room[axis] - thin) / 2, thin / 2
    centre[1 - axis], half[1 - axis] = along * room[1 - axis], width / 2
    return Box(centre, half, 0.0, label)
