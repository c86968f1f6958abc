"""Images of scenes with exact labels, by casting one ray through every pixel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmtl.data.rooms_scene import CLASSES, COLOURS, Ball, Box, Scene, draw_scene

__all__ = ["View", "draw_view"]

_WALL, _CEILING, _FLOOR = (CLASSES.index(name) for name in ("wall", "ceiling", "floor"))
_COLOURS = np.array(list(COLOURS.values()))
# A view that shows hardly anything but wall, or starts inside or against something, is drawn again.
_MOST_WALL, _NEAREST = 0.7, 0.35
# Rays closer to parallel than this take this slope, so that no slab is divided by zero.
_PARALLEL = 1e-9


@dataclass(kw_only=True, slots=True, frozen=True)
class View:
    """What the camera sees, all float32.

    Attributes:
        image: ``(h, w, 3)``, 0 .. 1.
        label: ``(h, w)``, index in ``CLASSES``.
        depth: ``(h, w, 1)``, metres along the camera's axis.
        normal: ``(h, w, 3)``, unit length: x to the right, y upwards, z towards the camera.
    """

    image: np.ndarray
    label: np.ndarray
    depth: np.ndarray
    normal: np.ndarray


class _Hits:
    """The nearest surface each ray has met so far; rays ``(n, 3)`` advance one metre along the camera's axis per t."""

    def __init__(self, eye: np.ndarray, rays: np.ndarray, extent: np.ndarray) -> None:
        """Meet the walls, the floor and the ceiling of a room from inside."""
        self.eye = eye
        self.rays = rays
        centre = np.array([0, 0, extent[2] / 2])
        slope = _nonzero(self.rays)
        leave = (centre + np.sign(slope) * extent / 2 - self.eye) / slope
        axis = leave.argmin(1)
        pixels = np.arange(len(axis))
        side = np.sign(slope[pixels, axis])
        self.depth = leave.min(1)
        self.normal = np.zeros_like(rays)
        self.normal[pixels, axis] = -side
        self.label = np.where(axis < 2, _WALL, np.where(side > 0, _CEILING, _FLOOR))
        self.surface = 2 * axis + (side > 0)
        self.surfaces = 6

    def box(self, box: Box) -> None:
        """Meet a box from outside."""
        cos, sin = np.cos(box.yaw), np.sin(box.yaw)
        turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        origin, slope = turn @ (self.eye - box.centre), _nonzero(self.rays @ turn.T)
        enter = (-np.sign(slope) * box.half - origin) / slope
        leave = (np.sign(slope) * box.half - origin) / slope
        axis = enter.argmax(1)
        rows = np.arange(len(axis))
        normal = np.zeros_like(slope)
        normal[rows, axis] = -np.sign(slope[rows, axis])
        depth = enter.max(1)
        self._keep(depth < leave.min(1), depth, normal @ turn, box.label)

    def ball(self, ball: Ball) -> None:
        """Meet a ball from outside."""
        origin = self.eye - ball.centre
        square, half = (self.rays**2).sum(1), self.rays @ origin
        root = half**2 - square * (origin @ origin - ball.radius**2)
        depth = (-half - np.sqrt(np.maximum(root, 0))) / square
        normal = (origin + depth[:, None] * self.rays) / ball.radius
        self._keep(root > 0, depth, normal, ball.label)

    def _keep(self, met: np.ndarray, depth: np.ndarray, normal: np.ndarray, label: int) -> None:
        nearer = met & (depth > 0) & (depth < self.depth)
        self.depth[nearer], self.normal[nearer] = depth[nearer], normal[nearer]
        self.label[nearer], self.surface[nearer] = label, self.surfaces
        self.surfaces += 1


def _nonzero(slope: np.ndarray) -> np.ndarray:
    return np.where(np.abs(slope) < _PARALLEL, _PARALLEL, slope)


def _camera(scene: Scene) -> np.ndarray:
    """Return the camera's axes as rows: to the right, upwards, forward."""
    forward = scene.target - scene.eye
    forward /= np.linalg.norm(forward)
    right = np.array([forward[1], -forward[0], 0.0])
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(right, forward), forward])


def _rays(height: int, width: int) -> np.ndarray:
    """Return a ray through each pixel's centre in the camera's axes, ``(h w, 3)``, 67 degrees across."""
    focal = 0.75 * width
    x, y = np.meshgrid(np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2)
    return np.stack([x / focal, -y / focal, np.ones_like(x)], -1).reshape(-1, 3)


def _shade(hits: _Hits, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Return ``(n, 3)`` colours: each surface's own, striped, lit by the lamp, with the noise of a camera."""
    count = hits.surfaces
    points = scene.eye + hits.depth[:, None] * hits.rays
    # Each surface has its own colour, so that colour alone does not tell the class.
    colour = np.clip(_COLOURS[hits.label] + rng.uniform(-0.25, 0.25, (count, 3))[hits.surface], 0.03, 1)
    pitch, strength = rng.uniform(3, 20, count)[hits.surface], rng.uniform(0, 0.15, count)[hits.surface]
    x, y, z = points.T
    colour *= 1 + (strength * np.sin(pitch * (x + 1.7 * z)) * np.sin(pitch * y))[:, None]
    towards = scene.lamp - points
    distance = np.linalg.norm(towards, axis=1)
    lit = 4 * np.maximum((hits.normal * towards).sum(1) / distance, 0) / (1 + distance**2)
    colour *= (rng.uniform(0.3, 0.55) + 0.6 * lit)[:, None] * rng.uniform(0.85, 1.1, 3)
    return np.clip(colour + rng.normal(0, 0.02, colour.shape), 0, 1)


def draw_view(rng: np.random.Generator, height: int, width: int) -> View:
    """Return a view of a random room, ``height`` x ``width`` pixels; the same for the same generator's state."""
    while True:
        scene = draw_scene(rng)
        axes = _camera(scene)
        hits = _Hits(scene.eye, _rays(height, width) @ axes, scene.room)
        for box in scene.boxes:
            hits.box(box)
        for ball in scene.balls:
            hits.ball(ball)
        if hits.depth.min() >= _NEAREST and (hits.label == _WALL).mean() <= _MOST_WALL:
            break
    seen = {
        "image": _shade(hits, scene, rng),
        "depth": hits.depth[:, None],
        # Towards the camera is against its forward axis.
        "normal": hits.normal @ (axes * [[1], [1], [-1]]).T,
    }
    maps = {name: values.reshape(height, width, -1).astype(np.float32) for name, values in seen.items()}
    return View(label=hits.label.reshape(height, width).astype(np.float32), **maps)
