# SPDX-License-Identifier: Apache-2.0
"""Write a backbone as an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from opendino.export.builder import EXTERNAL_FROM_BYTES
from opendino.export.calibrate import Range
from opendino.export.graph import BackboneGraph
from opendino.export.metadata import ExportInfo
from opendino.models.vit import VisionTransformer


def write_onnx(
    model: VisionTransformer,
    info: ExportInfo,
    path: Path,
    ranges: Mapping[str, Range] | None = None,
    external_from: int = EXTERNAL_FROM_BYTES,
) -> None:
    """Write the graph, without verifying it.

    Args:
        model: the backbone.
        info: what the file is to be; it is kept in the file.
        path: file to write; from `external_from` bytes on the weights go into PATH.data.
        ranges: for int8, see `opendino.export.graph.BackboneGraph`.
        external_from: bytes.
    """
    graph, inputs, outputs = BackboneGraph(model, info, ranges).build()
    info = info.model_copy(update={"content_sha256": graph.content_sha256()})
    graph.save(path, inputs, outputs, info.to_strings(), external_from)
