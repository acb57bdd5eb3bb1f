# SPDX-License-Identifier: Apache-2.0
"""Instance recognition by nearest neighbours, scored by global average precision (Ypsilantis et al. 2021, "Met").

Every query gets one predicted instance and a confidence. All queries, distractors too, are ranked by confidence; GAP is
the sum of the precision at each right answer, over the number of queries that have a right answer.

Shapes: Q queries, G gallery images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from opendino.errors import ConfigError, DataError


def recognise(
    similarity: npt.NDArray[np.floating[Any]], ids: npt.ArrayLike, k: int = 1, temperature: float = 1.0
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """Give each query's instance and confidence from its k nearest gallery images.

    An instance's similarity is that of its nearest image among the k; instances without one there have similarity 0.
    The confidence is the softmax over all instances of temperature · similarity, of the winner (`temperature`
    multiplies, as in the Met baseline). With k = 1 the order of confidences is that of similarities at any
    temperature. Equal confidences: the instance that sorts first.

    Args:
        similarity: (Q, G) cosine similarities.
        ids: (G,) instances.
        k: neighbours; above G it is G.
        temperature: above 0.

    Returns:
        Instances (Q,) and confidences (Q,), 0–1.
    """
    names, number = np.unique(np.asarray(ids), return_inverse=True)
    sims = np.asarray(similarity, dtype=np.float64)
    if sims.ndim != 2 or sims.shape[1] != len(number) or not len(number):
        raise DataError(
            f"{len(number)} gallery instances need similarities of shape (queries, gallery); got {sims.shape}."
        )
    if k < 1 or temperature <= 0:
        raise ConfigError(f"k is {k} and temperature {temperature}; both must be positive.")
    winners, confidence = np.empty(len(sims), np.int64), np.empty(len(sims))
    for row, values in enumerate(sims):
        least = np.partition(values, -min(k, len(values)))[-min(k, len(values))]
        near = np.flatnonzero(values >= least)  # k, or more where several are equally far
        near = near[np.argsort(-values[near], kind="stable")[:k]]
        found, where = np.unique(number[near], return_inverse=True)
        best = np.full(len(found), -np.inf)
        np.maximum.at(best, where, values[near])
        top = temperature * max(best.max(), 0.0)  # subtracted, so that no exponential overflows
        weights = np.exp(temperature * best - top)
        total = weights.sum() + (len(names) - len(found)) * np.exp(-top)
        winners[row] = found[weights.argmax()]
        confidence[row] = weights.max() / total
    return names[winners], confidence


def global_average_precision(
    predicted: Sequence[Any] | npt.NDArray[Any], confidence: npt.ArrayLike, truth: Sequence[Any]
) -> dict[str, float | None]:
    """Give GAP, GAP without distractors and accuracy, in percent.

    Args:
        predicted: (Q,) instances.
        confidence: (Q,); equal ones keep the order of the queries.
        truth: (Q,) instances, None for a distractor, whose every prediction is wrong.

    Returns:
        {"gap", "gap_no_distractors", "accuracy"}; accuracy and the second are over the queries that are no
        distractors. None each when all are.
    """
    score = np.asarray(confidence, dtype=np.float64)
    if not len(predicted) == len(score) == len(truth) or not np.isfinite(score).all():
        raise DataError(
            f"{len(predicted)} predictions, {len(score)} confidences and {len(truth)} instances were given; one finite "
            "confidence and one instance for each prediction are needed."
        )
    known = np.array([t is not None for t in truth], dtype=bool)
    right = np.array([t is not None and p == t for p, t in zip(predicted, truth, strict=True)], dtype=bool)
    if not known.any():
        return {"gap": None, "gap_no_distractors": None, "accuracy": None}

    def gap(of: npt.NDArray[np.bool_]) -> float:
        hits = right[of][np.argsort(-score[of], kind="stable")]
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        return 100 * float((precision * hits).sum() / known.sum())

    return {
        "gap": gap(np.ones_like(known)),
        "gap_no_distractors": gap(known),
        "accuracy": 100 * float(right[known].mean()),
    }
