# SPDX-License-Identifier: Apache-2.0
"""Floors and walls drawn by numbers alone: boards, tiles, bricks, stone, cloth and plaster, from nobody's photograph.

File names follow the rule by which `Renderer` tells floors from walls.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE, EACH, SEED = 256, 24, 20
Floats = npt.NDArray[np.float64]
Rng = np.random.Generator


def make_surfaces(folder: Path, each: int = EACH) -> list[Path]:
    """Write `each` PNG files of every kind of surface unless they are there; give their paths, sorted."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind, (name, draw) in enumerate(KINDS.items()):
        for number in range(each):
            path = folder / f"{name}-{number:02d}.png"
            if not path.exists():
                pixels = np.clip(draw(np.random.default_rng([SEED, kind, number])), 0, 1)
                part = path.with_suffix(".part")
                Image.fromarray((255 * pixels).round().astype(np.uint8)).save(part, "PNG")
                part.rename(path)
            paths.append(path)
    return sorted(paths)


def noise(rng: Rng, cells: tuple[int, int], octaves: int = 4) -> Floats:
    """Give (SIDE, SIDE) noise of mean 0 and deviation 1 that goes on over the edges, coarsest in `cells` cells."""
    total = np.zeros((SIDE, SIDE))
    for octave in range(octaves):
        rows, columns = (min(n << octave, SIDE) for n in cells)
        total += _stretched(rng.normal(size=(rows, columns))) * 0.6**octave
    centred: Floats = total - total.mean()
    return centred / max(float(centred.std()), 1e-9)


def _stretched(grid: Floats) -> Floats:
    """Enlarge a grid to (SIDE, SIDE) smoothly, as if it were repeated in both directions."""
    for axis in (0, 1):
        count = grid.shape[axis]
        at = np.arange(SIDE) * count / SIDE
        low, share = np.floor(at).astype(int), at - np.floor(at)
        share = share * share * (3 - 2 * share)
        share = share[:, None] if axis == 0 else share[None]
        grid = np.take(grid, low % count, axis) * (1 - share) + np.take(grid, (low + 1) % count, axis) * share
    return grid


# --- colours -------------------------------------------------------------------------------------------------------


def hue(rng: Rng, dark: float = 0.35, light: float = 0.95, strength: float = 0.2) -> Floats:
    """Draw a colour (3,) between two brightnesses, at most `strength` away from grey."""
    colour: Floats = rng.uniform(dark, light) * (1 + rng.uniform(-strength, strength) * rng.uniform(-1, 1, 3))
    return colour


def wood(rng: Rng) -> Floats:
    """Draw the colour of a wood, from nearly white to nearly black."""
    colour: Floats = rng.uniform(0.25, 0.85) * np.array([1.0, rng.uniform(0.7, 0.88), rng.uniform(0.4, 0.75)])
    return colour


def _painted(colour: Floats, shade: Floats) -> Floats:
    return colour[None, None] * (1 + shade[..., None])


def _grid(rows: int, columns: int, shift: float, joint: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Lay `rows` × `columns` pieces; give each pixel's piece, and which pixels are joints. Odd rows are shifted."""
    y, x = np.mgrid[:SIDE, :SIDE]
    high, wide = SIDE // rows, SIDE / columns
    row = np.minimum(y // high, rows - 1)
    moved = (x + (row % 2) * shift * wide) % SIDE
    joints = (y % high < joint) | (moved % wide < joint)
    return row * columns + (moved // wide).astype(int), joints


# --- kinds ---------------------------------------------------------------------------------------------------------


def boards(rng: Rng) -> Floats:
    """Boards with grain, laid in shifted rows."""
    rows, columns = int(rng.choice([4, 8, 16])), int(rng.integers(1, 3))
    piece, joints = _grid(rows, columns, float(rng.uniform(0.2, 0.8)), int(rng.integers(1, 3)))
    tone = rng.normal(0, rng.uniform(0.03, 0.15), rows * columns)[piece]
    shift = rng.integers(0, SIDE, rows * columns)[piece]
    grain = noise(rng, (int(rng.choice([16, 32, 64])), 2))
    y, x = np.mgrid[:SIDE, :SIDE]
    shade = tone + rng.uniform(0.03, 0.1) * grain[y, (x + shift) % SIDE]
    return _painted(wood(rng), np.where(joints, -0.5, shade))


def tiles(rng: Rng) -> Floats:
    """Square or oblong tiles in one or two colours, with joints."""
    rows, columns = int(rng.choice([2, 4, 8])), int(rng.choice([2, 4, 8]))
    piece, joints = _grid(rows, columns, 0.0, int(rng.integers(2, 6)))
    first, second = hue(rng), hue(rng)
    mixed = (piece // columns + piece % columns) % 2 if rng.random() < 0.4 else np.zeros_like(piece)
    tone = rng.normal(0, 0.04, rows * columns)[piece] + 0.04 * noise(rng, (8, 8))
    colour = np.where(mixed[..., None] == 1, second, first) * (1 + tone[..., None])
    return np.where(joints[..., None], hue(rng, 0.3, 0.9, 0.1), colour)


def bricks(rng: Rng) -> Floats:
    """Bricks in rows shifted by a half."""
    rows = int(rng.choice([8, 16]))
    piece, joints = _grid(rows, rows // 2, 0.5, int(rng.integers(2, 5)))
    base = hue(rng, 0.35, 0.8) if rng.random() < 0.5 else np.array([0.62, 0.32, 0.24]) * rng.uniform(0.7, 1.3)
    tone = rng.normal(0, 0.12, rows * rows // 2)[piece] + 0.07 * noise(rng, (32, 32))
    return np.where(joints[..., None], hue(rng, 0.5, 0.9, 0.08), _painted(base, tone))


def marble(rng: Rng) -> Floats:
    """Stone with veins: ridges of noise."""
    vein = np.exp(-np.abs(noise(rng, (3, 3), 5)) * rng.uniform(3, 10))
    cloud = 0.05 * noise(rng, (4, 4))
    first, second = hue(rng, 0.5, 0.97, 0.2), hue(rng, 0.15, 0.7, 0.3)
    share = np.clip(rng.uniform(0.3, 0.9) * vein, 0, 1)[..., None]
    return _painted(first, cloud) * (1 - share) + second * share


def pebbles(rng: Rng) -> Floats:
    """Stones that fill the ground: the nearest of many points, darker towards the edge."""
    count = int(rng.integers(30, 200))
    points = rng.uniform(0, SIDE, (count, 2))
    y, x = np.mgrid[:SIDE, :SIDE]
    at = np.stack([y, x], -1)
    gap = np.abs(at[:, :, None] - points)
    distance = np.linalg.norm(np.minimum(gap, SIDE - gap), axis=-1)
    near = np.partition(distance, 1, -1)
    edge = np.clip((near[..., 1] - near[..., 0]) / (0.25 * SIDE / np.sqrt(count)), 0, 1)
    tone = rng.normal(0, 0.15, count)[distance.argmin(-1)] + 0.06 * noise(rng, (32, 32))
    stones: Floats = _painted(hue(rng), tone) * (0.35 + 0.65 * edge[..., None])
    return stones


def cloth(rng: Rng) -> Floats:
    """Stripes or checks woven over noise."""
    image = np.broadcast_to(hue(rng, 0.3, 0.9, 0.6), (SIDE, SIDE, 3)).copy()
    y, x = np.mgrid[:SIDE, :SIDE]
    for axis in (x, y) if rng.random() < 0.5 else (x,):
        for _ in range(int(rng.integers(1, 4))):
            period, width = SIDE // int(rng.choice([2, 4, 8, 16, 32])), rng.uniform(0.1, 0.5)
            stripe = ((axis + rng.integers(0, period)) % period < width * period)[..., None]
            image = np.where(stripe, 0.4 * image + 0.6 * hue(rng, 0.2, 0.95, 0.6), image)
    woven: Floats = image * (1 + 0.05 * noise(rng, (128, 128), 2)[..., None])
    return woven


def plaster(rng: Rng) -> Floats:
    """An even colour with fine and coarse roughness."""
    rough = noise(rng, (64, 64), 3) * rng.uniform(0.01, 0.06) + noise(rng, (3, 3), 3) * rng.uniform(0, 0.05)
    return _painted(hue(rng, 0.5, 1.0, 0.4), rough)


def dots(rng: Rng) -> Floats:
    """Printed wallpaper: a figure repeated on a grid."""
    count = int(rng.choice([4, 8, 16]))
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE * count
    u, v = (x + 0.5 * (np.floor(y) % 2)) % 1 - 0.5, y % 1 - 0.5
    petals, reach = int(rng.integers(1, 7)), rng.uniform(0.15, 0.4)
    outline = reach * (1 + rng.uniform(0, 0.6) * np.cos(petals * np.arctan2(v, u)))
    figure = (np.hypot(u, v) < outline)[..., None]
    image = np.where(figure, hue(rng, 0.3, 1.0, 0.6), hue(rng, 0.4, 1.0, 0.4))
    printed: Floats = image * (1 + 0.02 * noise(rng, (64, 64), 2)[..., None])
    return printed


KINDS: dict[str, Callable[[Rng], Floats]] = {
    "wooden": boards, "tiles": tiles, "bricks": bricks, "marble": marble, "pebbles": pebbles, "textile": cloth,
    "plaster": plaster, "dots": dots,
}  # fmt: skip
"""Beginning of the file names → what draws it. Names with "oden", "ile", "arble" or "ebble" are floors too."""
