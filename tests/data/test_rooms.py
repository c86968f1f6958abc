"""Rooms: the same scenes for the same seed, and labels that agree with each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastmtl.data.rooms import default_folder, make_rooms
from fastmtl.data.rooms_render import View, draw_view
from fastmtl.data.rooms_scene import CLASSES, draw_scene
from fastmtl.errors import UsageError

SIZE = (24, 32)


def _view(seed: int, size: tuple[int, int] = SIZE) -> View:
    return draw_view(np.random.default_rng(seed), *size)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.npy"))}


def test_maps_have_the_shapes_and_ranges_of_nyuv2() -> None:
    for seed in range(8):
        view = _view(seed)
        assert view.image.shape == view.normal.shape == (*SIZE, 3)
        assert view.label.shape == SIZE
        assert view.depth.shape == (*SIZE, 1)
        for each in (view.image, view.label, view.depth, view.normal):
            assert each.dtype == np.float32
            assert np.isfinite(each).all()
        assert 0 <= view.image.min() <= view.image.max() <= 1
        assert set(np.unique(view.label)) <= set(range(len(CLASSES)))
        assert 0.35 <= view.depth.min() <= view.depth.max() < 12
        np.testing.assert_allclose(np.linalg.norm(view.normal, axis=-1), 1, atol=1e-6)


def test_normals_are_those_of_the_depth() -> None:
    height, width = 96, 128
    agreeing = []
    for seed in range(4):
        view = _view(seed, (height, width))
        focal = 0.75 * width
        x, y = np.meshgrid(np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2)
        depth = view.depth[..., 0].astype(np.float64)
        points = np.stack([x / focal * depth, -y / focal * depth, -depth], -1)
        across, down = np.diff(points[:-1], axis=1), np.diff(points[:, :-1], axis=0)
        normal = -np.cross(across, down)
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
        cosine = (normal * view.normal[:-1, :-1]).sum(-1)
        agreeing.append(np.degrees(np.arccos(np.clip(cosine, -1, 1))) < 1)
        # A visible surface faces the ray that meets it.
        assert ((view.normal * points).sum(-1) < 0).all()
    assert np.mean(agreeing) > 0.75, "all but the pixels at edges"


def test_floors_lie_below_and_ceilings_above() -> None:
    floor, ceiling = CLASSES.index("floor"), CLASSES.index("ceiling")
    for seed in range(8):
        view = _view(seed)
        rows = np.arange(SIZE[0])[:, None] * np.ones(SIZE[1])
        assert (view.normal[..., 1][view.label == floor] > 0.5).all()
        assert (view.normal[..., 1][view.label == ceiling] < -0.5).all()
        if (view.label == floor).any() and (view.label == ceiling).any():
            assert rows[view.label == floor].mean() > rows[view.label == ceiling].mean()


def test_all_classes_occur() -> None:
    seen = {label for seed in range(60) for label in np.unique(_view(seed).label).astype(int)}
    assert seen == set(range(len(CLASSES)))


def test_furniture_stays_in_the_room() -> None:
    for seed in range(20):
        scene = draw_scene(np.random.default_rng(seed))
        for box in scene.boxes:
            assert (np.abs(box.centre[:2]) <= scene.room[:2] / 2 + 1).all()
            assert box.half.min() > 0
            assert box.centre[2] - box.half[2] > -1e-9
        assert (np.abs(scene.eye[:2]) < scene.room[:2] / 2).all()


def test_a_folder_is_the_same_for_the_same_seed_and_can_be_extended(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert make_rooms(tmp_path / "a", train=3, test=2, size=SIZE, progress=lambda *done: seen.append(done)) == 5
    assert seen == [(i, 5) for i in range(1, 6)]
    make_rooms(tmp_path / "b", train=1, test=1, size=SIZE)
    assert make_rooms(tmp_path / "b", train=3, test=2, size=SIZE) == 3
    make_rooms(tmp_path / "c", train=3, test=2, size=SIZE, seed=1)
    first, extended, other = (_files(tmp_path / name) for name in "abc")
    assert len(first) == 5 * 4
    assert first == extended
    assert first.keys() == other.keys()
    assert not any(first[name] == other[name] for name in first)
    assert len(set(first.values())) == len(first), "no scene is in both splits"


def test_an_interrupted_folder_is_completed(tmp_path: Path) -> None:
    make_rooms(tmp_path, train=2, test=1, size=SIZE)
    whole = _files(tmp_path)
    (tmp_path / "train" / "image" / "1.npy").unlink()
    (tmp_path / "train" / "depth" / "1.npy").unlink()
    assert make_rooms(tmp_path, train=2, test=1, size=SIZE) == 1
    assert _files(tmp_path) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 0}, "train must be at least 1, got 0"),
        ({"test": 0}, "test must be at least 1, got 0"),
        ({"size": (4, 32)}, "size must be at least 8, got 4"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_numbers_out_of_range(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        make_rooms(tmp_path / "new", **{"train": 1, "test": 1, "size": SIZE, **options})
    assert not (tmp_path / "new").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    make_rooms(tmp_path / "rooms", train=1, test=1, size=SIZE)
    with pytest.raises(UsageError, match=r"holds rooms of .*'seed': 0.*give another path"):
        make_rooms(tmp_path / "rooms", train=1, test=1, size=SIZE, seed=1)
    (tmp_path / "rooms" / "rooms.json").write_text(json.dumps([]))
    with pytest.raises(UsageError, match="give another path"):
        make_rooms(tmp_path / "rooms", train=1, test=1, size=SIZE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    with pytest.raises(UsageError, match="is not empty and holds no rooms"):
        make_rooms(tmp_path / "mine", train=1, test=1, size=SIZE)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter"]
    with pytest.raises(UsageError, match=r"cannot be written to .*give another path"):
        make_rooms(tmp_path / "mine" / "letter" / "rooms", train=1, test=1, size=SIZE)


def test_the_cache_is_where_it_is_asked_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMTL_CACHE", str(tmp_path / "Upper"))
    assert default_folder(SIZE, 3) == tmp_path / "Upper" / "rooms-24x32-seed3"
    monkeypatch.delenv("FASTMTL_CACHE")
    assert default_folder().is_relative_to(Path.home())
