# SPDX-License-Identifier: Apache-2.0
"""Where the files of a tar lie, from its headers alone (POSIX.1-2001 "ustar" and "pax"; GNU long names).

The payload is skipped, so that a shard is listed in a fraction of the time that reading it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opendino.errors import DataError

BLOCK = 512
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
TOOLS = {"gzip": "gunzip", "bzip2": "bunzip2", "xz": "unxz", "zstd": "unzstd"}
PLAIN, EXTENDED, WITHOUT_PAYLOAD = b"0\x007", b"LKxg", b"123456"
"""Types of members: files; headers about the next member or all that follow; links, devices and folders."""
MAX_EXTENDED = 1 << 20
"""Bytes of a long name or a pax header; more is damage."""


@dataclass(frozen=True)
class Member:
    """A plain file in a tar.

    Attributes:
        name: with its folders, as stored.
        offset: of its first byte, from the beginning of the tar.
        size: bytes.
    """

    name: str
    offset: int
    size: int


class _DamagedError(Exception):
    """What is wrong with a tar from a place on."""


def walk_tar(file: Any, size: int, place: str, use: Callable[[Member], None]) -> str | None:
    """Call `use` with each plain file of a tar, in order.

    Args:
        file: has seek and read.
        size: of the tar, bytes.
        place: its path, for messages.
        use: gets the members that lie in the file with all their bytes.

    Returns:
        None, or what is wrong with the tar: it was cut off, or is damaged from some place on.

    Raises:
        DataError: when it is compressed, or no tar at all.
    """
    position = 0
    own: dict[str, str] = {}  # of the next member, from the headers before it
    common: dict[str, str] = {}  # of all members that follow
    try:
        while (header := _exactly(file, position, BLOCK, size)).strip(b"\0"):
            if position == 0:
                _refuse_other_files(header, place)
            length, kind, data = _number(header[124:136]), header[156:157], position + BLOCK
            if not _is_header(header) or length < 0:
                raise _DamagedError(f"has no valid header at byte {position}")
            if kind in EXTENDED:
                (common if kind == b"g" else own).update(_extended(file, kind, data, length, size))
            else:
                fields = common | own
                own = {}
                length = 0 if kind in WITHOUT_PAYLOAD else int(fields.get("size", length))
                name = fields.get("path") or _name(header)
                if kind in PLAIN:
                    if data + length > size:
                        raise _DamagedError(f"ends in the middle of {name}")
                    use(Member(name, data, length))
            position = data + -(-length // BLOCK) * BLOCK
    except _DamagedError as damage:
        return str(damage)
    return None


def _extended(file: Any, kind: bytes, data: int, length: int, size: int) -> dict[str, str]:
    """Read a long name or a pax header."""
    if length > MAX_EXTENDED:
        raise _DamagedError(f"has a header of {length} bytes at byte {data - BLOCK}")
    payload = _exactly(file, data, length, size) if length else b""
    if kind in b"xg":
        return _pax(payload)
    return {"path": _text(payload)} if kind == b"L" else {}


def _exactly(file: Any, position: int, count: int, size: int) -> bytes:
    if position >= size:
        raise _DamagedError("ends without the closing blocks")
    file.seek(position)
    data = bytes(file.read(count))
    if len(data) < count:
        raise _DamagedError(f"ends in the middle of a header at byte {position}")
    return data


def _refuse_other_files(header: bytes, place: str) -> None:
    method = next((name for magic, name in COMPRESSED.items() if header.startswith(magic)), None)
    if method:
        raise DataError(
            f"{place} is compressed with {method}; its files cannot be read one by one. Decompress it once "
            f"({TOOLS[method]} {place}): images are compressed already, and the tar hardly grows."
        )
    if not _is_header(header):
        raise DataError(f"{place} is no tar file: it does not begin with a tar header. Give a tar, or remove it.")


def _is_header(header: bytes) -> bool:
    """Compare the checksum: the sum of all bytes, its own field taken as blanks."""
    return _number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * 32


def _number(field: bytes) -> int:
    """Read an octal number, or a binary one whose first bit is set; -1 when it is neither."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _pax(payload: bytes) -> dict[str, str]:
    """Read the records "length key=value" that matter."""
    found: dict[str, str] = {}
    while payload.strip(b"\0"):
        digits, _, _ = payload.partition(b" ")
        if not digits.isdigit() or not len(digits) + 1 < int(digits) <= len(payload):
            raise _DamagedError("has a damaged pax header")
        key, _, value = payload[len(digits) + 1 : int(digits) - 1].partition(b"=")
        payload = payload[int(digits) :]
        if key == b"path":
            found["path"] = _text(value)
        elif key == b"size":
            if not value.isdigit():
                raise _DamagedError("has a damaged pax header")
            found["size"] = value.decode()
    return found


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
