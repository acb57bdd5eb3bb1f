# SPDX-License-Identifier: Apache-2.0
"""Write a backbone as an OpenVINO file: .xml with its .bin beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from opendino.export.content import bin_sha256
from opendino.export.extras import require
from opendino.export.metadata import ExportInfo
from opendino.export.onnx import write_onnx
from opendino.models.vit import VisionTransformer

UNKNOWN = "0" * 64
"""Stands for the content's hash until the content is written."""


def write_openvino(
    model: VisionTransformer, info: ExportInfo, path: Path, calibration: Sequence[npt.NDArray[Any]] = ()
) -> None:
    """Write the files, without verifying them.

    The ONNX graph is written aside and read by OpenVINO's own reader. fp16 compresses the weights; int8 quantises
    weights and activations with NNCF's recipe for transformers, which moves the range of outlier channels into the
    weights.

    Args:
        model: the backbone.
        info: what the file is to be; it is kept in the file.
        path: .xml to write.
        calibration: for int8, inputs as the file takes them.
    """
    ov = require("openvino", "Exporting to OpenVINO")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source = Path(folder) / "model.onnx"
        write_onnx(model, info.model_copy(update={"precision": "fp32"}), source)
        converted = ov.Core().read_model(str(source))
        if info.precision == "int8":
            converted = _quantised(converted, calibration)
        for key, value in info.model_copy(update={"content_sha256": UNKNOWN}).to_strings().items():
            converted.set_rt_info(value, key.split("."))
        ov.save_model(converted, str(path), compress_to_fp16=info.precision == "fp16")
        del converted  # it may map the file aside
    digest = bin_sha256(path)
    path.write_text(path.read_text(encoding="utf-8").replace(UNKNOWN, digest), encoding="utf-8")


def _quantised(model: Any, calibration: Sequence[npt.NDArray[Any]]) -> Any:
    nncf = require("nncf", "Exporting int8 to OpenVINO")
    nncf.set_log_level(40)
    return nncf.quantize(
        model, nncf.Dataset([{"images": batch} for batch in calibration]), model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED, subset_size=len(calibration),
    )  # fmt: skip
