# SPDX-License-Identifier: Apache-2.0
"""One unit vector an image for retrieval: cls token, mean or generalised mean of the patches, at one or several scales.

Shapes: n images, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from opendino.embed.cache import POOLED_BLOCKS, OnImages, pooled_rows, stored_rows
from opendino.embed.embedder import Embedder, Features
from opendino.errors import ConfigError
from opendino.images.sources import SourceImage
from opendino.models.vit import VisionTransformer

Pooling = Literal["cls", "mean", "gem"]
Array = npt.NDArray[np.float32]
GEM_POWER, GEM_FLOOR = 3.0, 1e-6


@dataclass(frozen=True)
class EmbedderSettings:
    """What an Embedder is made with, besides the model, its size and what it gives."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    batch_size: int = 32
    fit: Literal["crop", "resize", "pad"] = "crop"
    workers: int | None = None


def generalised_mean(patches: Array, power: float = GEM_POWER, floor: float = GEM_FLOOR) -> Array:
    """Give (mean of patches^power)^(1/power) over the patches: (n, P, D) → (n, D).

    Values below `floor` count as `floor`, as published for the non-negative outputs of convolutional networks
    (Radenović et al. 2018). Tokens after a LayerNorm are negative half the time, and that half is lost.
    """
    raised = np.maximum(patches, floor).astype(np.float64) ** power
    out: Array = (raised.mean(1) ** (1 / power)).astype(np.float32)
    return out


def unit(rows: Array) -> Array:
    """Scale rows to length 1; a row of zeros stays."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    out: Array = rows / np.maximum(length, 1e-12)
    return out


def descriptors(
    model: VisionTransformer, items: Sequence[SourceImage], root: str | Path | None, *, pooling: Pooling = "cls",
    size: int | tuple[int, int] | None = None, scales: Sequence[float] = (1.0,),
    settings: EmbedderSettings | None = None, on_images: OnImages | None = None,
) -> tuple[Array, list[str | None]]:  # fmt: skip
    """Describe each image by one unit vector; what is in the store is not computed again.

    Args:
        model: the backbone.
        items: images, or boxes of them.
        root: folder of the stores of features; None keeps nothing. cls and mean are in the rows that the other
            protocols use; each scale has a store of its own.
        pooling: "cls", "mean" of the patch tokens, or "gem"; of the last block, after the final LayerNorm.
        size: input side or (height, width) at scale 1, pixels; default: the model's.
        scales: the unit vectors at these scales are averaged, and the mean is scaled to length 1. Sides at scales
            other than 1 are rounded to multiples of the patch.
        settings: further ones of the embedder.
        on_images: told about progress; images count once for each scale.

    Returns:
        (n, D), NaN for images that cannot be read, and per image None or why it cannot.

    Raises:
        ConfigError: for an unknown pooling or a scale that is not positive.
    """
    if pooling not in get_args(Pooling):
        raise ConfigError(f"pooling is {pooling!r}; it must be one of {', '.join(get_args(Pooling))}.")
    if not scales or min(scales) <= 0 or len(set(scales)) != len(scales):
        raise ConfigError(
            f"scales are {tuple(scales)}; give one or more different numbers above 0, such as 1,0.707,0.5."
        )
    total = np.zeros((len(items), model.config.embed_dim), np.float32)
    errors: list[str | None] = []
    for number, scale in enumerate(scales):
        report = _shifted(on_images, number * len(items), len(scales) * len(items))
        shape = scaled_size(model, size, scale)
        rows, errors = _at_one_size(model, items, root, pooling, shape, settings or EmbedderSettings(), report)
        total += unit(rows)
    return unit(total), errors


def scaled_size(
    model: VisionTransformer, size: int | tuple[int, int] | None, scale: float
) -> int | tuple[int, int] | None:
    """Give the input size at a scale: itself at 1, else the nearest multiples of the patch, at least one patch."""
    if scale == 1:
        return size
    whole, patch = model.preprocess.crop if size is None else size, model.config.patch_size
    sides = (whole, whole) if isinstance(whole, int) else whole
    height, width = (max(round(side * scale / patch), 1) * patch for side in sides)
    return height, width


def _at_one_size(
    model: VisionTransformer, items: Sequence[SourceImage], root: str | Path | None, pooling: Pooling,
    size: int | tuple[int, int] | None, settings: EmbedderSettings, on_images: OnImages | None,
) -> tuple[Array, list[str | None]]:  # fmt: skip
    what = ("patches",) if pooling == "gem" else ("cls", "mean")
    embedder = Embedder(
        model, precision=settings.precision, batch_size=settings.batch_size, fit=settings.fit,
        workers=settings.workers, size=size, what=what,
    )  # fmt: skip
    dim = model.config.embed_dim
    if pooling == "gem":
        return stored_rows(embedder, items, root, f"gem {GEM_POWER} {GEM_FLOOR}", dim, _gem_rows, on_images)
    embedder.layers = min(POOLED_BLOCKS, model.config.depth)
    rows, errors = pooled_rows(embedder, items, root, on_images)
    return (rows[:, -2 * dim : -dim] if pooling == "cls" else rows[:, -dim:]), errors


def _gem_rows(batch: Features) -> Array:
    assert batch.patches is not None
    return generalised_mean(batch.patches)


def _shifted(on_images: OnImages | None, before: int, total: int) -> OnImages | None:
    if on_images is None:
        return None
    return lambda done, errors, _: on_images(before + done, errors, total)
