# SPDX-License-Identifier: Apache-2.0
"""Retrieval scores: the revisited Oxford and Paris protocol (Radenović et al. 2018), and recall of the same source.

Shapes: Q queries, G gallery items, n items, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from opendino.errors import ConfigError, DataError

LEVELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""For each level: what counts as found, and what is passed over as if it were not in the gallery."""
PRECISION_AT = (1, 5, 10)


def average_precision(ranks: npt.ArrayLike, num_positives: int) -> float:
    """Give the area under the precision-recall curve by the trapezoid rule, 0–1.

    Args:
        ranks: ranks of the positives found, from 0.
        num_positives: how many there are.
    """
    total = 0.0
    for found, rank in enumerate(sorted(np.asarray(ranks, dtype=np.int64).tolist())):
        before = 1.0 if rank == 0 else found / rank
        total += (before + (found + 1) / (rank + 1)) / 2
    return total / num_positives


def mean_average_precision(similarity: Any, queries: Sequence[Mapping[str, Iterable[int]]]) -> dict[str, float]:
    """Give the revisited mAP of the three levels, {"easy", "medium", "hard"}, percent; see `score_queries`.

    A level without any query that has positives is NaN.
    """
    return summary(score_queries(similarity, queries))["map"]


@dataclass(frozen=True)
class QueryScores:
    """Scores of each query at one level.

    Attributes:
        ap: (Q,) average precision, 0–1; NaN for a query without positives.
        precision: k → (Q,) precision among the first k, 0–1; NaN likewise.
    """

    ap: npt.NDArray[np.float64]
    precision: dict[int, npt.NDArray[np.float64]]


def score_queries(
    similarity: Any, queries: Sequence[Mapping[str, Iterable[int]]], at: Sequence[int] = PRECISION_AT
) -> dict[str, QueryScores]:
    """Score a ranking by the revisited protocol, query by query.

    Items that are in none of a query's lists are negatives. A query without positives at a level does not count there.
    Equal similarities keep the gallery's order.

    Args:
        similarity: (Q, G), larger is closer.
        queries: for each query the gallery indices "easy", "hard" and "junk"; a missing list is empty.
        at: ks of the precision at k. When the last positive stands before rank k, its rank takes the place of k, so
            that a query with few positives can reach 1 (as the published evaluation has it).

    Returns:
        level → scores.

    Raises:
        DataError: for a wrong shape, an index outside the gallery, or one that is in two lists.
    """
    sims = _as_array(similarity)
    if sims.ndim != 2 or len(sims) != len(queries):
        raise DataError(f"{len(queries)} queries need similarities of shape (queries, gallery); got {sims.shape}.")
    nothing = np.full(len(sims), np.nan)
    scores = {level: QueryScores(nothing.copy(), {k: nothing.copy() for k in at}) for level in LEVELS}
    for number, (row, query) in enumerate(zip(sims, queries, strict=True)):
        lists = _checked_lists(query, len(row), number)
        if not len(lists["easy"]) + len(lists["hard"]):
            continue
        order = np.argsort(-row, kind="stable")
        for level in LEVELS:
            ranks = ranks_of_positives(order, lists, level)
            if len(ranks):
                scores[level].ap[number] = average_precision(ranks, len(ranks))
                for k in at:
                    scores[level].precision[k][number] = precision_at(ranks, k)
    return scores


def join_scores(parts: Sequence[Mapping[str, QueryScores]]) -> dict[str, QueryScores]:
    """Put the scores of several bunches of queries behind each other; there is at least one."""
    return {
        level: QueryScores(
            np.concatenate([p[level].ap for p in parts]),
            {k: np.concatenate([p[level].precision[k] for p in parts]) for k in parts[0][level].precision},
        )
        for level in parts[0]
    }


def ranks_of_positives(
    order: npt.NDArray[np.int64], lists: Mapping[str, npt.NDArray[np.int64]], level: str
) -> npt.NDArray[np.int64]:
    """Give the rising ranks, from 0, of a query's positives in a ranking (G,) from which the level's junk is taken."""
    wanted, passed_over = LEVELS[level]
    kind = np.zeros(len(order), np.int8)  # by gallery index: 1 positive, 2 passed over
    for names, value in ((wanted, 1), (passed_over, 2)):
        for name in names:
            kind[lists[name]] = value
    ranked = kind[order]
    return np.flatnonzero(ranked[ranked != 2] == 1)


def precision_at(ranks: npt.ArrayLike, k: int) -> float:
    """Give the share of positives among the first k, or among all up to the last positive when it stands before k.

    Args:
        ranks: ranks of all positives, from 0; at least one.
        k: at least 1.
    """
    places = np.asarray(ranks, dtype=np.int64) + 1
    cut = min(int(places.max()), k)
    return int((places <= cut).sum()) / cut


def summary(scores: Mapping[str, QueryScores]) -> dict[str, dict[str, Any]]:
    """Give the means over the queries that count, percent; NaN for a level without any.

    Returns:
        {"map": {level: …}, "precision": {level: {"1": …}}, "queries": {level: number that count}}.
    """

    def mean(values: npt.NDArray[np.float64]) -> float:
        kept = values[~np.isnan(values)]
        return 100 * float(kept.mean()) if len(kept) else float("nan")

    return {
        "map": {level: mean(s.ap) for level, s in scores.items()},
        "precision": {level: {str(k): mean(v) for k, v in s.precision.items()} for level, s in scores.items()},
        "queries": {level: int((~np.isnan(s.ap)).sum()) for level, s in scores.items()},
    }


def same_source_recall(features: Any, groups: Sequence[object] | npt.ArrayLike, k: int = 1, chunk: int = 1024) -> float:
    """Give the share of items that have one of their own group among their k nearest other items, in percent.

    Cosine similarity. An item that is alone in its group is a miss.

    Args:
        features: (n, D), n ≥ 2.
        groups: n group names or numbers.
        k: how many nearest others are looked at.
        chunk: items compared at once.

    Raises:
        DataError: for features that are not finite, or fewer groups than items.
    """
    x = torch.as_tensor(features)
    _, numbers = np.unique(np.asarray(groups), return_inverse=True)
    group = torch.as_tensor(numbers, device=x.device)
    if x.ndim != 2 or len(x) < 2 or len(group) != len(x):
        raise DataError(
            f"{tuple(x.shape)} features and {len(group)} groups; at least two rows, one group each, are needed."
        )
    if not torch.isfinite(x).all():
        raise DataError("The features hold NaN or infinity. Leave out the images that could not be read.")
    if k < 1:
        raise ConfigError(f"k is {k}; it must be at least 1.")
    x, hits = F.normalize(x.float(), dim=1), 0
    for start in range(0, len(x), chunk):
        sims = x[start : start + chunk] @ x.T  # (m, n)
        own = torch.arange(start, start + len(sims), device=x.device)
        sims[own - start, own] = -torch.inf
        nearest = sims.topk(min(k, len(x) - 1), dim=1).indices
        hits += int((group[nearest] == group[own, None]).any(1).sum())
    return 100 * hits / len(x)


def _as_array(values: Any) -> npt.NDArray[np.float64]:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if not np.isfinite(array).all():
        raise DataError("The similarities hold NaN or infinity. Leave out the images that could not be read.")
    return array.astype(np.float64)


def _checked_lists(query: Mapping[str, Iterable[int]], size: int, number: int) -> dict[str, npt.NDArray[np.int64]]:
    lists = {name: np.asarray(list(query.get(name, ())), dtype=np.int64) for name in ("easy", "hard", "junk")}
    joined = np.concatenate(list(lists.values()))
    if len(joined) and (joined.min() < 0 or joined.max() >= size):
        raise DataError(f"Query {number} names gallery items outside 0…{size - 1}.")
    if len(np.unique(joined)) != len(joined):
        raise DataError(f"Query {number} names a gallery item twice; easy, hard and junk must not overlap.")
    return lists
