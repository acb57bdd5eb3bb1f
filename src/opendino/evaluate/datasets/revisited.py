# SPDX-License-Identifier: Apache-2.0
"""Revisited Oxford and Paris (Radenović et al. 2018): queries in boxes; easy, hard and junk images for each.

gnd_roxford5k.pkl or gnd_rparis6k.pkl  jpg/*.jpg
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opendino.errors import DataError
from opendino.evaluate.datasets.layout import Layout, Opened, check_files, variable
from opendino.evaluate.datasets.pickles import read_pickle
from opendino.evaluate.datasets.types import Box, RetrievalSet

LEVELS = ("easy", "hard", "junk")


def open_revisited(root: Path, name: str) -> Opened:
    """Open roxford5k or rparis6k; the ground truth is a pickle that cannot run code here."""
    file = root / f"gnd_{name}.pkl"
    found = read_pickle(file)
    gallery, queries, truth = (list(variable(found, key, file)) for key in ("imlist", "qimlist", "gnd"))
    if len(truth) != len(queries):
        raise DataError(f"{file} has {len(queries)} queries and ground truth for {len(truth)}. Take it anew.")
    paths = [f"{n}.jpg" for n in gallery]
    query_paths = [f"{n}.jpg" for n in queries]
    images = root / "jpg"
    check_files(images, [*paths, *query_paths], file)
    relevant = [_relevant(g, len(gallery), file) for g in truth]
    return Opened(
        RetrievalSet(
            str(root), [str(images / p) for p in paths], [str(images / p) for p in query_paths],
            [_box(g, file) for g in truth], relevant,
        )
    )  # fmt: skip


def _relevant(truth: dict[str, Any], count: int, file: Path) -> dict[str, list[int]]:
    found = {level: [int(i) for i in truth.get(level, ())] for level in LEVELS}
    wrong = [i for ids in found.values() for i in ids if not 0 <= i < count]
    if wrong:
        raise DataError(f"{file} speaks of image {wrong[0]}, but has {count} images. Take it anew from the download.")
    return found


def _box(truth: dict[str, Any], file: Path) -> Box | None:
    values = truth.get("bbx")
    if values is None:
        return None
    if len(values) != 4:
        raise DataError(f"{file} has a box of {len(values)} numbers; left, upper, right, lower are needed.")
    left, upper, right, lower = (float(v) for v in values)
    return left, upper, right, lower


def _layout(title: str, name: str) -> Layout:
    return Layout(
        title, "retrieval", (f"gnd_{name}.pkl",), lambda root: [name], open_revisited, (name,)
    )  # fmt: skip


LAYOUTS = (_layout("Revisited Oxford", "roxford5k"), _layout("Revisited Paris", "rparis6k"))
