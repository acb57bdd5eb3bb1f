# SPDX-License-Identifier: Apache-2.0
"""The position table resized inside a graph, by plain products whose weights are made from the image's size.

Bicubic interpolation is separable: out = Wy · T · Wxᵀ, where row i of Wy (h, G) holds the cubic kernel at the distances
between target row i and the table's rows. Wy and Wx follow from h and w with arithmetic that every runtime has, so one
file serves all sizes, in the three conventions of `opendino.models.positions`, without a resize operator (whose
antialiased and offset variants runtimes lack or compute otherwise).

Shapes: h × w target grid, G × G the table's own grid, D width.
"""

from __future__ import annotations

import numpy as np

from opendino.export.builder import GraphBuilder
from opendino.models.config import PosResize
from opendino.models.positions import OFFSET

KEYS_PLAIN, KEYS_ANTIALIAS = -0.75, -0.5
"""The cubic kernel's parameter in torch's bicubic interpolation without and with antialias."""


def resized_positions(g: GraphBuilder, table: np.ndarray, height: str, width: str, convention: PosResize) -> str:
    """Add the nodes that resize a table.

    Args:
        g: the graph so far.
        table: (G, G, D) fp32, without the cls entry.
        height: name of the target rows h, an int64 scalar.
        width: name of the target columns w.
        convention: see `opendino.models.config.PosResize`.

    Returns:
        Name of (1, h·w, D).
    """
    grid, dim = table.shape[0], table.shape[2]
    own = g.op("Mul", g.same(height, grid), g.same(width, grid))  # 1.0 where the grid is the table's own
    rows = _weights(g, height, own, grid, convention)  # (h, G)
    columns = _weights(g, width, own, grid, convention)  # (w, G)
    tall = g.op("MatMul", rows, g.const(table.reshape(grid, grid * dim), "pos_embed.patches"))  # (h, G·D)
    tall = g.op("Reshape", tall, g.const(np.array([-1, grid, dim])))  # (h, G, D)
    full = g.op("MatMul", columns, tall)  # (h, w, D)
    return g.op("Reshape", full, g.const(np.array([1, -1, dim])))


def _weights(g: GraphBuilder, size: str, own: str, grid: int, convention: PosResize) -> str:
    """Interpolation weights (size, G) along one axis; the identity when own is 1."""
    target = g.op("Cast", size, to="float32")
    if convention == "scale_offset":  # on the own grid the table is taken as it is, so there the offset is 0
        target = g.op("Add", target, g.op("Mul", g.op("Sub", g.f32(1.0), own), g.f32(OFFSET)))
    scale = g.op("Div", g.f32(grid), target)
    index = g.op("Cast", g.op("Range", g.const(np.array(0)), size, g.const(np.array(1))), to="float32")
    centre = g.op("Mul", g.op("Add", index, g.f32(0.5)), scale)  # in the table's rows, (size,)
    centre = g.op("Unsqueeze", centre, g.const(np.array([1])))  # (size, 1)
    if convention == "size_antialias":
        stretch = g.op("Max", scale, g.f32(1.0))  # a kernel as wide as a target row where the table shrinks
        taps = g.const((np.arange(grid, dtype=np.float32) + 0.5)[None])
        weights = _cubic(g, g.op("Div", g.op("Sub", taps, centre), stretch), KEYS_ANTIALIAS)
        return g.op("Div", weights, g.op("ReduceSum", weights, g.const(np.array([1])), keepdims=1))
    # Without antialias the four taps may lie up to two rows outside; those count for the row at the edge.
    taps = g.const(np.arange(-2, grid + 2, dtype=np.float32)[None] + np.float32(0.5))
    weights = _cubic(g, g.op("Sub", taps, centre), KEYS_PLAIN)  # (size, G + 4)
    return g.op("MatMul", weights, g.const(_edges(grid)))


def _edges(grid: int) -> np.ndarray:
    """(G + 4, G): tap j - 2 goes to row j - 2 clamped to the table."""
    fold = np.zeros((grid + 4, grid), np.float32)
    fold[np.arange(grid + 4), np.clip(np.arange(-2, grid + 2), 0, grid - 1)] = 1
    return fold


def _cubic(g: GraphBuilder, distance: str, a: float) -> str:
    """Keys' cubic kernel (1981), elementwise: (a+2)|x|³ - (a+3)|x|² + 1 up to 1, a|x|³ - 5a|x|² + 8a|x| - 4a up to 2.

    Written without a choice: beyond 1 it is a·(|x|-1)·(|x|-2)², so with m = min(|x|, 1) and r = 2 - min(max(|x|, 1), 2)
    the two pieces are the first at m, which is 0 at 1, and the second at 2 - r, which is 0 at 1 and at 2.
    """
    x = g.op("Abs", distance)
    m = g.op("Min", x, g.f32(1.0))
    inner = g.op("Sub", g.op("Mul", m, g.f32(a + 2)), g.f32(a + 3))
    inner = g.op("Add", g.op("Mul", g.op("Mul", inner, m), m), g.f32(1.0))
    r = g.op("Sub", g.f32(2.0), g.op("Min", g.op("Max", x, g.f32(1.0)), g.f32(2.0)))
    outer = g.op("Mul", g.op("Mul", g.op("Sub", g.f32(1.0), r), g.f32(a)), g.op("Mul", r, r))
    return g.op("Add", inner, outer)
