# SPDX-License-Identifier: Apache-2.0
"""The Vision Transformer backbone: images in, cls, register and patch tokens out.

Shapes: B images, C channels, R registers, P = h·w patches, N = 1 + R + P tokens, D width.
Token order: cls, registers, patches. Registers get no position: the table is added before they are inserted
(Darcet et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from opendino.errors import DataError
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.layers import Block, LayerScale, PatchEmbed, Shapes, Subset, normalize
from opendino.models.positions import resize_pos_embed

Features = dict[str, Any]


class DepthPlan(Protocol):
    """Says which images each residual branch of a packed batch is computed on."""

    def subsets(self, block: int, rate: float, shapes: Shapes, device: torch.device) -> Sequence[Subset]:
        """Give the subsets of the attention and the feed-forward branch of block number `block`."""


def _subsets(
    depth: DepthPlan | None, number: int, block: Any, shapes: Shapes, device: torch.device
) -> Sequence[Subset] | None:
    if depth is None or not block.training or not block.drop_path_rate:
        return None
    return depth.subsets(number, block.drop_path_rate, shapes, device)


class VisionTransformer(nn.Module):
    """DINOv2 backbone with the published state-dict keys and outputs (Oquab et al. 2023).

    Sides that are no multiple of the patch are cropped at the bottom and right to the closest smaller multiple, as the
    strided convolution drops them.

    Attributes:
        config: shape and position-resize convention.
        preprocess: the evaluation preprocessing that belongs to the weights.
        load_report: where the weights came from (`opendino.models.weights.LoadReport`); None for fresh ones.

    Example:
        >>> model = VisionTransformer(ViTConfig(img_size=28, embed_dim=16, depth=1, num_heads=2)).eval()
        >>> model(torch.zeros(2, 3, 28, 42)).shape
        torch.Size([2, 16])
    """

    load_report: Any = None

    def __init__(self, config: ViTConfig, preprocess: PreprocessSpec | None = None) -> None:
        super().__init__()
        self.config = config
        self.preprocess = preprocess or PreprocessSpec()
        dim = config.embed_dim
        self.embed_dim = self.num_features = dim
        self.num_register_tokens = config.num_register_tokens
        self.patch_size = config.patch_size
        self.num_heads, self.n_blocks = config.num_heads, config.depth
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.grid**2, dim))
        self.register_tokens = (
            nn.Parameter(torch.empty(1, config.num_register_tokens, dim)) if config.num_register_tokens else None
        )
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Identity()
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every parameter afresh from torch's global generator.

        Linear weights and the position table: truncated normal, std 0.02; linear biases 0. cls and register tokens:
        normal, std 1e-6. Mask token 0. LayerScale: config.init_values. LayerNorm: 1 and 0. Patch convolution: torch's
        default. Usable after `to_empty` on a model built on the meta device.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, LayerScale):
                module.gamma.fill_(module.init_values)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d):
                module.reset_parameters()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)

    # --- from pixels to tokens -------------------------------------------------------------------------------------

    def grid_of(self, x: Tensor) -> tuple[int, int]:
        """Patch grid (h, w) of images (B, C, H, W) after cropping to whole patches; refuses what cannot be an image."""
        if x.ndim != 4 or x.shape[1] != self.config.in_chans:
            raise DataError(
                f"The backbone was given a tensor of shape {tuple(x.shape)}; it needs (batch, {self.config.in_chans}, "
                "height, width). Put the channels second and add a batch axis if there is none."
            )
        h, w = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
        if h < 1 or w < 1:
            raise DataError(
                f"The image is {x.shape[-2]}×{x.shape[-1]} pixels; both sides must be at least one patch "
                f"({self.patch_size} pixels). Enlarge it first."
            )
        return h, w

    def prepare_tokens(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Embed images as tokens with positions and registers.

        Args:
            x: (B, C, H, W), normalised.
            masks: optional bool (B, P); True patches are replaced by the mask token.

        Returns:
            (B, 1 + R + P, D).
        """
        h, w = self.grid_of(x)
        p = self.patch_size
        tokens = self.patch_embed(x[..., : h * p, : w * p])  # (B, P, D)
        if masks is not None:
            tokens = torch.where(masks.unsqueeze(-1), self.mask_token.to(tokens.dtype).unsqueeze(0), tokens)
        cls = self.cls_token.expand(x.shape[0], -1, -1).to(tokens.dtype)
        tokens = torch.cat([cls, tokens], dim=1)
        tokens = tokens + resize_pos_embed(self.pos_embed, h, w, self.config.pos_resize).to(tokens.dtype)
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(x.shape[0], -1, -1).to(tokens.dtype)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
        return tokens

    # --- forward ---------------------------------------------------------------------------------------------------

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> Features:
        """Compute all final tokens of a batch.

        Args:
            x: (B, C, H, W) float, normalised with `preprocess.mean` and `preprocess.std`.
            masks: optional bool (B, P), True where a patch is hidden.

        Returns:
            The published dict: x_norm_clstoken (B, D), x_norm_regtokens (B, R, D), x_norm_patchtokens (B, P, D),
            x_prenorm (B, N, D), masks.

        Raises:
            DataError: for a tensor that is no image batch or is smaller than a patch.
        """
        tokens = self.prepare_tokens(x, masks)
        for block in self.blocks:
            tokens = block(tokens)
        return self._split(tokens, normalize(self.norm, tokens), masks)

    def forward_packed(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None], depth: DepthPlan | None = None
    ) -> list[Features]:
        """Compute several batches of different sizes in one pass over the packed tokens.

        Equal to one `forward_features` per batch; linear layers run once over all tokens, attention stays inside each
        crop (DINOv2 §4, "Sequence packing").

        Args:
            crops: images of each group, (B_i, C, H_i, W_i).
            masks: one bool (B_i, P_i) or None per group.
            depth: the images that each branch is computed on; see `Block.forward`.
        """
        packed, shapes = self._pack(crops, masks)
        for i, block in enumerate(self.blocks):
            packed = block(packed, shapes, _subsets(depth, i, block, shapes, packed.device))
        lengths = [b * n for b, n in shapes]
        parts = zip(packed.split(lengths), normalize(self.norm, packed).split(lengths), shapes, masks, strict=True)
        return [self._split(raw.unflatten(0, s), normed.unflatten(0, s), m) for raw, normed, s, m in parts]

    def forward_selected(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        patches: Sequence[Tensor | None],
        depth: DepthPlan | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Compute only the tokens that losses need: every cls token and the chosen patches of each batch.

        Equal to those of `forward_packed`; the last block's projection and feed-forward run for them alone.

        Args:
            crops: images of each group, (B_i, C, H_i, W_i).
            masks: hidden patches, one bool (B_i, P_i) or None per group.
            patches: wanted patches, one bool (B_i, P_i) or None per group.
            depth: the images that each branch is computed on; see `Block.forward`.

        Returns:
            x_norm_clstoken (B_i, D) and x_norm_patchtokens[patches] (M_i, D) of each group.
        """
        tokens, shapes = self._pack(crops, masks)
        keep = self._wanted_rows(shapes, patches, tokens.device)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            subsets = _subsets(depth, i, block, shapes, tokens.device)
            tokens = block(tokens, shapes, subsets, torch.cat(keep) if i == last else None)
        parts = iter(normalize(self.norm, tokens).split([len(k) for k in keep]))
        return list(zip(parts, parts, strict=True))

    def _pack(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, list[tuple[int, int]]]:
        groups = [self.prepare_tokens(x, m) for x, m in zip(crops, masks, strict=True)]
        return torch.cat([t.flatten(0, 1) for t in groups]), [(t.shape[0], t.shape[1]) for t in groups]

    def _wanted_rows(
        self, shapes: Sequence[tuple[int, int]], patches: Sequence[Tensor | None], device: torch.device
    ) -> list[Tensor]:
        """Rows of the cls tokens, then of the wanted patches, of each group in turn."""
        rows, start, before = [], 0, 1 + self.num_register_tokens
        for (batch, tokens), wanted in zip(shapes, patches, strict=True):
            cls = start + torch.arange(batch, device=device) * tokens
            image, patch = torch.zeros(2, 0, dtype=torch.long, device=device)
            if wanted is not None:
                image, patch = wanted.nonzero().unbind(1)
            rows += [cls, cls[image] + before + patch]
            start += batch * tokens
        return rows

    def _split(self, prenorm: Tensor, normed: Tensor, masks: Tensor | None) -> Features:
        first_patch = 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:first_patch],
            "x_norm_patchtokens": normed[:, first_patch:],
            "x_prenorm": prenorm,
            "masks": masks,
        }

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], ...]:
        """Give the patch tokens of several blocks.

        Args:
            x: (B, C, H, W), normalised.
            n: the last n blocks, or the indices of blocks (0 is the first).
            reshape: patch tokens as (B, D, h, w) instead of (B, P, D).
            return_class_token: give (patch tokens, cls token (B, D)) for each block.
            norm: apply the final LayerNorm.

        Returns:
            One entry per block, in the order of the blocks. Registers are left out.
        """
        h, w = self.grid_of(x)
        wanted = range(len(self.blocks) - n, len(self.blocks)) if isinstance(n, int) else n
        if not wanted or min(wanted) < 0 or max(wanted) >= len(self.blocks):
            raise DataError(f"n is {n!r}; the model has {len(self.blocks)} blocks, numbered from 0.")
        tokens, outputs = self.prepare_tokens(x), []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens)
            if i in wanted:
                outputs.append(normalize(self.norm, tokens) if norm else tokens)
        patches = [t[:, 1 + self.num_register_tokens :] for t in outputs]
        if reshape:
            patches = [p.unflatten(1, (h, w)).permute(0, 3, 1, 2).contiguous() for p in patches]
        if return_class_token:
            return tuple((p, t[:, 0]) for p, t in zip(patches, outputs, strict=True))
        return tuple(patches)

    def forward(self, x: Tensor, masks: Tensor | None = None, is_training: bool = False) -> Any:
        """Give the normalised cls token (B, D), or the whole published dict with `is_training=True`."""
        features = self.forward_features(x, masks)
        return features if is_training else self.head(features["x_norm_clstoken"])
