# SPDX-License-Identifier: Apache-2.0
"""Weights that come with the package: `vitt14_open`, backbone and heads in half precision (docs/open-model.md)."""

from __future__ import annotations

from pathlib import Path

from opendino.models.registry import MODELS

FOLDER = Path(__file__).with_name("packaged_weights")


def packaged_weights(name: str) -> Path | None:
    """Give the backbone of a named model whose weights are in the package; None for every other name."""
    entry = MODELS.get(name.removeprefix("dinov2_"))
    return FOLDER / f"{entry.name}.safetensors" if entry and entry.packaged else None


def packaged_heads(name: str) -> Path | None:
    """Give the DINO and iBOT heads that such a model was trained with, or None."""
    entry = MODELS.get(name.removeprefix("dinov2_"))
    return FOLDER / f"{entry.name}_heads.safetensors" if entry and entry.packaged else None
