# SPDX-License-Identifier: Apache-2.0
"""Multi-crops of images that are floats in 0–255, from 16-bit files: the same rectangles, no rounding."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from opendino.pretrain.crops import Boxes, CropsConfig, draw_boxes


def multi_crop_float(image: Tensor, config: CropsConfig, rng: np.random.Generator) -> tuple[Tensor, Tensor | None]:
    """Cut the crops that `multi_crop` cuts, of a float image.

    Args:
        image: float32 (C, H, W), 0–255.
        config: sizes and scales.
        rng: of this sample; the draws are those of `multi_crop`.

    Returns:
        Global crops float32 (2, C, g, g), 0–255, and local crops (L, C, l, l) or None when L is 0.
    """
    height, width = image.shape[-2:]
    global_boxes = draw_boxes(height, width, 2, config.global_scale, config.flip, rng)
    local_boxes = draw_boxes(height, width, config.num_local, config.local_scale, config.flip, rng)
    local = _cut(image, local_boxes, config.local_size) if config.num_local else None
    return _cut(image, global_boxes, config.global_size), local


def _cut(image: Tensor, boxes: Boxes, size: int) -> Tensor:
    crops = []
    for k in range(len(boxes.top)):
        top, left, height, width = (int(v[k]) for v in (boxes.top, boxes.left, boxes.height, boxes.width))
        part = image[None, :, top : top + height, left : left + width]
        crop = interpolate(part, size=(size, size), mode="bicubic", antialias=True, align_corners=False)[0]
        crops.append(crop.flip(-1) if boxes.flip[k] else crop)
    return torch.stack(crops).clamp_(0, 255)  # bicubic weights overshoot at edges; uint8 cuts that off by itself
