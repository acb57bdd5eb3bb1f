# SPDX-License-Identifier: Apache-2.0
"""Retrieval sets of one's own, described by one JSON file.

    {"gallery": ["new/a.jpg", "new/b.jpg"],
     "queries": [{"query": "old/a.jpg", "box": [10, 20, 110, 90],
                  "easy": ["new/a.jpg"], "hard": [], "junk": ["new/b.jpg"]}]}

    {"gallery": [{"image": "new/a.jpg", "instance": "town hall"}],
     "queries": [{"query": "old/a.jpg", "instance": "town hall"}, {"query": "old/z.jpg", "instance": null}]}

Paths count from the file's folder. `box` (left, upper, right, lower; pixels), the three lists and further keys are
optional. In the second form every gallery image is of an instance; a query whose instance is null or in no gallery
image is a distractor.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opendino.errors import DataError
from opendino.evaluate.datasets.types import Box, RetrievalSet

FILE = "retrieval.json"
LISTS = ("easy", "hard", "junk")
FORM = 'It needs {"gallery": [paths], "queries": [{"query": path, "easy": [paths], "hard": [paths], "junk": [paths]}]}.'


def open_retrieval(path: str | Path) -> RetrievalSet:
    """Open a retrieval set: a .json file, or a folder with retrieval.json.

    A query that is also a gallery image is put among its own junk.

    Raises:
        DataError: when nothing is there, the file has another form, a list names what is not in the gallery, or an
            image file is missing.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.is_file() or file.suffix != ".json":
        raise DataError(
            f"{path} is no retrieval set: give a .json file with gallery and queries, or a folder that holds {FILE}."
        )
    found = read_retrieval_json(file)
    _check_files(file, [*found.gallery, *found.queries])
    return found


def read_retrieval_json(file: Path) -> RetrievalSet:
    """Read the JSON form without looking at the image files; see `open_retrieval`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict) or not _is_list(content.get("gallery")) or not _is_list(content.get("queries")):
        raise DataError(f'{file} has no "gallery" and "queries" with at least one entry each. {FORM}')
    gallery, instances = _gallery(file, content["gallery"])
    place = {name: i for i, name in enumerate(gallery)}
    if len(place) != len(gallery):
        twice = next(name for i, name in enumerate(gallery) if place[name] != i)
        raise DataError(f"{file} lists {twice} twice in the gallery; each image is searched once.")
    queries, boxes, relevant, ids = [], [], [], []
    of_instance: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(instances):
        of_instance[name].append(i)
    for number, entry in enumerate(content["queries"]):
        what = f"Query {number} of {file}"
        if not isinstance(entry, dict) or not isinstance(entry.get("query"), str):
            raise DataError(f'{what} is {entry!r}; it needs at least {{"query": path}}. {FORM}')
        own = _path(file, entry["query"])
        instance = None if entry.get("instance") is None else str(entry["instance"])
        ids.append(instance if instance in of_instance else None)
        lists = _lists(what, file, entry, place)
        if instances and not any(name in entry for name in LISTS):
            lists["easy"] = [i for i in of_instance.get(instance or "", []) if gallery[i] != own]
        queries.append(own)
        boxes.append(_box(what, entry.get("box")))
        relevant.append(_without_itself(what, lists, place.get(own)))
    return RetrievalSet(
        str(file), gallery, queries, boxes, relevant, bool(instances), instances, ids if instances else ()
    )


def _gallery(file: Path, entries: Sequence[Any]) -> tuple[list[str], list[str]]:
    """Give the paths, and the instances where the entries have them."""
    paths, instances = [], []
    for entry in entries:
        name = entry.get("image") if isinstance(entry, dict) else entry
        if not isinstance(name, str):
            raise DataError(
                f'{file} has the gallery entry {entry!r}; it needs a path, or {{"image": path, "instance": name}}.'
            )
        paths.append(_path(file, name))
        if isinstance(entry, dict) and entry.get("instance") is not None:
            instances.append(str(entry["instance"]))
    if instances and len(instances) != len(paths):
        raise DataError(
            f"{file} names an instance for {len(instances)} of {len(paths)} gallery images; name all of them or none."
        )
    return paths, instances


def _lists(what: str, file: Path, entry: Mapping[str, Any], place: Mapping[str, int]) -> dict[str, list[int]]:
    lists: dict[str, list[int]] = {}
    for name in LISTS:
        given = entry.get(name) or []
        if not isinstance(given, list) or not all(isinstance(p, str) for p in given):
            raise DataError(f"{what} has {name} = {given!r}; a list of gallery paths is needed.")
        unknown = [p for p in given if _path(file, p) not in place]
        if unknown:
            raise DataError(
                f"{what} lists {unknown[0]} as {name}, which is not in the gallery ({len(unknown)} such paths). Write "
                "it as the gallery does, or add it there."
            )
        lists[name] = [place[_path(file, p)] for p in given]
    return lists


def _without_itself(what: str, lists: dict[str, list[int]], own: int | None) -> dict[str, list[int]]:
    if own is None or own in lists["junk"]:
        return lists
    for name in ("easy", "hard"):
        if own in lists[name]:
            raise DataError(f"{what} lists itself as {name}. An image finds itself always; take it out of the list.")
    return lists | {"junk": [*lists["junk"], own]}


def _box(what: str, given: Any) -> Box | None:
    if given is None:
        return None
    if not _is_list(given) or len(given) != 4 or not all(isinstance(v, int | float) for v in given):
        raise DataError(f"{what} has the box {given!r}; it needs [left, upper, right, lower] in pixels.")
    left, upper, right, lower = (float(v) for v in given)
    if right <= left or lower <= upper:
        raise DataError(f"{what} has the box {given!r}, which is empty: right and lower lie beyond left and upper.")
    return left, upper, right, lower


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0


def _path(file: Path, name: str) -> str:
    return os.path.normpath(os.path.join(file.parent, name))


def _check_files(file: Path, paths: Sequence[str]) -> None:
    missing = [p for p in dict.fromkeys(paths) if not os.path.isfile(p)]
    if missing:
        raise DataError(
            f"{len(missing)} of the images that {file} names do not exist, such as {missing[0]}. Paths count from the "
            "folder of the file; add the images or take them out of it."
        )
