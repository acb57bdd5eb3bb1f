# SPDX-License-Identifier: Apache-2.0
"""The index of tar shards: arrays that say where each image lies, kept on disk and mapped into memory.

It lies in `.opendino-index` beside local shards, or in the user's cache when that folder cannot be written. The name
of an index holds the shards' sizes and times, so one that no longer fits is never found; what did not change is taken
over from the old one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from opendino.images import locations
from opendino.images.packed import PackedText
from opendino.images.sources import number_classes

log = logging.getLogger("opendino")

FORMAT = 1
FOLDER = ".opendino-index"
THREADS = 8
"""Shards listed at a time; listing mostly waits for a disk or a network."""
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
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
        try:
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
        """Map a saved index into memory."""
        about = json.loads((folder / "about.json").read_text())
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name in ARRAY_NAMES:
            path = folder / f"{name}.npy"
            try:
                arrays[name] = np.load(path, mmap_mode="r")
            except ValueError:  # an empty array cannot be mapped
                arrays[name] = np.load(path)
        index = cls(arrays, about["classes"], about["notes"])
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


def load_or_build(paths: list[str], index_shard: Callable[[str, int], TarIndex]) -> TarIndex:
    """Give the index of shards: the kept one when no shard changed since, else a new one that is kept.

    Args:
        paths: of the shards.
        index_shard: lists one shard, given its path and size.

    Raises:
        DataError: when a shard is missing or no tar.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        stamps = list(pool.map(locations.size_and_stamp, paths))
    sizes = [size for size, _ in stamps]
    home = _home(paths)
    if home is None:
        return TarIndex.join(_index_all(paths, sizes, {}, index_shard))
    state: State = [(_place(path, home), size, stamp) for path, (size, stamp) in zip(paths, stamps, strict=True)]
    shard_set = _digest([FORMAT, [place for place, _, _ in state]])
    folder = home / f"{shard_set}-{_digest(state)}"
    with _one_at_a_time(home / f"{shard_set}.lock"):
        found = _try_load(folder)
        if found is not None:
            return found
        older = [f for f in sorted(home.glob(f"{shard_set}-*")) if f.is_dir()]
        index = TarIndex.join(_index_all(paths, sizes, _unchanged(state, home), index_shard))
        try:
            index.save(folder, state)
        except OSError as error:
            log.warning(
                "The index of the tar shards cannot be kept in %s (%s); it is made again next time.", home, error
            )
            return index
        for old in older:
            shutil.rmtree(old, ignore_errors=True)
    return TarIndex.load(folder)


def _place(path: str, home: Path) -> str:
    """Name a shard: below its index, so that a data set can be moved with it, or by its whole path."""
    if locations.is_url(path):
        return path
    whole = os.path.abspath(path)
    return os.path.relpath(whole, home.parent) if home.name == FOLDER else whole


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _home(paths: list[str]) -> Path | None:
    """Find a folder for the index that can be written, or None."""
    places = [Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opendino" / "index"]
    if not any(locations.is_url(p) for p in paths):
        places.insert(0, Path(os.path.abspath(locations.parent(paths[0]))) / FOLDER)
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                return place
        except OSError:
            continue
    return None


def _try_load(folder: Path) -> TarIndex | None:
    try:
        return TarIndex.load(folder) if folder.is_dir() else None
    except (OSError, ValueError, KeyError, EOFError) as error:
        log.warning("The index %s cannot be read (%s); it is made anew.", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _unchanged(state: State, home: Path) -> dict[int, TarIndex]:
    """Give the parts of the indices kept here whose shards are as they were, also of other lists of shards."""
    wanted = {shard: i for i, shard in enumerate(state)}
    parts: dict[int, TarIndex] = {}
    for about in sorted(home.glob("*/about.json")):
        try:
            shards = [tuple(s) for s in json.loads(about.read_text())["shards"]]
            fitting = [(wanted[s], number) for number, s in enumerate(shards) if s in wanted and s[2]]
            index = TarIndex.load(about.parent) if fitting else None
        except (OSError, ValueError, KeyError):
            continue
        if index is not None:
            parts |= {i: index.shard(number) for i, number in fitting}
    return parts


def _index_all(
    paths: list[str], sizes: list[int], known: dict[int, TarIndex], index_shard: Callable[[str, int], TarIndex]
) -> list[TarIndex]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    new = [i for i in range(len(paths)) if i not in known]
    console = Console(stderr=True)
    if not console.is_terminal and new:
        console.print(f"Listing what is in {len(new)} tar shards, once.", highlight=False)
    bar = Progress(
        TextColumn("indexing tar shards"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[images]} images"), console=console, transient=True,
        disable=not console.is_terminal,
    )  # fmt: skip
    images, parts = 0, dict(known)
    with ThreadPoolExecutor(THREADS) as pool, bar:
        task = bar.add_task("", total=len(new), images=0)
        found = pool.map(lambda i: index_shard(paths[i], sizes[i]), new)
        try:
            for i, part in zip(new, found, strict=True):
                parts[i], images = part, images + len(part)
                bar.update(task, advance=1, images=images)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [parts[i] for i in range(len(paths))]


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Let one process index while others of the same run wait for what it finds."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows; indexing twice does no harm
        yield
        return
    with open(path, "w") as file:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
