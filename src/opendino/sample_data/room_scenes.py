# SPDX-License-Identifier: Apache-2.0
"""Where furniture, lights and cameras of a rendered room are put: draws of one random generator.

The origin is the middle of the floor; a box on the floor is (x, y, width, depth) around its middle, metres.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from opendino.sample_data.room_models import Floats, RoomModel
from opendino.sample_data.room_renderer import Lights, Renderer

TO_WALL = frozenset(["sofa", "cabinet", "bed", "bathroom", "appliance"])
"""Classes that stand with their back to a wall."""
ON_TOP = ("other", "electronics", "lamp", "plant")
SPOTS, CAMERAS = 40, 60  # tries
Box = tuple[float, float, float, float]
Range = tuple[float, float]


@dataclass(frozen=True)
class Space:
    """A room: width, depth and height in metres."""

    width: float
    depth: float
    height: float


@dataclass(frozen=True)
class Placed:
    """A model in a room: the renderer's body, its box on the floor, and the height that it stands on."""

    body: int
    model: RoomModel
    box: Box
    bottom: float


@dataclass(frozen=True)
class CameraSet:
    """How rooms are looked at and lit.

    Attributes:
        fov: field of view, degrees, in both directions.
        height: of the camera, metres; the upper end is lowered in low rooms.
        ambient: light that comes from everywhere.
        brightness: of a lamp.
        green: of a lamp, next to a red of 1.
        blue: of a lamp.
        stream: number of the random stream of lights and cameras; None goes on with that of the furniture.
    """

    fov: Range = (55, 75)
    height: Range = (1.1, 1.9)
    ambient: Range = (0.2, 0.4)
    brightness: Range = (0.7, 1.3)
    green: Range = (0.85, 1.0)
    blue: Range = (0.7, 1.05)
    stream: int | None = None


FIRST = CameraSet()
"""Cameras at eye height with the field of view of a phone."""
SECOND = CameraSet(
    fov=(85, 100), height=(0.4, 0.9), ambient=(0.08, 0.18), brightness=(0.45, 0.9), green=(0.7, 0.85),
    blue=(0.45, 0.65), stream=1,
)  # fmt: skip
"""Wide cameras at the height of a robot, in dim and warm light."""


def draw_lights(rng: np.random.Generator, space: Space, cameras: CameraSet = FIRST) -> Lights:
    """Draw one to three lamps under the ceiling."""
    points = []
    for _ in range(int(rng.integers(1, 4))):
        colour = rng.uniform(*cameras.brightness) * np.array(
            [1.0, rng.uniform(*cameras.green), rng.uniform(*cameras.blue)]
        )
        x, y = (rng.uniform(-side, side) * 0.4 for side in (space.width, space.depth))
        points.append(([x, y, space.height - 0.15], colour))
    return Lights(rng.uniform(*cameras.ambient), points)


def draw_eye(
    rng: np.random.Generator, space: Space, boxes: Sequence[Box], target: Floats, heights: Range = FIRST.height
) -> Floats | None:
    """Draw a place for a camera over free floor, at least 1.2 m from its target; None when none is found."""
    w, d = space.width / 2 - 0.3, space.depth / 2 - 0.3
    for _ in range(CAMERAS):
        top = min(heights[1], space.height - 0.4)
        eye = np.array([rng.uniform(-w, w), rng.uniform(-d, d), rng.uniform(heights[0], top)])
        if not overlaps((eye[0], eye[1], 0.3, 0.3), boxes) and np.linalg.norm(eye[:2] - target[:2]) > 1.2:
            return eye
    return None


def overlaps(box: Box, boxes: Iterable[Box], gap: float = 0.05) -> bool:
    """Whether a box comes nearer than `gap` to one of the others."""
    return any(
        abs(box[0] - b[0]) < (box[2] + b[2]) / 2 + gap and abs(box[1] - b[1]) < (box[3] + b[3]) / 2 + gap for b in boxes
    )


def draw_spot(rng: np.random.Generator, model: RoomModel, space: Space, boxes: Sequence[Box]) -> tuple[int, Box] | None:
    """Draw quarter turns and a floor box for a model, clear of the others; None when none is found."""
    for _ in range(SPOTS):
        quarter = int(rng.integers(4))
        width, depth = model.size[:2] if quarter % 2 == 0 else model.size[1::-1]
        if width > space.width - 0.3 or depth > space.depth - 0.3:
            continue
        far_x, far_y = (space.width - width) / 2, (space.depth - depth) / 2
        x, y = rng.uniform(-far_x, far_x), rng.uniform(-far_y, far_y)
        if model.label in TO_WALL:  # back to the wall that the front looks away from
            x = {1: -far_x + 0.03, 3: far_x - 0.03}.get(quarter, x)
            y = {0: far_y - 0.03, 2: -far_y + 0.03}.get(quarter, y)
        if not overlaps((x, y, width, depth), boxes):
            return quarter, (x, y, width, depth)
    return None


def furnish(
    renderer: Renderer,
    rng: np.random.Generator,
    models: Sequence[RoomModel],
    space: Space,
    boxes: list[Box],
    count: int,
) -> list[Placed]:
    """Put about `count` models of random classes on the floor, and small ones on tables and cabinets.

    Args:
        renderer: the room.
        rng: of the scene.
        models: to draw from.
        space: the room's size.
        boxes: of floor that is taken; those of what is put there are added.
        count: when to stop; a crowded room ends with fewer.
    """
    standing: dict[str, list[RoomModel]] = defaultdict(list)
    for model in models:
        if max(model.size) > 0.45 and model.size[2] < space.height - 0.1 and model.elevation < 0.3:
            standing[model.label].append(model)
    small = [m for m in models if max(m.size) <= 0.6 and m.label in ON_TOP]
    labels, placed = sorted(standing), list[Placed]()
    for _ in range(4 * count):
        if len(placed) >= count:
            break
        choice = standing[labels[rng.integers(len(labels))]]
        model = choice[rng.integers(len(choice))]
        spot = draw_spot(rng, model, space, boxes)
        body = renderer.spawn(model, (*spot[1][:2], 0), spot[0] * math.pi / 2) if spot else None
        if spot is None or body is None:
            continue
        boxes.append(spot[1])
        placed.append(Placed(body, model, spot[1], 0.0))
        if model.label in ("table", "cabinet") and small and model.size[2] < 1.4:
            placed += _put_on_top(renderer, rng, small, placed[-1])
    return placed


def _put_on_top(
    renderer: Renderer, rng: np.random.Generator, small: Sequence[RoomModel], below: Placed
) -> list[Placed]:
    """Put up to two small models on a table or cabinet."""
    x, y, width, depth = below.box
    top, found = below.model.size[2], list[Placed]()
    for _ in range(int(rng.integers(0, 3))):
        model = small[int(rng.integers(len(small)))]
        room_x, room_y = width - max(model.size[:2]), depth - max(model.size[:2])
        if room_x <= 0 or room_y <= 0:
            continue
        place = (x + rng.uniform(-room_x, room_x) / 2, y + rng.uniform(-room_y, room_y) / 2)
        body = renderer.spawn(model, (*place, top), rng.uniform(0, 6.28))
        if body is not None:
            found.append(Placed(body, model, (*place, model.size[0], model.size[1]), top))
    return found
