# SPDX-License-Identifier: Apache-2.0
"""A fixed number of fixed augmentations of each image, so that a teacher need look at each only once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

VIEW_STREAM = 32
"""Use of (image, view); the low numbers are those of crops and orders."""


@dataclass(frozen=True)
class FixedViews:
    """Epoch e shows view e mod N of every image; what view v of image i looks like follows from (i, v) alone.

    So runs of other seeds, students or batch sizes share the views, and what is cached of them.

    Attributes:
        count: N.
        num_images: size of the data set.
        batch_size: images of a step, over all processes.
    """

    count: int
    num_images: int
    batch_size: int

    def of_step(self, step: int) -> int:
        """Give the view that all images of a step are shown in."""
        return step // (self.num_images // self.batch_size) % self.count

    def __call__(self, index: int, counter: int) -> np.random.Generator:
        """Give the generator of a sample, for `PretrainDataset`."""
        view = self.of_step(counter // self.batch_size)
        return np.random.Generator(np.random.Philox(key=0, counter=[0, view, VIEW_STREAM, index]))
