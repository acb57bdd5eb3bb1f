# SPDX-License-Identifier: Apache-2.0
"""Pictures of furnished rooms with metric depth, by PyBullet's software renderer: no display, no GPU.

PyBullet gives flat colour, depth and which body is seen; `shade` adds point lights, dark corners and noise. Bytes are
the same for one version of pybullet, numpy and pillow.

World: z up, metres, the floor at 0. Camera: x right, y up, looking along −z.
"""

from __future__ import annotations

import hashlib
import math
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from opendino.errors import MissingExtraError
from opendino.sample_data.room_models import Floats, Part, RoomModel, read_obj

NEAR, FAR = 0.05, 20.0
TEXTURE_SIDE = 512
_OUTDOORS = ("cloudy", "sky", "Sky", "boxTree", "Cloudy")
_FLOORS = re.compile("oden|ile|aving|ebble|arble|grass")
Triple = tuple[float, float, float]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class View:
    """What a camera sees.

    Attributes:
        colour: uint8 (n, n, 3), without light.
        depth: (n, n) metres along the optical axis, 0 where nothing is.
        body: (n, n) number of the body, −1 where nothing is.
        matrix: (4, 4) world → camera.
        fov: degrees.
    """

    colour: Bytes
    depth: Floats
    body: npt.NDArray[np.int64]
    matrix: Floats
    fov: float


@dataclass(frozen=True)
class Lights:
    """Ambient light, and point lights as (place, colour)."""

    ambient: float
    points: Sequence[tuple[Sequence[float], Floats]]


class _World:
    """PyBullet's functions for one world of its own: by default they all act on the first one of the process."""

    def __init__(self, bullet: Any) -> None:
        self._bullet, self._number = bullet, bullet.connect(bullet.DIRECT)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._bullet, name)
        return partial(found, physicsClientId=self._number) if isinstance(found, BuiltinFunctionType) else found


class Renderer:
    """A room that things can be put into.

    Args:
        surfaces: texture files of floors and walls.

    Raises:
        MissingExtraError: without pybullet, whose wheels are for Python 3.11 at most.
    """

    def __init__(self, surfaces: Sequence[Path]) -> None:
        try:
            import pybullet
        except ImportError as error:
            raise MissingExtraError("pybullet", "rooms", "Rendering rooms") from error
        self._bullet: Any = pybullet
        self._world: _World | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="opendino-textures-")
        self._parts: dict[Path, list[Part] | None] = {}
        indoors = [p for p in surfaces if not any(s in p.name for s in _OUTDOORS)]
        self.floors = [p for p in indoors if _FLOORS.search(p.name)]
        self.walls = [p for p in indoors if "grass" not in p.name and "Floor" not in p.name]

    def reset(self) -> None:
        """Start with an empty world."""
        self.close()
        self._world = _World(self._bullet)
        self._textures: dict[Path, int] = {}

    def close(self) -> None:
        """Let go of the world."""
        if self._world is not None:
            self._world.disconnect()
            self._world = None

    @property
    def _p(self) -> _World:
        assert self._world is not None, "reset() comes first"
        return self._world

    # --- what is put into it

    def room(self, rng: np.random.Generator, width: float, depth: float, height: float) -> dict[int, str]:
        """Put four walls, a floor and a ceiling around the origin; give body → class."""
        wall = self.walls[rng.integers(len(self.walls))] if rng.random() < 0.6 else None
        floor = self.floors[rng.integers(len(self.floors))]
        tint = tuple(rng.uniform(0.8, 1.0, 3)) if wall else tuple(rng.uniform(0.55, 1.0, 3))
        x, y, tile = width / 2, depth / 2, rng.uniform(0.8, 1.6)
        ground = [(-x, -y), (x, -y), (x, y), (-x, y)]
        bodies = {
            self._quad([(*c, 0) for c in ground], (width / tile, depth / tile), floor, (1, 1, 1)): "floor",
            self._quad([(*c, height) for c in ground], (1, 1), None, tuple(rng.uniform(0.85, 1, 3))): "ceiling",
        }
        for i, length in enumerate((width, depth, width, depth)):
            a, b = ground[i], ground[(i + 1) % 4]
            corners = [(*a, 0), (*b, 0), (*b, height), (*a, height)]
            bodies[self._quad(corners, (length / tile, height / tile), wall, tint)] = "wall"
        return bodies

    def spawn(self, model: RoomModel, place: Triple, yaw: float) -> int | None:
        """Put a model with its bottom at a place, turned by `yaw` radians; None when it cannot be read."""
        parts = self._read(model.path)
        if not parts:
            return None
        p = self._p
        shapes = self._shapes(parts, model.size)
        rest = len(shapes) - 1
        zero, unit = [[0, 0, 0]] * rest, [[0, 0, 0, 1]] * rest
        body: int = p.createMultiBody(
            0, -1, shapes[0], list(place), p.getQuaternionFromEuler([0, 0, yaw]), linkMasses=[0] * rest,
            linkCollisionShapeIndices=[-1] * rest, linkVisualShapeIndices=shapes[1:], linkPositions=zero,
            linkOrientations=unit, linkInertialFramePositions=zero, linkInertialFrameOrientations=unit,
            linkParentIndices=[0] * rest, linkJointTypes=[p.JOINT_FIXED] * rest, linkJointAxis=[[0, 0, 1]] * rest,
        )  # fmt: skip
        for link, part in enumerate(parts):
            self._put_texture(body, link - 1, part)
        return body

    def _read(self, path: Path) -> list[Part] | None:
        if path not in self._parts:
            try:
                self._parts[path] = read_obj(path)
            except (OSError, ValueError, IndexError):
                self._parts[path] = None
        return self._parts[path]

    def _shapes(self, parts: Sequence[Part], size: Triple) -> list[int]:
        """Scale the parts to the model's size and stand them on the ground; y up becomes z up."""
        every = np.concatenate([part.vertices for part in parts])
        low, high = every.min(0), every.max(0)
        width, depth, height = size
        scale = np.array([width, height, depth]) / np.maximum(high - low, 1e-6)
        shapes = []
        for part in parts:
            v = (part.vertices - (low + high) / 2) * scale
            v = np.stack([v[:, 0], -v[:, 2], v[:, 1] + height / 2], 1)
            colour = (1.0, 1.0, 1.0) if _texture(part) else part.material.colour
            shapes.append(self._mesh(v, part.triangles, part.uvs, colour))
        return shapes

    def _put_texture(self, body: int, link: int, part: Part) -> None:
        texture = _texture(part)
        if texture:
            try:
                self._p.changeVisualShape(body, link, textureUniqueId=self._load(texture))
            except (OSError, ValueError, self._p.error):  # a texture that cannot be read leaves the part white
                return

    def _quad(self, corners: Sequence[Triple], repeat: tuple[float, float], texture: Path | None, tint: Any) -> int:
        uvs = np.array([[0, 0], [repeat[0], 0], [repeat[0], repeat[1]], [0, repeat[1]]], float)
        both_sides = np.array([0, 1, 2, 0, 2, 3, 0, 2, 1, 0, 3, 2])
        body: int = self._p.createMultiBody(0, -1, self._mesh(np.array(corners, float), both_sides, uvs, tint))
        if texture:
            self._p.changeVisualShape(body, -1, textureUniqueId=self._load(texture))
        return body

    def _mesh(self, vertices: Floats, triangles: npt.NDArray[np.int64], uvs: Floats, colour: Sequence[float]) -> int:
        shape: int = self._p.createVisualShape(
            self._p.GEOM_MESH, vertices=vertices.tolist(), indices=triangles.tolist(), uvs=uvs.tolist(),
            rgbaColor=[*colour, 1],
        )  # fmt: skip
        return shape

    def _load(self, path: Path) -> int:
        """Give pybullet's number of a texture, which it reads from a PNG of at most 512 pixels a side."""
        if path not in self._textures:
            small = Path(self._folder.name) / f"{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.png"
            if not small.exists():
                with Image.open(path) as file:
                    image = file.convert("RGB")
                image.thumbnail((TEXTURE_SIDE, TEXTURE_SIDE), Image.Resampling.LANCZOS)
                image.save(small)
            self._textures[path] = self._p.loadTexture(str(small))
        return self._textures[path]

    # --- what is seen of it

    def view(self, eye: Iterable[float], target: Iterable[float], fov: float, size: int) -> View:
        """Look from a place at another, square image of `size` pixels, `fov` degrees in both directions."""
        p = self._p
        matrix = p.computeViewMatrix(list(eye), list(target), [0, 0, 1])
        projection = p.computeProjectionMatrixFOV(fov, 1.0, NEAR, FAR)
        _, _, colour, z, body = p.getCameraImage(
            size, size, matrix, projection, renderer=p.ER_TINY_RENDERER, shadow=0, lightDirection=[0, 0, 1],
            lightColor=[1, 1, 1], lightAmbientCoeff=1.0, lightDiffuseCoeff=0.0, lightSpecularCoeff=0.0,
        )  # fmt: skip
        flat = np.asarray(colour, np.uint8).reshape(size, size, -1)[..., :3]
        buffer = np.asarray(z, np.float64).reshape(size, size)
        depth = FAR * NEAR / (FAR - (FAR - NEAR) * buffer)
        seen = np.asarray(body).reshape(size, size)
        depth[seen < 0] = 0
        return View(flat, depth, seen, np.array(matrix).reshape(4, 4).T, fov)


def _texture(part: Part) -> Path | None:
    texture = part.material.texture
    return texture if texture and texture.exists() else None


# --- light ---------------------------------------------------------------------------------------------------------


def shade(rng: np.random.Generator, view: View, lights: Lights) -> Bytes:
    """Give a view uint8 (n, n, 3) with point lights by the normals of its depth, darker corners, exposure and noise."""
    points = _points(view)
    normals = _normals(points)
    light = np.full((*view.depth.shape, 3), lights.ambient)
    for place, colour in lights.points:
        to = (view.matrix @ np.array([*place, 1.0]))[:3] - points
        distance = np.linalg.norm(to, axis=-1, keepdims=True)
        facing = np.clip((normals * to).sum(-1, keepdims=True) / distance, 0, 1)
        light = light + facing * colour / (1 + 0.25 * distance**2)
    side = len(view.depth)
    for reach in (side // 40, side // 14):
        light = light * _openness(view.depth, reach)[..., None]
    out = 255 * np.clip((view.colour / 255.0) ** 1.6 * light, 0, None) ** (1 / 1.8)
    out = out * rng.uniform(0.9, 1.1) + rng.normal(0, 2.0, out.shape)
    lit: Bytes = np.clip(out, 0, 255).astype(np.uint8)
    return lit


def _points(view: View) -> Floats:
    """Give the camera coordinates (n, n, 3) of what each pixel sees."""
    n = len(view.depth)
    focal = 0.5 * n / math.tan(math.radians(view.fov) / 2)
    u = (np.arange(n) + 0.5 - n / 2) / focal
    return np.stack([u[None] * view.depth, -u[:, None] * view.depth, -view.depth], -1)


def _normals(points: Floats) -> Floats:
    normals: Floats = np.cross(np.gradient(points, axis=0), np.gradient(points, axis=1))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True) + 1e-9
    towards_camera = np.where((normals * points).sum(-1, keepdims=True) > 0, -1, 1)
    facing: Floats = normals * towards_camera
    return facing


def _openness(depth: Floats, reach: int) -> Floats:
    """Give 0.6–1 per pixel: what lies behind its surroundings is darker."""
    n, box = len(depth), Image.Resampling.BOX
    mean = Image.fromarray(depth.astype(np.float32)).resize((n // 2, n // 2), box)
    mean = mean.resize((max(n // reach, 2),) * 2, box).resize((n, n), Image.Resampling.BICUBIC)
    open_: Floats = np.clip(1 - 1.2 * np.clip(depth - np.asarray(mean), 0, 0.25), 0.6, 1)
    return open_


def shrink(image: Bytes, factor: int) -> Bytes:
    """Average blocks of factor × factor pixels."""
    n = len(image) // factor
    blocks = image.reshape(n, factor, n, factor, 3)
    small: Bytes = blocks.mean((1, 3)).round().astype(np.uint8) if factor > 1 else image
    return small
