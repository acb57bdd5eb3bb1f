# SPDX-License-Identifier: Apache-2.0
"""What the networks are shown: crops of a few images of a batch and their masks, as one picture.

Shapes: B images, L local crops each, P patches of a global crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

Pixels = npt.NDArray[np.uint8]
GREY, GAP, WHITE = 128, 4, 255
MIN_SIDE = 112
"""Global crops are enlarged by whole factors to about this side, pixels, so that small runs can be looked at too."""


def sample_pictures(
    global_crops: Tensor,
    local_crops: Tensor | None,
    masks: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    num_images: int = 4,
) -> Image.Image:
    """Draw the first images of a batch, one block each.

    The first row of a block has the first global crop, the same with its masked patches grey, and both of the second
    global crop; below it the local crops at the same scale, as many to a row as fit.

    Args:
        global_crops: (2B, C, g, g) normalised, all first crops before all second ones.
        local_crops: (L·B, C, l, l) normalised, crop-major, or None.
        masks: bool (2B, P), True where the student sees the mask token.
        mean: of the normalisation, per channel.
        std: of the normalisation, per channel.
        num_images: images drawn, at most B.

    Returns:
        An RGB picture. Of images that have not three channels, the first one is drawn in grey.
    """
    batch = len(global_crops) // 2
    count = min(num_images, batch)
    factor = max(1, round(MIN_SIDE / global_crops.shape[-1]))
    pixels = _pixels(global_crops.unflatten(0, (2, batch))[:, :count], mean, std)  # (2, n, g, g, 3)
    shown = masks.unflatten(0, (2, batch))[:, :count].cpu().numpy()
    local = None
    if local_crops is not None and len(local_crops):
        local = _pixels(local_crops.unflatten(0, (-1, batch))[:, :count], mean, std)
    blocks = []
    for i in range(count):
        pairs = [(pixels[c, i], grey_out(pixels[c, i], shown[c, i])) for c in range(2)]
        rows = [_row([_enlarge(x, factor) for pair in pairs for x in pair])]
        if local is not None:
            tiles = [_enlarge(x, factor) for x in local[:, i]]
            per_row = max(1, (rows[0].shape[1] + GAP) // (tiles[0].shape[1] + GAP))
            rows += [_row(tiles[j : j + per_row]) for j in range(0, len(tiles), per_row)]
        blocks.append(_column(rows, GAP))
    return Image.fromarray(_column(blocks, 3 * GAP))


def grey_out(picture: Pixels, mask: npt.NDArray[np.bool_]) -> Pixels:
    """Paint the masked patches of a picture (g, g, 3) grey; mask: bool (P,), the rows of a square grid."""
    grid = math.isqrt(len(mask))
    patch = picture.shape[0] // grid
    out: Pixels = picture.copy()
    covered = np.kron(mask.reshape(grid, grid), np.ones((patch, patch), dtype=bool))
    out[: covered.shape[0], : covered.shape[1]][covered] = GREY
    return out


def _pixels(crops: Tensor, mean: Sequence[float], std: Sequence[float]) -> Pixels:
    """Undo the normalisation: (…, C, s, s) → uint8 (…, s, s, 3)."""
    x = crops.detach().float().cpu()
    scale, shift = (torch.tensor(list(v))[:, None, None] for v in (std, mean))
    x = (x * scale + shift).clamp(0, 1).mul(255).round().to(torch.uint8)
    if x.shape[-3] != 3:
        x = x[..., :1, :, :].expand(*x.shape[:-3], 3, *x.shape[-2:])
    pixels: Pixels = np.asarray(x.movedim(-3, -1).numpy())
    return pixels


def _enlarge(picture: Pixels, factor: int) -> Pixels:
    large: Pixels = picture.repeat(factor, 0).repeat(factor, 1)
    return large


def _row(tiles: list[Pixels]) -> Pixels:
    height = max(t.shape[0] for t in tiles)
    width = sum(t.shape[1] for t in tiles) + GAP * (len(tiles) - 1)
    out, left = np.full((height, width, 3), WHITE, np.uint8), 0
    for tile in tiles:
        out[: tile.shape[0], left : left + tile.shape[1]] = tile
        left += tile.shape[1] + GAP
    return out


def _column(rows: list[Pixels], gap: int) -> Pixels:
    width = max(r.shape[1] for r in rows)
    out, top = np.full((sum(r.shape[0] for r in rows) + gap * (len(rows) - 1), width, 3), WHITE, np.uint8), 0
    for row in rows:
        out[top : top + row.shape[0], : row.shape[1]] = row
        top += row.shape[0] + gap
    return out
