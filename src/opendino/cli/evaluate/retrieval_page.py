# SPDX-License-Identifier: Apache-2.0
"""The page of `opendino eval retrieval`: queries beside what was ranked first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from opendino.errors import DataError
from opendino.evaluate.retrieval import LEVELS, QueryScores
from opendino.images.arrays import read_image
from opendino.images.preprocess import crop_box
from opendino.report.page import Figure, Section, write_page
from opendino.report.retrieval import Kind, Tile, strip

if TYPE_CHECKING:
    from opendino.cli.evaluate.retrieval import Ranking, RetrievalArgs
    from opendino.evaluate.datasets.types import Box

ABOUT = (
    "First the query, as the model saw it; then the gallery from the nearest on. Green with a bar: it was to be found. "
    "Red: it was not. Grey: junk at this level, passed over in the scores."
)


def write_retrieval_page(args: RetrievalArgs, ranking: Ranking, scores: Mapping[str, QueryScores]) -> None:
    """Write the queries with the worst and the best average precision at the middle one of the levels asked for.

    Args:
        args: page, page_queries, page_ranked and levels count.
        ranking: the set and its similarities.
        scores: per level, one entry a kept query.
    """
    assert args.page is not None
    level = "medium" if "medium" in args.levels else args.levels[0]
    ap = scores[level].ap
    ranked = [int(i) for i in np.argsort(ap, kind="stable") if not np.isnan(ap[i])]
    half = max(args.page_queries // 2, 1)
    worst, best = ranked[:half], ranked[half:][-half:][::-1]
    sections = [
        Section(f"{title} average precision, {level}", (ABOUT,), figures=[
            _figure(args, ranking, int(ranking.kept[row]), level, float(ap[row])) for row in rows
        ])
        for title, rows in (("Lowest", worst), ("Highest", best)) if rows
    ]  # fmt: skip
    try:
        args.page.parent.mkdir(parents=True, exist_ok=True)
        write_page(args.page, f"Retrieval: {Path(ranking.data.root).parent.name}", sections)
    except OSError as error:
        raise DataError(f"The page {args.page} cannot be written: {error}. Give another --page.") from error


def _figure(args: RetrievalArgs, ranking: Ranking, query: int, level: str, ap: float) -> Figure:
    data, row = ranking.data, ranking.similarity(np.array([query]))[0]
    lists = data.relevant[query]
    kind: dict[int, Kind] = {}
    for names, value in zip(LEVELS[level], ("right", "junk"), strict=True):
        kind |= {i: value for name in names for i in lists.get(name, ())}  # type: ignore[misc]
    order = [int(i) for i in np.argsort(-row, kind="stable")[: args.page_ranked]]
    tiles = [Tile(_pixels(data.queries[query], data.boxes[query]), "query")]
    tiles += [Tile(_pixels(data.gallery[i], None), kind.get(i, "wrong")) for i in order]
    wanted = sum(k == "right" for k in kind.values())
    shown = sum(t.kind == "right" for t in tiles)
    caption = f"{Path(data.queries[query]).name}: AP {100 * ap:.1f} %; {shown} of {wanted} to be found are shown"
    return Figure(strip(tiles), caption)


def _pixels(path: str, box: Box | None) -> Tensor | None:
    try:
        pixels = read_image(path, channels=3, name=path)
        return pixels if box is None else crop_box(pixels, box, path)
    except (DataError, OSError):
        return None
