# SPDX-License-Identifier: Apache-2.0
"""Memory that is no longer needed, back to the system at once."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

_DONTNEED = 4  # MADV_DONTNEED of Linux


def give_up(tensor: Tensor) -> None:
    """Give the memory of a tensor back to the system, for a tensor that nobody has written to or will read again.

    Pages of a mapped file count as this process's memory from their first reading until the last tensor of the file is
    gone; this ends it for one tensor. Read all the same, it is read from the file again. A tensor that lies in no file
    loses its values. Does nothing where the system is not Linux, and to what is smaller than a page.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # a page that is shared with a neighbour stays
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), ctypes.c_int(_DONTNEED))


def close_gaps() -> None:
    """Give back what the C library keeps of freed memory; between lasting tensors it would keep a third more for ever.

    Does nothing where the C library is not GNU's.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))
