# SPDX-License-Identifier: Apache-2.0
"""Whether the numbers in an exported file are those that were written: a hash of them is in its description."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from opendino.export.builder import content_sha256
from opendino.export.extras import require
from opendino.export.metadata import ExportInfo


def changed(path: Path, info: ExportInfo) -> bool:
    """Say whether the constants of a file differ from those that were exported."""
    return (bin_sha256(path) if path.suffix == ".xml" else constants_sha256(path)) != info.content_sha256


def constants_sha256(path: Path) -> str:
    """Give the hash over the constants of an .onnx file, those in its .data included."""
    onnx = require("onnx", "Checking the content of an ONNX file")
    model = onnx.load(str(path), load_external_data=False)
    return content_sha256({t.name: _array(onnx, t, path) for t in model.graph.initializer})


def _array(onnx: Any, tensor: Any, path: Path) -> npt.NDArray[Any]:
    """One constant, in memory or mapped from the file beside."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    where = {entry.key: entry.value for entry in tensor.external_data}
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    file = path.with_name(Path(where["location"]).name)
    return np.memmap(file, dtype=kind, mode="r", offset=int(where["offset"]), shape=tuple(tensor.dims))


def bin_sha256(path: Path) -> str:
    """Give the sha256 of the .bin beside an .xml."""
    digest = hashlib.sha256()
    with path.with_suffix(".bin").open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
