# SPDX-License-Identifier: Apache-2.0
"""Reader of Qt binary resources (.rcc), the container that GCompris keeps its photographs in."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from opendino.errors import DataError

_COMPRESSED, _DIRECTORY, _ZSTD = 1, 2, 4


def read_rcc(path: Path) -> Iterator[tuple[str, bytes]]:
    """Iterate over (path inside, bytes) of every file that is stored plain or with zlib; zstd entries are left out.

    Layout: header `qres`, version, offsets of tree, data and names; tree nodes of 14 bytes (22 from version 2 on) with
    name offset and flags, then (children, first child) of a folder or (locale, data offset) of a file; data entries
    start with their length; names with their length and hash, in UTF-16. All big-endian.

    Raises:
        DataError: when the file is no Qt resource or is cut short.
    """
    blob = path.read_bytes()
    if blob[:4] != b"qres":
        raise DataError(f"{path} is no Qt resource: it starts with {blob[:4]!r}, not b'qres'. Fetch its package again.")
    try:
        version, tree, data, names = struct.unpack_from(">4I", blob, 4)
        yield from _walk(blob, tree, 14 if version == 1 else 22, data, names)
    except (struct.error, zlib.error, RecursionError) as error:
        raise DataError(f"{path} is a damaged Qt resource: {error}. Fetch its package again.") from error


def _walk(
    blob: bytes, tree: int, node_size: int, data: int, names: int, node: int = 0, prefix: str = ""
) -> Iterator[tuple[str, bytes]]:
    at = tree + node * node_size
    name_at, flags = struct.unpack_from(">IH", blob, at)
    full = f"{prefix}/{_name(blob, names + name_at)}" if node else ""
    if flags & _DIRECTORY:
        count, first = struct.unpack_from(">II", blob, at + 6)
        for child in range(first, first + count):
            yield from _walk(blob, tree, node_size, data, names, child, full)
    elif not flags & _ZSTD:
        (where,) = struct.unpack_from(">I", blob, at + 10)
        (length,) = struct.unpack_from(">I", blob, data + where)
        content = blob[data + where + 4 : data + where + 4 + length]
        # A zlib entry has the unpacked length in front of the stream.
        yield full, zlib.decompress(content[4:]) if flags & _COMPRESSED else content


def _name(blob: bytes, at: int) -> str:
    (length,) = struct.unpack_from(">H", blob, at)
    return blob[at + 6 : at + 6 + 2 * length].decode("utf-16-be")
