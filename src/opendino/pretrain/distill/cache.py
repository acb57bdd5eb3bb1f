# SPDX-License-Identifier: Apache-2.0
"""What a frozen teacher made of fixed views, on disk: a folder that several runs may share.

tokens.bin has one record of fixed length for each (image, view), in that order, and checks.bin the CRC-32 of each; 0
means that it has not been written. A record that a kill or a power cut left half written fails its check, and is made
again. Space on disk is taken as records are written, where the file system has sparse files.
"""

from __future__ import annotations

import json
import logging
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opendino.errors import ConfigError, DataError
from opendino.images.fingerprint import fingerprint
from opendino.images.sources import ImageSource
from opendino.pretrain.distill.config import DistillConfig
from opendino.pretrain.distill.teacher import FrozenTeacher
from opendino.pretrain.run_folder import replace_text

log = logging.getLogger("opendino")
ABOUT = "about.json"
Shapes = list[list[int]]


def describe_cache(
    config: DistillConfig,
    teacher: FrozenTeacher,
    source: ImageSource,
    *,
    local_crops: bool,
    amp_dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Say all that the tokens depend on, and what a record looks like; plain values, fit for JSON."""
    crops, backbone = config.crops, teacher.backbone
    groups = [(2, crops.global_size)] + ([(crops.num_local, crops.local_size)] if local_crops else [])
    shapes: Shapes = []
    for count, size in groups:
        h, w = backbone.grid_of(torch.empty(1, backbone.config.in_chans, size, size, device="meta"))
        shapes += [[count, backbone.embed_dim], [count, h * w, backbone.embed_dim]]
    data = fingerprint(source)
    return {
        "teacher": teacher.fingerprint,
        "data": {"images": data["images"], "names": data["names"]},
        "views": config.views,
        "crops": json.loads(crops.model_dump_json()),
        "in_chans": config.model.in_chans,
        "computed_in": str(amp_dtype or torch.float32).removeprefix("torch."),
        "dtype": config.cache_dtype,
        "shapes": shapes,
    }


class TeacherCache:
    """Tokens of (image, view) pairs.

    Args:
        folder: is made when it is not there.
        about: from `describe_cache`.

    Raises:
        ConfigError: when the folder holds tokens of another teacher, other images or other views.
    """

    def __init__(self, folder: str | Path, about: dict[str, Any]) -> None:
        self.folder, self.about = Path(folder), about
        self.dtype = np.dtype(np.float16 if about["dtype"] == "fp16" else np.float32)
        self.shapes = [tuple(s) for s in about["shapes"]]
        self.sizes = [int(np.prod(s)) for s in self.shapes]
        self._claim()
        records = about["data"]["images"] * about["views"]
        self._tokens = _Records(self.folder / "tokens.bin", self.dtype, records, sum(self.sizes))
        self._checks = _Records(self.folder / "checks.bin", np.dtype(np.uint32), records, 1)
        self._full = False

    def _claim(self) -> None:
        path = self.folder / ABOUT
        if path.is_file():
            old = json.loads(path.read_text())
            different = [k for k in {**old, **self.about} if old.get(k) != self.about.get(k)]
            if different:
                raise ConfigError(
                    f"{self.folder} holds what a teacher made of other inputs ({', '.join(different)} differ). Give "
                    "another --cache-teacher folder, or remove this one."
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(self.about))

    def __len__(self) -> int:
        """Number of records that have been written."""
        return int((np.fromfile(self._checks.path, np.uint32) != 0).sum())

    def read(self, index: int, view: int) -> list[Tensor] | None:
        """Give the tokens of a view as fp32, or None when they are not there."""
        place = index * self.about["views"] + view
        check = int(self._checks.read(place)[0])
        if not check:
            return None
        record = self._tokens.read(place)
        if _check(record) != check:
            return None
        parts = np.split(record.astype(np.float32), np.cumsum(self.sizes)[:-1])
        return [torch.from_numpy(part).reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def write(self, index: int, view: int, tokens: list[Tensor]) -> None:
        """Keep the tokens of a view, which have the dtype of the cache; a full disk ends the caching, not the run."""
        if self._full:
            return
        place = index * self.about["views"] + view
        record = np.concatenate([t.cpu().numpy().ravel() for t in tokens])
        assert record.dtype == self.dtype
        try:
            self._tokens.write(place, record)
            self._checks.write(place, np.array([_check(record)], np.uint32))
        except OSError as error:
            self._full = True
            log.warning(
                "The teacher's cache %s cannot be written (%s). Training goes on: the teacher computes what is not in "
                "it. Make room for the next run, or take --cache-dtype fp16 or fewer --views.",
                self.folder,
                error,
            )


class _Records:
    """A file of records of one length, each read and written by its number; zeros where nothing was written."""

    def __init__(self, path: Path, dtype: np.dtype[Any], count: int, length: int) -> None:
        self.path, self.dtype, self.length = path, dtype, length
        self.bytes = dtype.itemsize * length
        try:
            path.touch()
            self.file = path.open("r+b", buffering=0)
            if self.file.seek(0, 2) < count * self.bytes:
                self.file.truncate(count * self.bytes)
        except OSError as error:
            raise DataError(
                f"The teacher's cache {path} would need up to {count * self.bytes / 2**30:.1f} GiB and cannot be made "
                f"({error}). Give a --cache-teacher folder on a larger disk, fewer --views, or --cache-dtype fp16."
            ) from error

    def read(self, place: int) -> np.ndarray[Any, Any]:
        self.file.seek(place * self.bytes)
        out = np.zeros(self.length, self.dtype)
        self.file.readinto(out.data)
        return out

    def write(self, place: int, record: np.ndarray[Any, Any]) -> None:
        self.file.seek(place * self.bytes)
        rest = np.ascontiguousarray(record).data.cast("B")
        while len(rest):
            rest = rest[self.file.write(rest) :]


def _check(record: np.ndarray[Any, Any]) -> int:
    return zlib.crc32(record.data) or 1
