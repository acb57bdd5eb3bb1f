# SPDX-License-Identifier: Apache-2.0
"""The index of tar shards: arrays that say where each image lies, written to disk and mapped into memory."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from opendino.images.packed import PackedText
from opendino.images.sources import number_classes

FORMAT = 1
ARRAY_NAMES = ("firsts", "offsets", "sizes", "labels", "text", "ends")
State = list[tuple[str, int, str]]
"""(place, size in bytes, stamp) of each shard."""


class TarIndex:
    """Where the images of a list of shards lie.

    Attributes:
        firsts: (shards + 1,) int64, the first image of each shard, and the number of images.
        offsets, sizes: (n,) int64, bytes.
        labels: (n,) int32 in `classes`, -1 without.
        names: in the shards.
        classes: sorted class names.
        notes: one a shard, "" or what a user should know about it.
    """

    def __init__(self, arrays: dict[str, npt.NDArray[Any]], classes: list[str], notes: list[str]) -> None:
        self.firsts, self.offsets, self.sizes = (arrays[k] for k in ("firsts", "offsets", "sizes"))
        self.labels: npt.NDArray[np.int32] = arrays["labels"]
        self.names = PackedText(arrays["text"], arrays["ends"])
        self.classes, self.notes = classes, notes
        self._folder: Path | None = None

    @classmethod
    def of_shard(
        cls, names: list[str], offsets: list[int], sizes: list[int], labels: Sequence[str | None], note: str
    ) -> TarIndex:
        """Make the index of one shard."""
        classes, ids = number_classes(labels)
        packed = PackedText.of(names)
        arrays: dict[str, npt.NDArray[Any]] = {
            "firsts": np.array([0, len(names)]), "offsets": np.array(offsets, np.int64),
            "sizes": np.array(sizes, np.int64), "labels": ids, "text": packed.text, "ends": packed.ends,
        }  # fmt: skip
        return cls(arrays, classes, [note])

    @classmethod
    def join(cls, parts: list[TarIndex]) -> TarIndex:
        """Put the indices of shards one after the other."""
        classes = sorted({name for p in parts for name in p.classes})
        number = {name: i for i, name in enumerate(classes)}
        labels = []
        for p in parts:  # the last entry answers for -1
            table = np.array([*(number[name] for name in p.classes), -1], np.int32)
            labels.append(table[p.labels])
        names = PackedText.join([p.names for p in parts])
        arrays: dict[str, npt.NDArray[Any]] = {
            "firsts": np.cumsum([0, *(len(p) for p in parts)]),
            "offsets": np.concatenate([p.offsets for p in parts]),
            "sizes": np.concatenate([p.sizes for p in parts]),
            "labels": np.concatenate(labels), "text": names.text, "ends": names.ends,
        }  # fmt: skip
        return cls(arrays, classes, [note for p in parts for note in p.notes])

    def __len__(self) -> int:
        return len(self.offsets)

    def shard_of(self, index: int) -> int:
        """Give the number of the shard that image `index` lies in."""
        return int(np.searchsorted(self.firsts, index, side="right")) - 1

    def shard(self, number: int) -> TarIndex:
        """Give the index of one shard alone."""
        first, last = (int(i) for i in self.firsts[number : number + 2])
        ids = self.labels[first:last]
        labels = [None if i < 0 else self.classes[i] for i in ids.tolist()]
        classes, ids = number_classes(labels)
        names = self.names.part(first, last)
        arrays: dict[str, npt.NDArray[Any]] = {
            "firsts": np.array([0, last - first]), "offsets": self.offsets[first:last], "sizes": self.sizes[first:last],
            "labels": ids, "text": names.text, "ends": names.ends,
        }  # fmt: skip
        return TarIndex(arrays, classes, [self.notes[number]])

    def save(self, folder: Path, state: State) -> None:
        """Write the arrays aside and rename them, so that an index is there whole or not at all."""
        aside = folder.parent / f".new-{uuid.uuid4().hex}"
        try:
            aside.mkdir(parents=True)  # readable for whom the umask allows, as the shards may be shared
            for name, array in self._arrays().items():
                np.save(aside / f"{name}.npy", array)
            about = {"format": FORMAT, "classes": self.classes, "notes": self.notes, "shards": state}
            (aside / "about.json").write_text(json.dumps(about))
            os.rename(aside, folder)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            if not folder.is_dir():  # else another process was faster
                raise

    @classmethod
    def load(cls, folder: Path) -> TarIndex:
        """Map a saved index into memory.

        Raises:
            OSError, ValueError, KeyError: when it is not there or damaged.
        """
        about = json.loads((folder / "about.json").read_text())
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name in ARRAY_NAMES:
            path = folder / f"{name}.npy"
            try:
                arrays[name] = np.load(path, mmap_mode="r")
            except ValueError:  # an empty array cannot be mapped
                arrays[name] = np.load(path)
        index = cls(arrays, about["classes"], about["notes"])
        counts = {len(a) for a in (index.offsets, index.sizes, index.labels, index.names)} | {int(index.firsts[-1])}
        if len(counts) > 1 or len(arrays["text"]) != index.names.ends[-1]:
            raise ValueError("its arrays have different lengths")
        index._folder = folder
        return index

    def __reduce__(self) -> Any:
        """Send worker processes the folder, not the arrays."""
        if self._folder is not None:
            return TarIndex.load, (self._folder,)
        return TarIndex, (self._arrays(), self.classes, self.notes)

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        own = {name: getattr(self, name) for name in ("firsts", "offsets", "sizes", "labels")}
        return own | {"text": self.names.text, "ends": self.names.ends}
