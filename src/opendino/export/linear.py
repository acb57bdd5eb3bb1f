# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a graph in fp32 or fp16; everything between them stays in fp32."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from opendino.export.builder import GraphBuilder
from opendino.export.metadata import ExportPrecision

Floats = npt.NDArray[np.float32]


class LinearWriter:
    """Writes x·Wᵀ + b in one precision.

    fp16 keeps the weights and computes the products in half precision; the residual stream, LayerNorm and softmax stay
    in fp32, which costs little and keeps what half precision loses.
    """

    def __init__(self, g: GraphBuilder, precision: ExportPrecision, ranges: Mapping[str, Floats]) -> None:
        self.g, self.precision, self.ranges = g, precision, ranges

    @property
    def holds_small_weights(self) -> bool:
        """Whether γ·W can be kept with γ of a fresh LayerScale; fp16 has no room below 6e-8."""
        return self.precision != "fp16"

    def __call__(self, name: str, x: str, weight: Floats, bias: Floats | None) -> str:
        """Add the nodes of one layer: x (…, in), weight (out, in), bias (out,)."""
        out = self._product(name, x, weight)
        return out if bias is None else self.g.op("Add", self.g.const(bias, f"{name}.bias"), out)

    def _product(self, name: str, x: str, weight: Floats) -> str:
        turned = weight.T.astype(np.float16 if self.precision == "fp16" else np.float32)
        return self.product(x, self.g.const(turned, f"{name}.weight"), halved=True)

    def product(self, a: str, b: str, halved: bool = False) -> str:
        """Add a matrix product of fp32 values with an fp32 result; `halved` says that b is fp16 already."""
        if self.precision != "fp16":
            return self.g.op("MatMul", a, b)
        a = self.g.op("Cast", a, to="float16")
        b = b if halved else self.g.op("Cast", b, to="float16")
        return self.g.op("Cast", self.g.op("MatMul", a, b), to="float32")
