# SPDX-License-Identifier: Apache-2.0
"""Photographed floors and walls, from the jar of the Sweet Home 3D package (GPL-2+, eTeks)."""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath

from opendino.errors import DataError

_JAR = "usr/share/sweethome3d/sweethome3d.jar"
_INSIDE = "/resources/textures/"


def unpack_surfaces(package: Path) -> list[Path]:
    """Give the texture files of the unpacked `sweethome3d` package, sorted; the jar is unpacked once beside it.

    Raises:
        DataError: when the jar is missing or damaged.
    """
    folder = package / "textures"
    if not folder.is_dir():
        part = package / ".textures.part"
        part.mkdir(exist_ok=True)
        try:
            with zipfile.ZipFile(package / _JAR) as jar:
                for name in jar.namelist():
                    if _INSIDE in name and name.endswith(".jpg"):
                        (part / PurePosixPath(name).name).write_bytes(jar.read(name))
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{package / _JAR} cannot be read: {error}. Delete {package}; it is fetched again."
            ) from error
        part.rename(folder)
    return sorted(folder.glob("*.jpg"), key=lambda p: p.name)
