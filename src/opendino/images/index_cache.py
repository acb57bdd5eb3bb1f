# SPDX-License-Identifier: Apache-2.0
"""Where indices of tar shards are kept, and when they are made anew.

They lie in `.opendino-index` beside local shards, or in the user's cache when that folder cannot be written. The name
of an index holds the shards' sizes and times, so one that no longer fits is never found; what did not change is taken
over from any older one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from opendino.images import locations
from opendino.images.tar_index import FORMAT, State, TarIndex

log = logging.getLogger("opendino")

FOLDER = ".opendino-index"
THREADS, STAT_THREADS = 8, 32
"""Shards listed and asked for their size at a time; both mostly wait for a disk or a network."""
TOLD_FROM = 10
"""Shards from which a log is told that they are being listed."""
KEEP_EVERY_S = 300.0
"""Between the times that a long listing is kept, so that a kill does not undo all of it."""


def load_or_build(paths: list[str], index_shard: Callable[[str, int], TarIndex]) -> TarIndex:
    """Give the index of shards: the kept one when no shard changed since, else a new one that is kept.

    Args:
        paths: of the shards.
        index_shard: lists one shard, given its path and size.

    Raises:
        DataError: when a shard is missing or no tar.
    """
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        stamps = list(pool.map(locations.size_and_stamp, paths))
    sizes = [size for size, _ in stamps]
    home = _home(paths)
    if home is None:
        return TarIndex.join(_index_all(paths, sizes, {}, index_shard, lambda parts: None))
    state: State = [(_place(path, home), size, stamp) for path, (size, stamp) in zip(paths, stamps, strict=True)]
    shard_set = _digest([FORMAT, [place for place, _, _ in state]])
    whole = home / f"{shard_set}-{_digest(state)}"

    def keep(parts: dict[int, TarIndex]) -> None:
        numbers = sorted(parts)
        kept = [state[i] for i in numbers]
        folder = home / f"{shard_set}-{_digest(kept)}"
        if numbers and not folder.exists():
            TarIndex.join([parts[i] for i in numbers]).save(folder, kept)

    with _one_at_a_time(home / f"{shard_set}.lock"):
        found = _try_load(whole)
        if found is not None:
            return found
        parts = _index_all(paths, sizes, _unchanged(state, home), index_shard, keep)
        try:
            keep(dict(enumerate(parts)))
            index = TarIndex.load(whole)
        except (OSError, ValueError, KeyError) as error:
            log.warning(
                "The index of the tar shards cannot be kept in %s (%s); next time it is made anew.", home, error
            )
            return TarIndex.join(parts)
        for older in home.glob(f"{shard_set}-*"):
            if older != whole:
                shutil.rmtree(older, ignore_errors=True)
    return index


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
    paths: list[str],
    sizes: list[int],
    known: dict[int, TarIndex],
    index_shard: Callable[[str, int], TarIndex],
    keep: Callable[[dict[int, TarIndex]], None],
) -> list[TarIndex]:
    """List the shards that are not known, and keep what there is every few minutes and when it is broken off."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    new = [i for i in range(len(paths)) if i not in known]
    console = Console(stderr=True)
    if not console.is_terminal and len(new) >= TOLD_FROM:
        console.print(f"Listing what is in {len(new)} tar shards, once.", highlight=False)
    bar = Progress(
        TextColumn("indexing tar shards"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[images]} images"), console=console, transient=True,
        disable=not console.is_terminal,
    )  # fmt: skip
    images, parts, kept_at = 0, dict(known), time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool, bar:
        task = bar.add_task("", total=len(new), images=0)
        found = pool.map(lambda i: index_shard(paths[i], sizes[i]), new)
        try:
            for i, part in zip(new, found, strict=True):
                parts[i], images = part, images + len(part)
                bar.update(task, advance=1, images=images)
                if time.monotonic() - kept_at > KEEP_EVERY_S:
                    with suppress(OSError):
                        keep(parts)
                    kept_at = time.monotonic()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            with suppress(OSError):
                keep(parts)
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
    with ExitStack() as stack:
        with suppress(OSError):  # another user's file, or a network file system without locks
            fcntl.flock(stack.enter_context(open(path, "a")), fcntl.LOCK_EX)
        yield
