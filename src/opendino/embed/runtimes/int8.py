# SPDX-License-Identifier: Apache-2.0
"""The backbone on a CPU with its feed-forward layers, two thirds of all products, in int8; the rest is bf16.

Each patch token has an 8-bit scale of its own, found from the token itself: no calibration is needed, and an image's
vector does not depend on others. The cls and register tokens, one in 257 at 224 px, keep bf16 feed-forward layers:
their own rounding is what a cls vector would suffer from most, while that of the patches averages out in attention.
So do patch tokens with a few values so large that 8 bits leave little of the others, as large models have (Darcet et
al. 2024).
Attention's layers stay in bf16 because rounded keys disturb a cls vector more than all feed-forward layers together.
docs/export.md says more, benchmarks/RESULTS.md has the figures.

Calibration on a user's images rounds each weight so that the rounding of those before it is made up for.

Shapes: B images, N tokens, D width, K inputs of a layer.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opendino.embed.runtimes.agreement import Agreement
from opendino.embed.runtimes.prepared import PreparedBlock, PreparedViT, packs, preparable, scaled
from opendino.embed.runtimes.pytorch import TorchRuntime
from opendino.embed.runtimes.rounding import round_for
from opendino.errors import ConfigError
from opendino.models.layers import Block, SwiGLU
from opendino.models.vit import VisionTransformer
from opendino.native.attention import attention_supported
from opendino.native.build import kernels
from opendino.native.int8 import PackedLinear, add_feed_forward, int8_supported, quantise_weight

MOST_CLS, MOST_PATCHES, LEAST_VOTES = 3e-4, 5e-5, 0.995
"""The floor: 1 − cosine to fp32 of the worst cls token and of the patches, mean; share of k-NN answers that stay, where
there are labels and ENOUGH images to tell (`opendino.embed.runtimes.agreement`)."""
ENOUGH = 1000
PIECE_VALUES = 2**21
"""Of the residual stream in a piece of a batch. More than in bf16: hidden layers stay in the cache whatever its size,
and the bf16 weights for cls and registers are read once a piece."""
MOST_CALIBRATION = 32
"""Images: 8192 patch tokens at 224 px, twice the inputs of the widest layer of a ViT-L."""


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
        self.calibration: Tensor | None = None

    def calibrate(self, images: Tensor) -> None:
        """Round the weights for images like these, and again for the same ones whenever the weights change.

        Args:
            images: (n, C, H, W) normalised, of the size that will be used; MOST_CALIBRATION of them are kept.
        """
        self.calibration, self._prepared = images[:MOST_CALIBRATION].clone(), None

    def identity(self) -> dict[str, Any]:
        """Give the digest of the images that it was calibrated on."""
        if self.calibration is None:
            return {}
        return {"calibration_sha256": hashlib.sha256(self.calibration.contiguous().numpy().tobytes()).hexdigest()}

    def _is_prepared(self) -> bool:
        return True

    def _make_prepared(self) -> PreparedViT:
        return Int8ViT(self.model, self.calibration)


def too_far(close: Agreement) -> str | None:
    """Say which floor of int8 the vectors miss, or None."""
    if not close.cls <= MOST_CLS:
        return f"1 − cosine of the worst cls token is {close.cls:.1e}, more than {MOST_CLS:.0e}"
    if not close.patches <= MOST_PATCHES:
        return f"1 − cosine of the patches is {close.patches:.1e}, more than {MOST_PATCHES:.0e}"
    if close.votes is not None and close.images >= ENOUGH and close.votes < LEAST_VOTES:
        return f"{close.votes:.2%} of the k-NN answers are the same, fewer than {LEAST_VOTES:.1%}"
    return None


def unsupported(model: VisionTransformer) -> str | None:
    """Say why a model cannot run in int8 here and what to do, or None."""
    device, dtype = model.cls_token.device, model.cls_token.dtype
    if device.type != "cpu" or dtype is not torch.float32:
        return (
            f"precision is 'int8', which needs a model with fp32 weights on the CPU; this one is {dtype} on {device}. "
            "Give bf16 or fp16 there, or load the model in fp32 with device='cpu'."
        )
    if not preparable(model):
        return (
            "precision is 'int8', which is for backbones of this package as they are; this one has layers of another "
            "kind, such as adapters. Merge them into the weights first, or use fp32."
        )
    if not int8_supported(kernels().library):
        reason = "this processor has no AVX-512 VNNI" if kernels().library else kernels().about.rstrip(".")
        return (
            f"precision is 'int8', which a kernel of ours computes, and it cannot run here: {reason}. Use bf16 or "
            "fp32, or export an int8 file (opendino export onnx --precision int8) and give it instead of the model."
        )
    return None


class Int8ViT(PreparedViT):
    """A frozen copy of a backbone's weights with int8 feed-forward layers.

    Args:
        model: the backbone, where `unsupported` says nothing.
        calibration: (n, C, H, W) normalised images that weights are rounded for; None rounds to the nearest.
        threads: default: torch's number.
    """

    def __init__(self, model: VisionTransformer, calibration: Tensor | None = None, threads: int | None = None) -> None:
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                self.seen = None if calibration is None else model.prepare_tokens(calibration.float())
            super().__init__(model, _precision(), threads)
        finally:
            model.train(was_training)
            self.seen = None

    def _prepared_block(self, block: Block, finished: Callable[[Tensor], None] | None = None) -> PreparedBlock:
        leading = 1 + self.config.num_register_tokens
        first, second = _linears(block)
        inputs: list[Tensor] = []
        if self.seen is not None:
            hooks = [
                linear.register_forward_pre_hook(lambda _, given: inputs.append(given[0][:, leading:].flatten(0, 1)))
                for linear in (first, second)
            ]
            try:
                self.seen = block(self.seen)
            finally:
                for hook in hooks:
                    hook.remove()
        return Int8Block(block, self.dtype, self.library, leading, inputs)

    def _piece_values(self) -> int:
        return PIECE_VALUES


class Int8Block(PreparedBlock):
    """A block whose feed-forward adds itself to the residual stream: it gives no branch back.

    Args:
        block: the model's.
        dtype: of all other products.
        library: for attention and LayerNorm, or None.
        leading: first tokens of an image that are not computed in int8.
        inputs: typical ones of both linear layers, (n, K) each, or none.
    """

    def __init__(
        self, block: Block, dtype: torch.dtype, library: ctypes.CDLL | None, leading: int, inputs: Sequence[Tensor] = ()
    ) -> None:
        super().__init__(block, dtype, library)
        self.leading = leading
        first, second = _linears(block)
        layers = [(first.weight.detach(), first.bias), scaled(second, block.ls2)]
        rounded = [
            round_for(weight, inputs[i]) if inputs else quantise_weight(weight) for i, (weight, _) in enumerate(layers)
        ]
        biases = [None if bias is None else bias.detach() for _, bias in layers]
        self.first = PackedLinear(*rounded[0], biases[0], gated=self.gated)
        self.second = PackedLinear(*rounded[1], biases[1], inputs=self.first.gives)

    def __call__(self, stream: Tensor, branch: Tensor | None, tokens: int) -> None:
        """Do all of the block to the residual stream, in place."""
        library = kernels().library
        assert library is not None
        x = self.attention(stream, branch, tokens).unflatten(0, (-1, tokens))
        images = stream.unflatten(0, (-1, tokens))
        others = add_feed_forward(
            library, x.bfloat16(), images, self.first, self.second, gated=self.gated, skipped=self.leading,
            threads=torch.get_num_threads(),
        )  # fmt: skip
        others[:, : self.leading] = True
        images[others] += self.feed_forward(x[others])


def _precision() -> Literal["fp32", "bf16"]:
    """Of all that is not int8: bf16 where the processor has its products; some with VNNI have not."""
    library = kernels().library
    return "bf16" if library and packs(torch.bfloat16) and attention_supported(library) else "fp32"


def _linears(block: Block) -> tuple[nn.Linear, nn.Linear]:
    mlp = block.mlp
    return (mlp.w12, mlp.w3) if isinstance(mlp, SwiGLU) else (mlp.fc1, mlp.fc2)
