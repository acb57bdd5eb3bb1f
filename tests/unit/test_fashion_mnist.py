# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST is read from its idx files, damaged ones are refused, and class folders hold the same pixels."""

import gzip
import json
import struct

import numpy as np
import pytest
from PIL import Image

from opendino.errors import DataError
from opendino.sample_data.fashion_mnist import (
    CLASSES,
    FashionMnist,
    build_fashion_mnist,
    load_fashion_mnist,
    read_idx,
)
from opendino.sample_data.packages import MARKER, PACKAGES


def idx(array) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def small(seed=0, n=40) -> FashionMnist:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (2, n, 5, 4), dtype=np.uint8)
    labels = np.stack([rng.permutation(n) % 10, rng.permutation(n) % 10]).astype(np.uint8)
    return FashionMnist(images[0], labels[0], images[1], labels[1])


def put_package(cache, data: FashionMnist):
    folder = cache / "fashion-mnist" / "usr/share/datasets/fashion-mnist"
    folder.mkdir(parents=True)
    for stem, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("t10k", data.test_images, data.test_labels),
    ):
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    marker = cache / "fashion-mnist" / MARKER
    marker.write_text(json.dumps({"pinned": PACKAGES["fashion-mnist"].sha256}))
    return folder


def test_the_files_of_the_package_are_read(tmp_path):
    data = small()
    put_package(tmp_path, data)
    read = load_fashion_mnist(tmp_path)
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(read, name), getattr(data, name))


def test_labels_that_do_not_fit_the_images_are_refused(tmp_path):
    folder = put_package(tmp_path, small())
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(39, np.uint8))))
    with pytest.raises(DataError, match="t10k"):
        load_fashion_mnist(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"not gzip",
        gzip.compress(idx(np.zeros((2, 3), np.uint8)))[:-9],
        gzip.compress(idx(np.zeros((2, 3), np.uint8))[:-1]),
        gzip.compress(b"\0\0\x0d" + idx(np.zeros((2, 3), np.uint8))[3:]),
        gzip.compress(b"\0\0\x08"),
    ],
    ids=["no gzip", "cut gzip", "too few bytes", "floats", "header only"],
)
def test_what_is_no_idx_file_is_refused(tmp_path, content):
    path = tmp_path / "x.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.gz"):
        read_idx(path)


def test_the_bank_is_the_first_images_of_each_class():
    data = small()
    bank = data.bank(2)
    assert len(bank) == 20
    for c in range(10):
        of_class = [i for i, label in enumerate(data.train_labels) if label == c]
        assert [i for i in bank if data.train_labels[i] == c] == of_class[:2]


def test_class_folders_hold_the_same_pixels(tmp_path):
    data = small()
    assert build_fashion_mnist(data, tmp_path, per_class=3) == {"train": 30, "test": 30}
    for split, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        files = sorted((tmp_path / split).rglob("*.png"))
        assert len(files) == 30
        for path in files:
            i = int(path.stem)
            assert CLASSES[labels[i]] == path.parent.name
            with Image.open(path) as image:
                np.testing.assert_array_equal(np.asarray(image), images[i])
