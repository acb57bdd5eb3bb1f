# SPDX-License-Identifier: Apache-2.0
"""The Open Clip Art Library as Debian packages it: drawings of everything, dedicated to the public domain."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from rich.progress import Progress

from opendino.sample_data.drawings import fingerprint, is_missing_image, on_ground, open_drawing
from opendino.sample_data.licences import Ledger

PACKAGES_NEEDED = ("openclipart",)
LICENCE, HOLDER = "public-domain", "contributors of the Open Clip Art Library; each file name ends with its author"
LEFT_OUT_FOLDERS = ("logos/",)
THINNED = "shapes/stars/"  # 1 378 stars that differ by a number of points
KEPT_OF_THINNED = 20  # one in so many
_FOLDER = "usr/share/openclipart/png"


def build_openclipart(raw: Mapping[str, Path], out: Path, progress: Progress, side: int = 192) -> dict[str, int]:
    """Write the drawings as PNG files of at most `side` pixels, named by their path, and credits.json.

    Left out: logos, all but one in twenty of the stars, placeholders of images that were not found, copies, and what is
    empty, tiny or of more than 300 million pixels.
    """
    root, ledger, seen = raw["openclipart"] / _FOLDER, Ledger(), set[bytes]()
    files = sorted(root.rglob("*.png"))
    written = 0
    for path in progress.track(files, description="openclipart"):
        name = path.relative_to(root).as_posix()
        reason = _not_wanted(name)
        drawing = None if reason else _read(path)
        if reason or drawing is None:
            ledger.leave_out(reason or "empty, tiny, too large or broken")
        elif is_missing_image(drawing):
            ledger.leave_out("placeholder of a missing image")
        elif (mark := fingerprint(drawing)) in seen:
            ledger.leave_out("copy")
        elif ledger.admits(name, LICENCE, HOLDER, "openclipart-png"):
            seen.add(mark)
            on_ground(drawing, name, side).save(out / name.replace("/", "__"), compress_level=4)
            written += 1
    ledger.write(out)
    return {"images": written}


def _not_wanted(name: str) -> str | None:
    if name.startswith(LEFT_OUT_FOLDERS):
        return "logo"
    share = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % KEPT_OF_THINNED
    return "one of many stars" if name.startswith(THINNED) and share else None


def _read(path: Path) -> Image.Image | None:
    try:
        return open_drawing(path)
    except (OSError, SyntaxError):  # what Pillow raises for broken files
        return None
