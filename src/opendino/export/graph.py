# SPDX-License-Identifier: Apache-2.0
"""The backbone as an ONNX graph, written by hand from the weights.

A ViT is ten lines of operators a block, so the graph is written directly instead of traced: it does not depend on what
a version of torch's exporter makes of the model, it has one product for queries, keys and values and an attention in
the form that runtimes fuse, and constant factors (LayerScale, 1/√d, pixel normalisation) are in the weights.

Shapes: B images, H × W pixels, h × w patches, P = h·w, R registers, N = 1 + R + P tokens, D width, A heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from opendino.export.builder import GraphBuilder
from opendino.export.calibrate import Range
from opendino.export.linear import LinearWriter
from opendino.export.metadata import ExportInfo
from opendino.export.positions import resized_positions
from opendino.models.positions import resize_pos_embed
from opendino.models.vit import VisionTransformer

Floats = npt.NDArray[np.float32]
INPUT = "images"
EPSILON = 1e-6


class BackboneGraph:
    """Writes one backbone.

    Args:
        model: the backbone; its weights are read as fp32.
        info: what the file is to be.
        ranges: for int8, of each linear layer's inputs (`opendino.export.calibrate.input_ranges`).
    """

    def __init__(self, model: VisionTransformer, info: ExportInfo, ranges: Mapping[str, Range] | None = None) -> None:
        self.model, self.info, self.c = model, info, model.config
        self.w = {k: v.detach().float().cpu().numpy() for k, v in model.state_dict().items()}
        self.g = GraphBuilder()
        self.linear = LinearWriter(self.g, info.precision, ranges or {})

    def build(self) -> tuple[GraphBuilder, list[Any], list[Any]]:
        """Give the graph, its inputs and its outputs."""
        tokens, wanted = self._tokens(), []
        for i in range(self.c.depth):
            tokens = self._block(tokens, i)
            if i >= self.c.depth - self.info.layers:
                wanted.append(self._norm(tokens, "norm"))
        final = wanted[0] if len(wanted) == 1 else self.g.op("Concat", *wanted, axis=-1, name="tokens")
        outputs = [self._output(name, final) for name in self.info.outputs]
        return self.g, [self._input()], outputs

    # --- from pixels to tokens -------------------------------------------------------------------------------------

    def _input(self) -> Any:
        height, width = self.info.size or ("height", "width")
        kind = self.g.onnx.TensorProto.UINT8 if self.info.uint8_input else self.g.onnx.TensorProto.FLOAT
        shape = [self.info.batch or "batch", self.c.in_chans, height, width]
        return self.g.onnx.helper.make_tensor_value_info(INPUT, kind, shape)

    def _tokens(self) -> str:
        """Patches with positions, after the cls token and the registers: (B, N, D)."""
        g, dim, p = self.g, self.c.embed_dim, self.c.patch_size
        weight, bias, x = self.w["patch_embed.proj.weight"], self.w["patch_embed.proj.bias"], INPUT
        if self.info.uint8_input:
            mean, std = (np.array(v, np.float32)[:, None, None] * 255 for v in self._statistics())
            x = g.op("Sub", g.op("Cast", x, to="float32"), g.const(mean[None]))
            weight = weight / std
        # A stride that does not divide the side drops the rest at the bottom and right, as the model does.
        grid = g.op(
            "Conv", x, g.const(weight, "patch_embed.proj.weight"), g.const(bias, "patch_embed.proj.bias"),
            kernel_shape=[p, p], strides=[p, p], name="patch_embed",
        )  # (B, D, h, w)  # fmt: skip
        patches = g.op("Reshape", grid, g.const(np.array([0, dim, -1])))
        patches = g.op("Transpose", patches, perm=[0, 2, 1])
        patches = g.op("Add", patches, self._positions(grid), name="patches_with_positions")
        return g.op("Concat", self._prefix(), patches, axis=1, name="tokens_0")

    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.info.preprocess.mean, self.info.preprocess.std

    def _positions(self, grid: str) -> str:
        """Position table of the patches, (1, P, D): baked for a fixed size, else resized in the graph."""
        table = torch.from_numpy(self.w["pos_embed"])
        if self.info.size is not None:
            h, w = (side // self.c.patch_size for side in self.info.size)
            return self.g.const(resize_pos_embed(table, h, w, self.c.pos_resize)[:, 1:].numpy(), "pos_embed.patches")
        shape = self.g.op("Shape", grid)
        rows, columns = (self.g.op("Gather", shape, self.g.const(np.array(axis)), axis=0) for axis in (2, 3))
        own = table[0, 1:].unflatten(0, (self.c.grid, self.c.grid)).numpy()
        return resized_positions(self.g, own, rows, columns, self.c.pos_resize)

    def _prefix(self) -> str:
        """The cls token with its position, and the registers, for each image: (B, 1 + R, D)."""
        prefix = self.w["cls_token"] + self.w["pos_embed"][:, :1]
        if self.c.num_register_tokens:
            prefix = np.concatenate([prefix, self.w["register_tokens"]], axis=1)
        if self.info.batch is not None:
            return self.g.const(np.repeat(prefix, self.info.batch, axis=0), "prefix")
        batch = self.g.op("Slice", self.g.op("Shape", INPUT), self.g.const(np.array([0])), self.g.const(np.array([1])))
        shape = self.g.op("Concat", batch, self.g.const(np.array([1, 1])), axis=0)
        return self.g.op("Expand", self.g.const(prefix, "prefix"), shape)

    # --- blocks ----------------------------------------------------------------------------------------------------

    def _block(self, x: str, number: int) -> str:
        x = self.g.op("Add", x, self._attention(self._norm(x, f"blocks.{number}.norm1"), number))
        ffn = self._mlp if self.c.ffn == "mlp" else self._swiglu
        return self.g.op("Add", x, ffn(self._norm(x, f"blocks.{number}.norm2"), number), name=f"block_{number}")

    def _norm(self, x: str, name: str) -> str:
        scale, bias = (self._shared(f"{name}.{part}") for part in ("weight", "bias"))
        return self.g.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=EPSILON)

    def _shared(self, name: str) -> str:
        return name if name in self.g.constants else self.g.const(self.w[name], name)

    def _attention(self, x: str, number: int) -> str:
        g, dim, heads = self.g, self.c.embed_dim, self.c.num_heads
        name = f"blocks.{number}.attn"
        weight, bias = self._layer(f"{name}.qkv")
        factor = np.ones(3 * dim, np.float32)
        factor[:dim] = (dim // heads) ** -0.5  # of the scores, in the queries
        qkv = self.linear(f"{name}.qkv", x, weight * factor[:, None], None if bias is None else bias * factor)
        q, k, v = g.ops("Split", qkv, g.const(np.array([dim] * 3)), results=3, axis=-1)
        q, v = (self._by_head(t, [0, 2, 1, 3]) for t in (q, v))  # (B, A, N, D/A)
        k = self._by_head(k, [0, 2, 3, 1])  # (B, A, D/A, N)
        attention = g.op("Softmax", self.linear.product(q, k), axis=-1)
        mixed = g.op("Transpose", self.linear.product(attention, v), perm=[0, 2, 1, 3])
        mixed = g.op("Reshape", mixed, g.const(np.array([0, 0, dim])))
        return self._scaled(f"{name}.proj", mixed, f"blocks.{number}.ls1.gamma")

    def _by_head(self, x: str, order: list[int]) -> str:
        heads, dim = self.c.num_heads, self.c.embed_dim
        split = self.g.op("Reshape", x, self.g.const(np.array([0, 0, heads, dim // heads])))
        return self.g.op("Transpose", split, perm=order)

    def _mlp(self, x: str, number: int) -> str:
        g, name = self.g, f"blocks.{number}.mlp"
        hidden = self.linear(f"{name}.fc1", x, *self._layer(f"{name}.fc1"))
        erf = g.op("Erf", g.op("Div", hidden, g.f32(float(np.sqrt(2.0)))))  # exact GELU, in the form that is fused
        hidden = g.op("Mul", g.op("Mul", hidden, g.op("Add", erf, g.f32(1.0))), g.f32(0.5))
        return self._scaled(f"{name}.fc2", hidden, f"blocks.{number}.ls2.gamma")

    def _swiglu(self, x: str, number: int) -> str:
        g, name = self.g, f"blocks.{number}.mlp"
        both = self.linear(f"{name}.w12", x, *self._layer(f"{name}.w12"))
        gate, value = g.ops("Split", both, g.const(np.array([self.c.hidden_dim] * 2)), results=2, axis=-1)
        hidden = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), value)
        return self._scaled(f"{name}.w3", hidden, f"blocks.{number}.ls2.gamma")

    def _layer(self, name: str) -> tuple[Floats, Floats | None]:
        """Weight (out, in) and bias of a linear layer."""
        return self.w[f"{name}.weight"], self.w.get(f"{name}.bias")

    def _scaled(self, name: str, x: str, gamma: str) -> str:
        """A linear layer with the LayerScale that follows it, γ·(W·x + b) = (γW)·x + γb."""
        weight, bias = self._layer(name)
        assert bias is not None
        if gamma not in self.w:
            return self.linear(name, x, weight, bias)
        scale = self.w[gamma]
        return self.linear(name, x, weight * scale[:, None], bias * scale)

    # --- results ---------------------------------------------------------------------------------------------------

    def _output(self, name: str, tokens: str) -> Any:
        g, regs, width = self.g, self.c.num_register_tokens, self.info.layers * self.c.embed_dim
        if name == "cls":
            g.op("Gather", tokens, g.const(np.array(0)), axis=1, name=name)
        elif name == "registers":
            self._slice(tokens, 1, 1 + regs, name)
        elif name == "patches":
            self._slice(tokens, 1 + regs, np.iinfo(np.int64).max, name)
        else:
            patches = self._slice(tokens, 1 + regs, np.iinfo(np.int64).max)
            g.op("ReduceMean", patches, axes=[1], keepdims=0, name=name)
        middle: dict[str, list[int | str]] = {"registers": [regs], "patches": [self._num_patches()]}
        shape = [self.info.batch or "batch", *middle.get(name, []), width]
        return g.onnx.helper.make_tensor_value_info(name, g.onnx.TensorProto.FLOAT, shape)

    def _num_patches(self) -> int | str:
        if self.info.size is None:
            return "patches"
        return (self.info.size[0] // self.c.patch_size) * (self.info.size[1] // self.c.patch_size)

    def _slice(self, tokens: str, start: int, end: int, name: str | None = None) -> str:
        bounds = (self.g.const(np.array([v])) for v in (start, end, 1))
        return self.g.op("Slice", tokens, *bounds, name=name)
