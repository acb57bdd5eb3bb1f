# SPDX-License-Identifier: Apache-2.0
"""Files by path or URL: what is there, which ones a pattern names, and bytes of them.

Local files are read through the system alone; URLs through fsspec, which is imported when the first one is met. File
handles and file systems belong to a process: after a fork the child gets its own.
"""

from __future__ import annotations

import glob
import itertools
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from opendino.errors import DataError, MissingExtraError

TAR = re.compile(r"\.(tar|tgz|tar\.\w+)$", re.IGNORECASE)
OPEN_FILES = 64
"""Shards that a process keeps open."""
PAUSES_S = (0.2, 1.0, 3.0)
"""Between the tries of a read over a network."""
STAMPS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
"""What file systems call the thing that changes when a file changes, the surest first."""


def as_location(path: str | Path) -> str:
    """Give a path or URL as text; file:// becomes a path, and a URL that went through Path gets its // back."""
    text = str(path)
    if isinstance(path, Path):
        text = re.sub(r"^([a-z][a-z0-9+.-]+):/(?!/)", r"\1://", text)
    return re.sub(r"^(file|local)://", "", text)


def is_url(place: str) -> bool:
    """Say whether a place is a URL."""
    return re.match(r"[a-z][a-z0-9+.-]+://", place) is not None


def suffix(place: str) -> str:
    """Give the last extension in lower case; a query after it does not count."""
    return posixpath.splitext(place.split("?", 1)[0] if is_url(place) else place)[1].lower()


def is_tar(place: str) -> bool:
    """Say whether a name is that of a tar file, compressed or not."""
    return TAR.search(place.split("?", 1)[0] if is_url(place) else place) is not None


def is_pattern(place: str) -> bool:
    """Say whether a place names several files; one that exists as it stands does not."""
    return re.search(r"[*?\[{]", place) is not None and (is_url(place) or not os.path.exists(place))


def parent(place: str) -> str:
    """Give the folder of a place."""
    return posixpath.dirname(place) if is_url(place) else os.path.dirname(place)


def absolute(place: str) -> str:
    """Give a path from the root of the file system; URLs are so already."""
    return place if is_url(place) else os.path.abspath(place)


def beside(folder: str, entry: str) -> str:
    """Give an entry of a list in `folder` as a place; absolute paths and URLs stay."""
    if is_url(entry):
        return entry
    return posixpath.join(folder, entry) if is_url(folder) else os.path.join(folder, entry)


def expand(pattern: str) -> list[str]:
    """Give the files that a pattern names: {a,b} and {000..012} in their order, * and ? sorted.

    Names that braces spell out need not exist here; whoever opens them says which one is missing.
    """
    places: list[str] = []
    for place in _braces(pattern):
        if not re.search(r"[*?\[]", place):
            places.append(place)
        elif is_url(place):
            fs, inner = filesystem(place)
            places += sorted(fs.unstrip_protocol(p) for p in fs.glob(inner))
        else:
            places += sorted(glob.glob(place, recursive=True))
    return places


def _braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    inside = match[1]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        options = [str(i).zfill(len(numbers[1])) for i in range(first, last + 1)]
    else:
        options = inside.split(",")
    heads = (pattern[: match.start()] + option for option in options)
    tails = _braces(pattern[match.end() :])
    return [head + tail for head, tail in itertools.product(heads, tails)]


def is_folder(place: str) -> bool:
    """Say whether a place is a folder."""
    if not is_url(place):
        return os.path.isdir(place)
    fs, inner = filesystem(place)
    return bool(fs.isdir(inner))


def is_file(place: str) -> bool:
    """Say whether a place is a file."""
    if not is_url(place):
        return os.path.isfile(place)
    fs, inner = filesystem(place)
    return bool(fs.isfile(inner))


def walk(root: str) -> Iterator[str]:
    """Give the files below a folder as "a/b.jpg", sorted part by part, hidden ones left out.

    Links to folders are not followed. A local folder is listed when its turn comes, so that memory does not grow with
    the number of files.
    """
    if is_url(root):
        fs, inner = filesystem(root)
        inner = inner.rstrip("/") + "/"
        names = sorted(fs.find(inner), key=lambda name: name.split("/"))
        for found in names:
            name = found[len(inner) :] if found.startswith(inner) else found
            if not any(part.startswith(".") for part in name.split("/")):
                yield name
        return
    yield from _walk(root, "")


def _walk(folder: str, below: str) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            names, folders = [], {}
            for entry in entries:
                if not entry.name.startswith("."):
                    names.append(entry.name)
                    if entry.is_dir():
                        folders[entry.name] = entry.is_symlink()
    except OSError:  # gone meanwhile, or not ours to read
        return
    names.sort()
    for name in names:
        if name not in folders:
            yield below + name
        elif not folders[name]:
            yield from _walk(os.path.join(folder, name), f"{below}{name}/")


def size_and_stamp(place: str) -> tuple[int, str]:
    """Give a file's size in bytes and something that changes when it is written anew.

    Raises:
        DataError: when it is not there.
    """
    try:
        if not is_url(place):
            stat = os.stat(place)
            return stat.st_size, str(stat.st_mtime_ns)
        fs, inner = filesystem(place)
        info = fs.info(inner)
    except OSError as error:
        raise DataError(f"{place} cannot be opened: {error}. Mend the path, the pattern or the list.") from error
    stamp = next((str(info[k]) for k in STAMPS if info.get(k) is not None), "")
    return int(info["size"]), stamp


def read_whole(place: str) -> bytes:
    """Give all bytes of a file."""
    if not is_url(place):
        return Path(place).read_bytes()
    fs, inner = filesystem(place)
    return _patiently(place, lambda: bytes(fs.cat_file(inner)))


def read_range(place: str, offset: int, size: int) -> bytes:
    """Give `size` bytes of a file from `offset` on, fewer where it ends before."""
    if is_url(place):
        fs, inner = filesystem(place)
        return _patiently(place, lambda: bytes(fs.cat_file(inner, start=offset, end=offset + size)))
    return _handle(place, os.getpid()).read(offset, size)


def _patiently(place: str, read: Callable[[], bytes]) -> bytes:
    """Try a read again when a network fails, so that a hiccup does not put another image into a batch.

    Raises:
        FileNotFoundError: at once.
        DataError: when it fails every time, whatever the storage raised.
    """
    for pause in PAUSES_S:
        try:
            return read()
        except FileNotFoundError:
            raise
        except Exception:  # each kind of storage has errors of its own
            time.sleep(pause)
    try:
        return read()
    except Exception as error:
        raise DataError(f"{place} cannot be read: {type(error).__name__}: {error}") from error


def open_binary(place: str, block_size: int = 4 << 20) -> Any:
    """Open a file for reading from its beginning on; a remote one is read ahead by `block_size` bytes."""
    if not is_url(place):
        return open(place, "rb", buffering=0)
    fs, inner = filesystem(place)
    return fs.open(inner, "rb", block_size=block_size, cache_type="readahead")


class _Handle:
    """An open file, read at any place by any thread, closed with its last user."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)) if hasattr(os, "pread") else -1

    def read(self, offset: int, size: int) -> bytes:
        if self._fd < 0:  # Windows has no pread
            with open(self._path, "rb") as file:
                file.seek(offset)
                return file.read(size)
        parts = []
        while size > 0 and (part := os.pread(self._fd, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)


@lru_cache(maxsize=OPEN_FILES)
def _handle(path: str, pid: int) -> _Handle:
    return _Handle(path)


def forget_open_files() -> None:
    """Close the kept files, so that one that was written anew is read anew."""
    _handle.cache_clear()


def filesystem(url: str) -> tuple[Any, str]:
    """Give fsspec's file system and the path there. fsspec keeps one for each process and thread, so this is cheap."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise MissingExtraError("fsspec", "remote", f"Using {url}") from error
    try:
        fs, inner = url_to_fs(url)
    except (ValueError, ImportError) as error:  # an unknown scheme, or one whose package is missing
        raise DataError(
            f"{url} cannot be opened: {error}. Give a path, or install what fsspec needs for it."
        ) from error
    return fs, str(inner)
