# SPDX-License-Identifier: Apache-2.0
"""The parts of a block. Parameter names are those of the published state dicts.

Shapes: B images, N tokens, D width, H heads, T = ΣB·N tokens of a packed batch.

A token tensor is (B, N, D), or (T, D) together with `shapes`, a list of (B, N), when crops of several sizes are packed
into one sequence: then linear layers run once over all tokens and attention stays inside each crop (DINOv2 §4,
"Sequence packing").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opendino.models.config import ViTConfig
from opendino.native.attention import HEAD_DIM, attention_supported, packed_attention
from opendino.native.build import kernels

Shapes = Sequence[tuple[int, int]]

EXPLICIT_ATTENTION_MAX_TOKENS = 320
"""Up to this many tokens, a network in training mode on a CPU uses explicit products: torch's CPU flash attention is
slower there (benchmarks/RESULTS.md). Everything else uses scaled_dot_product_attention, and packed bf16 tokens on a
processor with bf16 products a kernel of our own."""

RECOMPUTE_GELU_FROM = 2**22
"""Values of a hidden layer from which on GELU's output is not kept; below it takes 16 MiB at most."""


class PatchEmbed(nn.Module):
    """Strided convolution that turns an image into patch tokens (B, C, h·p, w·p) → (B, h·w, D)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.device.type == "cpu":
            return self._as_product(x)
        out: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return out

    def _as_product(self, x: Tensor) -> Tensor:
        """The same as one product over rows of pixels; the convolution and its gradients take a CPU twice as long."""
        p = self.patch_size
        grid = x.unflatten(2, (-1, p)).unflatten(4, (-1, p))  # (B, C, h, p, w, p)
        rows = grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)  # (B, h·w, C·p·p)
        out: Tensor = F.linear(rows, self.proj.weight.flatten(1), self.proj.bias)
        return out


class LayerScale(nn.Module):
    """Learned per-channel factor on a residual branch (Touvron et al. 2021, CaiT §2.2)."""

    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def normalize(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Give norm(x), in fp32 for fp32 tokens even where a sharding wrapper hands out half-precision weights."""
    half = isinstance(norm, nn.LayerNorm) and norm.weight.dtype in (torch.bfloat16, torch.float16)
    if half and x.dtype is torch.float32:
        return F.layer_norm(x, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
    out: Tensor = norm(x)
    return out


def scaled_linear(x: Tensor, linear: nn.Linear, scale: nn.Module | None) -> Tensor:
    """Give scale(linear(x)), scale being a LayerScale, the identity or None.

    In training the factors go into the weights, exactly: γ·(W·x + b) = (γW)·x + γb. That saves three passes over the
    tokens and keeps no branch output for the backward pass. Not in fp16, which cannot hold 1e-5·W, nor where a layer
    with more than W takes the linear one's place (LoRA): its `weight` is not all that it adds.
    """
    if (
        linear.training
        and isinstance(linear, nn.Linear)
        and isinstance(scale, LayerScale)
        and not _in_fp16(linear.weight)
    ):
        bias = None if linear.bias is None else linear.bias * scale.gamma
        return F.linear(x, linear.weight * scale.gamma.unsqueeze(1), bias)
    out: Tensor = linear(x)
    return out if scale is None else scale(out)


def _in_fp16(weight: Tensor) -> bool:
    kind = weight.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind) is torch.float16
    return weight.dtype is torch.float16


class Mlp(nn.Module):
    """Two linear layers with exact GELU between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, scale: nn.Module | None = None) -> Tensor:
        hidden = self.fc1(x)
        small = hidden.numel() < RECOMPUTE_GELU_FROM
        if small or not (self.training and hidden.requires_grad) or torch.compiler.is_compiling():
            return self._project(hidden, scale)
        # The backward pass makes GELU(hidden) again, 1 % of a step (3 % of a small one), instead of keeping it, the
        # largest of all activations. Recomputation stops before the product.
        out: Tensor = checkpoint(self._project, hidden, scale, use_reentrant=False, preserve_rng_state=False)
        return out

    def _project(self, hidden: Tensor, scale: nn.Module | None) -> Tensor:
        return scaled_linear(F.gelu(hidden), self.fc2, scale)


class SwiGLU(nn.Module):
    """Gated feed-forward: silu(x1)·x2, both halves from one linear layer (Shazeer 2020; ViT-g)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, scale: nn.Module | None = None) -> Tensor:
        x1, x2 = self.w12(x).chunk(2, dim=-1)
        return scaled_linear(F.silu(x1) * x2, self.w3, scale)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over (B, H, N, D/H) queries, keys and values; returns the same shape."""
    return F.scaled_dot_product_attention(q, k, v)


def attend_explicitly(qkv: Tensor, num_heads: int) -> Tensor:
    """The same attention by plain products, from (B, N, 3·D) to (B, N, D), with one copy of the input.

    Under autocast both products run in half precision and the softmax is taken in its own dtype.
    """
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).contiguous().flatten(1, 2)  # (B·H, N, D/H)
    scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
    mixed = torch.bmm(scores.softmax(-1).to(v.dtype), v)
    by_token: Tensor = mixed.unflatten(0, (-1, num_heads)).transpose(1, 2)
    return by_token.flatten(2)


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

    def forward(
        self, x: Tensor, shapes: Shapes | None = None, keep: Tensor | None = None, scale: nn.Module | None = None
    ) -> Tensor:
        """(B, N, D) → (B, N, D), or packed (T, D) → (T, D); only the rows `keep` of a packed result when given."""
        qkv = self.qkv(x)
        if shapes is not None and self._has_kernel(qkv):
            mixed, _ = packed_attention(qkv.contiguous(), [side for shape in shapes for side in shape], self.num_heads)
        elif shapes is None:
            mixed = self._mix(qkv)
        else:
            parts = qkv.split([b * n for b, n in shapes])
            mixed = torch.cat(
                [self._mix(p.unflatten(0, shape)).flatten(0, 1) for p, shape in zip(parts, shapes, strict=True)]
            )
        return scaled_linear(mixed if keep is None else mixed[keep], self.proj, scale)

    def _has_kernel(self, qkv: Tensor) -> bool:
        """Say whether the native kernel serves: bf16 tokens on a CPU that has bf16 products, heads of its width."""
        if qkv.dtype is not torch.bfloat16 or qkv.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        library = kernels().library if qkv.shape[-1] == 3 * self.num_heads * HEAD_DIM else None
        return library is not None and attention_supported(library)

    def _mix(self, qkv: Tensor) -> Tensor:
        if not qkv.numel():  # no image of this group was kept by stochastic depth
            return qkv.chunk(3, dim=-1)[0]
        if self.training and qkv.device.type == "cpu" and qkv.shape[1] <= EXPLICIT_ATTENTION_MAX_TOKENS:
            return attend_explicitly(qkv, self.num_heads)
        return attend(*self.split_heads(qkv)).transpose(1, 2).flatten(2)  # (B, N, D)


@dataclass(frozen=True)
class Subset:
    """The images of a packed batch on which a residual branch is computed (DINOv2 §4, "Efficient stochastic depth").

    Attributes:
        index: rows of the kept images' tokens in the packed batch, (S,).
        shapes: (kept images, N) of each crop group; groups without a kept image stay, with 0.
        scale: what the branch is multiplied by so that its mean is kept; a number, or per row, (S, 1).
    """

    index: Tensor
    shapes: Shapes
    scale: float | Tensor


class Block(nn.Module):
    """Pre-norm transformer block: attention and feed-forward, each a residual with LayerScale.

    In training with `drop_path_rate` > 0 each branch is computed on a subset of the images only and rescaled.
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

    def forward(
        self,
        x: Tensor,
        shapes: Shapes | None = None,
        subsets: Sequence[Subset] | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Apply both branches.

        Args:
            x: (B, N, D), or packed (T, D).
            shapes: (B, N) of each crop group when packed.
            subsets: the images of the attention branch and those of the feed-forward; None draws them from torch's
                global generator when the block drops any.
            keep: rows of a packed x whose outputs are wanted; the others serve as keys and values only.

        Returns:
            Same shape as x, or (len(keep), D).
        """
        if self.training and torch.is_autocast_enabled(x.device.type):
            x = x if x.dtype is torch.float64 else x.float()  # half precision would lose branches of 1e-5
        if subsets is None and self.training and self.drop_path_rate > 0:
            drawn = shapes or [(x.shape[0], x.shape[1])]
            subsets = [random_subset(drawn, self.drop_path_rate, device=x.device) for _ in range(2)]
            if shapes is None:
                return self(x.flatten(0, 1), drawn, subsets).unflatten(0, x.shape[:2])  # type: ignore[no-any-return]
        if subsets is not None:
            return self._on_subsets(x, subsets, keep)
        if keep is not None:
            x = x[keep] + self._attention_branch(x, shapes, keep)
        else:
            x = x + self._attention_branch(x, shapes)
        return x + self._ffn_branch(x)

    def _on_subsets(self, x: Tensor, subsets: Sequence[Subset], keep: Tensor | None) -> Tensor:
        first, second = subsets
        if keep is None:
            x = add_rows(x, first.index, self._attention_branch(x[first.index], first.shapes), first.scale)
            return add_rows(x, second.index, self._ffn_branch(x[second.index]), second.scale)
        place = torch.full((len(x),), -1, device=x.device)  # of each row in the result
        place[keep] = torch.arange(len(keep), device=x.device)
        out = x[keep]
        wanted, scale = _wanted(place, first)
        branch = self._attention_branch(x[first.index], first.shapes, wanted)
        out = add_rows(out, place[first.index[wanted]], branch, scale)
        wanted, scale = _wanted(place, second)
        rows = place[second.index[wanted]]
        return add_rows(out, rows, self._ffn_branch(out[rows]), scale)

    def _attention_branch(self, x: Tensor, shapes: Shapes | None, keep: Tensor | None = None) -> Tensor:
        out: Tensor = self.attn(normalize(self.norm1, x), shapes, keep, self.ls1)
        return out

    def _ffn_branch(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(normalize(self.norm2, x), self.ls2)
        return out


def _wanted(place: Tensor, subset: Subset) -> tuple[Tensor, float | Tensor]:
    """Rows of a subset that have a place in the result, and their scale."""
    wanted = (place[subset.index] >= 0).nonzero().squeeze(1)
    return wanted, subset.scale[wanted] if isinstance(subset.scale, Tensor) else subset.scale


def add_rows(x: Tensor, index: Tensor, branch: Tensor, scale: float | Tensor) -> Tensor:
    """Give x (T, D) with scale · branch (S, D) added to its rows `index`."""
    if isinstance(scale, Tensor):
        branch, scale = branch * scale, 1.0
    return x.index_add(0, index, branch.to(x.dtype), alpha=scale)


def random_subset(
    shapes: Shapes, rate: float, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Subset:
    """Draw the images that a branch keeps from each crop group, at least one.

    Args:
        shapes: (B, N) of each crop group.
        rate: share of the images that skip the branch.
        generator: CPU generator of the draw; None uses torch's global one.
        device: of the tokens.
    """
    kept, share = [], []
    for batch, _ in shapes:
        count = max(int(batch * (1 - rate)), 1)
        kept.append(torch.randperm(batch, generator=generator)[:count])
        share.append(torch.full((count,), batch / count))
    return subset_of(shapes, kept, share, device)


def subset_of(
    shapes: Shapes, kept: Sequence[Tensor], scales: Sequence[Tensor], device: torch.device | str = "cpu"
) -> Subset:
    """Build a subset from the kept images of each crop group and their scales, both on the CPU."""
    rows, factors, kept_shapes, start = [], [], [], 0
    for (batch, tokens), images, scale in zip(shapes, kept, scales, strict=True):
        rows.append((start + images[:, None] * tokens + torch.arange(tokens)).flatten())
        factors.append(scale.repeat_interleave(tokens))
        kept_shapes.append((len(images), tokens))
        start += batch * tokens
    factor = torch.cat(factors)
    one = len(factor) > 0 and bool((factor == factor[0]).all())
    return Subset(torch.cat(rows).to(device), kept_shapes, float(factor[0]) if one else factor.unsqueeze(1).to(device))
