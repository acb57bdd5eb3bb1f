# SPDX-License-Identifier: Apache-2.0
"""Accuracy by group, the gaps between groups, and how sure they are (protocol of Goyal et al. 2022, DINOv2 §8).

Intervals are percentile bootstrap intervals, stratified by group: a draw takes as many images of each group as there
are, with replacement. Figures are percent, gaps percentage points.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from opendino.errors import ConfigError, DataError

Array = npt.NDArray[Any]
DRAW_CHUNK = 1 << 22


def resample(n: int, draws: int, seed: int, *names: str) -> Array:
    """Draw image numbers with replacement, (draws, n) int64: a function of the seed and the names alone."""
    keys = [zlib.crc32(name.encode()) for name in names]
    return np.random.default_rng([seed, *keys]).integers(0, n, (draws, n))


def group_accuracy(
    correct: Sequence[bool] | Array,
    groups: Sequence[str],
    *,
    column: str = "",
    order: Sequence[str] | None = None,
    draws: int = 1000,
    seed: int = 0,
    confidence: float = 95.0,
    min_images: int = 20,
) -> dict[str, Any]:
    """Give the accuracy of each group and the gaps.

    Args:
        correct: (n,) whether each image was classified correctly.
        groups: (n,) the group of each image; "" is none, and such images count nowhere.
        column: name of the grouping; part of the random draws' key, so that groupings do not share draws.
        order: groups in the order wanted; default: by name.
        draws: of the bootstrap and of the shuffles.
        seed: of both.
        confidence: of the intervals, percent.
        min_images: a group of fewer images is flagged "small" and left out of the gap.

    Returns:
        "groups": name → accuracy, interval [low, high], n, small, against_overall and its interval (the group's
        accuracy minus that of all); "overall": accuracy, interval, n; "gap": None with fewer than two groups that are
        large enough, else points (largest minus smallest accuracy), interval, best, worst, by_chance (mean gap when the
        correct answers are dealt out to the groups at random) and p (share of these gaps that are at least as large);
        "without_group": images that are in no group.

    Raises:
        DataError: without images in a group, or for lists of different lengths.
        ConfigError: for settings out of range.
    """
    if draws < 1 or not 0 < confidence < 100:
        raise ConfigError(f"draws is {draws} and confidence {confidence}; they must be positive, and below 100 %.")
    right, names = np.asarray(correct, dtype=np.float64), np.asarray(groups, dtype=object)
    if len(right) != len(names):
        raise DataError(f"There are {len(right)} results and {len(names)} groups; give one group per image.")
    present = sorted({str(name) for name in names if name != ""})
    listed = present if order is None else [g for g in order if g in present] + [g for g in present if g not in order]
    if not listed:
        raise DataError(f"No image has a value in the group column {column!r}.")
    members = {g: right[names == g] for g in listed}
    drawn = {g: _drawn_accuracy(members[g], draws, seed, column, g) for g in listed}
    sizes = np.array([len(members[g]) for g in listed])
    overall = float(np.concatenate(list(members.values())).mean() * 100)
    drawn_overall = sum(n * drawn[g] for n, g in zip(sizes, listed, strict=True)) / sizes.sum()
    rows = {}
    for group in listed:
        accuracy = float(members[group].mean() * 100)
        rows[group] = {
            "accuracy": accuracy,
            "interval": interval(drawn[group], confidence),
            "n": len(members[group]),
            "small": len(members[group]) < min_images,
            "against_overall": accuracy - overall,
            "against_overall_interval": interval(drawn[group] - drawn_overall, confidence),
        }
    large = [g for g in listed if not rows[g]["small"]]
    return {
        "groups": rows,
        "overall": {"accuracy": overall, "interval": interval(drawn_overall, confidence), "n": int(sizes.sum())},
        "gap": _gap(large, members, drawn, draws, seed, column, confidence) if len(large) > 1 else None,
        "without_group": int((names == "").sum()),
    }


def _drawn_accuracy(right: Array, draws: int, seed: int, column: str, group: str) -> Array:
    rows = max(1, DRAW_CHUNK // len(right))
    if draws <= rows:
        return np.asarray(right[resample(len(right), draws, seed, column, group)].mean(1) * 100)
    parts = range(0, draws, rows)  # each with a key of its own, so that memory stays bounded
    drawn = [right[resample(len(right), min(rows, draws - i), seed, column, group, str(i))].mean(1) for i in parts]
    return np.concatenate(drawn) * 100


def _gap(
    large: list[str], members: dict[str, Array], drawn: dict[str, Array], draws: int, seed: int, column: str,
    confidence: float,
) -> dict[str, Any]:  # fmt: skip
    accuracy = {g: float(members[g].mean() * 100) for g in large}
    best, worst = max(large, key=accuracy.__getitem__), min(large, key=accuracy.__getitem__)
    points = accuracy[best] - accuracy[worst]
    stacked = np.stack([drawn[g] for g in large])  # (groups, draws)
    sizes = np.array([len(members[g]) for g in large])
    hits = round(float(sum(members[g].sum() for g in large)))
    rng = np.random.default_rng([seed, zlib.crc32(column.encode()), 1])
    dealt = (
        rng.multivariate_hypergeometric(sizes, hits, size=draws, method="marginals") / sizes * 100
    )  # (draws, groups)
    chance = dealt.max(1) - dealt.min(1)
    return {
        "points": points,
        "interval": interval(stacked.max(0) - stacked.min(0), confidence),
        "best": best,
        "worst": worst,
        "by_chance": float(chance.mean()),
        "p": float((1 + (chance >= points - 1e-9).sum()) / (1 + draws)),
    }


def interval(values: Array, confidence: float) -> list[float]:
    """Give the [low, high] percentiles that hold the middle `confidence` percent of values, linearly interpolated."""
    tail = (100 - confidence) / 2
    return [float(v) for v in np.percentile(values, [tail, 100 - tail])]


def cross(columns: dict[str, Sequence[str]]) -> list[str]:
    """Join the groups of several columns image by image: "Africa × low"; "" where one of them is ""."""
    return [" × ".join(row) if all(row) else "" for row in zip(*columns.values(), strict=True)]


def bucket(values: Sequence[str], edges: Sequence[float] | int, column: str = "") -> tuple[list[str], list[str]]:
    """Put numbers in buckets.

    Args:
        values: numbers as text; "" stays "".
        edges: where buckets end, rising: a value belongs to the bucket below the first edge that it is smaller than;
            or a number of buckets that hold about as many images each, equal values together.
        column: for messages.

    Returns:
        The bucket of each value, and the buckets in rising order. Three equal buckets are called low, medium and high.

    Raises:
        DataError: for a value that is no number.
        ConfigError: for edges that do not rise, or fewer than two buckets.
    """
    try:
        numbers = np.array([float(v) if v != "" else np.nan for v in values])
    except ValueError as error:
        raise DataError(f"The column {column!r} is to be put in buckets, but holds a text: {error}.") from error
    known = numbers[~np.isnan(numbers)]
    if isinstance(edges, int):
        if not 2 <= edges <= len(np.unique(known)):
            raise ConfigError(
                f"The column {column!r} holds {len(np.unique(known))} different numbers and cannot be put in {edges} "
                "buckets of as many images each. Give 2 or a few more, or edges such as 200,2000."
            )
        ends = [float(v) for v in np.quantile(known, np.arange(1, edges) / edges)]
    else:
        ends = list(edges)
    if not ends or any(a >= b for a, b in pairwise(ends)):
        raise ConfigError(f"The edges of {column!r} are {ends}; they must rise. Give fewer buckets, or edges.")
    texts = [f"{end:.6g}" for end in ends]
    names = [f"below {texts[0]}", *(f"{a} to {b}" for a, b in pairwise(texts)), f"from {texts[-1]}"]
    if edges == 3:
        names = [f"{word} ({name})" for word, name in zip(("low", "medium", "high"), names, strict=True)]
    places = np.searchsorted(ends, numbers, side="right")
    return ["" if np.isnan(x) else names[place] for x, place in zip(numbers, places, strict=True)], names
