# SPDX-License-Identifier: Apache-2.0
"""The released ImageNet-1k linear classifiers: dinov2_vit*14[_reg4]_linear_head.pth and …_linear4_head.pth.

A file holds `weight` (1000, F) and `bias` (1000,). F is 2·D for one layer, [cls, mean patch] of the last block, and 5·D
for four, the cls tokens of the last four blocks in their order and the mean patch of the last; all after the final
LayerNorm.

Shapes: B images, C channels, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opendino.embed.embedder import Embedder
from opendino.errors import ConfigError, WeightsError
from opendino.evaluate.linear_grid import Kind, LinearModel
from opendino.heads.backbone import Backbone, make_pooled_embedder
from opendino.heads.classifier import Linear
from opendino.models.files import read_weights
from opendino.models.vit import VisionTransformer

LAYERS = (1, 4)
NUM_CLASSES = 1000


class LinearClassifier(nn.Module):
    """A backbone with a released linear classifier: images (B, C, H, W), normalised, to logits (B, K).

    Parameters have the published names, `backbone.…` and `linear_head.…`.

    Args:
        backbone: of at least `layers` blocks.
        layers: 1 or 4.
        num_classes: K.
    """

    def __init__(self, backbone: VisionTransformer, layers: int = 4, num_classes: int = NUM_CLASSES) -> None:
        super().__init__()
        check_layers(layers)
        if layers > backbone.n_blocks:
            raise ConfigError(f"layers is {layers}, but the backbone has {backbone.n_blocks} blocks. Give layers=1.")
        self.backbone, self.layers = backbone, layers
        self.linear_head = nn.Linear((1 + layers) * backbone.embed_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits."""
        tokens: Any = self.backbone.get_intermediate_layers(x, self.layers, return_class_token=True)
        mean = tokens[-1][0].mean(1)
        logits: Tensor = self.linear_head(torch.cat([*(cls for _, cls in tokens), mean], 1))
        return logits


def check_layers(layers: int) -> None:
    """Refuse what no classifier was released for."""
    if layers not in LAYERS:
        raise ConfigError(f"layers is {layers}; there are linear classifiers on 1 and on 4 layers.")


def read_linear_head(path: str | Path, embed_dim: int, layers: int | None = None) -> tuple[Tensor, Tensor, int]:
    """Read a released head.

    Args:
        path: of the file; nothing in it is run.
        embed_dim: D of the backbone.
        layers: 1 or 4; None takes what the width says.

    Returns:
        weight (K, F), bias (K,), and the number of layers.

    Raises:
        WeightsError: for a file with other tensors, or for another backbone or number of layers.
    """
    state = read_weights(Path(path)).state
    if set(state) != {"weight", "bias"}:
        raise WeightsError(
            f"{path} holds {', '.join(sorted(state)[:10])}; a linear classifier has `weight` and `bias` alone. Give a "
            "file such as dinov2_vits14_linear_head.pth."
        )
    weight, bias = state["weight"], state["bias"]
    wanted = [layers] if layers is not None else list(LAYERS)
    found = [n for n in wanted if weight.ndim == 2 and weight.shape[1] == (1 + n) * embed_dim]
    if not found or bias.shape != weight.shape[:1]:
        widths = " or ".join(f"{(1 + n) * embed_dim} ({n} layer{'s' if n > 1 else ''})" for n in wanted)
        raise WeightsError(
            f"{path} has a weight of {tuple(weight.shape)} and a bias of {tuple(bias.shape)}; for a backbone of width "
            f"{embed_dim} the weight must be (classes, {widths}). Give the head of this backbone"
            f"{'' if layers is None else ' and number of layers'}."
        )
    return weight, bias, found[0]


def load_linear_head(
    path: str | Path,
    backbone: Backbone | None = None,
    *,
    embed_dim: int | None = None,
    classes: Sequence[Any] | None = None,
) -> Linear:
    """Load a released head as a `Linear`, which takes images or features and can be saved with its backbone.

    Args:
        path: of the .pth.
        backbone: the model that it belongs to; None for features as arrays.
        embed_dim: D, needed without a backbone.
        classes: names of the K classes; default: their numbers.

    Example:
        >>> head = load_linear_head("dinov2_vits14_linear4_head.pth", "vits14")  # doctest: +SKIP
        >>> head.predict(["cat.jpg"])  # doctest: +SKIP
    """
    embedder: Embedder | None = None if backbone is None else make_pooled_embedder(backbone)
    dim = embed_dim if embedder is None else embedder.model.config.embed_dim
    if dim is None:
        raise ConfigError("A released head needs to know its backbone's width: give backbone= or embed_dim=.")
    weight, bias, layers = read_linear_head(path, dim)
    names = list(range(len(bias))) if classes is None else list(classes)
    if len(names) != len(bias):
        raise ConfigError(f"{path} has {len(bias)} classes and {len(names)} names were given. Give as many.")
    model = LinearModel(Kind(layers, True), 0.0, weight.float(), bias.float())
    name = str(backbone) if isinstance(backbone, str | Path) else None
    return Linear.from_model(model, names, embedder, name)
