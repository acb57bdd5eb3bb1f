# SPDX-License-Identifier: Apache-2.0
"""The published linear segmentation head, and the protocols that say how images are fed to it.

Shapes: B images, L blocks, D width of the backbone, C classes, (h, w) patch grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from opendino.errors import ConfigError
from opendino.heads.tokens import Views

NEVER = -1e4
"""Logit of a class that is not to be predicted; finite, because resizing multiplies by 0."""


@dataclass(frozen=True)
class Protocol:
    """How images are fed to the head.

    Attributes:
        blocks: last blocks whose patch tokens are concatenated.
        size: shorter side of an image at scale 1, pixels.
        crop: side of the windows.
        stride: pixels from window to window.
        scales: factors on `size` whose probabilities are averaged.
        flip: also average the mirrored image.
        ratios: range of the random factor on `size` in augmented training.
    """

    blocks: int = 1
    size: int = 512
    crop: int = 512
    stride: int = 341
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    ratios: tuple[float, float] = (0.5, 2.0)

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.size or not 0 < self.stride <= self.crop:
            raise ConfigError(
                f"size is {self.size}, crop {self.crop} and stride {self.stride}; a window must fit into the shorter "
                "side and windows must not leave gaps: stride ≤ crop ≤ size."
            )
        if not self.scales or min(self.scales) <= 0:
            raise ConfigError(f"scales is {self.scales}; give one or more factors above 0.")

    def views(self, scale: float = 1.0, flip: bool | None = None) -> Views:
        """Give the windows of images at one scale."""
        return Views(int(self.size * scale), self.crop, self.stride, self.flip if flip is None else flip)


PROTOCOLS = {
    "linear": Protocol(),
    "ms": Protocol(4, 640, 640, 320, (1.0, 1.32, 1.73, 2.28, 3.0), True, (1.0, 3.0)),
}
"""The published settings of "linear" and "+ms" (DINOv2 §7.4, Meta's head configurations)."""


class SegmentationHead(nn.Module):
    """BatchNorm over channels, then a 1×1 convolution to class logits; tensors are named as in Meta's files.

    Args:
        width: L·D.
        num_classes: C.
        seed: of the first weights: normal, std 0.01; biases 0.
    """

    def __init__(self, width: int, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(width)
        self.conv_seg = nn.Conv2d(width, num_classes, 1)
        with torch.no_grad():
            self.conv_seg.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(seed))
            self.conv_seg.bias.zero_()  # type: ignore[union-attr]

    @torch.no_grad()
    def silence(self, classes: npt.NDArray[np.bool_]) -> None:
        """Let classes never be predicted; those without a training pixel would have arbitrary logits elsewhere."""
        which = torch.from_numpy(classes).to(self.conv_seg.weight.device)
        self.conv_seg.weight[which] = 0
        assert self.conv_seg.bias is not None
        self.conv_seg.bias[which] = NEVER

    @torch.no_grad()
    def balance(self, pixels: npt.NDArray[np.int64], strength: float) -> None:
        """Take `strength` times the log of each class's share of the training pixels from its logit.

        0 is the published head, which maximises pixel accuracy; 1 treats all classes as equally frequent (logit
        adjustment, Menon et al. 2021).

        Args:
            pixels: (C,) training pixels of each class; classes without any keep their logit.
            strength: 0 to 1.
        """
        shares = np.where(pixels > 0, pixels / max(int(pixels.sum()), 1), 1.0)
        assert self.conv_seg.bias is not None
        self.conv_seg.bias -= strength * torch.from_numpy(shares).log().to(self.conv_seg.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Turn patch tokens (B, L·D, h, w) into logits (B, C, h, w)."""
        out: Tensor = self.conv_seg(self.bn(tokens))
        return out


def changed(
    protocol: Protocol, *, blocks: int | None = None, size: int | None = None, scales: Sequence[float] | None = None,
    flip: bool | None = None,
) -> Protocol:  # fmt: skip
    """Give a protocol with some settings replaced; crop and stride follow the size in proportion."""
    changes: dict[str, Any] = {}
    if size is not None:
        crop = round(size * protocol.crop / protocol.size)
        changes = {"size": size, "crop": crop, "stride": max(int(crop * protocol.stride / protocol.crop), 1)}
    given: dict[str, Any] = {"blocks": blocks, "scales": None if scales is None else tuple(scales), "flip": flip}
    changes |= {name: value for name, value in given.items() if value is not None}
    return replace(protocol, **changes)


def named(protocol: str | Protocol) -> Protocol:
    """Give a published protocol by its name.

    Raises:
        ConfigError: for another name.
    """
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol is {protocol!r}; it must be {' or '.join(PROTOCOLS)}.")
    return PROTOCOLS[protocol]


def protocol_from(saved: dict[str, Any]) -> Protocol:
    """Give a protocol from what JSON kept of it."""
    low, high = saved["ratios"]
    return Protocol(**saved | {"scales": tuple(saved["scales"]), "ratios": (low, high)})
