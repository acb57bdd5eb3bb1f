# SPDX-License-Identifier: Apache-2.0
"""Class probabilities of whole images from logits of windows, put together as mmsegmentation does.

Shapes: n windows, C classes, (h, w) patch grid of a window, H × W pixels.

The published steps (DINOv2 §7.4, Meta's head configurations): the shorter side is resized (bilinear, no antialiasing),
windows are cut, each is normalised and padded to whole patches around its centre, the logits of the padded grid are
stretched over the window, logits are averaged where windows overlap, resized to the original image, and turned into
probabilities; those of all scales and of the mirrored image are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from opendino.heads.tokens import Box, Views, cut, normalized, resize_pixels
from opendino.models.vit import VisionTransformer

LogitsOf = Callable[[Tensor], Tensor]
"""Windows (n, 3, H, W), normalised → logits (n, C, h, w)."""


def merge_windows(
    logits: Tensor, windows: Sequence[tuple[Box, bool]], resized: tuple[int, int], original: tuple[int, int]
) -> Tensor:  # fmt: skip
    """Give the mean class probabilities of one image at one scale.

    Args:
        logits: (n, C, h, w), one entry a view.
        windows: (box, mirrored) of each, from `Views.windows`.
        resized: height and width that the windows were cut from.
        original: height and width of the image.

    Returns:
        (C, H, W), the mean of the plain and the mirrored image.
    """
    total = torch.zeros(logits.shape[1], *original)
    flips = sorted({flip for _, flip in windows})
    for flip in flips:
        canvas, count = torch.zeros(logits.shape[1], *resized), torch.zeros(*resized)
        for window, ((top, left, bottom, right), mirrored) in zip(logits, windows, strict=True):
            if mirrored != flip:
                continue
            part = stretch(window[None], (bottom - top, right - left))[0]
            # Put back before windows are averaged; linear resizing and mirroring commute.
            canvas[:, top:bottom, left:right] += part.flip(-1) if flip else part
            count[top:bottom, left:right] += 1
        total += stretch((canvas / count)[None], original)[0].softmax(0)
    return total / len(flips)


def image_probabilities(
    logits_of: LogitsOf,
    image: Tensor,
    model: VisionTransformer,
    views: Sequence[Views],
    batch_size: int = 8,
) -> Tensor:
    """Give the mean class probabilities of one image over several scales.

    Args:
        logits_of: the frozen backbone and the head.
        image: uint8 (3, H, W).
        model: the backbone, for its normalisation.
        views: one per scale.
        batch_size: windows in one forward pass.

    Returns:
        (C, H, W).
    """
    total: Tensor | None = None
    original = (image.shape[-2], image.shape[-1])
    for how in views:
        resized = how.resized(*original)
        pixels = normalized(resize_pixels(image, resized), model)
        windows = how.windows(*original)
        parts = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
        logits = torch.cat([logits_of(torch.stack([cut(pixels, *window) for window in part])).cpu() for part in parts])
        merged = merge_windows(logits, windows, resized, original)
        total = merged if total is None else total + merged
    assert total is not None
    return total / len(views)


def stretch(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (n, C, h, w) bilinearly over (H, W), `align_corners` False."""
    return F.interpolate(planes, size, mode="bilinear", align_corners=False)
