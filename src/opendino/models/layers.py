# SPDX-License-Identifier: Apache-2.0
"""The parts of a block. Parameter names are those of the published state dicts.

Shapes: B images, N tokens, D width, H heads, T = ΣB·N tokens of a packed batch.

A token tensor is (B, N, D), or (T, D) together with `shapes`, a list of (B, N), when crops of several sizes are packed
into one sequence: then linear layers run once over all tokens and attention stays inside each crop (DINOv2 §4,
"Sequence packing").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opendino.models.config import ViTConfig

Shapes = Sequence[tuple[int, int]]
Branch = Callable[[Tensor, "Shapes | None"], Tensor]

EXPLICIT_ATTENTION_MAX_TOKENS = 320
"""Up to this many tokens, training on a CPU uses explicit products: torch's CPU flash backward is slower there
(benchmarks/RESULTS.md). Everything else uses scaled_dot_product_attention."""


class PatchEmbed(nn.Module):
    """Strided convolution that turns an image into patch tokens (B, C, h·p, w·p) → (B, h·w, D)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return out


class LayerScale(nn.Module):
    """Learned per-channel factor on a residual branch (Touvron et al. 2021, CaiT §2.2)."""

    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    """Two linear layers with exact GELU between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwiGLU(nn.Module):
    """Gated feed-forward: silu(x1)·x2, both halves from one linear layer (Shazeer 2020; ViT-g)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(x1) * x2)
        return out


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over (B, H, N, D/H) queries, keys and values; returns the same shape."""
    if q.device.type == "cpu" and q.requires_grad and q.shape[-2] <= EXPLICIT_ATTENTION_MAX_TOKENS:
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, H, N, N)
        mixed: Tensor = weights.to(v.dtype) @ v
        return mixed
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split (B, N, 3·D) into queries, keys and values, each (B, H, N, D/H)."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor, shapes: Shapes | None = None) -> Tensor:
        qkv = self.qkv(x)
        if shapes is None:
            mixed = self._mix(qkv)
        else:
            parts = qkv.split([b * n for b, n in shapes])
            mixed = torch.cat(
                [self._mix(p.unflatten(0, shape)).flatten(0, 1) for p, shape in zip(parts, shapes, strict=True)]
            )
        out: Tensor = self.proj(mixed)
        return out

    def _mix(self, qkv: Tensor) -> Tensor:
        return attend(*self.split_heads(qkv)).transpose(1, 2).flatten(2)  # (B, N, D)


class Block(nn.Module):
    """Pre-norm transformer block: attention and feed-forward, each a residual with LayerScale.

    In training with `drop_path_rate` > 0 each branch is computed on a random subset of the batch only and rescaled
    (DINOv2 §4, "Efficient stochastic depth").
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim, scale = config.embed_dim, config.init_values
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(config)
        self.ls1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, config.hidden_dim) if config.ffn == "mlp" else SwiGLU(dim, config.hidden_dim)
        self.ls2 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.drop_path_rate = config.drop_path_rate

    def forward(self, x: Tensor, shapes: Shapes | None = None, generator: torch.Generator | None = None) -> Tensor:
        """(B, N, D) → (B, N, D), or packed (T, D) → (T, D). `generator` draws the stochastic-depth subsets."""
        x = self._add(x, self._attention_branch, shapes, generator)
        return self._add(x, self._ffn_branch, shapes, generator)

    def _attention_branch(self, x: Tensor, shapes: Shapes | None) -> Tensor:
        out: Tensor = self.ls1(self.attn(self.norm1(x), shapes))
        return out

    def _ffn_branch(self, x: Tensor, shapes: Shapes | None) -> Tensor:
        out: Tensor = self.ls2(self.mlp(self.norm2(x)))
        return out

    def _add(self, x: Tensor, branch: Branch, shapes: Shapes | None, generator: torch.Generator | None) -> Tensor:
        if self.training and self.drop_path_rate > 0:
            return add_on_subset(x, branch, shapes, self.drop_path_rate, generator)
        return x + branch(x, shapes)


def add_on_subset(
    x: Tensor, branch: Branch, shapes: Shapes | None, rate: float, generator: torch.Generator | None = None
) -> Tensor:
    """Add a residual branch computed on a random part of the batch, rescaled so that its mean is kept.

    Args:
        x: (B, N, D), or packed (T, D).
        branch: the residual function of the kept tokens and their shapes.
        shapes: (B, N) of each crop group when packed, else None.
        rate: share of the samples of each group that skip the branch; at least one sample is kept.
        generator: CPU generator of the draw; None uses torch's global one.

    Returns:
        x plus the rescaled branch, same shape (DINOv2 §4, "Efficient stochastic depth").
    """
    if shapes is None:
        packed = add_on_subset(x.flatten(0, 1), branch, [(x.shape[0], x.shape[1])], rate, generator)
        unpacked: Tensor = packed.unflatten(0, (x.shape[0], x.shape[1]))
        return unpacked
    rows, kept_shapes, scales, start = [], [], [], 0
    for batch, tokens in shapes:
        kept = max(int(batch * (1 - rate)), 1)
        samples = torch.randperm(batch, generator=generator)[:kept]
        rows.append((start + samples[:, None] * tokens + torch.arange(tokens)).flatten())
        kept_shapes.append((kept, tokens))
        scales.append(torch.full((kept * tokens, 1), batch / kept))
        start += batch * tokens
    index = torch.cat(rows).to(x.device)
    scale = torch.cat(scales).to(x)
    return x.index_add(0, index, (branch(x[index], kept_shapes) * scale).to(x.dtype))
