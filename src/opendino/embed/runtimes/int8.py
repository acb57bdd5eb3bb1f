# SPDX-License-Identifier: Apache-2.0
"""The backbone on a CPU with its feed-forward layers, two thirds of all products, in int8; the rest is bf16.

Each patch token has an 8-bit scale of its own, found from the token itself: no calibration is needed, and an image's
vector does not depend on others. The cls and register tokens, one in 257 at 224 px, keep bf16 feed-forward layers:
their own rounding is what a cls vector would suffer from most, while that of the patches averages out in attention.
Attention's layers stay in bf16 because rounded keys disturb a cls vector more than all feed-forward layers together.
docs/export.md has the figures.

Calibration on a user's images rounds each weight so that the rounding of those before it is made up for.

Shapes: B images, N tokens, D width, K inputs of a layer.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from opendino.embed.runtimes.prepared import PreparedBlock, PreparedViT, packs, scaled
from opendino.embed.runtimes.pytorch import TorchRuntime
from opendino.errors import ConfigError
from opendino.models.layers import Block, SwiGLU
from opendino.models.vit import VisionTransformer
from opendino.native.build import kernels
from opendino.native.int8 import PackedLinear, add_feed_forward, int8_supported, quantise_weight

OFFERED_BY_AUTO = True
"""Whether the runtime auto may choose int8 where it is fastest and within its floor."""


class Int8Runtime(TorchRuntime):
    """Runs a model on the CPU with feed-forward layers in int8; a model in training stays up to date.

    Args:
        model: the backbone, fp32 on the CPU.

    Raises:
        ConfigError: where it cannot be, with what to do instead.
    """

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__(model, "auto")
        why = unsupported(model)
        if why:
            raise ConfigError(why)
        self.precision = "int8"

    def _is_prepared(self) -> bool:
        return True

    def _prepare(self) -> PreparedViT:
        now = [(p.data_ptr(), p._version) for p in self.model.parameters()]
        if self._prepared is None or now != self._prepared_from:
            self._prepared, self._prepared_from = Int8ViT(self.model), now
        return self._prepared


def unsupported(model: VisionTransformer) -> str | None:
    """Say why a model cannot run in int8 here and what to do, or None."""
    device, dtype = model.cls_token.device, model.cls_token.dtype
    if device.type != "cpu" or dtype is not torch.float32:
        return (
            f"precision is 'int8', which needs a model with fp32 weights on the CPU; this one is {dtype} on {device}. "
            "Give bf16 or fp16 there, or load the model in fp32 with device='cpu'."
        )
    if not int8_supported(kernels().library):
        reason = "this processor has no AVX-512 VNNI" if kernels().library else kernels().about.rstrip(".")
        return (
            f"precision is 'int8', which a kernel of ours computes, and it cannot run here: {reason}. Use bf16 or fp32, "
            "or export an int8 file (opendino export onnx --precision int8) and give it instead of the model."
        )
    return None


class Int8ViT(PreparedViT):
    """A frozen copy of a backbone's weights with int8 feed-forward layers.

    Args:
        model: the backbone, where `unsupported` says nothing.
        threads: default: torch's number.
    """

    def __init__(self, model: VisionTransformer, threads: int | None = None) -> None:
        super().__init__(model, "bf16" if packs(torch.bfloat16) else "fp32", threads)

    def _prepared_block(self, block: Block) -> PreparedBlock:
        return Int8Block(block, self.dtype, self.library, 1 + self.config.num_register_tokens)


class Int8Block(PreparedBlock):
    """A block whose feed-forward adds itself to the residual stream: it gives no branch back.

    Args:
        block: the model's.
        dtype: of all other products.
        library: for attention and LayerNorm, or None.
        leading: first tokens of an image that are not computed in int8.
    """

    def __init__(self, block: Block, dtype: torch.dtype, library: ctypes.CDLL | None, leading: int) -> None:
        super().__init__(block, dtype, library)
        self.leading, mlp = leading, block.mlp
        first, second = (mlp.w12, mlp.w3) if isinstance(mlp, SwiGLU) else (mlp.fc1, mlp.fc2)
        weight, bias = first.weight.detach(), None if first.bias is None else first.bias.detach()
        self.first = PackedLinear(*quantise_weight(weight), bias, gated=self.gated)
        weight, bias = scaled(second, block.ls2)
        self.second = PackedLinear(
            *quantise_weight(weight), None if bias is None else bias.detach(), inputs=self.first.gives
        )

    def __call__(self, stream: Tensor, branch: Tensor | None, tokens: int) -> None:
        """Do all of the block to the residual stream, in place."""
        library = kernels().library
        assert library is not None
        x = self.attention(stream, branch, tokens).unflatten(0, (-1, tokens))
        images = stream.unflatten(0, (-1, tokens))
        kept = self.feed_forward(x[:, : self.leading].flatten(0, 1)).unflatten(0, (-1, self.leading))
        add_feed_forward(
            library, x.bfloat16(), images, self.first, self.second, gated=self.gated, skipped=self.leading,
            threads=torch.get_num_threads(),
        )  # fmt: skip
        images[:, : self.leading] += kept
