# SPDX-License-Identifier: Apache-2.0
"""Attention of bf16 tokens with its gradients, and residual stream with LayerNorm, by the compiled kernels.

Shapes: B images, N tokens, H heads of 64, D = 64·H, T = ΣB·N tokens of a packed batch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opendino.native.threads import run_together

HEAD_DIM = 64
"""Width of a head that the kernel is written for; that of every published model."""
SCORES_PER_THREAD = 2**17
"""Starting a thread takes about as long as the attention over so many scores."""
OTHER_WORK = 32
"""Scores of a query that take as long as all that is done once a token."""


def attention_supported(library: ctypes.CDLL) -> bool:
    """Say whether this processor has what the attention kernel is made of: AVX-512 products of bf16."""
    return bool(library.attention_bf16_supported())


def attend(library: ctypes.CDLL, qkv: Tensor, num_heads: int, threads: int) -> Tensor:
    """Give softmax(QKᵀ/8)·V of every head.

    Args:
        library: of `opendino.native.build`, where `attention_supported`.
        qkv: contiguous bf16 (B, N, 3·D) on the CPU: queries, keys and values, each of H heads.
        num_heads: H.
        threads: at most so many, and as many as torch uses.

    Returns:
        bf16 (B, N, D). Products are added up in fp32; the softmax is fp32 and rounded to bf16.
    """
    out = qkv.new_empty(*qkv.shape[:2], num_heads * HEAD_DIM)
    _forward(library, qkv, out, None, num_heads, threads)
    return out


class PackedAttention(torch.autograd.Function):
    """Attention inside each image of a packed batch, which can be differentiated once.

    The logarithm of each query's sum is kept for the backward pass, and neither scores nor probabilities.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, library: ctypes.CDLL, qkv: Tensor, shapes: Sequence[tuple[int, int]], num_heads: int
    ) -> Tensor:
        """Give bf16 (T, D).

        Args:
            ctx: torch's.
            library: of `opendino.native.build`, where `attention_supported`.
            qkv: contiguous bf16 (T, 3·D).
            shapes: (B, N) of each group of images; T = ΣB·N.
            num_heads: H.
        """
        out = qkv.new_empty(len(qkv), num_heads * HEAD_DIM)
        logs = torch.empty(len(qkv) * num_heads)
        lengths = [b * n for b, n in shapes]
        parts = zip(qkv.split(lengths), out.split(lengths), logs.split([n * num_heads for n in lengths]), strict=True)
        for (x, y, log), (batch, tokens) in zip(parts, shapes, strict=True):
            _forward(library, x.view(batch, tokens, x.shape[-1]), y, log, num_heads, torch.get_num_threads())
        ctx.save_for_backward(qkv, out, logs)
        ctx.library, ctx.shapes, ctx.num_heads = library, shapes, num_heads
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None, None]:
        """Give the gradient of qkv."""
        qkv, out, logs = ctx.saved_tensors
        gradient, result, done = gradient.contiguous(), torch.empty_like(qkv), 0
        for batch, tokens in ctx.shapes:
            tensors = (qkv[done:], out[done:], logs[done * ctx.num_heads :], gradient[done:], result[done:])
            sizes = (batch, tokens, ctx.num_heads)
            _run(ctx.library.attention_bf16_backward, tensors, sizes, 3 * torch.get_num_threads())
            done += batch * tokens
        return None, result, None, None


def _forward(library: ctypes.CDLL, qkv: Tensor, out: Tensor, logs: Tensor | None, num_heads: int, threads: int) -> None:
    batch, tokens, width = qkv.shape
    assert qkv.dtype is torch.bfloat16
    assert qkv.is_contiguous()
    assert width == 3 * num_heads * HEAD_DIM
    _run(library.attention_bf16, (qkv, out, logs), (batch, tokens, num_heads), threads)


def _run(kernel: Any, tensors: Sequence[Tensor | None], sizes: tuple[int, int, int], threads: int) -> None:
    batch, tokens, num_heads = sizes
    following = ctypes.c_long(0)
    arguments = (
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors),
        *map(ctypes.c_int64, sizes),
        ctypes.c_float(HEAD_DIM**-0.5),
        ctypes.byref(following),
    )
    scores = batch * num_heads * tokens * (tokens + OTHER_WORK)
    run_together(lambda: int(kernel(*arguments)), min(threads, scores // SCORES_PER_THREAD))


def add_and_normalize(
    library: ctypes.CDLL, stream: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Add a branch to the residual stream, in place, and give the LayerNorm of the sum.

    Args:
        library: of `opendino.native.build`.
        stream: contiguous fp32 (T, D) on the CPU.
        branch: contiguous bf16 (T, D), or None to add nothing.
        weight: fp32 (D,).
        bias: fp32 (D,).
        eps: of the LayerNorm.

    Returns:
        bf16 (T, D).
    """
    rows, dim = stream.shape
    for tensor, dtype in ((stream, torch.float32), (branch, torch.bfloat16)):
        assert tensor is None or (tensor.dtype is dtype and tensor.is_contiguous() and len(tensor) == rows)
    out = torch.empty(rows, dim, dtype=torch.bfloat16)
    pointers = (stream, branch, weight, bias, out)
    library.add_and_normalize(
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in pointers),
        ctypes.c_int64(rows),
        ctypes.c_int64(dim),
        ctypes.c_float(eps),
    )
    return out
