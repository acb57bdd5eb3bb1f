# SPDX-License-Identifier: Apache-2.0
"""Whether the numbers in an exported file are those that were written: a hash of them is in its description."""

from __future__ import annotations

import hashlib
from pathlib import Path

from opendino.export.builder import content_sha256
from opendino.export.extras import require
from opendino.export.metadata import ExportInfo


def changed(path: Path, info: ExportInfo) -> bool:
    """Say whether the constants of a file differ from those that were exported."""
    return (bin_sha256(path) if path.suffix == ".xml" else constants_sha256(path)) != info.content_sha256


def constants_sha256(path: Path) -> str:
    """Give the hash over the constants of an .onnx file, those in its .data included."""
    onnx = require("onnx", "Checking the content of an ONNX file")
    model = onnx.load(str(path))
    return content_sha256({t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer})


def bin_sha256(path: Path) -> str:
    """Give the sha256 of the .bin beside an .xml."""
    digest = hashlib.sha256()
    with path.with_suffix(".bin").open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
