# SPDX-License-Identifier: Apache-2.0
"""Attention of bf16 tokens with its gradients, and residual stream with LayerNorm, by the compiled kernels.

Shapes: B images, N tokens, H heads of 64, D = 64·H, T = ΣB·N tokens of a packed batch.
"""

import ctypes
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from opendino.native.build import kernels
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


# The operators below are known to torch, so that it can differentiate them, trace them without data and count them.


@torch.library.custom_op("opendino::packed_attention", mutates_args=(), device_types="cpu")
def packed_attention(qkv: Tensor, shapes: Sequence[int], num_heads: int) -> tuple[Tensor, Tensor]:
    """Give attention inside each image of a packed batch; it can be differentiated once.

    The logarithm of each query's sum is kept for the backward pass, and neither scores nor probabilities.

    Args:
        qkv: contiguous bf16 (T, 3·D).
        shapes: B and N of each group of images, one after the other; T = ΣB·N.
        num_heads: H.

    Returns:
        bf16 (T, D), and the logarithms, fp32 (T·H,).
    """
    out, logs = qkv.new_empty(len(qkv), num_heads * HEAD_DIM), torch.empty(len(qkv) * num_heads)
    for rows, batch, tokens in _groups(shapes):
        log = logs[rows.start * num_heads : rows.stop * num_heads]
        x = qkv[rows].view(batch, tokens, qkv.shape[1])
        _forward(_library(), x, out[rows], log, num_heads, torch.get_num_threads())
    return out, logs


@torch.library.custom_op("opendino::packed_attention_backward", mutates_args=(), device_types="cpu")
def packed_attention_backward(
    qkv: Tensor, out: Tensor, logs: Tensor, gradient: Tensor, shapes: Sequence[int], num_heads: int
) -> Tensor:
    """Give the gradient of qkv from what `packed_attention` took and gave and the gradient of its tokens."""
    gradient, result = gradient.contiguous(), torch.empty_like(qkv)
    for rows, batch, tokens in _groups(shapes):
        log = logs[rows.start * num_heads : rows.stop * num_heads]
        tensors = (qkv[rows], out[rows], log, gradient[rows], result[rows])
        sizes = (batch, tokens, num_heads)
        _run(_library().attention_bf16_backward, tensors, sizes, 3 * torch.get_num_threads())
    return result


@packed_attention.register_fake
def _(qkv: Tensor, shapes: Sequence[int], num_heads: int) -> tuple[Tensor, Tensor]:
    out = qkv.new_empty(len(qkv), num_heads * HEAD_DIM)
    return out, qkv.new_empty(len(qkv) * num_heads, dtype=torch.float32)


@packed_attention_backward.register_fake
def _(qkv: Tensor, out: Tensor, logs: Tensor, gradient: Tensor, shapes: Sequence[int], num_heads: int) -> Tensor:
    return torch.empty_like(qkv)


def _keep(ctx: Any, inputs: tuple[Tensor, Sequence[int], int], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.shapes, ctx.num_heads = inputs
    ctx.save_for_backward(qkv, *output)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return packed_attention_backward(*ctx.saved_tensors, gradient, ctx.shapes, ctx.num_heads), None, None


packed_attention.register_autograd(_differentiate, setup_context=_keep)


def _flops(qkv: Any, shapes: Sequence[int], num_heads: int, *args: Any, **kwargs: Any) -> int:
    """Count the two products of the forward pass."""
    return sum(4 * b * n * n * num_heads * HEAD_DIM for b, n in zip(shapes[::2], shapes[1::2], strict=True))


def _backward_flops(
    qkv: Any, out: Any, logs: Any, gradient: Any, shapes: Sequence[int], num_heads: int, *args: Any, **kwargs: Any
) -> int:
    """Count the four products that have to be; the kernel does seven, because it keeps nothing."""
    return 2 * _flops(qkv, shapes, num_heads)


@cache
def let_torch_count() -> None:
    """Tell `torch.utils.flop_counter` of the attention; not done on import, since its own takes 70 MiB."""
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.opendino.packed_attention)(_flops)
    register_flop_formula(torch.ops.opendino.packed_attention_backward)(_backward_flops)


def _library() -> ctypes.CDLL:
    library = kernels().library
    assert library is not None
    return library


def _groups(shapes: Sequence[int]) -> Iterator[tuple[slice, int, int]]:
    """Give rows, B and N of each group of a packed batch."""
    start = 0
    for batch, tokens in zip(shapes[::2], shapes[1::2], strict=True):
        yield slice(start, start + batch * tokens), batch, tokens
        start += batch * tokens


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
