# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 and CIFAR-100, "python version": images of 32 × 32 in pickles, read so that they cannot run code.

cifar-10-batches-py/{data_batch_1 … data_batch_5, test_batch, batches.meta}
cifar-100-python/{train, test, meta}
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from opendino.errors import DataError
from opendino.evaluate.datasets.layout import Layout, Opened, variable
from opendino.evaluate.datasets.pickles import read_pickle
from opendino.images.sources import ImageSource, Labels, number_classes

SIDE = 32


class ArraySource(ImageSource):
    """Images that lie in memory; each is given as the bytes of a .npy file.

    Args:
        root: what was opened.
        pixels: uint8 (n, H, W, 3).
        names: one per image.
        labels: class names, one per image.
    """

    def __init__(self, root: str, pixels: npt.NDArray[np.uint8], names: Sequence[str], labels: Sequence[str]) -> None:
        self.root, self._pixels, self._names = root, pixels, names
        self._classes, self._labels = number_classes(labels)

    def __len__(self) -> int:
        return len(self._pixels)

    def name(self, index: int) -> str:
        """Give the file of the image and its name there."""
        return f"{self.root}/{self._names[index]}"

    def read(self, index: int) -> str | bytes:
        """Give the bytes of a .npy file with the image."""
        file = io.BytesIO()
        np.save(file, self._pixels[index])
        return file.getvalue()

    @property
    def classes(self) -> list[str]:
        """Sorted class names."""
        return self._classes

    def label_ids(self) -> Labels:
        """Give (n,) int32, the index in `classes` of each image."""
        return self._labels

    def short_name(self, index: int) -> str:
        """Give the name of an image that does not say where the data lie."""
        return self._names[index]

    def names_hash(self) -> str:
        """Give a hash of the names."""
        return hashlib.sha256("\n".join(self._names).encode("utf-8", "surrogateescape")).hexdigest()


def open_cifar10(root: Path, split: str) -> Opened:
    """Open train or test of CIFAR-10."""
    files = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    return _open(root, files, "labels", "batches.meta", "label_names")


def open_cifar100(root: Path, split: str) -> Opened:
    """Open train or test of CIFAR-100 with its 100 fine classes."""
    return _open(root, [split], "fine_labels", "meta", "fine_label_names")


def _open(root: Path, files: list[str], key: str, meta: str, names_key: str) -> Opened:
    classes = [_text(n) for n in variable(read_pickle(root / meta), names_key, root / meta)]
    pixels, names, labels = [], [], []
    for file in files:
        batch = read_pickle(root / file)
        data, ids = np.asarray(variable(batch, "data", root / file)), list(variable(batch, key, root / file))
        if data.dtype != np.uint8 or data.shape != (len(ids), 3 * SIDE * SIDE):
            raise DataError(
                f"{root / file} has data {data.dtype} {data.shape} and {len(ids)} labels; uint8 (n, 3072) and n labels "
                "are needed. Take the file anew from the download."
            )
        if any(not 0 <= int(i) < len(classes) for i in ids):
            raise DataError(f"{root / file} has labels beyond the {len(classes)} classes of {meta}.")
        pixels.append(data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
        given: Any = batch.get("filenames") or [f"{i:05d}.png" for i in range(len(ids))]
        names += [f"{file}/{_text(n)}" for n in given]
        labels += [classes[int(i)] for i in ids]
    return Opened(ArraySource(str(root), np.ascontiguousarray(np.concatenate(pixels)), names, labels))


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _splits(root: Path) -> list[str]:
    files = {"train": ("train", "data_batch_1"), "test": ("test", "test_batch")}
    return [split for split, names in files.items() if any((root / n).is_file() for n in names)]


LAYOUTS = (
    Layout(
        "CIFAR-10", "classification", ("batches.meta", "data_batch_[1-5]|test_batch"), _splits, open_cifar10,
        ("cifar-10-batches-py",),
    ),
    Layout(
        "CIFAR-100", "classification", ("meta", "train|test"), _splits, open_cifar100, ("cifar-100-python",),
        lambda root: (root / "meta").is_file() and any((root / s).is_file() for s in ("train", "test")),
    ),
)  # fmt: skip
