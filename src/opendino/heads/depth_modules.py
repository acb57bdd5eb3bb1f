# SPDX-License-Identifier: Apache-2.0
"""Depth networks: the linear head over bins, which blocks a head reads, and backbone and head as one module.

Shapes: B images, D width, L blocks, K bins (256), (h, w) patch grid, H × W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opendino.errors import ConfigError
from opendino.heads.dpt import STAGES, DPTHead
from opendino.heads.tokens import center_pad
from opendino.models.vit import VisionTransformer

HeadKind = Literal["lin1", "lin4", "dpt"]
NUM_BINS, DPT_CHANNELS = 256, 256
UPSAMPLE = 4
BIN_EPS = 0.1
_LARGE = (4, 11, 17, 23)


def depth_blocks(num_blocks: int, kind: HeadKind) -> tuple[int, ...]:
    """Give the blocks (from 0) that a head reads: the last, or four at the quarters of the depth.

    The published ones, counted from 1: 3, 6, 9, 12 of ViT-S and B; 5, 12, 18, 24 of L; 10, 20, 30, 40 of g.

    Raises:
        ConfigError: for an unknown kind, or fewer than four blocks.
    """
    if kind not in get_args(HeadKind):
        raise ConfigError(f"The depth head is {kind!r}; it must be one of {', '.join(get_args(HeadKind))}.")
    if kind == "lin1":
        return (num_blocks - 1,)
    if num_blocks < STAGES:
        raise ConfigError(f"A {kind} head reads four blocks, but the model has {num_blocks}. Give the head lin1.")
    if num_blocks == _LARGE[-1] + 1:
        return _LARGE
    return tuple(int(num_blocks * k / STAGES + 0.5) - 1 for k in range(1, STAGES + 1))


class LinearDepthHead(nn.Module):
    """Depth as the mean of K uniform bins under linearly normalised weights (AdaBins eq. 3; DINOv2 §7.4).

    One linear layer on each block's patch token joined with its cls token, enlarged 4 times. No BatchNorm: the released
    code names the class after one, but has it switched off.

    Args:
        embed_dim: D.
        num_layers: L.
        min_depth: first bin, metres.
        max_depth: last bin.
    """

    bins: Tensor

    def __init__(self, embed_dim: int, num_layers: int, min_depth: float = 1e-3, max_depth: float = 10.0) -> None:
        super().__init__()
        self.embed_dim, self.num_layers = embed_dim, num_layers
        self.conv_depth = nn.Conv2d(2 * embed_dim * num_layers, NUM_BINS, 1)
        self.register_buffer("bins", torch.linspace(min_depth, max_depth, NUM_BINS), persistent=False)

    def forward(self, patches: Sequence[Tensor], cls: Sequence[Tensor]) -> Tensor:
        """Give depth (B, 1, 4h, 4w), metres.

        Args:
            patches: L of (B, D, h, w), from the earliest block to the last.
            cls: L of (B, D).
        """
        # The layer is applied before the enlargement, and once to the cls tokens: both are linear, so the result is
        # that of the published order at a sixteenth of the work.
        shape = (NUM_BINS, self.num_layers, 2, self.embed_dim)
        of_patches, of_cls = self.conv_depth.weight.reshape(shape).unbind(2)  # (K, L, D) each
        logits = F.conv2d(torch.cat(list(patches), 1), of_patches.flatten(1)[..., None, None])
        shift = F.linear(torch.cat(list(cls), 1), of_cls.flatten(1), self.conv_depth.bias)
        logits = logits + shift[..., None, None]
        if logits.device.type != "cpu":
            return self._mean_bin(logits)
        # One image at a time stays in a core's cache: a ninth of the time of the whole batch.
        return torch.cat([self._mean_bin(image) for image in logits.split(1)])

    def _mean_bin(self, logits: Tensor) -> Tensor:
        """Give (B, 1, 4h, 4w) from logits (B, K, h, w).

        Σ bins·(relu + ε) / Σ (relu + ε) is two rows of one matrix product, and the enlargement two more.
        """
        up_h, up_w = (_enlarging(side, logits) for side in logits.shape[-2:])
        weights = F.relu(up_h @ (logits @ up_w.T))  # (B, K, 4h, 4w)
        sums = torch.stack([self.bins, torch.ones_like(self.bins)])  # (2, K)
        both = sums @ weights.flatten(2) + BIN_EPS * sums.sum(1, keepdim=True)  # (B, 2, 4h·4w)
        depth: Tensor = (both[:, :1] / both[:, 1:]).unflatten(2, (up_h.shape[0], up_w.shape[0]))
        return depth


def _enlarging(side: int, like: Tensor) -> Tensor:
    """Give the matrix (4·side, side) that enlarges one axis as bilinear interpolation without aligned corners does."""
    identity = torch.eye(side, device=like.device, dtype=like.dtype)
    return F.interpolate(identity[None], size=UPSAMPLE * side, mode="linear", align_corners=False)[0].T


def make_depth_head(
    kind: HeadKind, embed_dim: int, min_depth: float, max_depth: float, channels: int = DPT_CHANNELS
) -> LinearDepthHead | DPTHead:
    """Make an untrained head from torch's global generator.

    Args:
        kind: "lin1", "lin4" or "dpt".
        embed_dim: D.
        min_depth: metres.
        max_depth: metres.
        channels: of the DPT head.
    """
    if not 0 < min_depth < max_depth:
        raise ConfigError(f"The depths go from {min_depth:g} to {max_depth:g} m; they must be positive and rise.")
    if kind == "dpt":
        if embed_dim < 8:
            raise ConfigError(f"A DPT head needs a backbone at least 8 wide; this one is {embed_dim}. Give lin4.")
        head = DPTHead(embed_dim, min_depth, channels=channels)
        # What the last ReLU cuts off for every pixel can never be learnt again, so training begins at a middling depth.
        assert head.last.bias is not None
        nn.init.constant_(head.last.bias, (max_depth - min_depth) / 4)
        return head
    return LinearDepthHead(embed_dim, 1 if kind == "lin1" else STAGES, min_depth, max_depth)


def block_tokens(
    model: VisionTransformer, images: Tensor, blocks: Sequence[int], norm: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Give patch tokens (B, D, h, w) and cls tokens (B, D) of chosen blocks, fp32, of images padded at their centre.

    Args:
        model: the backbone.
        images: (B, C, H, W), normalised, on its device.
        blocks: indices from 0.
        norm: apply the final LayerNorm; the published depth heads read tokens without it.
    """
    padded, _ = center_pad(images, model.patch_size)
    outputs = model.get_intermediate_layers(padded, tuple(blocks), reshape=True, return_class_token=True, norm=norm)
    return [p.float() for p, _ in outputs], [c.float() for _, c in outputs]


class DepthModel(nn.Module):
    """Backbone and depth head as one network, with the published names `backbone` and `decode_head`.

    Args:
        backbone: its tokens are read as they leave the blocks.
        decode_head: takes lists of patch and cls tokens.
        blocks: which blocks, from 0.
        min_depth: metres; predictions are clipped to the range before they are resized.
        max_depth: metres.
        norm: see `block_tokens`.
    """

    def __init__(
        self, backbone: VisionTransformer, decode_head: LinearDepthHead | DPTHead, blocks: Sequence[int],
        min_depth: float, max_depth: float, *, norm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone, self.decode_head = backbone, decode_head
        self.blocks, self.min_depth, self.max_depth, self.norm = tuple(blocks), min_depth, max_depth, norm

    def forward(self, images: Tensor) -> Tensor:
        """Give depth (B, 1, H, W), metres, of normalised images (B, C, H, W) of any size.

        Images are padded to whole patches and the prediction of the padded image is resized to H × W, padding and all,
        as the released heads were trained.
        """
        patches, cls = block_tokens(self.backbone, images, self.blocks, self.norm)
        return self.resized(self.decode_head(patches, cls), (images.shape[-2], images.shape[-1]))

    def resized(self, depth: Tensor, size: tuple[int, int]) -> Tensor:
        """Clip what the head gives (B, 1, ·, ·) to the range and resize it, bilinear."""
        return F.interpolate(depth.clamp(self.min_depth, self.max_depth), size, mode="bilinear", align_corners=False)

    def whole_inference(self, img: Tensor, img_meta: object = None, rescale: bool = True) -> Tensor:
        """The published hub model's method; the same as calling the model."""
        out: Tensor = self(img)
        return out
