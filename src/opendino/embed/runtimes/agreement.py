# SPDX-License-Identifier: Apache-2.0
"""How close a runtime's vectors are to another's on a user's images: by angle, and by the neighbours they have.

Shapes: n images, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opendino.embed.runtimes.base import Runtime
from opendino.embed.runtimes.measure import distances
from opendino.errors import DataError

K = 20
TEMPERATURE = 0.07


@dataclass(frozen=True)
class Agreement:
    """What differs between two runtimes.

    Attributes:
        images: n.
        cls: 1 − cosine of the cls tokens, worst image; infinite where a vector is not finite.
        cls_mean: the same, mean.
        patches: 1 − cosine of the patch tokens, mean over all.
        neighbours: share of the k nearest other images, by cosine of the cls tokens, that are the same, 0 to 1.
        votes: share of images for which the weighted vote of these neighbours is the same class, 0 to 1; None without
            labels.
    """

    images: int
    cls: float
    cls_mean: float
    patches: float
    neighbours: float
    votes: float | None = None

    def __str__(self) -> str:
        votes = "" if self.votes is None else f", {self.votes:.2%} of the k-NN answers the same"
        return (
            f"over {self.images} images: cosine {1 - self.cls:.6f} (cls, worst), {1 - self.cls_mean:.6f} (cls, mean), "
            f"{1 - self.patches:.6f} (patches, mean); {self.neighbours:.2%} of the neighbours{votes}"
        )


@torch.inference_mode()
def agreement(
    runtime: Runtime, reference: Runtime, images: Iterable[Tensor], labels: Any = None, *, k: int = K
) -> Agreement:
    """Compare the vectors of two runtimes.

    Args:
        runtime: in question.
        reference: for example the model itself in fp32; takes the same input.
        images: batches (B, C, H, W) as both take them; n of them in all, kept nowhere.
        labels: classes of all images, integers from 0; each image is then classified by the others.
        k: neighbours; at most n − 1 are used.

    Raises:
        DataError: for fewer than two images, or another number of labels.
    """
    found, exact, patches = [], [], []
    for batch in images:
        a, b = (r.vectors(batch, 1, ("cls", "patches")) for r in (runtime, reference))
        found.append(a["cls"].float().cpu())
        exact.append(b["cls"].float().cpu())
        patches.append(distances(a["patches"], b["patches"]).flatten())
    if sum(map(len, found)) < 2:
        raise DataError(f"Vectors are compared on {sum(map(len, found))} images; give at least 2, better 1000.")
    one, two = torch.cat(found), torch.cat(exact)
    cls = distances(one, two)
    near, far = nearest(one, k), nearest(two, k)
    same = [len(set(a) & set(b)) / len(a) for a, b in zip(near[1].tolist(), far[1].tolist(), strict=True)]
    votes = None
    if labels is not None:
        classes = torch.as_tensor(labels).long()
        if len(classes) != len(one):
            raise DataError(f"There are {len(classes)} labels for {len(one)} images; give one for each.")
        votes = float((vote(*near, classes) == vote(*far, classes)).double().mean())
    return Agreement(
        len(one), float(cls.max()), float(cls.mean()), float(torch.cat(patches).mean()), sum(same) / len(same), votes
    )


def nearest(vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Give cosines and numbers of each vector's k nearest others, (n, k) each, nearest first."""
    unit, k = F.normalize(vectors, dim=-1), min(k, len(vectors) - 1)
    similar, number = [], []
    for start in range(0, len(unit), 1024):
        block = unit[start : start + 1024] @ unit.T
        block[torch.arange(len(block)), start + torch.arange(len(block))] = -torch.inf
        best = block.topk(k, dim=1)
        similar.append(best.values)
        number.append(best.indices)
    return torch.cat(similar), torch.cat(number)


def vote(similar: Tensor, number: Tensor, labels: Tensor) -> Tensor:
    """Give the class with most weight among neighbours, weights softmax(cosine / 0.07) (DINOv2 §7, "k-NN")."""
    weights = (similar / TEMPERATURE).softmax(1)
    votes = weights.new_zeros(len(weights), int(labels.max()) + 1)
    return votes.scatter_add_(1, labels[number], weights).argmax(1)
