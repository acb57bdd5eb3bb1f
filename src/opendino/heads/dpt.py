# SPDX-License-Identifier: Apache-2.0
"""The DPT depth head with the key names of Meta's released files (Ranftl et al. 2021, "Vision Transformers for Dense
Prediction"; as released with DINOv2 it predicts depth itself, not bins).

Shapes: B images, D width of the backbone, C channels of the head (256), (h, w) patch grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = 4


class NamedConv(nn.Module):
    """A convolution under the name `conv`, as the released files have it; He initialisation, zero bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, inputs, h, w)."""
        out: Tensor = self.conv(x)
        return out


class Reassemble(nn.Module):
    """Tokens of four blocks to feature maps of 4, 2, 1 and 1/2 times the patch grid.

    The cls token is joined to each patch token and projected back to D ("readout project").
    """

    def __init__(self, dim: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.projects = nn.ModuleList(NamedConv(dim, c, 1) for c in channels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
                nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1),
            ]
        )
        self.readout_projects = nn.ModuleList(nn.Sequential(nn.Linear(2 * dim, dim), nn.GELU()) for _ in channels)

    def forward(self, patches: Sequence[Tensor], cls: Sequence[Tensor]) -> list[Tensor]:
        """Give four maps (B, channels[i], ·, ·) from patch tokens (B, D, h, w) and cls tokens (B, D)."""
        maps = []
        for i, (p, c) in enumerate(zip(patches, cls, strict=True)):
            tokens = p.permute(0, 2, 3, 1)  # (B, h, w, D)
            joined = torch.cat([tokens, c[:, None, None].expand_as(tokens)], dim=-1)
            read = self.readout_projects[i](joined).permute(0, 3, 1, 2)
            maps.append(self.resize_layers[i](self.projects[i](read)))
        return maps


class ResidualUnit(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = NamedConv(channels, channels, 3, bias=False)
        self.conv2 = NamedConv(channels, channels, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape (B, C, h, w)."""
        out: Tensor = x + self.conv2(F.relu(self.conv1(F.relu(x))))
        return out


class Fusion(nn.Module):
    """Add a map to the coarser result so far, refine and double the size; the first has nothing to add."""

    def __init__(self, channels: int, *, first: bool) -> None:
        super().__init__()
        self.project = NamedConv(channels, channels, 1)
        self.res_conv_unit1 = None if first else ResidualUnit(channels)
        self.res_conv_unit2 = ResidualUnit(channels)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Give (B, C, 2h, 2w) from (B, C, h, w); `skip` is brought to h × w where the grid was odd."""
        if self.res_conv_unit1 is not None:
            assert skip is not None
            if skip.shape != x.shape:
                skip = F.interpolate(skip, x.shape[-2:], mode="bilinear", align_corners=False)
            x = x + self.res_conv_unit1(skip)
        x = F.interpolate(self.res_conv_unit2(x), scale_factor=2, mode="bilinear", align_corners=True)
        out: Tensor = self.project(x)
        return out


class Double(nn.Module):
    """Twice the size, bilinear, corners aligned."""

    def forward(self, x: Tensor) -> Tensor:
        """Give (B, C, 2h, 2w)."""
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class DepthConvs(nn.Module):
    """The last convolutions: C → C/2, twice the size, → 32 → 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.head = nn.Sequential(
            nn.Conv2d(channels, half, 3, padding=1), Double(), nn.Conv2d(half, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 1, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Give (B, 1, 2h, 2w)."""
        out: Tensor = self.head(x)
        return out


class DPTHead(nn.Module):
    """Depth from the tokens of four blocks.

    Args:
        embed_dim: D; the four maps have D/8, D/4, D/2 and D channels, so 8 at least.
        min_depth: metres, added to what the network gives.
        channels: C.
    """

    def __init__(self, embed_dim: int, min_depth: float = 1e-3, *, channels: int = 256) -> None:
        super().__init__()
        self.min_depth = min_depth
        widths = [embed_dim // 2 ** (STAGES - 1 - i) for i in range(STAGES)]
        self.reassemble_blocks = Reassemble(embed_dim, widths)
        self.convs = nn.ModuleList(NamedConv(w, channels, 3, bias=False) for w in widths)
        self.fusion_blocks = nn.ModuleList(Fusion(channels, first=i == 0) for i in range(STAGES))
        self.project = NamedConv(channels, channels, 3)
        self.conv_depth = DepthConvs(channels)

    @property
    def last(self) -> nn.Conv2d:
        """The convolution whose bias is the depth that an untrained head starts from."""
        conv = self.conv_depth.head[4]
        assert isinstance(conv, nn.Conv2d)
        return conv

    def forward(self, patches: Sequence[Tensor], cls: Sequence[Tensor]) -> Tensor:
        """Give depth (B, 1, 32⌈h/2⌉, 32⌈w/2⌉), metres, at least min_depth.

        Args:
            patches: four (B, D, h, w), from the earliest block to the last.
            cls: four (B, D).
        """
        maps = [conv(m) for conv, m in zip(self.convs, self.reassemble_blocks(patches, cls), strict=True)]
        out = self.fusion_blocks[0](maps[-1])
        for fuse, skip in zip(list(self.fusion_blocks)[1:], maps[-2::-1], strict=True):
            out = fuse(out, skip)
        return F.relu(self.conv_depth(F.relu(self.project(out)))) + self.min_depth
