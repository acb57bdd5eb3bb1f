# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a graph in fp32, fp16 or int8; everything between them stays in fp32."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from opendino.export.builder import GraphBuilder
from opendino.export.calibrate import Range
from opendino.export.metadata import ExportPrecision

Floats = npt.NDArray[np.float32]
TINY = 1e-8


class LinearWriter:
    """Writes x·Wᵀ + b in one precision.

    fp16 keeps the weights and computes the products in half precision; the residual stream, LayerNorm and softmax stay
    in fp32, which costs little and keeps what half precision loses.

    int8 has weights with a scale for each output channel and inputs with one fixed scale, from their range on
    calibration images. ViTs have a few channels much larger than the rest, for which one scale is too coarse; so each
    input channel j is divided by √(max|x_j| / max|W_j|) and its weights multiplied by it, which shares the difficulty
    (SmoothQuant, Xiao et al. 2023, eq. 4 with α = 0.5). Written as quantise–dequantise pairs, which runtimes replace
    by integer products. Attention's own products stay in fp32.
    """

    def __init__(self, g: GraphBuilder, precision: ExportPrecision, ranges: Mapping[str, Range]) -> None:
        self.g, self.precision, self.ranges = g, precision, ranges

    def __call__(self, name: str, x: str, weight: Floats, bias: Floats | None) -> str:
        """Add the nodes of one layer: x (…, in), weight (out, in), bias (out,)."""
        if self.precision == "int8":
            out = self._integer(name, x, weight, self.ranges[name])
        else:
            turned = weight.T.astype(np.float16 if self.precision == "fp16" else np.float32)
            out = self.product(x, self.g.const(turned, f"{name}.weight"), halved=True)
        return out if bias is None else self.g.op("Add", self.g.const(bias, f"{name}.bias"), out)

    def product(self, a: str, b: str, halved: bool = False) -> str:
        """Add a matrix product of fp32 values with an fp32 result; `halved` says that b is fp16 already."""
        if self.precision != "fp16":
            return self.g.op("MatMul", a, b)
        a = self.g.op("Cast", a, to="float16")
        b = b if halved else self.g.op("Cast", b, to="float16")
        return self.g.op("Cast", self.g.op("MatMul", a, b), to="float32")

    def _integer(self, name: str, x: str, weight: Floats, seen: Range) -> str:
        g, share = self.g, smoothing(weight, seen)
        scale, zero = input_scale(seen.low / share, seen.high / share)
        smooth = g.op("Mul", x, g.const(1 / share, f"{name}.smooth"))
        steps = (g.const(scale, f"{name}.input_scale"), g.const(zero, f"{name}.input_zero"))
        rounded = g.op("DequantizeLinear", g.op("QuantizeLinear", smooth, *steps), *steps)
        integers, scales = quantised(weight * share)
        zeros = np.zeros(len(scales), np.int8)
        kept = (g.const(v, f"{name}.{n}") for v, n in ((integers.T, "weight"), (scales, "scale"), (zeros, "zero")))
        return g.op("MatMul", rounded, g.op("DequantizeLinear", *kept, axis=1))


def smoothing(weight: Floats, seen: Range) -> Floats:
    """Give what each input channel is divided by, (in,), from weights (out, in) and the range of the inputs."""
    inputs = np.maximum(np.maximum(-seen.low, seen.high), TINY)
    weights = np.maximum(np.abs(weight).max(0), TINY)
    out: Floats = np.sqrt(inputs / weights).astype(np.float32)
    return out


def input_scale(low: Floats, high: Floats) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """Give scale and zero point of uint8 for values of a range that holds 0."""
    bottom, top = min(float(low.min()), 0.0), max(float(high.max()), 0.0)
    scale = max((top - bottom) / 255, TINY)
    return np.array(scale, np.float32), np.array(round(-bottom / scale), np.uint8)


def quantised(weight: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """Give int8 weights (out, in) and the scale of each output channel, (out,)."""
    scales = np.maximum(np.abs(weight).max(1) / 127, TINY).astype(np.float32)
    return np.clip(np.rint(weight / scales[:, None]), -127, 127).astype(np.int8), scales
