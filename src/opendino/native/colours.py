# SPDX-License-Identifier: Apache-2.0
"""Colours of a batch by the compiled kernel: each crop goes through all operations while it lies in the cache."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opendino.native.threads import run_together

VALUES_PER_THREAD = 2**18
"""Starting a thread takes about as long as colouring so many values."""
Array = np.ndarray[Any, Any]


class _Job(ctypes.Structure):
    """`Job` of colours.c."""

    _fields_ = (
        ("crops", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n", "channels", "height", "width", "is_float")),
        *(
            (name, ctypes.c_void_p)
            for name in ("steps", "factors", "grey", "solarize", "kernels", "reaches", "scale", "shift", "next")
        ),
    )


def colour_crops(
    library: ctypes.CDLL,
    crops: Tensor,
    *,
    steps: Array,
    factors: Array,
    grey: Array,
    solarize: Array,
    kernels: Array,
    reaches: Array,
    scale: Array,
    shift: Array,
) -> Tensor:
    """Give coloured and normalised crops, on as many threads as torch uses.

    Args:
        library: of `opendino.native.build`.
        crops: (n, C, h, w), uint8, or float32 in 0–255, on the CPU; h and w more than 4 where there is blur.
        steps: (n, 4), operations of the jitter in their order: 0 brightness, 1 contrast, 2 saturation, 3 hue, -1 none.
        factors: (n, 4) of these operations.
        grey: (n,) bool.
        solarize: (n,) bool.
        kernels: (n, 5) weights of the blur from its middle outwards.
        reaches: (n,) how many of them beside the middle count, 0 for no blur.
        scale: (C,) and
        shift: (C,) of the normalisation x · scale + shift.

    Returns:
        float32 (n, C, h, w).
    """
    crops = crops.contiguous()
    out = np.empty(tuple(crops.shape), np.float32)  # NumPy asks for huge pages: fewer page faults, 2 µs each
    arrays = {
        "steps": steps.astype(np.int8),
        "factors": factors.astype(np.float32),
        "grey": grey.astype(np.uint8),
        "solarize": solarize.astype(np.uint8),
        "kernels": kernels.astype(np.float32),
        "reaches": reaches.astype(np.int32),
        "scale": scale.astype(np.float32),
        "shift": shift.astype(np.float32),
        "next": np.zeros(1, np.int32),
    }
    held = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    n, channels, height, width = crops.shape
    job = _Job(
        crops=crops.data_ptr(),
        out=out.ctypes.data,
        n=n,
        channels=channels,
        height=height,
        width=width,
        is_float=crops.dtype is torch.float32,
        **{name: values.ctypes.data for name, values in held.items()},
    )
    run_together(lambda: int(library.colour_crops(ctypes.byref(job))), min(n, out.size // VALUES_PER_THREAD))
    return torch.from_numpy(out)
