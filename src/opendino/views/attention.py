# SPDX-License-Identifier: Apache-2.0
"""Where the cls token looks: its attention in the last block, per head and averaged (Caron et al. 2021, figure 1).

Shapes: B images, H heads, R registers, P = h·w patches, N = 1 + R + P tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opendino.models.layers import Block
from opendino.models.vit import VisionTransformer
from opendino.views.inputs import enlarge, model_input

# Dark blue, purple, red, orange, pale yellow: brightness grows evenly, so the map also reads in grey.
_HEAT = np.array([[4, 5, 20], [80, 18, 110], [180, 50, 90], [245, 125, 35], [252, 250, 170]], float)


@torch.inference_mode()
def cls_attention(model: VisionTransformer, x: Tensor) -> Tensor:
    """Give the attention of the cls token to all tokens in the last block.

    Only this one row is computed explicitly; the blocks before run as always.

    Args:
        model: in eval mode.
        x: (B, C, H, W), normalised.

    Returns:
        (B, H, N) float32, rows sum to 1. Order: cls, registers, patches.
    """
    tokens = model.prepare_tokens(x)
    for block in model.blocks[:-1]:
        tokens = block(tokens)
    last = model.blocks[-1]
    assert isinstance(last, Block)
    q, k, _ = last.attn.split_heads(last.attn.qkv(last.norm1(tokens)))  # (B, H, N, D/H)
    logits = q[:, :, :1].float() * q.shape[-1] ** -0.5 @ k.float().transpose(-2, -1)  # (B, H, 1, N)
    rows: Tensor = logits.softmax(dim=-1).squeeze(2)
    return rows


def attention_maps(model: VisionTransformer, x: Tensor) -> Tensor:
    """Give the attention of the cls token to the patches, (B, C, H, W) → (B, H, h, w).

    Values are shares of the whole row; what goes to cls and registers is left out, so a map sums to less than 1.
    """
    h, w = model.grid_of(x)
    maps: Tensor = cls_attention(model, x)[..., 1 + model.num_register_tokens :].unflatten(-1, (h, w))
    return maps


def heat(values: np.ndarray) -> np.ndarray:
    """Colour a map (h, w) from its smallest value (dark) to its largest (bright), uint8 (h, w, 3)."""
    scaled = (values - values.min()) / max(float(values.max() - values.min()), 1e-12)
    at = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(scaled, at, _HEAT[:, c]) for c in range(3)]
    return np.asarray(np.stack(channels, axis=-1).round(), dtype=np.uint8)


def head_pictures(model: VisionTransformer, image: Any, size: int | None = None) -> list[Image.Image]:
    """Draw the mean over the heads and then each head, as large as the image.

    Args:
        model: in eval mode.
        image: path, PIL image or uint8 HWC array.
        size: shorter side given to the model, pixels; None is the crop that travels with it.

    Returns:
        1 + H RGB pictures.
    """
    x, shape = model_input(model, image, size)
    maps = attention_maps(model, x)[0].cpu().numpy()  # (H, h, w)
    return [enlarge(heat(one), shape) for one in (maps.mean(0), *maps)]


def attention_pictures(
    model: VisionTransformer, images: Sequence[Any], *, size: int | None = None
) -> list[Image.Image]:
    """Draw the attention averaged over the heads, one RGB picture per image, as large as the image."""
    return [head_pictures(model, image, size)[0] for image in images]
