# SPDX-License-Identifier: Apache-2.0
"""Backbones with their released linear classifiers, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opendino.heads.published_linear import LinearClassifier, check_layers, read_linear_head
from opendino.heads.released import fetch_head, released_stems
from opendino.models.weights import load

RELEASED = "IMAGENET1K"


def linear_head_file(name: str, layers: int) -> tuple[str, str]:
    """Give (folder, file name) of a released linear classifier."""
    check_layers(layers)
    folder, stem = released_stems(name)
    return folder, f"{stem}_linear{layers if layers == 4 else ''}_head.pth"


def linear_classifier(
    name: str,
    layers: int = 4,
    *,
    pretrained: bool = True,
    weights: str | Path = RELEASED,
    backbone_weights: str | Path | None = None,
    **settings: Any,
) -> LinearClassifier:
    """Build a backbone with its released ImageNet-1k linear classifier, in eval mode.

    Args:
        name: architecture, e.g. vits14_reg.
        layers: 1 or 4.
        pretrained: False draws backbone and head at random.
        weights: "IMAGENET1K" for the released head, or its file.
        backbone_weights: file of the backbone; None takes the published one.
        settings: fields of `ViTConfig`.

    Raises:
        WeightsError: for files that are missing or do not go together.
    """
    folder, file_name = linear_head_file(name, layers)
    if not pretrained:
        return LinearClassifier(load(name, weights="random", **settings), layers).eval()
    path = fetch_head(folder, file_name) if weights == RELEASED else Path(weights)
    backbone = load(name, weights=backbone_weights, **settings)
    weight, bias, _ = read_linear_head(path, backbone.embed_dim, layers)
    model = LinearClassifier(backbone, layers, len(bias))
    model.linear_head.load_state_dict({"weight": weight, "bias": bias})
    return model.eval()
