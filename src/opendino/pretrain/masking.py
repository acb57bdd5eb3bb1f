# SPDX-License-Identifier: Apache-2.0
"""Block masks over the patch grid (iBOT §4.1; method.md §2)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

MIN_PATCHES = 4
MIN_ASPECT = 0.3
ATTEMPTS = 10


def block_mask(height: int, width: int, num_masked: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Mask exactly `num_masked` patches of a grid, in blocks.

    Blocks have at least 4 patches, or as many as are missing, and an aspect ratio of 0.3 to 1/0.3 before their sides
    are rounded to patches. When no further block fits the remaining count, single patches complete it; the original
    leaves such masks short.

    Returns:
        bool (height, width), True where masked.
    """
    mask = np.zeros((height, width), dtype=bool)
    while (missing := num_masked - int(mask.sum())) > 0 and _add_block(mask, missing, rng):
        pass
    free = np.flatnonzero(~mask.ravel())
    missing = num_masked - int(mask.sum())
    if missing > 0:
        mask.ravel()[rng.choice(free, missing, replace=False)] = True
    return mask


def _add_block(mask: npt.NDArray[np.bool_], missing: int, rng: np.random.Generator) -> bool:
    height, width = mask.shape
    log_aspect = math.log(1 / MIN_ASPECT)
    smallest = min(MIN_PATCHES, missing)
    for _ in range(ATTEMPTS):
        area = rng.uniform(smallest, missing)
        aspect = math.exp(rng.uniform(-log_aspect, log_aspect))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (1 <= h <= height and 1 <= w <= width and h * w >= smallest):
            continue
        top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        block = mask[top : top + h, left : left + w]
        if 0 < (~block).sum() <= missing:
            block[:] = True
            return True
    return False


def batch_masks(
    num_crops: int,
    grid: tuple[int, int],
    rng: np.random.Generator,
    ratio: tuple[float, float] = (0.1, 0.5),
    share: float = 0.5,
) -> torch.Tensor:
    """Draw the masks of a batch of global crops.

    `share` of the crops are masked; their masked shares are drawn one from each of as many equal sub-intervals of
    `ratio`, and the masks are shuffled over the crops.

    Returns:
        bool (num_crops, P).
    """
    patches = grid[0] * grid[1]
    masked_crops = int(num_crops * share)
    edges = np.linspace(*ratio, masked_crops + 1)
    masks = np.zeros((num_crops, patches), dtype=bool)
    for i in range(masked_crops):
        masks[i] = block_mask(*grid, int(patches * rng.uniform(edges[i], edges[i + 1])), rng).ravel()
    return torch.from_numpy(masks[rng.permutation(num_crops)])
