# SPDX-License-Identifier: Apache-2.0
"""AmsterTime (Yildiz et al. 2022): archival photographs against street views of the same place today.

new/NAME.png  old/NAME.jpg         as the archive unpacks: images of a pair have one name
"""

from __future__ import annotations

from pathlib import Path

from opendino.errors import DataError
from opendino.evaluate.datasets.layout import Layout, Opened
from opendino.evaluate.datasets.types import RetrievalSet
from opendino.images.sources import EXTENSIONS


def open_amstertime(root: Path, split: str) -> Opened:
    """Open the old photographs as queries, the new ones as gallery; the one match of a query counts as easy."""
    new, old = _images(root / "new"), _images(root / "old")
    alone = sorted(set(new) ^ set(old))
    if alone or not new:
        what = f"{len(alone)} images without a partner, such as {alone[0]}" if alone else "no images"
        raise DataError(f"{root} has {what}; new/ and old/ hold the two images of a pair under one name.")
    names = sorted(new)
    relevant = [{"easy": [i], "hard": [], "junk": []} for i in range(len(names))]
    return Opened(
        RetrievalSet(str(root), [str(new[n]) for n in names], [str(old[n]) for n in names], [None] * len(names),
                     relevant)
    )  # fmt: skip


def _images(folder: Path) -> dict[str, Path]:
    return {p.stem: p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".")}


LAYOUTS = (
    Layout(
        "AmsterTime", "retrieval", ("new", "old"), lambda root: ["test"], open_amstertime, ("amstertime", "AmsterTime"),
        lambda root: all((root / d).is_dir() for d in ("new", "old")),
    ),
)  # fmt: skip
