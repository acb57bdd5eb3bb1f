# SPDX-License-Identifier: Apache-2.0
"""Attention of bf16 tokens, and residual stream with LayerNorm, by the compiled kernels.

Shapes: B images, N tokens, H heads of 64, D = 64·H.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from opendino.native.threads import run_together

HEAD_DIM = 64
"""Width of a head that the kernel is written for; that of every published model."""
VALUES_PER_THREAD = 2**17
"""Starting a thread takes about as long as the attention over so many scores."""


def attention_supported(library: ctypes.CDLL) -> bool:
    """Say whether this processor has what the attention kernel is made of: AVX-512 products of bf16."""
    return bool(library.attention_bf16_supported())


def attend(library: ctypes.CDLL, qkv: Tensor, num_heads: int, threads: int = 1) -> Tensor:
    """Give softmax(QKᵀ/8)·V of every head.

    Args:
        library: of `opendino.native.build`, where `attention_supported`.
        qkv: contiguous bf16 (B, N, 3·D) on the CPU: queries, keys and values, each of H heads.
        num_heads: H.
        threads: at most so many, and as many as torch uses.

    Returns:
        bf16 (B, N, D). Products are added up in fp32; the softmax is fp32 and rounded to bf16.
    """
    batch, tokens, width = qkv.shape
    assert qkv.dtype is torch.bfloat16
    assert qkv.is_contiguous()
    assert width == 3 * num_heads * HEAD_DIM
    out = qkv.new_empty(batch, tokens, num_heads * HEAD_DIM)
    following = ctypes.c_long(0)
    arguments = (
        ctypes.c_void_p(qkv.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        *map(ctypes.c_int64, (batch, tokens, num_heads)),
        ctypes.c_float(HEAD_DIM**-0.5),
        ctypes.byref(following),
    )
    most = min(threads, batch * num_heads * tokens * tokens // VALUES_PER_THREAD)
    run_together(lambda: int(library.attention_bf16(*arguments)), most)
    return out


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
