# SPDX-License-Identifier: Apache-2.0
"""Crops of one image by the compiled kernel: cut, resize and flip without a copy between."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, Any]


class _Job(ctypes.Structure):
    """`Job` of crops.c."""

    _fields_ = (
        ("image", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("height", "width", "channels", "n")),
        ("boxes", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    )


def cut_crops(library: ctypes.CDLL, image: Tensor, boxes: Array, out: Sequence[Tensor]) -> None:
    """Cut rectangles out of an image and resize each to a square, bicubic with antialias.

    Args:
        library: of `opendino.pretrain.native.build`.
        image: uint8 (C, H, W) on the CPU with the channels of a pixel together in memory.
        boxes: (n, 5): top, left, height, width, and 1 for a flip; inside the image.
        out: contiguous uint8 (k, C, s, s) tensors for the n crops in turn.
    """
    channels, height, width = image.shape
    sides = np.repeat([o.shape[-1] for o in out], [len(o) for o in out])
    assert image.permute(1, 2, 0).is_contiguous()
    assert len(sides) == len(boxes)
    rows = np.ascontiguousarray(np.column_stack([boxes, sides]), np.int32)
    places = np.concatenate([o.data_ptr() + np.arange(len(o), dtype=np.uint64) * o[:1].numel() for o in out])
    places = places.astype(np.uintp)
    job = _Job(
        image=image.data_ptr(),
        height=height,
        width=width,
        channels=channels,
        n=len(rows),
        boxes=rows.ctypes.data,
        out=places.ctypes.data,
    )
    if library.cut_crops(ctypes.byref(job)):
        raise MemoryError("There is no memory for the crops of an image.")
