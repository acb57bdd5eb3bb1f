# SPDX-License-Identifier: Apache-2.0
"""`export_backbone`: write a file aside, run it, compare it, and only then give it its name."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opendino.errors import ConfigError
from opendino.export.calibrate import input_ranges
from opendino.export.images import batch_of, photographs
from opendino.export.metadata import PRECISIONS, ExportInfo, ExportPrecision, checked_outputs
from opendino.export.onnx import write_onnx
from opendino.export.openvino import write_openvino
from opendino.export.session import SUFFIXES, beside
from opendino.export.verify import Limits, OnCase, Report, check, verify
from opendino.images.preprocess import Preprocess
from opendino.models.fingerprint import weights_fingerprint
from opendino.models.vit import VisionTransformer

CALIBRATION_IMAGES = 64


def export_backbone(
    model: VisionTransformer,
    target: str | Path,
    *,
    info: ExportInfo | None = None,
    images: Sequence[Tensor] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    limits: Limits | None = None,
    allow: bool = False,
    on_case: OnCase | None = None,
    **settings: Any,
) -> Report:
    """Export a backbone; the file appears when it has been run and found close to the model.

    Args:
        model: the backbone, fp32.
        target: .onnx for ONNX, .xml for OpenVINO (its .bin appears beside it).
        info: what the file is to be; default: `describe_export` with the settings.
        images: (C, H, W) pixels 0–255 to calibrate int8 and to verify on; default: two carried photographs.
        sizes: of a dynamic file, to verify at.
        limits: default: those of the precision (`opendino.export.verify.LIMITS`).
        allow: keep a file that fails by its numbers; the report says so.
        on_case: told how many batches of the verification are done, of how many.
        settings: of `describe_export`.

    Returns:
        The verification's report.

    Raises:
        ConfigError: for settings that cannot be, or a target that exists.
        WeightsError: when the file fails its verification; then there is no file.
    """
    target = Path(target).expanduser()
    info = info or describe_export(model, **settings)
    if target.suffix not in SUFFIXES:
        raise ConfigError(f"{target} ends in {target.suffix!r}; give a name that ends in .onnx or .xml.")
    for file in (target, beside(target)):
        if file.exists():
            raise ConfigError(f"{file} exists already. Give another name, or remove it first.")
    aside = target.with_name(f".{target.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _write(model, info, aside / target.name, images or photographs(None, model.config.in_chans))
        report = verify(aside / target.name, model, images=images, sizes=sizes, limits=limits, on_case=on_case)
        report = replace(report, file=str(target))
        if not allow:
            check(report)
        for file in sorted(aside.iterdir(), key=lambda f: f.name == target.name):  # the file itself comes last
            file.replace(target.with_name(file.name))
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return report


def _write(model: VisionTransformer, info: ExportInfo, path: Path, images: Sequence[Tensor]) -> None:
    batches = _calibration(info, images) if info.precision == "int8" else []
    prepared = [Preprocess(info.preprocess, patch_size=info.config.patch_size).normalise(b) for b in batches]
    if path.suffix == ".onnx":
        write_onnx(model, info, path, input_ranges(model, prepared))
    else:
        write_openvino(model, info, path, input_ranges(model, prepared))


def _calibration(info: ExportInfo, images: Sequence[Tensor]) -> list[Tensor]:
    """Batches of pixels 0-255 in the shape that the file takes, each image once."""
    size = info.size or (info.preprocess.crop, info.preprocess.crop)
    count, step = min(len(images), CALIBRATION_IMAGES), info.batch or 1
    return [
        batch_of(images, info.preprocess, size, step, info.config.patch_size, first) for first in range(0, count, step)
    ]


def describe_export(
    model: VisionTransformer,
    *,
    size: int | tuple[int, int] | None = None,
    dynamic: bool = False,
    batch: int | None = None,
    precision: ExportPrecision = "fp32",
    outputs: Sequence[str] | str = ("cls", "patches"),
    layers: int = 1,
    uint8_input: bool = False,
    licence: str = "not stated",
) -> ExportInfo:
    """Give the description of a file that is to be exported.

    Args:
        model: the backbone, fp32.
        size: side or (height, width), pixels; default: the model's crop. Its position table is baked in.
        dynamic: take any height and width instead; the table is resized in the graph.
        batch: images at once; None takes any number.
        precision: "fp32", "fp16" or "int8".
        outputs: of "cls", "patches", "mean", "registers".
        layers: each vector is that of the last `layers` blocks, concatenated.
        uint8_input: take pixels 0–255 and normalise them in the graph.
        licence: of the weights, kept in the file.

    Raises:
        ConfigError: for settings that cannot be.
    """
    c, side = model.config, model.preprocess.crop if size is None else size
    if dynamic and size is not None:
        raise ConfigError("Both a size and dynamic were given. A dynamic file takes any size: leave one of them out.")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}.")
    if batch is not None and batch < 1:
        raise ConfigError(f"batch is {batch}; give at least 1, or dynamic.")
    if not 1 <= layers <= c.depth:
        raise ConfigError(f"layers is {layers}; the model has {c.depth} blocks: give 1 to that many.")
    if model.cls_token.dtype != torch.float32:
        raise ConfigError(f"The model's weights are {model.cls_token.dtype}; export it from fp32 weights.")
    sides = (side, side) if isinstance(side, int) else side
    if min(sides) < c.patch_size:
        raise ConfigError(f"The size {sides[0]}x{sides[1]} is below one patch of {c.patch_size} pixels.")
    return ExportInfo(
        config=c, preprocess=model.preprocess, outputs=checked_outputs(outputs, c), layers=layers,
        size=None if dynamic else sides, batch=batch, precision=precision, uint8_input=uint8_input,
        weights_sha256=weights_fingerprint(model), licence=licence,
    )  # fmt: skip
