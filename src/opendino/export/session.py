# SPDX-License-Identifier: Apache-2.0
"""Exported files, opened and run: one small class a runtime, with the file's own description beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from opendino.errors import ConfigError, WeightsError
from opendino.export.extras import require
from opendino.export.metadata import PREFIX, ExportInfo

Array = npt.NDArray[Any]
SUFFIXES = {".onnx": "onnx", ".xml": "openvino"}


class Session(Protocol):
    """An exported file that can be run.

    Attributes:
        runtime: "onnx" or "openvino".
        info: the file's description.
    """

    runtime: str
    info: ExportInfo

    def run(self, images: Array, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Give outputs by name, all or the named ones, for images (B, C, H, W) in the type that `info` says."""


def is_exported(path: str | Path) -> bool:
    """Say whether a name is that of an exported file (.onnx or .xml)."""
    return Path(path).suffix.lower() in SUFFIXES


def beside(path: Path) -> Path:
    """Give the file that the numbers of an exported file lie in, where they lie apart."""
    return path.with_suffix(".bin") if path.suffix == ".xml" else path.with_name(path.name + ".data")


def open_session(path: str | Path, *, precision: str | None = None, threads: int | None = None) -> Session:
    """Open an exported file.

    Args:
        path: .onnx, or .xml with its .bin beside it.
        precision: what OpenVINO computes in, fp32 or bf16; None is fp32. ONNX Runtime computes in the file's own.
        threads: of the runtime; None is torch's OMP_NUM_THREADS, or one a core.

    Raises:
        WeightsError: for a missing or damaged file, or one that this package has not exported.
        ConfigError: for another ending.
        MissingExtraError: when the runtime is not installed.
    """
    path = Path(path).expanduser()
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"{path} ends in {path.suffix!r}; an exported file ends in .onnx or .xml.")
    if not path.is_file():
        raise WeightsError(f"{path} does not exist. Give a file that `opendino export` wrote.")
    threads = threads or int(os.environ.get("OMP_NUM_THREADS", 0) or 0)
    return OnnxSession(path, threads) if kind == "onnx" else OpenvinoSession(path, threads, precision or "fp32")


def _damaged(path: Path, error: Exception) -> WeightsError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return WeightsError(
        f"{path} cannot be opened: {reason}. It is damaged or a file beside it is missing; export again."
    )


class OnnxSession:
    """A file run by ONNX Runtime on the CPU."""

    runtime = "onnx"

    def __init__(self, path: Path, threads: int) -> None:
        ort = require("onnxruntime", "Running an ONNX file")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime has a type of its own for each kind of damage
            raise _damaged(path, error) from error
        self.info = ExportInfo.from_strings(self.session.get_modelmeta().custom_metadata_map, str(path))

    def run(self, images: Array, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Give outputs by name, all or the named ones, for images (B, C, H, W)."""
        wanted = list(names or self.info.outputs)
        return dict(zip(wanted, self.session.run(wanted, {"images": images}), strict=True))


class OpenvinoSession:
    """A file run by OpenVINO on the CPU."""

    runtime = "openvino"

    def __init__(self, path: Path, threads: int, precision: str) -> None:
        ov = require("openvino", "Running an OpenVINO file")
        core = ov.Core()
        settings = {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[precision]}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        try:
            model = core.read_model(str(path))
            self.info = ExportInfo.from_strings(described(model), str(path))
            self.compiled = core.compile_model(model, "CPU", settings)
        except WeightsError:
            raise
        except Exception as error:
            raise _damaged(path, error) from error
        self.request = self.compiled.create_infer_request()

    def run(self, images: Array, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Give outputs by name, all or the named ones, for images (B, C, H, W)."""
        results = self.request.infer({"images": images}, share_inputs=True)
        return {name: np.array(results[name]) for name in names or self.info.outputs}


def described(model: Any) -> dict[str, str]:
    """Give the description that an OpenVINO model carries, as `ExportInfo.from_strings` takes it."""
    section = PREFIX.rstrip(".")
    if not model.has_rt_info([section]):
        return {}
    return {PREFIX + k: model.get_rt_info([section, k]).astype(str) for k in model.get_rt_info([section]).value}
