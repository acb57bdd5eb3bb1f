# SPDX-License-Identifier: Apache-2.0
"""Furniture files, where things are put, light, and what counts as found; rendering where pybullet is installed."""

import json
import math
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from opendino.errors import MissingExtraError
from opendino.evaluate.datasets.folders import open_folder_depth, open_folder_masks
from opendino.sample_data import room_models, room_renderer, room_retrieval, room_scenes, rooms
from opendino.sample_data.room_models import RoomModel, class_of, load_models, read_obj, split_models
from opendino.sample_data.room_renderer import Lights, Renderer, View, shade, shrink
from opendino.sample_data.room_scenes import SECOND, Space, draw_eye, draw_spot, overlaps

CUBE = """mtllib cube.mtl
v 0 0 0
v 1 0 0
v 1 1 0
v 0 1 0
v 0 0 1
v 1 0 1
v 1 1 1
v 0 1 1
vt 0.25 0.5
usemtl red
f 1/1 4/1 3/1 2/1
f 5/1 6/1 7/1 8/1
usemtl blue
f 1 2 6 5
f 3 4 8 7
f -8 -4 -1 -5
f 2 3 7 6
usemtl glass
f 1 2 3
"""
MATERIALS = "newmtl red\nKd 1 0 0\nnewmtl blue\nKd 0 0 1\nd 0.9\nnewmtl glass\nd 0.2\n"


def model(name="box", label="chair", size=(0.8, 0.6, 1.0), path=Path("box.obj")):
    return RoomModel(name, name, label, size, 0.0, path, "library")


@pytest.fixture
def cube(tmp_path):
    (tmp_path / "cube.obj").write_text(CUBE)
    (tmp_path / "cube.mtl").write_text(MATERIALS)
    return tmp_path / "cube.obj"


# --- furniture -----------------------------------------------------------------------------------------------------


def test_obj_becomes_triangles_per_material(cube):
    red, blue = read_obj(cube)  # glass is left out
    assert red.material.colour == (1, 0, 0)
    assert len(red.triangles) == 3 * 4  # two squares
    first = red.vertices[red.triangles[:6]]
    assert first.tolist() == [[0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 1, 0], [1, 0, 0]]
    assert np.allclose(red.uvs, (0.25, 0.5))
    assert len(blue.triangles) == 3 * 8
    turned = blue.vertices[blue.triangles[12:15]]  # numbers that count from the end
    assert turned.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 1]]


def test_obj_with_too_many_faces_is_none(cube, monkeypatch):
    monkeypatch.setattr(room_models, "MAX_FACES", 3)
    assert read_obj(cube) is None


def test_glass_alone_is_kept(tmp_path):
    (tmp_path / "cube.mtl").write_text(MATERIALS)
    (tmp_path / "vase.obj").write_text("mtllib cube.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl glass\nf 1 2 3\n")
    assert [p.material.opacity for p in read_obj(tmp_path / "vase.obj")] == [0.2]


def test_class_is_that_of_the_first_word_that_fits():
    assert class_of("Floor lamp on a table", "Lights") == "lamp"
    assert class_of("Armchair", "Living room") == "chair"
    assert class_of("Teacup", "Kitchen") == "other"  # "cup" starts no word
    assert class_of("Man", "Characters") == "figure"
    assert class_of("Oak door", "Doors and windows") is None
    assert class_of("Swing", "Exterior") is None


def test_models_of_val_are_a_third_of_each_class_and_never_in_train():
    models = [model(f"{c}{i}", c) for c in ("chair", "bed") for i in range(10)]
    train, val = split_models(models, "train"), split_models(models, "val")
    assert [sum(m.label == c for m in val) for c in ("chair", "bed")] == [3, 3]
    assert {m.id for m in train} | {m.id for m in val} == {m.id for m in models}
    assert len(train) == 14


# --- where things are put ------------------------------------------------------------------------------------------


def test_spots_are_free_inside_and_sofas_stand_at_walls():
    space, rng = Space(4, 5, 2.5), np.random.default_rng(0)
    taken = [(0.0, 0.0, 1.0, 1.0)]
    for label in ("chair", "sofa"):
        for _ in range(50):
            quarter, box = draw_spot(rng, model(label=label), space, taken)
            assert (box[2], box[3]) == ((0.8, 0.6) if quarter % 2 == 0 else (0.6, 0.8))
            assert not overlaps(box, taken)
            assert abs(box[0]) + box[2] / 2 <= 2
            assert abs(box[1]) + box[3] / 2 <= 2.5
            if label == "sofa":
                gap = {0: 2.5 - box[1], 1: 2 + box[0], 2: 2.5 + box[1], 3: 2 - box[0]}[quarter] - 0.6 / 2
                assert gap == pytest.approx(0.03)
    assert draw_spot(rng, model(size=(4.5, 4.5, 1)), space, []) is None


def test_cameras_stand_free_away_from_the_target_and_below_the_ceiling():
    space, rng, target = Space(5, 4, 1.6), np.random.default_rng(1), np.array([1.0, 1.0, 0.5])
    taken = [(-1.0, -1.0, 1.0, 1.0)]
    for _ in range(50):
        eye = draw_eye(rng, space, taken, target)
        assert not overlaps((eye[0], eye[1], 0.3, 0.3), taken)
        assert np.linalg.norm(eye[:2] - target[:2]) > 1.2
        assert 1.1 <= eye[2] <= 1.2
    assert draw_eye(rng, space, [(0, 0, 5, 4)], target) is None


def test_overlap_counts_the_gap():
    assert overlaps((0, 0, 1, 1), [(1.04, 0, 1, 1)])
    assert not overlaps((0, 0, 1, 1), [(1.06, 0, 1, 1)])


# --- light ---------------------------------------------------------------------------------------------------------


def flat_view(distance=2.0, side=56):
    colour = np.full((side, side, 3), 128, np.uint8)
    depth = np.full((side, side), distance)
    return View(colour, depth, np.zeros((side, side), int), np.eye(4), 60.0)


def test_a_lamp_lights_what_is_near_it():
    dark = shade(np.random.default_rng(0), flat_view(), Lights(0.2, []))
    lamp = Lights(0.2, [([-0.8, 0.0, -1.5], np.array([1.0, 1.0, 0.2]))])  # left of the middle, before the wall
    lit = shade(np.random.default_rng(0), flat_view(), lamp).astype(int)
    assert (lit.mean((0, 1)) > dark.mean((0, 1))).all()
    assert lit[:, :28].mean() > lit[:, 28:].mean() + 10
    assert lit[..., 0].mean() > lit[..., 2].mean() + 10  # its light is yellow


def test_ambient_light_follows_the_tone_curve():
    lit = shade(np.random.default_rng(0), flat_view(), Lights(0.5, []))
    exposure = np.random.default_rng(0).uniform(0.9, 1.1)
    assert lit.mean() == pytest.approx(exposure * 255 * ((128 / 255) ** 1.6 * 0.5) ** (1 / 1.8), abs=1)


def test_shrinking_averages():
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2, :2] = [[[1] * 3, [2] * 3], [[4] * 3, [4] * 3]]
    assert shrink(image, 2)[0, 0].tolist() == [3, 3, 3]
    assert shrink(image, 1) is image


# --- retrieval -----------------------------------------------------------------------------------------------------


def shot(path, azimuth=0.0, visible=1.0, share=0.1, instance=0, clear=False):
    return room_retrieval.Shot(path, instance, azimuth, visible, share, clear, [0, 0, 9, 9])


def test_levels_by_hand():
    query = shot("q", azimuth=0.1, clear=True)
    near = 2 * math.pi - 0.5  # 0.6 rad away, over zero
    assert room_retrieval.level_of(query, shot("a", near)) == "easy"
    assert room_retrieval.level_of(query, shot("a", 1.0)) == "hard"  # 0.9 rad is more than 45 degrees
    assert room_retrieval.level_of(query, shot("a", near, visible=0.5)) == "hard"
    assert room_retrieval.level_of(query, shot("a", near, visible=0.2)) == "junk"
    assert room_retrieval.level_of(query, shot("a", near, share=0.001)) == "junk"


def test_queries_are_clear_views_with_matches():
    shots = [
        shot("0", clear=True), shot("1", clear=True, visible=0.6), shot("2", 3.0), shot("3", visible=0.1),
        shot("4", instance=1, clear=True),
    ]  # fmt: skip
    (query,) = room_retrieval.query_list(shots)
    assert query == {"query": "0", "box": [0, 0, 9, 9], "easy": ["1"], "hard": ["2"], "junk": ["3"]}


# --- rendering -----------------------------------------------------------------------------------------------------


def test_without_pybullet_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pybullet", None)
    with pytest.raises(MissingExtraError, match=r"opendino\[rooms\]"):
        Renderer([])


@pytest.fixture
def packages(tmp_path, cube):
    """Packages with two textures and seven boxes of furniture, in the layout of the real ones."""
    jar = tmp_path / "sweethome3d/usr/share/sweethome3d/sweethome3d.jar"
    jar.parent.mkdir(parents=True)
    with zipfile.ZipFile(jar, "w") as file:
        for name in ("woodenFloor.jpg", "bricks.jpg"):
            pixels = np.random.default_rng(len(name)).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name)
            file.write(tmp_path / name, f"a/resources/textures/{name}")
    lines = []
    for i, name in enumerate(["Chair", "Stool", "Sofa", "Couch", "Table", "Desk", "Huge bed"]):
        side = 400 if name == "Huge bed" else 60 + 10 * i
        entry = {"id": f"x#{name}", "name": name, "category": "Living room", "model": "/cube.obj",
                 "width": side, "depth": 60, "height": 70}  # fmt: skip
        lines += [f"{key}#{i + 1}={value}" for key, value in entry.items()]
    library = tmp_path / "sweethome3d-furniture/usr/share/sweethome3d/furniture/Test.sh3f"
    library.parent.mkdir(parents=True)
    with zipfile.ZipFile(library, "w") as file:
        file.writestr("PluginFurnitureCatalog.properties", "\n".join(lines))
        file.write(cube, "cube.obj")
        file.write(cube.with_suffix(".mtl"), "cube.mtl")
    return {name: tmp_path / name for name in rooms.PACKAGES_NEEDED}


def test_library_is_read_with_sizes_in_metres(packages):
    models = load_models(packages["sweethome3d-furniture"])
    assert [(m.name, m.label) for m in models[:3]] == [("Chair", "chair"), ("Stool", "chair"), ("Sofa", "sofa")]
    assert models[0].size == (0.6, 0.6, 0.7)
    assert "Huge bed" not in [m.name for m in models]  # 4 m
    assert models[0].path.is_file()


@pytest.fixture
def renderer(packages):
    pytest.importorskip("pybullet", reason="rooms are rendered by the extra `rooms`")
    return rooms.open_renderer(packages)


def test_depth_is_metric_along_the_axis(renderer, packages):
    renderer.reset()
    bodies = renderer.room(np.random.default_rng(0), 6, 4, 2.5)
    view = renderer.view((-2, 0, 1), (3, 0, 1), 60, 64)
    assert bodies[int(view.body[32, 32])] == "wall"
    assert view.depth[32, 32] == pytest.approx(5, abs=0.01)  # the wall at x = 3
    assert view.depth[20, 20] == pytest.approx(5, abs=0.01)  # of the same wall: not along the ray
    box = load_models(packages["sweethome3d-furniture"])[0]  # 0.6 × 0.6 × 0.7
    body = renderer.spawn(box, (0, 0, 0), 0)
    view = renderer.view((-2, 0, 0.35), (3, 0, 0.35), 60, 64)
    assert view.body[32, 32] == body
    assert view.depth[32, 32] == pytest.approx(1.7, abs=0.01)
    assert view.depth[20, 20] != pytest.approx(1.7, abs=0.5)


def test_rooms_are_written_as_folders_that_open(renderer, packages, tmp_path, monkeypatch):
    monkeypatch.setattr(rooms, "SIZE", 64)
    monkeypatch.setattr(rooms, "VIEWS", 1)
    for out in ("one", "two"):
        with Progress(console=Console(quiet=True)) as progress:
            counts = rooms.build_rooms(packages, tmp_path / out, progress, scenes={"train": 1})
    assert counts == {"train": 1}
    masks, depth = open_folder_masks(tmp_path / "one", "train"), open_folder_depth(tmp_path / "one", "train")
    assert tuple(masks.classes) == room_models.CLASSES
    assert {0, 1} & set(masks.mask(0).unique().tolist())  # walls or floor
    known = depth.depth(0)
    assert known.shape == (64, 64)
    assert known.min() > 0.05
    assert known.max() < 10
    for path in sorted((tmp_path / "one").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_second_cameras_see_the_same_rooms_otherwise(renderer, packages, monkeypatch):
    monkeypatch.setattr(rooms, "SIZE", 64)
    models = load_models(packages["sweethome3d-furniture"])
    (first,), (second,) = (
        list(rooms.room_views(renderer, models, "val", 0, cameras, views=1)) for cameras in (room_scenes.FIRST, SECOND)
    )
    assert 55 <= first.meta["fov"] <= 75
    assert 85 <= second.meta["fov"] <= 100
    assert second.meta["eye"][2] <= 0.9 < first.meta["eye"][2]
    assert second.image.mean() < first.image.mean()


def test_retrieval_and_objects_are_written(renderer, packages, tmp_path, monkeypatch):
    for module in (rooms, room_retrieval):
        monkeypatch.setattr(module, "SIZE", 64)
    monkeypatch.setattr(room_retrieval, "VIEWS_EACH", 3)
    monkeypatch.setattr(rooms, "OBJECT_VIEWS", 1)
    with Progress(console=Console(quiet=True)) as progress:
        counts = room_retrieval.build_room_retrieval(packages, tmp_path / "retrieval", progress, instances=2)
        objects = rooms.build_room_objects(packages, tmp_path / "objects", progress)
    task = json.loads((tmp_path / "retrieval/retrieval.json").read_text())
    assert counts["images"] == len(task["gallery"]) == 6
    assert counts["queries"] == len(task["queries"]) > 0
    with Image.open(tmp_path / "retrieval" / task["queries"][0]["query"]) as image:
        assert image.size == (64, 64)
    assert sum(objects.values()) == len(list((tmp_path / "objects").rglob("*.jpg"))) >= 4
    assert room_renderer.NEAR < room_renderer.FAR
