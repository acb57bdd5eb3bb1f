# SPDX-License-Identifier: Apache-2.0
"""Exported files as runtimes: one that a user gives, or one made from a model when it is first needed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opendino.errors import ConfigError
from opendino.export.exporter import describe_export, export_backbone
from opendino.export.metadata import OUTPUTS, ExportInfo, ExportPrecision
from opendino.export.session import SUFFIXES, Session, open_session
from opendino.models.vit import VisionTransformer

log = logging.getLogger(__name__)
CACHE = "~/.cache/opendino/exports"


class ExportedRuntime:
    """Runs a file that `opendino export` wrote, on the CPU.

    Args:
        path: .onnx, or .xml with its .bin beside it.
        precision: "auto" or the file's own; OpenVINO also computes fp32 and fp16 files in bf16.

    Raises:
        WeightsError: for a file that cannot be opened, or that this package has not exported.
        ConfigError: for a precision that the file does not have.
    """

    device = torch.device("cpu")
    takes_turns = False

    def __init__(self, path: str | Path, precision: str = "auto") -> None:
        self.path = Path(path).expanduser()
        self.session = _open(self.path, precision)
        self.info: ExportInfo = self.session.info
        self.name: str = self.session.runtime
        self.precision: str = self.info.precision if precision == "auto" else precision
        self.config, self.spec, self.takes_pixels = self.info.config, self.info.preprocess, self.info.uint8_input
        self.takes_floats: bool = not self.takes_pixels
        outputs = set(self.info.outputs)
        self.size = self.info.size
        self.gives: tuple[str, ...] = tuple(
            n for n in OUTPUTS if n in outputs or (n == "mean" and "patches" in outputs)
        )

    def vectors(self, images: Tensor, layers: int, what: Sequence[str]) -> dict[str, Tensor]:
        """Give the vectors of images (B, C, H, W); see `Runtime`.

        Raises:
            ConfigError: for vectors of more blocks than the file gives.
        """
        if layers > self.info.layers:
            raise ConfigError(
                f"Vectors of {layers} blocks are wanted, and {self.path} gives those of {self.info.layers}. Export it "
                f"again with --layers {layers}, or use the model itself."
            )
        wanted = [n for n in what if n in self.info.outputs]
        by_hand = "mean" in what and "mean" not in wanted
        names = [*wanted, *(["patches"] if by_hand and "patches" not in wanted else [])]
        found = {k: torch.from_numpy(v) for k, v in self._run(images.numpy(), names).items()}
        if by_hand:
            found["mean"] = found["patches"].mean(1)
        width = layers * self.config.embed_dim
        return {name: found[name][..., -width:] for name in what}

    def weights_sha256(self) -> str:
        """Give the fingerprint of the weights that the file was made from."""
        return self.info.weights_sha256

    def identity(self) -> dict[str, Any]:
        """Give the runtime and the hash of the file's numbers."""
        return {"runtime": self.name, "content_sha256": self.info.content_sha256}

    def _run(self, images: npt.NDArray[Any], names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        size = self.info.batch
        if size is None:
            return self.session.run(images, names)
        parts = []
        for start in range(0, len(images), size):  # a file for a fixed number of images gets full batches
            part = images[start : start + size]
            fill = np.zeros((size - len(part), *part.shape[1:]), part.dtype)
            found = self.session.run(np.concatenate([part, fill]), names)
            parts.append({k: v[: len(part)] for k, v in found.items()})
        return {name: np.concatenate([p[name] for p in parts]) for name in names}


def _open(path: Path, precision: str) -> Session:
    """Open a file in a precision, refusing one that it has not."""
    session = open_session(path, precision=precision if precision == "bf16" and path.suffix == ".xml" else None)
    own = session.info.precision
    possible = {own} | ({"bf16"} if session.runtime == "openvino" and own != "int8" else set())
    if precision not in possible | {"auto"}:
        raise ConfigError(
            f"precision is {precision!r}, but {path} computes in {' or '.join(sorted(possible))}. Leave it out, or "
            "export the model in the precision you want."
        )
    return session


class CachedExportRuntime:
    """Runs a model through a file that is exported to a cache on first use, for any size, and verified there.

    The file holds the weights as they were when this was made; a model that is trained on needs a new one.

    Args:
        model: the backbone, fp32 on the CPU.
        name: "onnx" or "openvino".
        precision: "auto" is fp32; fp32 or fp16, with OpenVINO also bf16.
        cache: folder; default: OPENDINO_EXPORTS, else ~/.cache/opendino/exports.
    """

    device = torch.device("cpu")
    takes_pixels = False
    takes_floats = True
    takes_turns = False
    size: tuple[int, int] | None = None

    def __init__(
        self, model: VisionTransformer, name: Literal["onnx", "openvino"], precision: str = "auto",
        cache: str | Path | None = None,
    ) -> None:  # fmt: skip
        self.model, self.config, self.spec = model, model.config, model.preprocess
        self.name: str = name
        self.precision = "fp32" if precision == "auto" else precision
        possible = ("fp32", "fp16", "bf16") if name == "openvino" else ("fp32", "fp16")
        if self.precision not in possible:
            raise ConfigError(
                f"precision is {precision!r}; {name} computes a model in {', '.join(possible)}. For int8, which is "
                "calibrated on your images, export a file (opendino export) and give it instead of the model."
            )
        if model.cls_token.device.type != "cpu":
            raise ConfigError(f"The model is on {model.cls_token.device}; {name} runs on the CPU. Move it there first.")
        self.cache = Path(cache or os.environ.get("OPENDINO_EXPORTS", CACHE)).expanduser()
        self.gives: tuple[str, ...] = OUTPUTS
        self._made: dict[int, ExportedRuntime] = {}
        self._sha256 = self._described(1).weights_sha256

    def vectors(self, images: Tensor, layers: int, what: Sequence[str]) -> dict[str, Tensor]:
        """Give the vectors of normalised images (B, C, H, W); see `Runtime`."""
        runtime = self._made.get(layers) or self._made.setdefault(layers, self._make(layers))
        kept = [n for n in what if n in runtime.gives]
        found = runtime.vectors(images, layers, kept)
        if "registers" in what and "registers" not in kept:
            found["registers"] = torch.zeros(len(images), 0, layers * self.config.embed_dim)
        return found

    def weights_sha256(self) -> str:
        """Give the fingerprint of the weights that are run."""
        return self._sha256

    def identity(self) -> dict[str, Any]:
        """Give the runtime."""
        return {"runtime": self.name}

    def exported(self, layers: int = 1) -> bool:
        """Say whether the file for vectors of so many blocks lies in the cache already."""
        return self._folder(self._described(layers)).exists()

    def _folder(self, info: ExportInfo) -> Path:
        key = hashlib.sha256(json.dumps(info.to_strings(), sort_keys=True).encode()).hexdigest()[:24]
        return self.cache / f"{self.name}-{key}"

    def _described(self, layers: int) -> ExportInfo:
        stored: ExportPrecision = "fp32" if self.precision == "bf16" else cast(ExportPrecision, self.precision)
        outputs = [n for n in OUTPUTS if n != "registers" or self.config.num_register_tokens]
        return describe_export(self.model, dynamic=True, precision=stored, outputs=outputs, layers=layers)

    def _make(self, layers: int) -> ExportedRuntime:
        info = self._described(layers)
        suffix = next(s for s, kind in SUFFIXES.items() if kind == self.name)
        folder = self._folder(info)
        if not folder.exists():
            log.warning("Exporting the model to %s for %s; this is done once.", folder, self.name)
            self.cache.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=self.cache))
            try:
                export_backbone(self.model, aside / f"model{suffix}", info=info)
                if not folder.exists():  # another process may have been first
                    aside.rename(folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        return ExportedRuntime(folder / f"model{suffix}", "bf16" if self.precision == "bf16" else "auto")
