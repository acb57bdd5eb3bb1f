# SPDX-License-Identifier: Apache-2.0
"""The k-NN score that a pre-training run computes on the way (`--probe`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from opendino.embed.embedder import Embedder
from opendino.errors import DataError
from opendino.evaluate.knn import knn_accuracy
from opendino.images.sources import ImageSource, open_source
from opendino.models.vit import VisionTransformer


def knn_probe(folder: Path, k: int = 20) -> Callable[[VisionTransformer], dict[str, float]]:
    """Make a probe of FOLDER/train and FOLDER/test (or val), class folders both.

    Raises:
        DataError: when one of them is missing or has no classes.
    """
    held_out = next((folder / n for n in ("test", "val") if (folder / n).is_dir()), folder / "test")
    parts = [open_source(folder / "train"), open_source(held_out)]
    for part in parts:
        if not part.classes:
            raise DataError(f"{part.root} has no class folders, which --probe needs: one folder of images per class.")

    def probe(model: VisionTransformer) -> dict[str, float]:
        embedder = Embedder(model, batch_size=64, precision="fp32")
        (x, y), (tx, ty) = (features_and_labels(embedder, p, parts[0].classes) for p in parts)
        score = knn_accuracy(x, y, tx, ty, k=(k,))
        return {f"knn{k}_top1": score["top1"][str(k)], f"knn{k}_mean_per_class": score["mean_per_class"][str(k)]}

    return probe


def features_and_labels(
    embedder: Embedder, source: ImageSource, classes: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed a labelled source; labels count in `classes`. Unreadable images are left out."""
    number = {name: i for i, name in enumerate(classes)}
    label_of = {item.path: number[item.label] for item in source.items if item.label in number}
    features, labels = [], []
    for batch in embedder.stream(source):
        assert batch.cls is not None
        for path, row, error in zip(batch.paths, batch.cls, batch.errors, strict=True):
            if not error and path in label_of:
                features.append(torch.as_tensor(row))
                labels.append(label_of[path])
    return torch.stack(features), torch.tensor(labels)
