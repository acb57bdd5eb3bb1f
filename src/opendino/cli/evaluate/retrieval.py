# SPDX-License-Identifier: Apache-2.0
"""`opendino eval retrieval`: what nearest neighbours find, by the revisited protocol or global average precision."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import tyro

from opendino.cli.embed import images_progress, make_embedder, show
from opendino.cli.evaluate.common import BackboneArgs, cache_folder
from opendino.errors import ConfigError, DataError

if TYPE_CHECKING:
    from opendino.evaluate.datasets.types import RetrievalSet
    from opendino.models.vit import VisionTransformer

EXAMPLE = """Score frozen features by what the nearest neighbours of queries are (cosine similarity, no training).

Example:
  opendino eval retrieval --model vits14 --data places/retrieval.json --pooling cls --page found.html --json

--data is a .json file with a gallery, queries and what each is to find (docs/evaluation-retrieval.md), a folder with
retrieval.json, or the folder of revisited Oxford or Paris, Met or AmsterTime.
Sets with lists are scored by the revisited Oxford and Paris protocol (mAP and precision at k;
easy, medium, hard); sets with instances also by the Met's global average precision."""
FAR = -2.0
"""Below every cosine: images that cannot be read, and a query among the images it searches."""
MOST_SIMILARITIES = 1 << 25
Level = Literal["easy", "medium", "hard"]
Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class RetrievalArgs(BackboneArgs):
    """Arguments of `opendino eval retrieval`."""

    data: Path
    """.json file, a folder that holds retrieval.json, or the folder of a named set."""
    pooling: Literal["cls", "mean", "gem"] = "cls"
    """Vector of an image: cls token, mean of the patch tokens, or their generalised mean (power 3; negative values
    count as 1e-6)."""
    scales: str = "1"
    """Sizes whose unit vectors are averaged, such as 1,0.707,0.5."""
    levels: tuple[Level, ...] = ("easy", "medium", "hard")
    """Levels to report."""
    k: int = 1
    """Neighbours that decide about the instance (sets with instances)."""
    temperature: float = 1.0
    """Multiplies similarities in the confidence when --k is above 1."""
    page: Path | None = None
    """Write an HTML page of queries beside their ranked pictures."""
    page_queries: int = 24
    """Queries on the page: those with the worst and the best average precision, half each."""
    page_ranked: int = 10
    """Ranked pictures beside each."""


def main(argv: list[str]) -> int:
    """Print the retrieval scores of a model."""
    args = tyro.cli(RetrievalArgs, args=argv, prog="opendino eval retrieval", description=EXAMPLE)
    result = run_retrieval(args)
    if args.json:
        print(json.dumps(result))
    else:
        print_table(result)
    return 0


def run_retrieval(args: RetrievalArgs) -> dict[str, Any]:
    """Describe queries and gallery and score the ranking.

    Returns:
        map {level: percent or None}, precision {level: {k: …}}, num_queries {level: those with something to find},
        without_positives {level: those that do not count}, gap, gap_no_distractors and accuracy for sets with
        instances, and the counts of images.
    """
    scales, data = parse_scales(args.scales), open_set(args.data)
    if args.page is not None and not data.relevant:
        raise ConfigError(f"--page needs lists of what is to be found, which {data.root} does not have.")
    query_x, gallery_x, unreadable = _described(args, data, scales)
    ranking = Ranking(data, query_x, gallery_x)
    result = _scores(args, ranking) | {
        "pooling": args.pooling, "scales": list(scales), "queries": len(ranking.kept), "gallery": len(data.gallery),
        "errors": len(unreadable), "errors_queries": len(data.queries) - len(ranking.kept),
    }  # fmt: skip
    return result


class Ranking:
    """The similarities of the queries that could be read, made when they are wanted.

    Attributes:
        data: the set.
        kept: (Q,) indices of those queries.
    """

    def __init__(self, data: RetrievalSet, queries: Array, gallery: Array) -> None:
        self.data, self.kept = data, np.flatnonzero(np.isfinite(queries[:, 0]))
        if not len(self.kept):
            raise DataError(f"None of the {len(data.queries)} queries of {data.root} could be read.")
        self._queries, self._bad = queries, ~np.isfinite(gallery[:, 0])
        self._gallery = np.where(self._bad[:, None], 0, gallery)

    def similarity(self, queries: npt.NDArray[np.int64]) -> Array:
        """Give (len(queries), G) cosines of queries of the set; unreadable gallery images are farther than all."""
        cosines: Array = self._queries[queries] @ self._gallery.T
        cosines[:, self._bad] = FAR
        return cosines

    def bunches(self) -> list[npt.NDArray[np.int64]]:
        """Part the kept queries so that the similarities of a bunch fit into memory."""
        size = max(MOST_SIMILARITIES // len(self._gallery), 1)
        return [self.kept[i : i + size] for i in range(0, len(self.kept), size)]


def _scores(args: RetrievalArgs, ranking: Ranking) -> dict[str, Any]:
    from opendino.evaluate.gap import global_average_precision, recognise
    from opendino.evaluate.retrieval import join_scores, score_queries, summary

    data, parts, known, result = ranking.data, [], [], {}
    place = {name: i for i, name in enumerate(data.gallery)}
    for bunch in ranking.bunches():
        similarity = ranking.similarity(bunch)
        if data.relevant:
            parts.append(score_queries(similarity, [data.relevant[int(i)] for i in bunch]))
        if data.gap:
            for row, i in enumerate(bunch):
                if data.queries[i] in place:
                    similarity[row, place[data.queries[i]]] = FAR
            known.append(recognise(similarity, data.gallery_ids, args.k, args.temperature))
    if parts:
        scores = join_scores(parts)
        means = summary({level: scores[level] for level in args.levels})
        counts = means.pop("queries")
        result = _without_nan(means) | {
            "num_queries": counts,
            "without_positives": {level: len(ranking.kept) - n for level, n in counts.items()},
        }
        if args.page is not None:
            from opendino.cli.evaluate.retrieval_page import write_retrieval_page

            write_retrieval_page(args, ranking, scores)
    if known:
        predicted, confidence = (np.concatenate(part) for part in zip(*known, strict=True))
        truth = [data.query_ids[int(i)] for i in ranking.kept]
        result |= global_average_precision(predicted, confidence, truth)
        result["distractors"] = sum(t is None for t in truth)
    return result


def open_set(path: Path) -> RetrievalSet:
    """Open a .json file of the plain form, or the folder of a set."""
    from opendino.evaluate.datasets import detect, retrieval_json

    return retrieval_json.open_retrieval(path) if path.is_file() else detect.open_retrieval(path)


def parse_scales(text: str) -> tuple[float, ...]:
    """Read "1,0.707,0.5".

    Raises:
        ConfigError: for anything but positive numbers.
    """
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        scales = ()
    if not scales or not all(0 < s < math.inf for s in scales):
        raise ConfigError(f"--scales is {text!r}; give positive numbers with commas, such as 1,0.707,0.5.")
    return scales


def _described(
    args: RetrievalArgs, data: RetrievalSet, scales: tuple[float, ...]
) -> tuple[Array, Array, dict[str, str]]:
    """Give unit vectors of queries (Q, D) and gallery (G, D), and why some images have none."""
    from opendino.embed.descriptors import EmbedderSettings, descriptors
    from opendino.images.preprocess import parse_size
    from opendino.images.sources import FileSource, SourceImage

    names = [*data.queries, *data.gallery]
    source = FileSource(data.root, "", names, [None] * len(names))
    boxes = [*data.boxes, *[None] * len(data.gallery)]
    items = [SourceImage(source, i, name, box) for i, (name, box) in enumerate(zip(names, boxes, strict=True))]
    settings = EmbedderSettings(args.precision, args.batch, args.fit, args.workers)  # type: ignore[arg-type]
    with images_progress() as bar:
        task, start, begun = bar.add_task("images", total=len(items), rate="", errors=0), perf_counter(), -1

        def on_images(done: int, errors: int, total: int) -> None:
            nonlocal begun
            begun = done if begun < 0 else begun
            show(bar, task, done, errors, total, (done - begun) / (perf_counter() - start))

        rows, errors = descriptors(
            _model(args), items, cache_folder(args), pooling=args.pooling, size=parse_size(args.size), scales=scales,
            settings=settings, on_images=on_images,
        )  # fmt: skip
        unreadable = {item.path: why for item, why in zip(items, errors, strict=True) if why}
        for path, why in unreadable.items():
            bar.console.print(f"cannot be read, {path}: {why}", highlight=False, markup=False)
    if args.max_errors is not None and len(unreadable) > args.max_errors:
        raise DataError(f"{len(unreadable)} images cannot be read, more than --max-errors {args.max_errors}.")
    return rows[: len(data.queries)], rows[len(data.queries) :], unreadable


def _model(args: RetrievalArgs) -> VisionTransformer:
    model: VisionTransformer = make_embedder(args.model, args.weights, device=args.device).model
    return model


def _without_nan(value: Any) -> Any:
    """Put None where JSON has no word for NaN."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def print_table(result: dict[str, Any]) -> None:
    """Print the scores for people."""
    print(
        f"{result['queries']} queries, {result['gallery']} gallery images"
        + (f", {result['errors']} unreadable images" if result["errors"] else "")
    )

    def text(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    if "map" in result:
        ks = list(next(iter(result["precision"].values())))
        print(
            f"{'':>10}{'mAP %':>9}" + "".join(f"{f'mP@{k} %':>10}" for k in ks) + f"{'queries':>10}{'not counted':>13}"
        )
        for level, value in result["map"].items():
            row = "".join(f"{text(result['precision'][level][k]):>10}" for k in ks)
            counts = f"{result['num_queries'][level]:>10}{result['without_positives'][level]:>13}"
            print(f"{level:>10}{text(value):>9}{row}{counts}")
    if "gap" in result:
        print(
            f"GAP {text(result['gap'])} %, without the {result['distractors']} distractors "
            f"{text(result['gap_no_distractors'])} %, accuracy {text(result['accuracy'])} %"
        )
