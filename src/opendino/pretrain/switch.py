# SPDX-License-Identifier: Apache-2.0
"""Carry the state of a run from the engine of one stage to that of the next, whose position tables may be larger.

The table becomes that of the new crops, as in the published models, whose tables are for 518 px: each new position is
then trained by itself. It is resized as the model resizes it at that size, so the features of an image of the new size
are the same before and after the switch.

Shapes: G × G the old grid, G' × G' the new one, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from opendino.distributed.sharding import local, whole
from opendino.models.config import PosResize
from opendino.models.positions import resize_pos_embed

MOMENTS = "optimizer."


@torch.no_grad()
def move_state(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor], convention: PosResize, *, moments: bool = True
) -> None:
    """Copy parameters, moving averages, centres and AdamW's state into another engine's, position tables resized.

    Every process must call it. Both engines are spread over the processes alike.

    Args:
        old: what `Engine.tensors` of the stage that ends gives.
        new: that of the stage that begins; overwritten.
        convention: by which the model resizes its table.
        moments: whether AdamW's state comes along; else it stays as it is, which is zero in a fresh engine.
    """
    assert old.keys() == new.keys(), sorted(old.keys() ^ new.keys())
    for name, target in new.items():
        if name.startswith(MOMENTS) and not moments:
            continue
        source = old[name]
        if source.shape == target.shape:
            local(target).copy_(local(source))
            continue
        assert "pos_embed" in name, name
        table, grid = whole(source), round((target.shape[1] - 1) ** 0.5)
        if name.startswith(MOMENTS):
            _fill(target, resize_moment(table, grid))
        else:
            _fill(target, resize_pos_embed(table, grid, grid, convention))


def resize_moment(moment: Tensor, grid: int) -> Tensor:
    """Resize a moment of AdamW that belongs to a position table.

    Both moments are interpolated linearly, with the same weights, none of them negative. So second moments stay
    positive, and by Cauchy–Schwarz |m| / √v nowhere exceeds what it was: no position gets a larger step than before.

    Args:
        moment: (1, 1 + G·G, D).
        grid: the new side G'.

    Returns:
        (1, 1 + G'·G', D); the entry of the cls token is kept.
    """
    side = round((moment.shape[1] - 1) ** 0.5)
    table = moment[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=(grid, grid), mode="bilinear", antialias=True)
    return torch.cat([moment[:, :1], table.permute(0, 2, 3, 1).flatten(1, 2).to(moment.dtype)], dim=1)


def _fill(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor into one that may be sharded."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.contiguous(), target.device_mesh, target.placements).to_local()
    local(target).copy_(value)
