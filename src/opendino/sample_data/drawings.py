# SPDX-License-Identifier: Apache-2.0
"""Drawings with an alpha channel made into opaque training images: cut to what is drawn, scaled, put on a ground."""

from __future__ import annotations

import hashlib
import math
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 192
MIN_SIDE = 24  # of what is drawn, pixels
MARGIN = 0.06
MAX_ELONGATION = 2.0
VISIBLE = 16  # alpha from which a pixel counts as drawn
MAX_PIXELS = 300_000_000
_LIGHT = 215  # mean brightness from which a drawing is put on a dark ground
_SIGN = (((255, 255, 255), 0.75), ((255, 0, 0), 0.14), ((0, 0, 0), 0.09))


def open_drawing(path: Path) -> Image.Image | None:
    """Read a drawing as RGBA, cut to what is drawn; None when it is empty, tiny or of more than 300 million pixels.

    Raises:
        OSError: for a file that is no image.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            if math.prod(image.size) > MAX_PIXELS:
                return None
            drawn: Image.Image = image.convert("RGBA")
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    drawn.thumbnail((2048, 2048), Image.Resampling.BOX, reducing_gap=1.0)
    return cut_out(drawn)


def cut_out(drawing: Image.Image) -> Image.Image | None:
    """Cut an RGBA image to what is drawn; None when that is less than 24 pixels on its longer side."""
    box = drawing.getchannel("A").point([255 * (a >= VISIBLE) for a in range(256)]).getbbox()
    return drawing.crop(box) if box and max(box[2] - box[0], box[3] - box[1]) >= MIN_SIDE else None


def on_ground(drawing: Image.Image, name: str, side: int = SIDE) -> Image.Image:
    """Put a drawing on a plain ground whose colour is a function of `name`.

    Args:
        drawing: RGBA, cut to what is drawn.
        name: of the drawing, the seed of the ground.
        side: longest side of the answer, pixels; drawings are never enlarged.

    Returns:
        RGB, at most twice as long as it is wide. Half of the grounds are white, the others light; a drawing that is
        itself light gets a dark one.
    """
    drawn = drawing.copy()
    drawn.thumbnail((round(side * (1 - 2 * MARGIN)),) * 2, Image.Resampling.LANCZOS, reducing_gap=3.0)
    least = max(drawn.size) / MAX_ELONGATION
    size = [min(math.ceil(max(length, least) / (1 - 2 * MARGIN)), side) for length in drawn.size]
    rng = np.random.default_rng(int(hashlib.sha256(name.encode()).hexdigest()[:16], 16))
    canvas = Image.new("RGBA", (size[0], size[1]), (*ground_colour(rng, drawn), 255))
    canvas.alpha_composite(drawn, ((canvas.width - drawn.width) // 2, (canvas.height - drawn.height) // 2))
    return canvas.convert("RGB")


def ground_colour(rng: np.random.Generator, drawn: Image.Image) -> tuple[int, int, int]:
    """Draw the colour of a ground on which the drawing can be seen."""
    pixels = np.asarray(drawn, float).reshape(-1, 4)
    brightness = float((pixels[:, :3].mean(1) * pixels[:, 3]).sum() / max(pixels[:, 3].sum(), 1.0))
    white = rng.random() < 0.5
    low, high = (20, 110) if brightness > _LIGHT else (190, 256)
    red, green, blue = (int(c) for c in rng.integers(low, high, 3))
    return (255, 255, 255) if white and brightness <= _LIGHT else (red, green, blue)


def is_missing_image(drawing: Image.Image) -> bool:
    """Whether a drawing is nothing but the red cross that a converter puts where a linked image was not found.

    The sign is square and has three colours in fixed shares: about 75 % white, 14 % red, 9 % black.
    """
    if abs(drawing.width - drawing.height) > 2:
        return False
    pixels = np.asarray(drawing)
    colours = pixels[pixels[..., 3] > 250][:, :3].astype(int)
    return bool(len(colours)) and all(
        abs(float((abs(colours - colour).max(1) < 12).mean()) - share) < 0.03 for colour, share in _SIGN
    )


def fingerprint(drawing: Image.Image) -> bytes:
    """Give what two copies of a drawing have in common: a digest of 24×24 pixels in 16 steps of brightness."""
    small = np.asarray(drawing.resize((24, 24), Image.Resampling.BOX))
    return hashlib.sha256((small // 16).tobytes()).digest()
