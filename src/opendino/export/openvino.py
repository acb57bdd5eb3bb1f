# SPDX-License-Identifier: Apache-2.0
"""Write a backbone as an OpenVINO file: .xml with its .bin beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from opendino.export.calibrate import Range
from opendino.export.content import bin_sha256
from opendino.export.extras import require
from opendino.export.metadata import ExportInfo
from opendino.export.onnx import write_onnx
from opendino.models.vit import VisionTransformer

UNKNOWN = "0" * 64
"""Stands for the content's hash until the content is written."""


def write_openvino(
    model: VisionTransformer, info: ExportInfo, path: Path, ranges: Mapping[str, Range] | None = None
) -> None:
    """Write the files, without verifying them.

    The ONNX graph is written aside and read by OpenVINO's own reader. fp16 compresses the weights; int8 is quantised
    in the graph (`opendino.export.linear`), which is closer to the model than NNCF's recipe for transformers was.

    Args:
        model: the backbone.
        info: what the file is to be; it is kept in the file.
        path: .xml to write.
        ranges: for int8, of each linear layer's inputs.
    """
    ov = require("openvino", "Exporting to OpenVINO")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source = Path(folder) / "model.onnx"
        graph = "int8" if info.precision == "int8" else "fp32"
        write_onnx(model, info.model_copy(update={"precision": graph}), source, ranges)
        converted = ov.Core().read_model(str(source))
        for key, value in info.model_copy(update={"content_sha256": UNKNOWN}).to_strings().items():
            converted.set_rt_info(value, key.split("."))
        ov.save_model(converted, str(path), compress_to_fp16=info.precision == "fp16")
        del converted  # it may map the file aside
    digest = bin_sha256(path)
    path.write_text(path.read_text(encoding="utf-8").replace(UNKNOWN, digest), encoding="utf-8")
