# SPDX-License-Identifier: Apache-2.0
"""Features of random crops: each time a sample is asked for, another crop of its image goes through the backbone.

The training augmentation of the published linear evaluation: a rectangle of 8–100 % of the area and aspect 3/4–4/3,
resized to the model's input with bicubic interpolation, flipped left-right in half of the cases.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from opendino.embed.embedder import Embedder
from opendino.errors import MissingExtraError, OpendinoError
from opendino.images.ahead import map_ahead
from opendino.images.arrays import read_image
from opendino.images.sources import ImageSource

SCALE, ASPECT, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
_Sample = tuple[Tensor, None] | tuple[None, str]


class Box(NamedTuple):
    """A rectangle, pixels, and whether it is flipped."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def random_box(height: int, width: int, rng: np.random.Generator) -> Box:
    """Draw a rectangle inside an image: area by `SCALE`, logarithm of the aspect by `ASPECT`, ten tries, then the
    largest centred one that has an allowed aspect (as torchvision's RandomResizedCrop does)."""
    draws = rng.random((TRIES, 4))
    flip = bool(rng.random() < 0.5)
    low, high = map(math.log, ASPECT)
    for area, aspect, top, left in draws:
        part = (SCALE[0] + area * (SCALE[1] - SCALE[0])) * height * width
        ratio = math.exp(low + aspect * (high - low))
        w, h = round(math.sqrt(part * ratio)), round(math.sqrt(part / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(top * (height - h + 1)), int(left * (width - w + 1)), h, w, flip)
    ratio = min(max(width / height, ASPECT[0]), ASPECT[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return Box((height - h) // 2, (width - w) // 2, h, w, flip)


class AugmentedFeatures:
    """What `opendino.evaluate.linear.train_grid` asks for its batches, with new crops at each step.

    A crop is a function of (seed, step, sample). A sample that cannot be read is left out of its batch, and named in
    `unreadable`.

    Args:
        embedder: with `layers` blocks and what=("cls", "mean").
        source: the images.
        labels: (n,) class of each, integers from 0.
        seed: of the crops.
    """

    def __init__(self, embedder: Embedder, source: ImageSource, labels: npt.NDArray[np.int64], seed: int = 0) -> None:
        self.embedder, self.source, self.seed = embedder, source, seed
        self.labels = torch.as_tensor(labels).long()
        self.unreadable: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.source)

    def at(self, step: int, samples: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Give cls (b, L, D), mean (b, D) and labels (b,) of new crops of the samples that can be read."""
        dim = self.embedder.config.embed_dim
        wanted = ((step, int(s)) for s in samples)
        kept, crops, tokens = [], [], []
        for sample, (pixels, why) in zip(samples, map_ahead(self._crop, wanted, self.embedder.workers,
                                         2 * self.embedder.batch_size), strict=True):  # fmt: skip
            if pixels is None:
                self.unreadable[self.source.name(int(sample))] = str(why)
                continue
            kept.append(int(sample))
            crops.append(pixels)
            if len(crops) == self.embedder.batch_size:
                tokens.append(self.embedder.pooled(self.embedder.stacked(crops)))
                crops = []
        if crops:
            tokens.append(self.embedder.pooled(self.embedder.stacked(crops)))
        if not tokens:
            empty = torch.zeros(0, dim, device=self.embedder.device)
            return empty.view(0, 1, dim).expand(0, self.embedder.layers, dim), empty, self.labels[:0]
        rows = torch.cat(tokens).unflatten(1, (-1, dim))  # (b, L + 1, D)
        return rows[:, :-1], rows[:, -1], self.labels[torch.tensor(kept)]

    def identity(self) -> str:
        """Give what tells these features from others, for resuming."""
        digest = hashlib.sha256(self.source.names_hash().encode())
        digest.update(np.ascontiguousarray(self.labels.numpy()).tobytes())
        settings = [self.seed, self.embedder.input_shape, self.embedder.precision, self.embedder.layers]
        digest.update(f"{self.embedder.runtime.weights_sha256()} {settings}".encode())
        return digest.hexdigest()

    def _crop(self, wanted: tuple[int, int]) -> _Sample:
        step, sample = wanted
        try:
            found = self.source.read(sample)
            image = read_image(found, channels=self.embedder.config.in_chans, name=self.source.name(sample))
        except MissingExtraError:
            raise
        except (OpendinoError, OSError) as error:
            return None, str(error) or type(error).__name__
        box = random_box(image.shape[-2], image.shape[-1], np.random.default_rng([self.seed, step, sample]))
        size = [self.embedder.preprocess.height, self.embedder.preprocess.width]
        crop = tv.resized_crop(image, *box[:4], size=size, interpolation=InterpolationMode.BICUBIC, antialias=True)
        return self.embedder.prepared(tv.horizontal_flip(crop) if box.flip else crop), None
