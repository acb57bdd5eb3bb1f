# SPDX-License-Identifier: Apache-2.0
"""Position tables at other grids than their own: the two published conventions, and a third that transformers uses.

The three differ by up to a few hundredths in the features at every size but the table's own, which is why the
convention is a field of the model's config and travels with the weights (method.md §1).

Shapes: h × w target grid, G × G the table's own grid, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opendino.errors import ConfigError
from opendino.models.config import PosResize

OFFSET = 0.1
"""Added to the target grid before dividing, in the published models without registers; it kept a scale factor from
rounding to one patch too few, and by now it is part of what the weights mean."""


def resize_pos_embed(pos_embed: Tensor, height: int, width: int, convention: PosResize) -> Tensor:
    """Resize a position table to a grid of height × width patches.

    Args:
        pos_embed: (1, 1 + G·G, D); the first entry belongs to the cls token and is kept.
        height: target rows, patches.
        width: target columns, patches.
        convention: see `opendino.models.config.PosResize`.

    Returns:
        (1, 1 + height·width, D), same dtype; the table itself when the grid is its own. Interpolates in fp32.
    """
    grid = round((pos_embed.shape[1] - 1) ** 0.5)
    if height == grid and width == grid:
        return pos_embed
    table = pos_embed[:, 1:].float().unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # (1, D, G, G)
    table = _bicubic(table, grid, height, width, convention)
    patches = table.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)  # (1, h·w, D)
    return torch.cat([pos_embed[:, :1], patches], dim=1)


def _bicubic(table: Tensor, grid: int, height: int, width: int, convention: PosResize) -> Tensor:
    if convention == "scale_offset":
        # The aten call takes the output size and the scale at once. F.interpolate with a scale factor derives the
        # size by rounding down, and loses a row at some sizes (the crash reported against the original).
        return torch.ops.aten.upsample_bicubic2d.default(  # type: ignore[no-any-return]
            table, [height, width], False, (height + OFFSET) / grid, (width + OFFSET) / grid
        )
    if convention == "size_antialias":
        return F.interpolate(table, size=(height, width), mode="bicubic", antialias=True)
    if convention == "size":
        return F.interpolate(table, size=(height, width), mode="bicubic", antialias=False)
    raise ConfigError(f"pos_resize is {convention!r}; it must be scale_offset, size_antialias or size.")
