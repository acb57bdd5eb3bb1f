# SPDX-License-Identifier: Apache-2.0
"""Rendered rooms: images with metric depth and class masks, and single objects in class folders.

Renderings, not photographs: say so where a figure is quoted. 30 % of the furniture models of each class are only in
val. Rooms of the second camera set are those of val, seen by wide and low cameras in another light: for measuring how a
depth estimator carries over.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.progress import Progress

from opendino.sample_data.room_models import CLASSES, RoomModel, hash_of, load_models, split_models
from opendino.sample_data.room_renderer import Bytes, Renderer, View, shade, shrink
from opendino.sample_data.room_scenes import (
    FIRST,
    SECOND,
    Box,
    CameraSet,
    Placed,
    Space,
    draw_eye,
    draw_lights,
    furnish,
)  # fmt: skip
from opendino.sample_data.surfaces import unpack_surfaces

PACKAGES_NEEDED = ("sweethome3d", "sweethome3d-furniture")
SEED, SIZE, SUPERSAMPLE, IGNORED = 0, 224, 2, 255
SCENES = {"train": 200, "val": 60}
VIEWS, OBJECT_VIEWS = 6, 4
MILLIMETRE = 0.001


@dataclass(frozen=True)
class RoomView:
    """One rendered image: uint8 (n, n, 3); depth uint16 (n, n) in millimetres, 0 unknown; mask uint8 (n, n)."""

    image: Bytes
    depth: npt.NDArray[np.uint16]
    mask: Bytes
    meta: dict[str, Any]


# --- rooms with depth and masks ------------------------------------------------------------------------------------


def build_rooms(
    raw: Mapping[str, Path], out: Path, progress: Progress, *, scenes: Mapping[str, int] = SCENES,
    cameras: CameraSet = FIRST,
) -> dict[str, int]:  # fmt: skip
    """Write images/, depth/, masks/, classes.txt and depth.json, the folder forms of `evaluate.datasets.folders`.

    Args:
        raw: unpacked folders of `PACKAGES_NEEDED`.
        out: folder to fill; meta/SPLIT.json gets scene, field of view, place of the camera and objects of each image.
        progress: gets a line per split.
        scenes: rooms of "train" and "val".
        cameras: how they are looked at.

    Returns:
        Number of images per split.

    Raises:
        MissingExtraError: without pybullet.
    """
    renderer, models = open_renderer(raw), load_models(raw["sweethome3d-furniture"])
    counts = {}
    for split, number in scenes.items():
        part, meta = split_models(models, split), list[dict[str, Any]]()
        for scene in progress.track(range(number), description=f"rooms {split}"):
            for view in room_views(renderer, part, split, scene, cameras):
                name = f"{len(meta):05d}"
                save_array(out / "images" / split / f"{name}.jpg", view.image, quality=92)
                save_array(out / "depth" / split / f"{name}.png", view.depth)
                save_array(out / "masks" / split / f"{name}.png", view.mask)
                meta.append({"name": name, "scene": scene, **view.meta})
        write_json(out / "meta" / f"{split}.json", meta)
        counts[split] = len(meta)
    write_descriptions(out)
    return counts


def build_second_cameras(raw: Mapping[str, Path], out: Path, progress: Progress) -> dict[str, int]:
    """Write the rooms of val as the second camera set sees them; arguments as in `build_rooms`."""
    return build_rooms(raw, out, progress, scenes={"val": SCENES["val"]}, cameras=SECOND)


def write_descriptions(out: Path) -> None:
    """Write classes.txt and depth.json."""
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    write_json(out / "depth.json", {"scale": MILLIMETRE, "max": 10})


def open_renderer(raw: Mapping[str, Path]) -> Renderer:
    """Make a renderer with the package's floors and walls."""
    return Renderer(unpack_surfaces(raw["sweethome3d"]))


def room_views(
    renderer: Renderer, models: Sequence[RoomModel], split: str, scene: int, cameras: CameraSet = FIRST,
    views: int | None = None,
) -> Iterator[RoomView]:  # fmt: skip
    """Iterate over the views of one room, a function of split, scene and cameras.

    A view is left out when no free place for its camera is found.
    """
    key = [SEED, int(split == "val"), scene]
    rng = np.random.default_rng(key)
    renderer.reset()
    space = Space(rng.uniform(3.5, 7), rng.uniform(3.5, 7), rng.uniform(2.4, 3.1))
    labels = renderer.room(rng, space.width, space.depth, space.height)
    boxes: list[Box] = []
    placed = furnish(renderer, rng, models, space, boxes, int(rng.integers(5, 12)))
    labels |= {p.body: p.model.label for p in placed}
    if cameras.stream is not None:
        rng = np.random.default_rng([*key, cameras.stream])
    lights = draw_lights(rng, space, cameras) if placed else None
    for _ in range((VIEWS if views is None else views) if lights else 0):
        aim = placed[rng.integers(len(placed))]
        target = np.array([*aim.box[:2], aim.bottom + aim.model.size[2] / 2]) + rng.normal(0, 0.25, 3)
        eye = draw_eye(rng, space, boxes, target, cameras.height)
        if eye is None or lights is None:
            continue
        view = renderer.view(eye, target, rng.uniform(*cameras.fov), SIZE * SUPERSAMPLE)
        yield _room_view(shrink(shade(rng, view, lights), SUPERSAMPLE), view, labels, placed, eye, target)


def _room_view(
    image: Bytes, view: View, labels: Mapping[int, str], placed: Sequence[Placed], eye: Any, target: Any
) -> RoomView:
    middle = slice(SUPERSAMPLE // 2, None, SUPERSAMPLE)
    depth, body = view.depth[middle, middle], view.body[middle, middle]
    mask = np.full(body.shape, IGNORED, np.uint8)
    for number, label in labels.items():
        mask[body == number] = CLASSES.index(label)
    meta = {
        "fov": round(float(view.fov), 3),
        "eye": [round(float(x), 4) for x in eye],
        "target": [round(float(x), 4) for x in target],
        "objects": sorted({p.model.id for p in placed if (body == p.body).sum() > 20}),
    }
    return RoomView(image, np.round(depth / MILLIMETRE).astype(np.uint16), mask, meta)


# --- single objects ------------------------------------------------------------------------------------------------


def build_room_objects(raw: Mapping[str, Path], out: Path, progress: Progress) -> dict[str, int]:
    """Write train/ and val/ class folders: four views of each model in a furnished room, cropped around it.

    Arguments and errors as in `build_rooms`. Models of the class "other" are left out; val holds unseen models.
    """
    renderer, models = open_renderer(raw), load_models(raw["sweethome3d-furniture"])
    counts = {}
    for split in ("train", "val"):
        part = split_models(models, split)
        counts[split] = 0
        for model in progress.track([m for m in part if m.label != "other"], description=f"objects {split}"):
            for number in range(OBJECT_VIEWS):
                image = object_view(renderer, part, model, number)
                if image is not None:
                    name = re.sub(r"[^A-Za-z0-9]+", "_", model.id)
                    path = out / split / model.label / f"{name}_{number}.jpg"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    image.save(path, quality=92)
                    counts[split] += 1
    return counts


def object_view(renderer: Renderer, models: Sequence[RoomModel], model: RoomModel, number: int) -> Image.Image | None:
    """Render view `number` of a model; None when the model cannot be read or is hardly seen."""
    rng = np.random.default_rng([SEED, 5, int(hash_of(model.id)[:8], 16), number])
    renderer.reset()
    reach = max(model.size)
    width, depth = rng.uniform(4, 7, 2) + max(0, reach - 2)
    space = Space(width, depth, max(rng.uniform(2.5, 3.1), model.size[2] + 0.3))
    renderer.room(rng, space.width, space.depth, space.height)
    body = renderer.spawn(model, (0, 0, 0), 0)
    if body is None:
        return None
    azimuth, fov = rng.uniform(0, 2 * math.pi), rng.uniform(45, 65)
    distance = min(fitting(rng.uniform(1.1, 1.7) * reach, fov) + reach / 2, 0.48 * min(width, depth))
    height = rng.uniform(0.3, 0.9) * min(1.7, max(0.8, model.size[2] * 1.6))
    eye = np.array([distance * math.cos(azimuth), distance * math.sin(azimuth), height])
    furnish(renderer, rng, models, space, [footprint(model), line_of_sight(eye)], int(rng.integers(0, 5)))
    view = renderer.view(eye, (0, 0, model.size[2] / 2), fov, SIZE * 2)
    ys, xs = np.nonzero(view.body == body)
    if len(ys) < 400:
        return None
    return _crop_around(rng, shade(rng, view, draw_lights(rng, space)), xs, ys)


def _crop_around(rng: np.random.Generator, image: Bytes, xs: Any, ys: Any) -> Image.Image:
    half = max(ys.max() - ys.min(), xs.max() - xs.min()) * rng.uniform(0.55, 0.8)
    centre = (xs.max() + xs.min()) / 2, (ys.max() + ys.min()) / 2
    half = min(half, len(image) / 2)
    x, y = (int(np.clip(c - half, 0, len(image) - 2 * half)) for c in centre)
    box = (x, y, x + int(2 * half), y + int(2 * half))
    return Image.fromarray(image).crop(box).resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def fitting(extent: float, fov: float) -> float:
    """Give the distance at which something so large fills a view of `fov` degrees."""
    return extent / (2 * math.tan(math.radians(fov) / 2))


def footprint(model: RoomModel) -> Box:
    """Give the floor that a model in the middle of the room takes."""
    return 0, 0, model.size[0], model.size[1]


def line_of_sight(eye: Any) -> Box:
    """Give the floor that must stay free between a camera and the middle of the room."""
    return eye[0] / 2, eye[1] / 2, abs(eye[0]) + 0.5, abs(eye[1]) + 0.5


# --- files ---------------------------------------------------------------------------------------------------------


def save_array(path: Path, array: npt.NDArray[Any], **options: Any) -> None:
    """Write an image file, and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
