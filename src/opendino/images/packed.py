# SPDX-License-Identifier: Apache-2.0
"""Long lists of text in two arrays, which worker processes share without copying however long they are."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt


class PackedText:
    """A fixed list of strings as bytes and ends; file names that are no UTF-8 survive.

    Attributes:
        text: (total bytes,) uint8.
        ends: (n + 1,) int64, where each string begins and the last one ends.
    """

    def __init__(self, text: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> PackedText:
        """Pack strings."""
        packer = Packer()
        for string in strings:
            packer.add(string)
        return packer.packed()

    @classmethod
    def join(cls, parts: list[PackedText]) -> PackedText:
        """Put lists one after the other."""
        lengths = [np.diff(p.ends) for p in parts]
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths]))])
        return cls(np.concatenate([np.zeros(0, np.uint8), *(p.text for p in parts)]), ends)

    def part(self, first: int, last: int) -> PackedText:
        """Give the strings from `first` to before `last`."""
        ends = self.ends[first : last + 1]
        return PackedText(self.text[ends[0] : ends[-1]], ends - ends[0])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = self.text[self.ends[index] : self.ends[index + 1]]
        return part.tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def add_to(self, digest: Any) -> None:
        """Feed a hash with the strings and where they end."""
        digest.update(np.ascontiguousarray(self.ends, dtype="<i8").data)
        digest.update(np.ascontiguousarray(self.text).data)

    def hash(self) -> str:
        """Give the sha256 of the list."""
        digest = hashlib.sha256()
        self.add_to(digest)
        return digest.hexdigest()


class Packer:
    """Packs strings as they come, so that nothing but the packed list grows."""

    def __init__(self) -> None:
        self._text, self._ends = bytearray(), array("q", [0])

    def add(self, string: str) -> None:
        """Take one more string."""
        self._text += string.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._text))

    def packed(self) -> PackedText:
        """Give the list; nothing can be added after it."""
        return PackedText(np.frombuffer(self._text, np.uint8), np.frombuffer(self._ends, np.int64))
