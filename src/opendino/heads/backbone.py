# SPDX-License-Identifier: Apache-2.0
"""From whatever a classifier is given to feature rows: arrays as they are, images through its backbone.

Shapes: n items, L blocks, D width.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from opendino.embed.cache import POOLED_BLOCKS, pooled_features
from opendino.embed.embedder import Embedder
from opendino.errors import ConfigError, DataError, WeightsError
from opendino.heads.storage import check_backbone, describe_backbone
from opendino.images.sources import FileSource, ImageSource, open_source
from opendino.models.vit import VisionTransformer

log = logging.getLogger("opendino")

Backbone = VisionTransformer | Embedder | str | Path
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rows:
    """Features of images, or of rows that were given as arrays.

    Attributes:
        cls: (n, L, D) cls tokens of the last blocks; the rows themselves as (n, 1, D) if they were given.
        mean: (n, D) mean patch tokens; None for given rows.
        labels: n class names of a labelled folder, or None.
        errors: per item None or why it cannot be read; its row is NaN.
        names: of the items.
    """

    cls: Floats
    mean: Floats | None
    labels: npt.NDArray[Any] | None
    errors: list[str | None]
    names: list[str]

    def readable(self) -> npt.NDArray[np.bool_]:
        """(n,) bool."""
        return np.array([e is None for e in self.errors], dtype=bool)


def make_pooled_embedder(backbone: Backbone, device: str | None = None) -> Embedder:
    """Give an embedder of cls and mean of the last four blocks, with the image settings of a given Embedder."""
    if isinstance(backbone, Embedder):
        made = copy.copy(backbone)
        made.what = ("cls", "mean")
    elif isinstance(backbone, VisionTransformer | str | Path):
        made = Embedder(backbone, device=device, what=("cls", "mean"))
    else:
        raise ConfigError(
            f"backbone is a {type(backbone).__name__}; give a model name, a path, what opendino.load gives, or an "
            "opendino.Embedder."
        )
    made.layers = min(POOLED_BLOCKS, made.model.config.depth)
    return made


def backbone_name(backbone: Backbone, embedder: Embedder) -> str:
    """Give what `opendino.load` takes to have the same backbone again, where that is known."""
    if isinstance(backbone, str | Path):
        path = Path(backbone).expanduser()
        return str(path.resolve()) if path.exists() else str(backbone)
    report = embedder.model.load_report
    return str(report.origin) if report is not None else embedder.model.config.arch


def describe_images(embedder: Embedder) -> dict[str, Any]:
    """Give how images reach the backbone, JSON-able, for `reload_embedder`."""
    size = list(embedder.size) if isinstance(embedder.size, tuple) else embedder.size
    shape = list(embedder.input_shape)
    return {"size": size, "fit": embedder.fit, "input_shape": shape, "precision": embedder.precision}


def reload_embedder(
    backbone: Backbone | None, reference: dict[str, Any], images: dict[str, Any], what: str
) -> Embedder:
    """Make the embedder that a saved head was fitted with.

    Args:
        backbone: given by the user; None loads what the reference names.
        reference: `describe_backbone`.
        images: `describe_images`.
        what: the head, for messages.

    Raises:
        WeightsError: for another backbone, or one that cannot be loaded.
        ConfigError: for an Embedder with other image settings.
    """
    if isinstance(backbone, Embedder):
        embedder = make_pooled_embedder(backbone)
        if list(embedder.input_shape) != images["input_shape"] or embedder.fit != images["fit"]:
            raise ConfigError(
                f"{what} was fitted on images of {images['input_shape']}, fit {images['fit']}, but the Embedder given "
                f"makes {list(embedder.input_shape)}, fit {embedder.fit}. Give the model alone, and they are as before."
            )
        check_backbone(embedder.model, reference, what)
        return embedder
    size = tuple(images["size"]) if isinstance(images["size"], list) else images["size"]
    try:
        embedder = Embedder(backbone or reference["name"], size=size, fit=images["fit"], what=("cls", "mean"))
    except (WeightsError, ConfigError) as error:
        if backbone is not None:
            raise
        raise WeightsError(
            f"The backbone of {what}, {reference['name']}, cannot be loaded: {error} Or give it as backbone=."
        ) from error
    check_backbone(embedder.model, reference, what)
    embedder.layers = min(POOLED_BLOCKS, embedder.model.config.depth)
    return embedder


def reference_to(backbone: Backbone, embedder: Embedder, name: str | None = None) -> dict[str, Any]:
    """Give `describe_backbone` of the backbone that a head was given; `name` is what loads it, if that is known."""
    return describe_backbone(embedder.model, backbone_name(backbone if name is None else name, embedder))


def is_features(x: Any) -> bool:
    """Tell an array or tensor of feature rows (n, D) from images."""
    if isinstance(x, str | Path | ImageSource):
        return False
    if hasattr(x, "ndim") and hasattr(x, "dtype"):
        return (
            bool(x.ndim == 2) and "uint8" not in str(x.dtype) and "str" not in str(x.dtype) and str(x.dtype) != "object"
        )
    first = next(iter(x), None) if isinstance(x, Sequence) else None
    return isinstance(first, list | tuple) or getattr(first, "ndim", 0) == 1


def feature_rows(x: Any) -> Rows:
    """Check rows that were given and wrap them.

    Raises:
        DataError: for what is no (n, D) array of finite numbers.
    """
    array = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
    if array.ndim != 2 or not len(array) or array.dtype.kind not in "fiu":
        raise DataError(f"Features are {array.dtype} {array.shape}; they must be numbers of shape (n, D), n ≥ 1.")
    if not np.isfinite(array).all():
        raise DataError("The features hold NaN or infinity. Leave out the images that could not be read.")
    rows = array.astype(np.float32, copy=False)
    return Rows(rows[:, None], None, None, [None] * len(rows), [f"row {i}" for i in range(len(rows))])


def image_rows(embedder: Embedder, x: Any, cache: str | Path | None) -> Rows:
    """Embed images: a folder or whatever `open_source` takes, or a list of paths, PIL images and uint8 arrays.

    Raises:
        DataError: for what is no list of images.
    """
    if isinstance(x, str | Path):
        x = open_source(x)
    if isinstance(x, ImageSource):
        return _of_source(embedder, x, cache)
    if isinstance(x, np.ndarray) and x.ndim == 4:
        x = list(x)
    items = list(x) if isinstance(x, Sequence | np.ndarray) and not isinstance(x, Image.Image) else None
    if items is None or not items:
        raise DataError(
            f"A head was given {type(x).__name__}; give a folder, a list of images (paths, PIL images or uint8 "
            "arrays), or an array of features (n, D)."
        )
    if all(isinstance(item, str | Path) for item in items):
        paths = [str(item) for item in items]
        return _of_source(embedder, FileSource("the list of images", "", paths, [None] * len(paths)), cache)
    found = embedder(items)
    assert found.cls is not None
    assert found.mean is not None
    dim = embedder.model.config.embed_dim
    names = [path or f"image {i}" for i, path in enumerate(found.paths)]
    cls = found.cls.reshape(len(items), embedder.layers, dim)
    return Rows(cls, found.mean[:, -dim:], None, found.errors, names)


def _of_source(embedder: Embedder, source: ImageSource, cache: str | Path | None) -> Rows:
    cls, mean, errors = pooled_features(embedder, source, cache)
    numbers, labels = source.label_ids(), None
    if source.classes and (numbers >= 0).all():
        labels = np.array(source.classes)[numbers]
    return Rows(cls, mean, labels, errors, [source.name(i) for i in range(len(source))])
