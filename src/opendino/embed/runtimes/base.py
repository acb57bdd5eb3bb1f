# SPDX-License-Identifier: Apache-2.0
"""What an Embedder asks of a runtime.

Shapes: B images, C channels, R registers, P = h·w patches, N = 1 + R + P tokens, L `layers`, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from opendino.models.config import PreprocessSpec, ViTConfig

Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
Vector = Literal["cls", "mean", "patches", "registers"]


class Runtime(Protocol):
    """Computes the vectors of a batch of images with a frozen backbone.

    Attributes:
        name: "torch", "onnx" or "openvino".
        precision: that it computes in, never "auto".
        config: shape of the backbone.
        spec: the preprocessing that belongs to the weights.
        device: where images are wanted and vectors come from.
        takes_pixels: whether images are best given as uint8 pixels.
        takes_floats: whether they can be given as normalised floats.
        takes_turns: whether several threads may ask it at once and gain by it: their batches share its own threads.
        gives: the vectors that can be asked for.
        size: the one (height, width) that it takes, pixels; None where it takes any.
    """

    name: str
    precision: str
    config: ViTConfig
    spec: PreprocessSpec
    device: torch.device
    takes_pixels: bool
    takes_floats: bool
    takes_turns: bool
    gives: tuple[str, ...]
    size: tuple[int, int] | None

    def vectors(self, images: Tensor, layers: int, what: Sequence[str]) -> dict[str, Tensor]:
        """Compute vectors after the final LayerNorm, those of the last `layers` blocks concatenated.

        Args:
            images: (B, C, H, W), float32 normalised where `takes_floats`, or uint8 where `takes_pixels`.
            layers: L.
            what: of `gives`.

        Returns:
            fp32 by name: cls (B, L·D), mean (B, L·D), patches (B, P, L·D), registers (B, R, L·D).
        """

    def weights_sha256(self) -> str:
        """Give `opendino.models.fingerprint.weights_fingerprint` of the weights as they are now."""

    def identity(self) -> dict[str, Any]:
        """Give what tells its vectors from PyTorch's, JSON-able; nothing for PyTorch."""


def split_tokens(tokens: Tensor, num_registers: int, what: Sequence[str]) -> dict[str, Tensor]:
    """Give vectors by name from tokens (B, N, L·D)."""
    patches = tokens[:, 1 + num_registers :]
    found = {"cls": tokens[:, 0], "registers": tokens[:, 1 : 1 + num_registers], "patches": patches}
    if "mean" in what:
        found["mean"] = patches.mean(1)
    return {name: found[name] for name in what}
