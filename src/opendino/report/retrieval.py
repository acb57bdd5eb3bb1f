# SPDX-License-Identifier: Apache-2.0
"""Queries beside their ranked pictures: green borders for what was to be found, red for what was not, grey for junk."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

Kind = Literal["right", "wrong", "junk", "query"]
COLOURS: dict[Kind, str] = {"right": "#2a7a3b", "wrong": "#b3261e", "junk": "#8a8a8a", "query": "#ffffff"}
SIDE, BORDER, GAP = 112, 5, 6


@dataclass(frozen=True)
class Tile:
    """One picture of a strip.

    Attributes:
        pixels: (3, H, W), 0–255; None where the image cannot be read.
        kind: decides the border.
    """

    pixels: Tensor | None
    kind: Kind


def strip(tiles: Sequence[Tile]) -> bytes:
    """Draw tiles in a row as one PNG, the query (first) apart from the others; aspect ratios are kept.

    Right answers also have a bar below them, for readers who do not tell the colours apart.
    """
    width = len(tiles) * (SIDE + GAP) + 2 * GAP
    canvas = Image.new("RGB", (width, SIDE + 12), "white")
    draw = ImageDraw.Draw(canvas)
    for number, tile in enumerate(tiles):
        left = number * (SIDE + GAP) + (2 * GAP if number else 0)
        draw.rectangle((left, 0, left + SIDE - 1, SIDE - 1), fill=COLOURS[tile.kind])
        inner = SIDE - 2 * BORDER
        draw.rectangle((left + BORDER, BORDER, left + SIDE - 1 - BORDER, SIDE - 1 - BORDER), fill="#eeeeee")
        if tile.pixels is not None:
            picture = _fitted(tile.pixels, inner)
            where = (left + BORDER + (inner - picture.width) // 2, BORDER + (inner - picture.height) // 2)
            canvas.paste(picture, where)
        if tile.kind == "right":
            draw.rectangle((left, SIDE + 4, left + SIDE - 1, SIDE + 8), fill=COLOURS["right"])
    buffer = io.BytesIO()
    canvas.quantize(256).save(buffer, "PNG", optimize=True)  # a third of the bytes
    return buffer.getvalue()


def _fitted(pixels: Tensor, side: int) -> Image.Image:
    array = pixels.float().round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    if array.shape[2] != 3:  # more or fewer channels than a screen has
        array = np.repeat(array[:, :, :1], 3, axis=2)
    picture = Image.fromarray(np.ascontiguousarray(array))
    picture.thumbnail((side, side), Image.Resampling.BICUBIC)
    return picture
