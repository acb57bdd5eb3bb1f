# SPDX-License-Identifier: Apache-2.0
"""Figures of the published models, for tables beside one's own (DINOv2 model card; method.md §5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal["knn", "linear", "other_test", "depth", "transfer", "segmentation", "fine_grained", "retrieval"]


@dataclass(frozen=True)
class Column:
    """One column of the model card's table.

    Attributes:
        task: what is done.
        title: the card's words for it.
        data: the card's data set.
        unit: of the figure.
        lower_is_better: for errors.
        scores: published figure of each model.
    """

    task: Task
    title: str
    data: str
    unit: str
    lower_is_better: bool
    scores: dict[str, float]


def _scores(*values: float) -> dict[str, float]:
    return dict(zip(("ViT-S/14", "ViT-B/14", "ViT-L/14", "ViT-g/14"), values, strict=True))


COLUMNS: tuple[Column, ...] = (
    Column("knn", "classification, k-NN", "ImageNet-1k", "%", False, _scores(79.0, 82.1, 83.5, 83.5)),
    Column("linear", "classification, linear", "ImageNet-1k", "%", False, _scores(81.1, 84.5, 86.3, 86.5)),
    Column("other_test", "classification, other test set", "ImageNet-V2", "%", False, _scores(70.8, 74.9, 77.6, 78.4)),
    Column("depth", "depth, linear, 4 layers", "NYU-Depth v2", "RMSE, m", True, _scores(0.417, 0.362, 0.333, 0.298)),
    Column("transfer", "depth, NYU-D transfer", "SUN-RGBD", "RMSE, m", True, _scores(0.431, 0.400, 0.396, 0.362)),
    Column("segmentation", "segmentation, multi-scale", "ADE20k", "mIoU, %", False, _scores(47.2, 51.3, 53.1, 53.0)),
    Column("fine_grained", "classification, linear", "iNaturalist 2018", "%", False, _scores(69.5, 76.3, 79.8, 81.6)),
    Column("retrieval", "retrieval, nearest neighbour", "Oxford-H", "mAP, %", False, _scores(43.2, 49.5, 54.0, 52.3)),
)
"""In the card's order."""
