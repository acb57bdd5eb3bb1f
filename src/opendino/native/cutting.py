# SPDX-License-Identifier: Apache-2.0
"""Crops of a batch of images by the compiled kernel: cut, resize and flip without a copy between."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from opendino.native.threads import run_together

IMAGES_PER_THREAD = 4
"""Starting a thread takes about as long as cutting so many small images."""
Array = np.ndarray[Any, Any]


def cut_crops(library: ctypes.CDLL, images: Sequence[Tensor], boxes: Array, out: Sequence[Tensor]) -> None:
    """Cut rectangles out of images and resize each to a square, bicubic with antialias, on torch's number of threads.

    Args:
        library: of `opendino.native.build`.
        images: B images, uint8 (C, H, W) on the CPU with the channels of a pixel together in memory.
        boxes: (n, B, 5): top, left, height, width, and 1 for a flip; inside the images.
        out: contiguous uint8 (k·B, C, s, s) tensors for the first k of n crops of all images, the next k, and so on;
            crop-major.
    """
    count = len(images)
    assert all(image.permute(1, 2, 0).is_contiguous() for image in images)
    assert sum(map(len, out)) == len(boxes) * count
    sides = np.concatenate([np.full(len(o) // count, o.shape[-1]) for o in out])
    sides = np.broadcast_to(sides[:, None, None], (*boxes.shape[:2], 1))
    rows = np.ascontiguousarray(np.concatenate([boxes, sides], axis=2).swapaxes(0, 1), np.int32)  # (B, n, 6)
    places = np.concatenate([o.data_ptr() + np.arange(len(o)) * o[:1].numel() for o in out])
    places = np.ascontiguousarray(places.reshape(boxes.shape[:2]).T, np.uintp)  # (B, n)
    jobs = np.empty((count, 7), np.int64)  # `Job` of crops.c
    for i, image in enumerate(images):
        channels, height, width = image.shape
        jobs[i, :5] = image.data_ptr(), height, width, channels, len(boxes)
    jobs[:, 5] = rows.ctypes.data + np.arange(count) * rows[:1].nbytes
    jobs[:, 6] = places.ctypes.data + np.arange(count) * places[:1].nbytes
    following = np.zeros(1, np.int32)
    pointers = [ctypes.c_void_p(jobs.ctypes.data), ctypes.c_int64(count), ctypes.c_void_p(following.ctypes.data)]
    run_together(lambda: int(library.cut_crops(*pointers)), count // IMAGES_PER_THREAD)
