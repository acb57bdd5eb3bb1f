# SPDX-License-Identifier: Apache-2.0
"""A backbone rewritten once for inference on a CPU: the same function of the same weights, in another order.

Shapes: B images, R registers, P = h·w patches, N = 1 + R + P tokens, T = B·N, D width, L blocks asked for.

- Weights lie in the layout that oneDNN's products read, with LayerScale inside them: γ·(W·x + b) = (γW)·x + γb.
- In bf16, products are bf16 with fp32 sums, and the residual stream stays fp32: rounding it at every block would be
  most of the error (benchmarks/RESULTS.md).
- GELU happens inside the product before it; adding a branch and the LayerNorm after it are one pass over the tokens.
- Attention of bf16 tokens is a kernel of our own (`opendino.native`) where the processor has bf16 products.
- A batch is cut into pieces that stay in the cache; each thread takes whole pieces, so threads wait for each other once
  a batch instead of once a product, and a busy core slows down its own pieces only. All threads share one image.
- Position tables are kept by grid.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opendino.models.layers import Block, SwiGLU
from opendino.models.memory import close_gaps, give_up
from opendino.models.positions import resize_pos_embed
from opendino.models.vit import VisionTransformer
from opendino.native import attention
from opendino.native.build import kernels

T = TypeVar("T")
CPUPrecision = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
PIECE_VALUES = 2**20
"""Values of the residual stream (T·D) of a piece of a batch: enough that weights, which come from memory once a piece,
are a small part of what is read (half as many cost ViT-B and ViT-L 3 %), and so few that the C library keeps the memory
of intermediate results instead of getting and returning it page by page."""


class PreparedViT:
    """A frozen copy of a backbone's weights, ready for fast forward passes on a CPU.

    Later changes of the model's weights are not seen. Several threads may call it at once.

    Args:
        model: the backbone, on the CPU; it is left as it is, unless `consume`.
        precision: of the products.
        threads: default: torch's number.
        consume: take the blocks out of the model one by one and give their memory back, so that the weights are never
            in memory twice; for a model that nobody else has.
    """

    def __init__(
        self, model: VisionTransformer, precision: CPUPrecision = "bf16", threads: int | None = None, *,
        consume: bool = False,
    ) -> None:  # fmt: skip
        config = model.config
        self.config, self.precision = config, precision
        self.dtype = DTYPES[precision]
        self.threads = threads or torch.get_num_threads()
        self.library = kernels().library if precision == "bf16" else None
        with torch.no_grad():
            self.pos_embed = model.pos_embed.detach().to(torch.float32, copy=True)
            self.cls = model.cls_token.detach().to(torch.float32, copy=True)
            registers = model.register_tokens
            self.registers = None if registers is None else registers.detach().to(torch.float32, copy=True)
            self.patches = PatchProduct(model, self.dtype)
            self.blocks = [self._taken(model, i, consume) for i in range(len(model.blocks))]
            self.norm = Norm(model.norm)
        self.tables: dict[tuple[int, int], Tensor] = {}
        self.pool: ThreadPoolExecutor | None = None
        self.lock = Lock()

    def _taken(self, model: VisionTransformer, number: int, consume: bool) -> PreparedBlock:
        block = model.blocks[number]
        assert isinstance(block, Block)
        if not consume:
            return self._prepared_block(block)
        model.blocks[number] = nn.Identity()
        mapped = model.load_report is not None and model.load_report.mapped
        ready = self._prepared_block(block, give_up if mapped else None)
        del block
        close_gaps()
        return ready

    def _prepared_block(self, block: Block, finished: Callable[[Tensor], None] | None = None) -> PreparedBlock:
        return PreparedBlock(block, self.dtype, self.library, finished)

    def tokens(self, images: Tensor, layers: int = 1) -> Tensor:
        """Give the normalised tokens of the last blocks.

        Args:
            images: (B, C, H, W) on the CPU, float and normalised, or uint8 pixels; H and W at least one patch.
            layers: L, the number of blocks.

        Returns:
            fp32 (B, N, L·D), blocks in their order.
        """
        return torch.cat(self.by_pieces(images, layers, lambda tokens: tokens))

    def by_pieces(self, images: Tensor, layers: int, pick: Callable[[Tensor], T]) -> list[T]:
        """Give what `pick` takes of the tokens (b, N, L·D) of each piece of a batch, in order.

        Nothing but that is kept of a piece: the tokens of a batch are more than all else that a forward pass holds.
        """
        pieces = images.split(self.piece_size(images))
        if len(pieces) == 1:
            return [pick(self._piece(images, layers))]
        with self.lock:
            if self.pool is None:
                # One thread of oneDNN in each: the setting belongs to the thread that makes it.
                self.pool = ThreadPoolExecutor(
                    self.threads, "opendino-forward", initializer=torch.set_num_threads, initargs=(1,)
                )
        return list(self.pool.map(lambda piece: pick(self._piece(piece, layers)), pieces))

    def piece_size(self, images: Tensor) -> int:
        """Images of a piece: few enough for the cache, and as many pieces for every thread."""
        p = self.config.patch_size
        tokens = 1 + self.config.num_register_tokens + (images.shape[-2] // p) * (images.shape[-1] // p)
        fits = max(1, self._piece_values() // (tokens * self.config.embed_dim))
        rounds = max(1, -(-len(images) // (fits * self.threads)))
        return max(1, -(-len(images) // (rounds * self.threads)))

    def _piece_values(self) -> int:
        return PIECE_VALUES

    @torch.inference_mode()
    def _piece(self, images: Tensor, layers: int) -> Tensor:
        stream, batch = self._embed(images), len(images)
        tokens = len(stream) // batch
        outputs = []
        branch: Tensor | None = None
        for i, block in enumerate(self.blocks):
            branch = block(stream, branch, tokens)
            if i >= len(self.blocks) - layers:
                stream = stream if branch is None else stream.add_(branch)
                branch = None
                outputs.append(self.norm.full(stream))
        result: Tensor = torch.cat(outputs, -1).unflatten(0, (batch, tokens))
        return result

    def _embed(self, images: Tensor) -> Tensor:
        """Pixels to tokens with positions and registers, (T, D) fp32."""
        p, config = self.config.patch_size, self.config
        h, w = images.shape[-2] // p, images.shape[-1] // p
        x = images[..., : h * p, : w * p].unflatten(2, (h, p)).unflatten(4, (w, p)).permute(0, 2, 4, 3, 5, 1)
        patches = self.patches(x.reshape(len(images) * h * w, -1))  # from (B, h, w, p, p, C)
        first = 1 + config.num_register_tokens
        stream = torch.empty(len(images), first + h * w, config.embed_dim)
        table = self._table(h, w)
        stream[:, :1] = self.cls + table[:, :1]
        if self.registers is not None:
            stream[:, 1:first] = self.registers
        torch.add(patches.unflatten(0, (len(images), h * w)), table[:, 1:], out=stream[:, first:])
        return stream.flatten(0, 1)

    def _table(self, h: int, w: int) -> Tensor:
        if (h, w) not in self.tables:
            self.tables[h, w] = resize_pos_embed(self.pos_embed, h, w, self.config.pos_resize)
        return self.tables[h, w]


class PatchProduct:
    """Patches to tokens, from normalised floats or from pixels with the normalisation inside weights and bias.

    A pixel u becomes u - m, where m is the integer next to 255·mean: in bf16 that is exact, which normalised values are
    not. With x = (u/255 - mean)/std, W·x + b = (W/(255·std))·(u - m) + b + W·(m/255 - mean)/std.
    A normalised value rounded to bf16 would be nearly all of the error (benchmarks/RESULTS.md), so the rest of it is a
    second input with the same weight: a hundredth of the products of a ViT-S.

    Args:
        model: the backbone with its preprocessing.
        dtype: of the products.
    """

    def __init__(self, model: VisionTransformer, dtype: torch.dtype) -> None:
        projection, spec, self.dtype = model.patch_embed.proj, model.preprocess, dtype
        weight = projection.weight.detach().double().permute(0, 2, 3, 1)  # (D, p, p, C): channels inside
        self.parts = 1 if dtype is torch.float32 else 2
        self.of_floats = Product(weight.flatten(1).repeat(1, self.parts), projection.bias, dtype)
        self.of_pixels: Product | None = None
        if spec.num_channels != weight.shape[-1]:
            return
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (spec.mean, spec.std))
        middle = (255 * mean).round()
        bias = 0 if projection.bias is None else projection.bias.detach().double()
        bias = bias + (weight * ((middle / 255 - mean) / std)).sum((1, 2, 3))
        self.of_pixels = Product((weight / (255 * std)).flatten(1), bias, dtype)
        self.middle = middle.repeat(weight.shape[1] * weight.shape[2]).to(dtype)

    def __call__(self, patches: Tensor) -> Tensor:
        """(T, p·p·C) uint8 or normalised float, a pixel's channels together → (T, D)."""
        x = patches.to(self.dtype)
        if patches.dtype is not torch.uint8:
            return self.of_floats(torch.cat([x, (patches - x).to(self.dtype)], 1) if self.parts == 2 else x)
        assert self.of_pixels is not None
        return self.of_pixels(x.sub_(self.middle))


class PreparedBlock:
    """One block on tokens (T, D): the branch of its feed-forward is given back unadded, for the next block to add.

    Args:
        block: where the weights come from.
        dtype: of the products.
        library: of the compiled kernels, or None.
        finished: called with each large weight as soon as it is prepared.
    """

    def __init__(
        self, block: Block, dtype: torch.dtype, library: ctypes.CDLL | None,
        finished: Callable[[Tensor], None] | None = None,
    ) -> None:  # fmt: skip
        self.dtype, self.library, self.num_heads = dtype, library, block.attn.num_heads
        attn, mlp = block.attn, block.mlp
        finished = finished or (lambda _: None)
        self.qkv = Product(attn.qkv.weight, attn.qkv.bias, dtype)
        finished(attn.qkv.weight)
        self.proj = Product(*scaled(attn.proj, block.ls1), dtype)
        finished(attn.proj.weight)
        self.gated = isinstance(mlp, SwiGLU)
        first, second = (mlp.w12, mlp.w3) if isinstance(mlp, SwiGLU) else (mlp.fc1, mlp.fc2)
        self.fc1 = Product(first.weight, first.bias, dtype)
        finished(first.weight)
        self.fc2 = Product(*scaled(second, block.ls2), dtype)
        finished(second.weight)
        self.norm1, self.norm2 = Norm(block.norm1, library), Norm(block.norm2, library)
        head_dim = attn.qkv.in_features // self.num_heads
        own = library is not None and head_dim == attention.HEAD_DIM and attention.attention_supported(library)
        self.attend: Callable[[Tensor], Tensor] = self._by_kernel if own else self._by_torch

    def __call__(self, stream: Tensor, branch: Tensor | None, tokens: int) -> Tensor | None:
        """Add `branch` to the residual stream, in place, then the attention; give the feed-forward's branch.

        Args:
            stream: fp32 (T, D), changed in place.
            branch: (T, D) of the block before, or None.
            tokens: N of an image.
        """
        return self.feed_forward(self.attention(stream, branch, tokens))

    def attention(self, stream: Tensor, branch: Tensor | None, tokens: int) -> Tensor:
        """Do the first half, and give what the feed-forward reads."""
        x = self.norm1(stream, branch, self.dtype)
        mixed = self.attend(self.qkv(x).unflatten(0, (-1, tokens)))
        return self.norm2(stream, self.proj(mixed.flatten(0, 1)), self.dtype)

    def feed_forward(self, x: Tensor) -> Tensor:
        """(T, D) → (T, D)."""
        if not self.gated:
            return self.fc2(self.fc1(x, gelu=True))
        gate, value = self.fc1(x).chunk(2, -1)
        return self.fc2(F.silu(gate) * value)

    def _by_kernel(self, qkv: Tensor) -> Tensor:
        assert self.library is not None
        return attention.attend(self.library, qkv, self.num_heads, torch.get_num_threads())

    def _by_torch(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Product:
    """x·Wᵀ + b with the weight in oneDNN's own layout where torch offers it, optionally with GELU."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.bias = None if bias is None else bias.detach().to(dtype, copy=True)
        self.packed = packs(dtype)
        if self.packed:  # which copies
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype).contiguous())
        else:
            self.weight = weight.detach().to(dtype, copy=True).contiguous()

    def __call__(self, x: Tensor, gelu: bool = False) -> Tensor:
        """(T, in) → (T, out), the dtype of the weight."""
        if self.packed:
            after: tuple[str, list[float], str] = ("gelu", [], "none") if gelu else ("none", [], "")
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *after)
            return out
        out = F.linear(x, self.weight, self.bias)
        return F.gelu(out) if gelu else out


class Norm:
    """LayerNorm with fp32 statistics, in one pass with an addition where a kernel does both."""

    def __init__(self, norm: nn.LayerNorm, library: ctypes.CDLL | None = None) -> None:
        self.weight, self.bias = (p.detach().to(torch.float32, copy=True) for p in (norm.weight, norm.bias))
        self.eps, self.library = norm.eps, library

    def __call__(self, stream: Tensor, branch: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Add `branch` to the stream in place and give the norm of the sum, in `dtype`."""
        if self.library is not None and dtype is torch.bfloat16:
            return attention.add_and_normalize(self.library, stream, branch, self.weight, self.bias, self.eps)
        if branch is not None:
            stream += branch
        return self.full(stream).to(dtype)

    def full(self, stream: Tensor) -> Tensor:
        """Give the norm in fp32."""
        return F.layer_norm(stream, stream.shape[-1:], self.weight, self.bias, self.eps)


def scaled(linear: nn.Linear, scale: Any) -> tuple[Tensor, Tensor | None]:
    """Give weight and bias of a linear layer with the LayerScale after it inside."""
    weight, bias = linear.weight.detach().float(), linear.bias
    gamma = getattr(scale, "gamma", None)
    if gamma is None:
        return weight, bias
    gamma = gamma.detach().float()
    return weight * gamma.unsqueeze(1), None if bias is None else bias.detach().float() * gamma


def preparable(model: VisionTransformer) -> bool:
    """Say whether a model is made of our own parts: not timm's, and without others in their place, such as LoRA's."""
    return all(
        isinstance(block, Block)
        and all(type(part) is nn.Linear for part in (block.attn.qkv, block.attn.proj, *block.mlp.children()))
        for block in model.blocks
    )


def packs(dtype: torch.dtype) -> bool:
    """Say whether this torch has oneDNN's packed products for a dtype on this processor."""
    ops = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(ops, "_linear_pointwise")):
        return False
    return dtype is torch.float32 or bool(ops._is_mkldnn_bf16_supported())
