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
MASK_STREAM = 3
"""Its own among the uses of a seed (see `opendino.pretrain.crops`)."""


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
    batch_size: int,
    grid: tuple[int, int],
    *,
    seed: int = 0,
    step: int = 0,
    images: slice = slice(None),
    ratio: tuple[float, float] = (0.1, 0.5),
    share: float = 0.5,
) -> torch.Tensor:
    """Draw the masks of the two global crops of each image of a step.

    `share` of the crops are masked; their masked shares are drawn one from each of as many equal sub-intervals of
    `ratio`, shuffled over the crops of the whole batch. The blocks of a crop are a function of (seed, step, crop)
    alone, so that a process draws only those of its own images and all processes together draw the masks of one.

    Args:
        batch_size: B, of all processes together.
        grid: patches of a global crop, (h, w).
        seed: of the run.
        step: number of the step.
        images: which of the B images masks are wanted for.
        ratio: smallest and largest masked share of the patches of a masked crop.
        share: of the crops that are masked.

    Returns:
        bool (2·b, P) for the b images wanted: first global crops, then second ones.
    """
    num_crops, patches = 2 * batch_size, grid[0] * grid[1]
    masked_crops = int(num_crops * share)
    rng = mask_rng(seed, step, num_crops)
    edges = np.linspace(*ratio, masked_crops + 1)
    counts = np.zeros(num_crops, dtype=int)
    counts[rng.permutation(num_crops)[:masked_crops]] = patches * rng.uniform(edges[:-1], edges[1:])
    wanted = np.arange(num_crops).reshape(2, batch_size)[:, images].ravel()
    masks = np.zeros((len(wanted), patches), dtype=bool)
    for row in np.flatnonzero(counts[wanted]):
        i = int(wanted[row])
        masks[row] = block_mask(*grid, int(counts[i]), mask_rng(seed, step, i)).ravel()
    return torch.from_numpy(masks)


def mask_rng(seed: int, step: int, index: int) -> np.random.Generator:
    """Give the generator of one crop's mask, or with index 2·B that of the whole batch."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, MASK_STREAM, step, index]))
