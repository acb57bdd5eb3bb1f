# SPDX-License-Identifier: Apache-2.0
"""The Met (Ypsilantis et al. 2021): photographs of exhibits by visitors against the museum's own, scored by GAP.

ground_truth/{MET_database.json, mini_MET_database.json, testset.json, valset.json}
images/MET/ID/*.jpg  images/test_met/…  images/test_other/…  images/test_noart/…

Entries of the database have path and id, those of the queries path and, unless they are distractors, MET_id.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opendino.errors import DataError
from opendino.evaluate.datasets.layout import Layout, Opened, check_files, read_json
from opendino.evaluate.datasets.types import RetrievalSet

DATABASES = ("MET_database.json", "mini_MET_database.json")
QUERIES = {"test": "testset.json", "val": "valset.json"}


def open_met(root: Path, split: str) -> Opened:
    """Open the queries of test or val, or with "mini_" before it, against the small database."""
    mini = split.startswith("mini_")
    truth = _truth(root)
    database, listed = truth / DATABASES[mini], truth / QUERIES[split.removeprefix("mini_")]
    gallery, queries = _entries(database, "id"), _entries(listed)
    images = root / "images" if (root / "images").is_dir() else root
    for entries, file in ((gallery, database), (queries, listed)):
        check_files(images, [e["path"] for e in entries], file)
    return Opened(
        RetrievalSet(
            str(root), [str(images / e["path"]) for e in gallery], [str(images / e["path"]) for e in queries],
            [None] * len(queries), gap=True, gallery_ids=[str(e["id"]) for e in gallery],
            query_ids=[str(e["MET_id"]) if "MET_id" in e else None for e in queries],
        )
    )  # fmt: skip


def _entries(file: Path, *needed: str) -> list[dict[str, Any]]:
    found = read_json(file)
    if not isinstance(found, list) or not found:
        raise DataError(f"{file} is no list of images.")
    for number, entry in enumerate(found):
        lacking = [k for k in ("path", *needed) if not isinstance(entry, dict) or k not in entry]
        if lacking:
            raise DataError(f"{file} has no {lacking[0]!r} in entry {number}. Take it anew from the download.")
    return found


def _truth(root: Path) -> Path:
    return root / "ground_truth" if (root / "ground_truth").is_dir() else root


def _splits(root: Path) -> list[str]:
    truth = _truth(root)
    there = [split for split, file in QUERIES.items() if (truth / file).is_file()]
    sizes = [mini for mini, name in zip(("", "mini_"), DATABASES, strict=True) if (truth / name).is_file()]
    return [mini + split for mini in sizes for split in there]


LAYOUTS = (
    Layout(
        "Met", "retrieval",
        ("|".join(f"{d}{n}" for d in ("ground_truth/", "") for n in DATABASES),
         "|".join(f"{d}{n}" for d in ("ground_truth/", "") for n in QUERIES.values())), _splits, open_met,
    ),
)  # fmt: skip
