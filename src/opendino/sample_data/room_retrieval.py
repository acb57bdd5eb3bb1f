# SPDX-License-Identifier: Apache-2.0
"""Finding a piece of furniture again: from another side, in another room and light, half hidden. Renderings.

As in revisited Oxford, a view of the same model is easy when at least 60 % of it is visible from within 45 degrees of
the query's side, hard when at least 25 % is visible, else junk. Queries come with a box. The models searched for never
stand in the background of other views. They are of both splits of the rooms: a backbone that was trained on rooms of
train has seen some of them, elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from opendino.sample_data.room_models import RoomModel, hash_of, load_models
from opendino.sample_data.room_renderer import Bytes, Renderer, View, shade, shrink
from opendino.sample_data.room_scenes import Box, Space, draw_lights, furnish
from opendino.sample_data.rooms import (
    SEED,
    SIZE,
    SUPERSAMPLE,
    fitting,
    footprint,
    line_of_sight,
    open_renderer,
    save_array,
    write_json,
)  # fmt: skip

INSTANCES, VIEWS_EACH, CLEAR_VIEWS = 50, 12, 2
WIDE = 100  # degrees, of the view that shows how large the whole object is
QUERY_VISIBLE, QUERY_SHARE = 0.7, 0.02
EASY_VISIBLE, EASY_TURN, EASY_SHARE = 0.6, math.pi / 4, 0.02
HARD_VISIBLE, HARD_SHARE = 0.25, 0.004


@dataclass(frozen=True)
class Shot:
    """What is known of one view.

    Attributes:
        path: of the image, from the folder of the set.
        instance: number of the model.
        azimuth: side that the camera is on, radians.
        visible: part of the object that can be seen, 0–1.
        share: part of the image that it fills.
        clear: it stands free: may be a query.
        box: left, upper, right, lower; None when nothing is seen.
    """

    path: str
    instance: int
    azimuth: float
    visible: float
    share: float
    clear: bool
    box: list[int] | None


@dataclass(frozen=True)
class _Camera:
    eye: Any
    target: Any
    fov: float
    azimuth: float


def build_room_retrieval(
    raw: Mapping[str, Path], out: Path, progress: Progress, instances: int = INSTANCES
) -> dict[str, int]:
    """Write images/ and retrieval.json: {"gallery", "queries": [{"query", "box", "easy", "hard", "junk"}]}.

    Args:
        raw: unpacked folders of `rooms.PACKAGES_NEEDED`.
        out: folder to fill.
        progress: gets one line.
        instances: models that are searched for, twelve views each.

    Returns:
        Numbers of images and queries.

    Raises:
        MissingExtraError: without pybullet.
    """
    renderer, models = open_renderer(raw), load_models(raw["sweethome3d-furniture"])
    wanted = choose_wanted(renderer, models, instances)
    taken, names = {m.id for m in wanted}, {m.name.lower() for m in wanted}
    others = [m for m in models if m.id not in taken and m.name.lower() not in names]
    shots = []
    for number, model in enumerate(progress.track(wanted, description="room retrieval")):
        for view in range(VIEWS_EACH):
            image, shot = instance_view(renderer, others, model, number, view)
            save_array(out / shot.path, image, quality=92)
            shots.append(shot)
    queries = query_list(shots)
    write_json(out / "retrieval.json", {"gallery": [s.path for s in shots], "queries": queries})
    write_json(out / "meta.json", {"views": [vars(s) for s in shots], "instances": [m.id for m in wanted]})
    return {"images": len(shots), "queries": len(queries)}


def choose_wanted(renderer: Renderer, models: Sequence[RoomModel], count: int) -> list[RoomModel]:
    """Give the first `count` models by hash that are of a size to walk around and can be read."""
    usable = [m for m in models if 0.4 < max(m.size) < 2.3 and m.elevation < 0.3 and m.label != "figure"]
    wanted: list[RoomModel] = []
    renderer.reset()
    for model in sorted(usable, key=lambda m: hash_of("r " + m.id)):
        if len(wanted) < count and renderer.spawn(model, (0, 0, 0), 0) is not None:
            wanted.append(model)
    return wanted


def instance_view(
    renderer: Renderer, others: Sequence[RoomModel], model: RoomModel, instance: int, number: int
) -> tuple[Bytes, Shot]:
    """Render view `number` of a model among `others`; the first two views stand free."""
    rng, clear = np.random.default_rng([SEED, 7, instance, number]), number < CLEAR_VIEWS
    renderer.reset()
    space = Space(rng.uniform(4, 7), rng.uniform(4, 7), max(rng.uniform(2.5, 3.1), model.size[2] + 0.3))
    renderer.room(rng, space.width, space.depth, space.height)
    camera, body = _camera(rng, space, model, number), renderer.spawn(model, (0, 0, 0), 0)
    alone = renderer.view(camera.eye, camera.target, camera.fov, SIZE)
    wide = renderer.view(camera.eye, np.array([0, 0, model.size[2] / 2]), WIDE, SIZE)
    eye = camera.eye
    free: Box = line_of_sight(eye) if clear else (eye[0], eye[1], 0.5, 0.5)
    furnish(renderer, rng, others, space, [footprint(model), free], int(rng.integers(4, 10)))
    view = renderer.view(eye, camera.target, camera.fov, SIZE * SUPERSAMPLE)
    image = shrink(shade(rng, view, draw_lights(rng, space)), SUPERSAMPLE)
    middle = slice(SUPERSAMPLE // 2, None, SUPERSAMPLE)
    seen = view.body[middle, middle] == body
    visible = float(seen.sum() / max(_whole(alone, wide, body), 1))
    shot = Shot(
        path=f"images/{instance:03d}_{number:02d}.jpg", instance=instance, azimuth=camera.azimuth,
        visible=round(min(visible, 1.0), 3), share=round(float(seen.mean()), 4), clear=clear, box=_box(seen),
    )  # fmt: skip
    return image, shot


def _camera(rng: np.random.Generator, space: Space, model: RoomModel, number: int) -> _Camera:
    clear, reach, narrow = number < CLEAR_VIEWS, max(model.size), min(space.width, space.depth)
    azimuth = rng.uniform(0, 2 * math.pi)
    if clear:
        azimuth = (number * math.pi + rng.uniform(-0.6, 0.6)) - math.pi / 2
    fov = rng.uniform(50, 65)
    times = rng.uniform(1.2, 1.5) if clear else rng.uniform(1.2, 2.6)
    distance = min(fitting(min(times, 0.47 * narrow / reach) * reach, fov) + reach / 2, 0.48 * narrow)
    aside = (0, 0) if clear else rng.normal(0, 0.4 * reach, 2)
    eye = np.array([distance * math.cos(azimuth), distance * math.sin(azimuth), rng.uniform(0.9, 1.7)])
    target = np.array([aside[0], aside[1], model.size[2] * (0.5 if clear else rng.uniform(0.2, 0.9))])
    return _Camera(eye, target, fov, azimuth)


def _whole(alone: View, wide: View, body: int | None) -> float:
    """Give the pixels that all of the object would fill: alone in view, or with what the frame cuts off."""
    scale = (math.tan(math.radians(WIDE) / 2) / math.tan(math.radians(alone.fov) / 2)) ** 2
    return max(float((alone.body == body).sum()), float((wide.body == body).sum()) * scale)


def _box(seen: Any) -> list[int] | None:
    ys, xs = np.nonzero(seen)
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1] if len(xs) else None


# --- what is to be found -------------------------------------------------------------------------------------------


def query_list(shots: Sequence[Shot]) -> list[dict[str, Any]]:
    """Make the queries: clear views that show most of the object, with the views of the same model by difficulty."""
    queries = []
    for query in shots:
        if not query.clear or query.visible < QUERY_VISIBLE or query.share < QUERY_SHARE:
            continue
        matches: dict[str, list[str]] = {"easy": [], "hard": [], "junk": []}
        for shot in shots:
            if shot.instance == query.instance and shot is not query:
                matches[level_of(query, shot)].append(shot.path)
        if matches["easy"] or matches["hard"]:
            queries.append({"query": query.path, "box": query.box, **matches})
    return queries


def level_of(query: Shot, shot: Shot) -> str:
    """Say how hard it is to find a view of the same model: "easy", "hard" or "junk"."""
    turn = abs((shot.azimuth - query.azimuth + math.pi) % (2 * math.pi) - math.pi)
    if shot.visible < HARD_VISIBLE or shot.share < HARD_SHARE:
        return "junk"
    easy = shot.visible >= EASY_VISIBLE and turn <= EASY_TURN and shot.share > EASY_SHARE
    return "easy" if easy else "hard"
