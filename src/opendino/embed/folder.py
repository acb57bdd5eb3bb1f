# SPDX-License-Identifier: Apache-2.0
"""Where features are written: a local folder or one behind a URL of fsspec. Files appear whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from opendino.errors import ConfigError, DataError
from opendino.images import locations

LOCK_WAIT_S = 10.0
"""How long to wait for a folder: after a kill, worker processes need a moment to notice that they are alone."""
ASIDE = ".tmp"
DIGITS = 16
"""Hexadecimal digits of a sha256 that are kept: 64 bits, to notice damage and not to withstand an attacker."""
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory")
"""Storage where an object appears whole when its writing ends, so that nothing need be written aside."""
Write = Callable[[IO[bytes]], object]


class Folder(ABC):
    """A flat folder of files.

    Attributes:
        place: path or URL.
    """

    place: str

    @abstractmethod
    def make(self) -> None:
        """Make the folder if it is missing."""

    @abstractmethod
    def names(self) -> list[str]:
        """List the files, sorted; empty when there is no folder."""

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading at any place in it."""

    @abstractmethod
    def put(self, write: Write, name: str | Callable[[str], str]) -> str:
        """Write a file aside, and put it in place when it is whole and on the disk.

        Args:
            write: fills the file.
            name: of the file, or a function that gives it from the first DIGITS of its sha256.

        Returns:
            The name.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file that may be gone already."""

    @abstractmethod
    def locked(self) -> Any:
        """Give a context in which no other process of this machine writes here; its value is what `pass_fds` takes."""

    def read(self, name: str) -> bytes:
        """Give the bytes of a file."""
        with self.open(name) as file:
            return file.read()

    def path(self, name: str) -> str:
        """Give a file's path or URL, for messages."""
        return locations.beside(self.place, name)

    def digest(self, name: str) -> str:
        """Give the first DIGITS of a file's sha256, read piece by piece."""
        found = hashlib.sha256()
        with self.open(name) as file:
            while piece := file.read(1 << 20):
                found.update(piece)
        return found.hexdigest()[:DIGITS]

    def tidy(self) -> None:
        """Remove what was left unfinished."""
        for name in self.names():
            if name.endswith(ASIDE):
                self.remove(name)


def open_folder(place: str | Path) -> Folder:
    """Give the folder at a path or URL.

    Raises:
        MissingExtraError: for a URL without fsspec.
        DataError: for a URL that fsspec does not know.
    """
    text = locations.as_location(place)
    return _Remote(text.rstrip("/")) if locations.is_url(text) else _Local(text)


class _Hashing(io.RawIOBase):
    """Passes bytes on and hashes them on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256, self.at = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.file.write(data)
        self.at += memoryview(data).nbytes
        return memoryview(data).nbytes

    def tell(self) -> int:
        return self.at

    def final(self, name: str | Callable[[str], str]) -> str:
        return name if isinstance(name, str) else name(self.sha256.hexdigest()[:DIGITS])


class _Local(Folder):
    def __init__(self, place: str) -> None:
        self.place = place

    def make(self) -> None:
        try:
            os.makedirs(self.place, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.place} cannot be made: {error}. Give a folder that can, with --out.") from error

    def names(self) -> list[str]:
        with suppress(FileNotFoundError):
            return sorted(os.listdir(self.place))
        return []

    def open(self, name: str) -> IO[bytes]:
        return open(self.path(name), "rb")

    def put(self, write: Write, name: str | Callable[[str], str]) -> str:
        aside = self.path(f"{uuid.uuid4().hex}{ASIDE}")
        try:
            with open(aside, "wb") as file:
                hashing = _Hashing(file)
                write(hashing)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            final = hashing.final(name)
            os.replace(aside, self.path(final))
        except OSError as error:
            raise DataError(
                f"{self.place} cannot be written: {error}. Mend that (more room, or rights) and run the same command "
                "again: what was written before is kept."
            ) from error
        finally:
            with suppress(OSError):  # it is gone when all went well
                os.remove(aside)
        self._sync()
        return final

    def _sync(self) -> None:
        """Have the new name on the disk too; systems that cannot open a folder need not be asked."""
        with suppress(OSError):
            number = os.open(self.place, os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.remove(self.path(name))

    @contextmanager
    def locked(self) -> Iterator[tuple[int, ...]]:
        """Hold the folder's lock; the system drops it when the last process that has it ends, however that happens."""
        try:
            import fcntl
        except ImportError:  # no such locks on Windows
            yield ()
            return
        deadline = time.monotonic() + LOCK_WAIT_S
        with open(self.path(".lock"), "w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise ConfigError(
                            f"{self.place} is being written by another process. Wait for it, or give another --out."
                        ) from None
                    time.sleep(0.05)
                    continue
                except OSError:  # some network file systems have no locks
                    pass
                break
            yield (file.fileno(),)


class _Remote(Folder):
    """A folder behind a URL. It has no lock: shards that two runs wrote are told apart by the range in their names."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.fs, self.inner = locations.filesystem(place)

    def _at(self, name: str) -> str:
        return f"{self.inner.rstrip('/')}/{name}"

    def make(self) -> None:
        with suppress(FileExistsError, NotImplementedError):
            self.fs.makedirs(self.inner, exist_ok=True)

    def names(self) -> list[str]:
        self.fs.invalidate_cache()
        with suppress(FileNotFoundError):
            return sorted(found.rstrip("/").rsplit("/", 1)[-1] for found in self.fs.ls(self.inner, detail=False))
        return []

    def open(self, name: str) -> IO[bytes]:
        file: IO[bytes] = self.fs.open(self._at(name), "rb")
        return file

    def put(self, write: Write, name: str | Callable[[str], str]) -> str:
        held = io.BytesIO()
        hashing = _Hashing(held)
        write(hashing)  # type: ignore[arg-type]
        final = hashing.final(name)
        if self.place.split("://")[0] in OBJECT_STORES:
            self.fs.pipe_file(self._at(final), held.getvalue())
        else:
            aside = self._at(f"{uuid.uuid4().hex}{ASIDE}")
            self.fs.pipe_file(aside, held.getvalue())
            self.fs.mv(aside, self._at(final))
        return final

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.fs.rm_file(self._at(name))

    @contextmanager
    def locked(self) -> Iterator[tuple[int, ...]]:
        yield ()
