# SPDX-License-Identifier: Apache-2.0
"""Heads on frozen features, in scikit-learn's manners: fit, predict, save, load.

    head = opendino.heads.Logistic("vits14").fit("photos/")  # one folder of images per class
    head.predict(["new.jpg"])

Names are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opendino.heads.classifier import KNN, Linear, Logistic

__all__ = ["KNN", "DepthEstimator", "Linear", "Logistic", "Segmenter"]

_HOMES = {
    "KNN": "opendino.heads.classifier",
    "Logistic": "opendino.heads.classifier",
    "Linear": "opendino.heads.classifier",
    "Segmenter": "opendino.heads.segmentation",
    "DepthEstimator": "opendino.heads.depth",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'opendino.heads' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
