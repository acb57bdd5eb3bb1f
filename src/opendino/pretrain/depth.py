# SPDX-License-Identifier: Apache-2.0
"""Which images skip which residual branch: a pure function of (seed, step, image), however a batch is cut.

The global batch is cut into groups of 16 consecutive images (fewer in the last). In each group, for every crop and
branch, the same number of images is kept: those with the smallest of as many uniform numbers. A process or micro-batch
takes the columns of the images that it holds.

Shapes: B images held here, C crops per image, R = 2·depth branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from opendino.models.layers import Shapes, Subset, subset_of

GROUP = 16
"""Images that share a fixed number of kept ones; small enough to be whole in the micro-batches of most runs."""
STREAM = 2
"""Keeps these numbers apart from those of crops and masks."""


class DepthDraws:
    """The draws of stochastic depth for images [first_image, first_image + num_images) of one step's global batch.

    Args:
        seed: of the run.
        step: of the optimiser.
        first_image: place of the first image held here in the global batch.
        num_images: number of images held here.
        batch_size: images of the global batch, over all processes and micro-batches.
    """

    def __init__(self, seed: int, step: int, first_image: int, num_images: int, batch_size: int) -> None:
        assert 0 <= first_image <= batch_size - num_images, "the images lie in the global batch"
        self.seed, self.step = seed, step
        self.first, self.images, self.batch = first_image, num_images, batch_size
        self._ranks: list[npt.NDArray[np.int64]] = []

    def subsets(self, block: int, rate: float, shapes: Shapes, device: torch.device) -> Sequence[Subset]:
        """Give the subsets of both branches of a block.

        Args:
            block: number of the block.
            rate: share of the images of a group that skip a branch; at least one is kept.
            shapes: (crops·B, N) of each crop group, crop-major.
            device: of the tokens.
        """
        crops = [batch // self.images for batch, _ in shapes]
        kept_counts = np.maximum((self._group_sizes * (1 - rate)).astype(int), 1)
        ranks = self._block_ranks(block, sum(crops))
        scale = torch.from_numpy(self._group_sizes / kept_counts).float()
        result = []
        for branch in ranks:  # (C, B)
            kept, scales, first = [], [], 0
            for count in crops:
                rows = np.flatnonzero(branch[first : first + count] < kept_counts)
                kept.append(torch.from_numpy(rows))
                scales.append(scale[kept[-1] % self.images])
                first += count
            result.append(subset_of(shapes, kept, scales, device))
        return result

    @cached_property
    def _group_sizes(self) -> npt.NDArray[np.int64]:
        """Size of the group of each image held here, (B,)."""
        start = np.arange(self.first, self.first + self.images) // GROUP * GROUP
        return np.minimum(start + GROUP, self.batch) - start

    def _block_ranks(self, block: int, crops: int) -> npt.NDArray[np.int64]:
        """Rank of each image among its group's numbers, for both branches of a block: (2, C, B)."""
        while len(self._ranks) <= block:  # each group's generator gives the numbers of one block after the other
            groups = [rng.random((2, crops, size)).argsort(-1).argsort(-1) for rng, size in self._generators]
            skip = self.first % GROUP
            self._ranks.append(np.concatenate(groups, axis=-1)[..., skip : skip + self.images])
        return self._ranks[block]

    @cached_property
    def _generators(self) -> list[tuple[np.random.Generator, int]]:
        """A generator and the number of images, for each group that touches the images held here."""
        groups = range(self.first // GROUP, -(-(self.first + self.images) // GROUP))
        keys = [np.random.SeedSequence([self.seed, STREAM, self.step, group]) for group in groups]
        sizes = [min(GROUP, self.batch - group * GROUP) for group in groups]
        return [(np.random.Generator(np.random.Philox(key)), size) for key, size in zip(keys, sizes, strict=True)]
