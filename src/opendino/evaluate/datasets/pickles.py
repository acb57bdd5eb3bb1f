# SPDX-License-Identifier: Apache-2.0
"""Pickles of numbers, text and numpy arrays, read so that they cannot run code."""

from __future__ import annotations

import codecs
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from opendino.errors import DataError

PARTS = {"_reconstruct": "multiarray", "scalar": "multiarray", "_frombuffer": "numeric"}
ARRAYS = {(f"{core}.{PARTS[n]}", n) for core in ("numpy.core", "numpy._core") for n in PARTS} | {
    ("numpy", "ndarray"), ("numpy", "dtype"),
}  # fmt: skip


class _Plain(pickle.Unpickler):
    """Builds arrays and plain Python values; every other class is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ARRAYS:
            if module == "numpy":
                return getattr(np, name)
            example: Any = np.float64(0) if name == "scalar" else np.zeros(1)
            return example.__reduce_ex__(5 if name == "_frombuffer" else 2)[0]  # what this numpy has for it
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 keeps bytes
            return _latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it asks for the codec {encoding}")
    return codecs.encode(text, "latin1")


def read_pickle(path: Path) -> dict[str, Any]:
    """Give the dictionary in a pickle of plain values and numpy arrays; text of Python 2 comes as str.

    Raises:
        DataError: when it is missing or damaged, holds no dictionary, or asks for anything else (it is not run).
    """
    try:
        found = _Plain(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. It is part of the data set's download: put it there.") from error
    except Exception as error:  # damaged pickles raise all sorts
        raise DataError(
            f"{path} is refused: {error}. Only pickles of numbers, text and numpy arrays are read, because others can "
            "run code. Take the file anew from the data set's own page."
        ) from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a {type(found).__name__}, no dictionary. It is another file than published.")
    return {k.decode("latin1") if isinstance(k, bytes) else str(k): v for k, v in found.items()}
