# SPDX-License-Identifier: Apache-2.0
"""What no learning gets: descriptors of images and of their patches by hand.

"raw" is the image at 16×16 pixels with its mean taken off; "hog" gradients of a grey 64×64 image in cells of 8 pixels,
nine directions, normalised over blocks of 2×2 cells (Dalal and Triggs 2005); "hog+colour" also has a 4×4×4 histogram of
each quarter. Image descriptors have unit length.

Shapes: n images, g patches a side, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
CELL, DIRECTIONS, BLOCK, CLIP, EPS = 8, 9, 2, 0.2, 1e-5
PATCH, PATCH_DIRECTIONS, RAW_SIDE = 14, 8, 4


def unit(x: Any) -> Floats:
    """Scale rows to length one."""
    x = np.asarray(x, float)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


# --- images --------------------------------------------------------------------------------------------------------


def raw_pixels(image: Image.Image) -> Floats:
    """Give the image at 16×16 pixels without its mean, (768,)."""
    small = np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BOX), float).ravel()
    return unit(small - small.mean())


def gradient_histograms(image: Image.Image) -> Floats:
    """Give the histogram of oriented gradients, (1764,)."""
    grey = np.asarray(image.convert("RGB").convert("L").resize((64, 64), Image.Resampling.BILINEAR), float) / 255
    return unit(_blocks(_cells(*_gradients(grey))))


def colour_histograms(image: Image.Image) -> Floats:
    """Give the square roots of the colour counts of each quarter, (256,)."""
    levels = _colour_levels(np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)))
    quarters = [q for half in np.split(levels, 2, 0) for q in np.split(half, 2, 1)]
    return unit(np.sqrt(np.concatenate([np.bincount(q.ravel(), minlength=64) for q in quarters])))


def gradients_and_colours(image: Image.Image) -> Floats:
    """Give both, (2020,)."""
    return unit(np.concatenate([gradient_histograms(image), colour_histograms(image)]))


def _gradients(grey: Floats) -> tuple[Floats, Floats]:
    """Give central differences along rows and columns, zero at the border."""
    rows, columns = np.zeros_like(grey), np.zeros_like(grey)
    rows[1:-1] = grey[2:] - grey[:-2]
    columns[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    return rows, columns


def _cells(rows: Floats, columns: Floats) -> Floats:
    """Add up gradient lengths per cell and direction (unsigned, 20 degrees each): (8, 8, 9)."""
    direction = np.rad2deg(np.arctan2(rows, columns)) % 180
    number = np.minimum((direction / (180 / DIRECTIONS)).astype(int), DIRECTIONS - 1)
    side = len(rows) // CELL
    cell = np.arange(len(rows)) // CELL
    place = (cell[:, None] * side + cell[None]) * DIRECTIONS + number
    total = np.bincount(place.ravel(), np.hypot(columns, rows).ravel(), side * side * DIRECTIONS)
    return total.reshape(side, side, DIRECTIONS) / CELL**2


def _blocks(cells: Floats) -> Floats:
    """Normalise blocks of 2×2 cells to length one, clip at 0.2, and normalise again."""
    side = len(cells) - BLOCK + 1
    windows = [cells[i : i + side, j : j + side] for i in range(BLOCK) for j in range(BLOCK)]
    blocks = np.stack(windows, 2).reshape(side, side, -1)
    blocks = blocks / np.sqrt((blocks**2).sum(-1, keepdims=True) + EPS**2)
    blocks = np.minimum(blocks, CLIP)
    return (blocks / np.sqrt((blocks**2).sum(-1, keepdims=True) + EPS**2)).ravel()


def _colour_levels(rgb: Bytes) -> npt.NDArray[np.int64]:
    level = rgb.astype(np.int64) >> 6
    return level[..., 0] * 16 + level[..., 1] * 4 + level[..., 2]


IMAGE: dict[str, Callable[[Image.Image], Floats]] = {
    "raw": raw_pixels,
    "hog": gradient_histograms,
    "hog+colour": gradients_and_colours,
}


def describe_images(kind: str, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
    """Describe images by "raw", "hog" or "hog+colour": (n, D)."""
    return np.stack([IMAGE[kind](image) for image in images]).astype(np.float32)


# --- patches -------------------------------------------------------------------------------------------------------


def describe_patches(kind: str, rgb: Bytes) -> Floats:
    """Describe each patch of 14 pixels and its 3×3 neighbourhood: (g, g, D).

    Args:
        kind: "raw" has the patch at 4×4 pixels, "hog" gradients in eight directions, "hog+colour" also a histogram.
        rgb: (H, W, 3), square.
    """
    side = len(rgb) // PATCH
    rgb = rgb[: side * PATCH, : side * PATCH]
    if kind == "raw":
        small = Image.fromarray(rgb).resize((side * RAW_SIDE,) * 2, Image.Resampling.BOX)
        blocks = np.asarray(small, float).reshape(side, RAW_SIDE, side, RAW_SIDE, 3) / 255
        own = blocks.transpose(0, 2, 1, 3, 4).reshape(side, side, -1)
    else:
        own = _patch_gradients(rgb, side)
        own = np.concatenate([_patch_colours(rgb, side), own], -1) if kind == "hog+colour" else own
    padded = np.pad(own, ((1, 1), (1, 1), (0, 0)), "edge")
    around = sum(padded[i : i + side, j : j + side] for i in range(3) for j in range(3)) / 9
    return np.concatenate([own, around], -1)


def _patch_gradients(rgb: Bytes, side: int) -> Floats:
    rows, columns = np.gradient(rgb.astype(float).mean(-1))
    turn = (np.arctan2(rows, columns) + np.pi) / (2 * np.pi) * PATCH_DIRECTIONS
    number = np.minimum(turn, PATCH_DIRECTIONS - 1).astype(int)
    total = _per_patch(number, side, PATCH_DIRECTIONS, np.hypot(rows, columns))
    return np.log1p(total) / 8


def _patch_colours(rgb: Bytes, side: int) -> Floats:
    return np.sqrt(_per_patch(_colour_levels(rgb), side, 64, np.ones(rgb.shape[:2])) / PATCH**2)


def _per_patch(number: npt.NDArray[np.int64], side: int, size: int, weight: Floats) -> Floats:
    """Add up weights per patch and number 0 to size − 1: (g, g, size)."""
    patch = np.arange(side * PATCH) // PATCH
    place = (patch[:, None] * side + patch[None]) * size + number
    return np.bincount(place.ravel(), weight.ravel(), side * side * size).reshape(side, side, size)
