# SPDX-License-Identifier: Apache-2.0
"""The feed-forward of a block in int8 by the compiled kernel: packing of the weights, and the call.

Shapes: T tokens, K inputs, H hidden values, D outputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from opendino.native.threads import run_together

PANEL = 32
"""Outputs that lie together (int8.c); of a gated layer 16 gates and their 16 values."""
MOST_WEIGHT = 127
MOST_NOISE = 0.02
"""Rounding noise of a token's activations, in parts of their root mean square, from which on 8 bits are too few. A bell
curve of 1000 values has 0.007; it is above when one value of 1536 has a fifth of all energy."""
WORK_PER_THREAD = 2**24
"""Starting a thread takes about as long as so many products."""


def int8_supported(library: ctypes.CDLL | None) -> bool:
    """Say whether there are kernels and this processor has what the int8 one is made of: AVX-512 VNNI."""
    return library is not None and bool(library.int8_supported())


class _Linear(ctypes.Structure):
    """`Linear` of int8.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "sum", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
    )


class _FeedForward(ctypes.Structure):
    """`FeedForward` of int8.c."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        ("coarse", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("images", "tokens", "skipped", "in", "out", "gated")),
        ("most", ctypes.c_float),
        ("first", _Linear),
        ("second", _Linear),
        ("next", ctypes.c_void_p),
    )


class PackedLinear:
    """An int8 layer as the kernel reads it.

    Args:
        weight: int8 (out, in), not −128.
        scale: fp32 (out,), so that weight · scale is what is meant.
        bias: fp32 (out,), or None for 0.
        gated: whether the outputs are gates and then as many values.
        inputs: of the layer before as they lie in memory; default: the next multiple of 4.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor, bias: Tensor | None, *, gated: bool = False, inputs: int | None = None
    ) -> None:
        bias = torch.zeros(len(weight)) if bias is None else bias
        columns = [weight.float(), scale.float()[:, None], bias.float()[:, None]]
        rows = torch.cat(columns, 1)
        rows = torch.cat(list(_panels(rows, gated)))
        self.scale, self.bias = rows[:, -2].contiguous(), rows[:, -1].contiguous()
        self.sum = rows[:, :-2].sum(1) * self.scale
        width = weight.shape[1]
        values = F.pad(rows[:, :-2], (0, (width + -width % 4 if inputs is None else inputs) - width)).to(torch.int8)
        self.outputs, self.inputs = values.shape
        self.gives = self.outputs // 2 if gated else self.outputs
        # [panel][4 inputs][output][input]
        self.weight = values.view(-1, PANEL, self.inputs // 4, 4).transpose(1, 2).contiguous()

    def __call__(self) -> _Linear:
        """Give it in the kernel's words; valid while this object lives."""
        tensors = (self.weight, self.scale, self.sum, self.bias)
        return _Linear(*(t.data_ptr() for t in tensors), self.inputs, self.outputs)


def _panels(rows: Tensor, gated: bool) -> Iterator[Tensor]:
    """Give rows in panels of 32, filled up with the last one: it widens no token's range of values."""
    if not gated:
        yield _filled(rows, PANEL)
        return
    half = PANEL // 2
    gates, values = (_filled(r, half) for r in rows.chunk(2))
    for pair in zip(gates.split(half), values.split(half), strict=True):
        yield from pair


def _filled(rows: Tensor, multiple: int) -> Tensor:
    return torch.cat([rows, rows[-1:].expand(-len(rows) % multiple, -1)])


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Give int8 (out, in) and its scales (out,) by rounding to the nearest."""
    scale = (weight.abs().amax(1) / MOST_WEIGHT).clamp_min(1e-30)
    return (weight / scale[:, None]).round().clamp(-MOST_WEIGHT, MOST_WEIGHT).to(torch.int8), scale


def add_feed_forward(
    library: ctypes.CDLL,
    x: Tensor,
    stream: Tensor,
    first: PackedLinear,
    second: PackedLinear,
    *,
    gated: bool,
    skipped: int,
    threads: int,
    most_noise: float = MOST_NOISE,
) -> Tensor:
    """Add W2·act(W1·x + b1) + b2 to a residual stream, with 8-bit activations of a scale of their own for each token.

    Args:
        library: of `opendino.native.build`, where `int8_supported`.
        x: contiguous bf16 (B, N, K) on the CPU.
        stream: contiguous fp32 (B, N, D), changed in place.
        first: K → H.
        second: H → D.
        gated: silu(gates)·values instead of GELU between them.
        skipped: first tokens of every image that are left alone.
        threads: at most so many, and as many as torch uses.
        most_noise: of activations, at the input and in the hidden layer.

    Returns:
        bool (B, N): tokens that were left alone because they have more noise.
    """
    images, tokens, width = x.shape
    assert x.dtype is torch.bfloat16
    assert stream.dtype is torch.float32
    assert x.is_contiguous()
    assert stream.is_contiguous()
    assert stream.shape[:2] == x.shape[:2]
    assert first.inputs - width in range(4)
    assert second.outputs - stream.shape[2] in range(PANEL)
    assert second.inputs == first.gives
    following = ctypes.c_long(0)
    coarse = torch.zeros(images, tokens, dtype=torch.bool)
    pointers = (t.data_ptr() for t in (x, stream, coarse))
    sizes = (images, tokens, skipped, width, stream.shape[2], int(gated))
    job = _FeedForward(*pointers, *sizes, most_noise, first(), second(), ctypes.addressof(following))
    work = images * tokens * (first.inputs * first.outputs + second.inputs * second.outputs)
    run_together(lambda: int(library.feed_forward_int8(ctypes.byref(job))), min(threads, work // WORK_PER_THREAD))
    return coarse
