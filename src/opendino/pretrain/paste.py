# SPDX-License-Identifier: Apache-2.0
"""Pasting drawings of a batch on its other crops, so that patches learn to tell what they belong to.

Copy-paste pre-training (CP2, Wang et al. 2022) pastes a foreground on two backgrounds and compares its patches. Here
the foreground is whatever differs from the plain border of a crop, so nothing but the images is needed: crops with a
border of one colour (drawings, things before a wall) are cut out along their outline and laid over others, and each
patch is told by `loss.hog_identity` which crop it is from. Not part of DINOv2; `loss.hog_paste` is 0 unless a recipe
says so.

Shapes: B crops, S pixels a side, P = g·g patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FRAME, PLAIN, NEAR = 2, 0.8, 0.06
"""Width of the border, pixels; share of it that must be near its median colour; how near in every channel."""
CHANCES = (1.0, 0.6, 0.4)
"""Probability of the first, second and third drawing on a crop."""
SCALE, STRETCH, WITHIN = (0.25, 0.85), 0.2, 0.6
"""Side of a drawing as a share of the crop's; log of its aspect at most; share of it that stays within the crop."""


def paste(rgb: Tensor, share: float, patch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lay drawings of the batch over some of its crops.

    Args:
        rgb: (B, 3, S, S), 0 to 1.
        share: of the crops that get one to three drawings.
        patch_size: side of a patch, pixels.
        generator: on the CPU; always gives as many numbers for as many crops with as many drawings among them.

    Returns:
        The crops (B, 3, S, S), and for each patch the number of the crop that most of it is from, int64 (B, P). Without
        any crop of a plain border they are the crops as they were.
    """
    number, side = len(rgb), rgb.shape[-1] // patch_size
    device = rgb.device
    own = torch.arange(number, device=device)
    plain, colour = plain_borders(rgb)
    drawings = plain.nonzero().flatten()
    if not len(drawings):
        return rgb, own[:, None].expand(-1, side * side).contiguous()
    cut_out = torch.cat([rgb[plain], foreground(rgb[plain], colour[plain])], 1)
    rgb, source = rgb.clone(), own[:, None].repeat(1, 1 + len(CHANCES))
    layers = torch.ones_like(rgb[:, :1]).repeat(1, 1 + len(CHANCES), 1, 1)
    layers[:, 1:] = 0
    wanted = torch.rand(number, generator=generator) < share
    for layer, chance in enumerate(CHANCES, 1):
        there = (wanted & (torch.rand(number, generator=generator) < chance)).to(device)
        which = torch.randint(len(cut_out), (number,), generator=generator).to(device)[there]
        places = _places(number, generator).to(device)[there]
        if not len(places):
            continue
        grid = F.affine_grid(places, [len(places), *rgb.shape[1:]], align_corners=False)
        laid = F.grid_sample(cut_out[which], grid, align_corners=False)
        drawn, over = laid[:, :3], laid[:, 3:]
        rgb[there] = rgb[there] * (1 - over) + drawn * over
        layers[there] *= 1 - over
        layers[there, layer] = over[:, 0]
        source[there, layer] = drawings[which]
    shown = F.avg_pool2d(layers, patch_size).flatten(2)  # (B, 4, P)
    return rgb, source.gather(1, shown.argmax(1))


def plain_borders(rgb: Tensor) -> tuple[Tensor, Tensor]:
    """Say which crops have a border of one colour: bool (B,), and the median colour of the border, (B, 3)."""
    rows = rgb[..., [*range(FRAME), *range(-FRAME, 0)], :]
    columns = rgb[..., [*range(FRAME), *range(-FRAME, 0)]]
    border = torch.cat([rows.flatten(2), columns.flatten(2)], 2)
    colour = border.median(2).values
    near = (border - colour[..., None]).abs().amax(1) < NEAR
    return near.float().mean(1) > PLAIN, colour


def foreground(rgb: Tensor, colour: Tensor) -> Tensor:
    """Give 1 where a crop differs from a colour, or has such pixels to its left, right, above and below; else 0.

    Args:
        rgb: (B, 3, S, S).
        colour: (B, 3).

    Returns:
        (B, 1, S, S).
    """
    other = ((rgb - colour[..., None, None]).abs().amax(1, keepdim=True) > NEAR).float()
    sides = [other.cummax(d).values for d in (2, 3)] + [other.flip(d).cummax(d).values.flip(d) for d in (2, 3)]
    return torch.stack(sides).amin(0)


def _places(number: int, generator: torch.Generator) -> Tensor:
    """Draw where drawings go, as inverse maps for `affine_grid`: (B, 2, 3)."""
    u = torch.rand(5, number, generator=generator)
    low, high = SCALE
    scale = low + (high - low) * u[0]
    aspect = torch.exp(STRETCH * (2 * u[1] - 1))
    flip = torch.where(u[2] < 0.5, -1.0, 1.0)
    room = 1 - WITHIN * scale
    x, y = ((2 * v - 1) * room for v in u[3:])
    across, down = flip * aspect.sqrt() / scale, 1 / (aspect.sqrt() * scale)
    nothing = torch.zeros(number)
    return torch.stack([across, nothing, -x * across, nothing, down, -y * down], 1).view(-1, 2, 3)
