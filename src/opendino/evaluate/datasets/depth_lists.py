# SPDX-License-Identifier: Apache-2.0
"""Lists of image and depth files, as depth estimation code passes them around: lines IMAGE DEPTH FOCAL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opendino.errors import DataError
from opendino.evaluate.datasets.folders import FolderDepth
from opendino.evaluate.datasets.layout import SHOWN, Opened, read_rows
from opendino.evaluate.datasets.types import DepthCrop


def open_depth_list(
    root: Path, listed: Path, images: Sequence[Path], depths: Sequence[Path], *, scale: float, min_depth: float,
    max_depth: float, crop: DepthCrop, made: type[FolderDepth] = FolderDepth,
) -> Opened:  # fmt: skip
    """Open a list; lines whose depth is None have no ground truth and are left out with a note.

    Args:
        root: what was opened.
        listed: the list.
        images: folders that the images may lie in.
        depths: folders that the depth files may lie in.
        scale: metres per unit.
        min_depth: metres.
        max_depth: metres.
        crop: the part that is scored.
        made: the class of the set.

    Raises:
        DataError: for a line of one part, or files that are not there.
    """
    rows = read_rows(listed, 2)
    pairs = [(r[0].lstrip("/"), r[1].split()[0].lstrip("/")) for r in rows]
    known = [p for p in pairs if p[1] != "None"]
    if not known:
        raise DataError(f"{listed} names no image with a depth file.")
    found_images = _find(images, [p[0] for p in known], listed)
    found_depths = _find(depths, [p[1] for p in known], listed)
    data = made(str(root), found_images, found_depths, scale=scale, min_depth=min_depth, max_depth=max_depth, crop=crop)
    without = len(pairs) - len(known)
    note = f"{without} of the {len(pairs)} lines of {listed.name} have no depth file (None) and are left out."
    return Opened(data, (note,) if without else ())


def _find(folders: Sequence[Path], names: Sequence[str], listed: Path) -> list[Path]:
    places, missing = [], []
    last = folders[0]  # most files lie in the folder where the one before them did
    for name in names:
        place = next((p for d in (last, *folders) if (p := d / name).is_file()), None)
        if place is None:
            missing.append(name)
            continue
        places.append(place)
        last = place.parents[len(Path(name).parts) - 1]
    if missing:
        tried = ", ".join(str(d) for d in folders if d.is_dir())
        raise DataError(
            f"{len(missing)} of {len(names)} files that {listed} names are not there, such as "
            f"{', '.join(missing[:SHOWN])}. Looked below {tried}. Unpack them there, or mend the list."
        )
    return places
