# SPDX-License-Identifier: Apache-2.0
"""How much memory a model takes, told before it is loaded: weights by precision, and activations of a batch.

Shapes: B images, N = 1 + R + P tokens, T = B·N, D width, H hidden width of the feed-forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opendino.embed.runtimes.prepared import PIECE_VALUES
from opendino.models.config import ViTConfig
from opendino.models.vit import VisionTransformer

OTHER_BYTES = 128 << 20
"""Of oneDNN's scratch memory and what the allocator keeps; 70 to 150 MiB with ViT-S and ViT-B at 224 px, batch 8."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one way to run a model.

    Attributes:
        name: of the way.
        weights: of all copies that are held.
        activations: at the fullest moment of a forward pass, images and results included.
        process: of Python and torch without a model, and what libraries keep for their work.
    """

    name: str
    weights: int
    activations: int
    process: int = 0

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.weights + self.activations + self.process


def count_parameters(config: ViTConfig) -> int:
    """Count the parameters of a backbone without making them."""
    with torch.device("meta"):
        return sum(p.numel() for p in VisionTransformer(config).parameters())


def num_tokens(config: ViTConfig, sides: tuple[int, int]) -> int:
    """Give N for images of (height, width) pixels."""
    return 1 + config.num_register_tokens + (sides[0] // config.patch_size) * (sides[1] // config.patch_size)


def plain_activations(config: ViTConfig, sides: tuple[int, int], batch: int, bytes_each: int = 4) -> int:
    """Give the bytes that plain torch holds at its fullest moment, the middle of a feed-forward.

    Then there are the residual stream before and after attention, its norm, the hidden layer before and after its
    nonlinearity, and what it gives before and after LayerScale. Attention, whose scores are never whole, takes less.
    """
    d, h = config.embed_dim, config.hidden_dim
    values = 5 * d + 2 * h if config.ffn == "mlp" else max(3 * d + 4 * h, 5 * d + 3 * h)
    return batch * num_tokens(config, sides) * values * bytes_each + image_bytes(config, sides, batch)


def prepared_activations(config: ViTConfig, sides: tuple[int, int], batch: int, threads: int) -> int:
    """Give the bytes that the prepared bf16 backbone holds: pieces of a batch, one a thread, and the results."""
    per_image = num_tokens(config, sides)
    fits = max(1, PIECE_VALUES // (per_image * config.embed_dim))
    piece = max(1, min(fits, -(-batch // threads)))
    at_once = min(threads, -(-batch // piece)) * piece * per_image
    hidden = config.hidden_dim * (1 if config.ffn == "mlp" else 4)
    values = 4 * config.embed_dim + 2 * (2 * config.embed_dim + hidden)
    results = 2 * batch * per_image * config.embed_dim * 4  # pieces, and put together
    return at_once * values + results + image_bytes(config, sides, batch)


def image_bytes(config: ViTConfig, sides: tuple[int, int], batch: int) -> int:
    """Give the bytes of a batch of normalised images."""
    return 4 * batch * config.in_chans * sides[0] * sides[1]


def footprints(
    config: ViTConfig, sides: tuple[int, int], batch: int, threads: int, device: str, process: int = 0
) -> list[Footprint]:
    """Give what each way to run a model on a device takes.

    Args:
        config: of the backbone.
        sides: height and width of the images, pixels.
        batch: B.
        threads: of torch.
        device: "cpu", "cuda:0", …
        process: bytes that a process holds without a model, where it counts.
    """
    parameters = count_parameters(config)
    process += OTHER_BYTES
    found = [Footprint("fp32", 4 * parameters, plain_activations(config, sides, batch), process)]
    if device == "cpu":
        prepared = prepared_activations(config, sides, batch, threads)
        found.append(Footprint("bf16 beside fp32 weights", 6 * parameters, prepared, process))
    half = plain_activations(config, sides, batch, 2)
    return [*found, Footprint("bf16 weights, load(dtype=torch.bfloat16)", 2 * parameters, half, process)]
