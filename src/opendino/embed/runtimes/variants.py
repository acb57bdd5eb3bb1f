# SPDX-License-Identifier: Apache-2.0
"""Every runtime by name, and PyTorch's other forms: compiled, and prepared for a CPU in fp32."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from opendino.embed.runtimes.base import Runtime
from opendino.embed.runtimes.prepared import PreparedViT, packs, preparable
from opendino.embed.runtimes.pytorch import TorchRuntime
from opendino.errors import ConfigError
from opendino.models.vit import VisionTransformer

RUNTIMES = ("torch", "torch-prepared", "torch-compiled", "onnx", "openvino")


def make_runtime(model: VisionTransformer, name: str, precision: str = "auto") -> Runtime:
    """Make a runtime of a model.

    Args:
        model: the backbone.
        name: one of RUNTIMES.
        precision: "auto" is the runtime's own choice.

    Raises:
        ConfigError: for a name or precision that is not there.
        MissingExtraError: when its package is not installed.
    """
    if name == "torch" and precision == "int8":
        from opendino.embed.runtimes.int8 import Int8Runtime

        return Int8Runtime(model)
    if name == "torch":
        return TorchRuntime(model, precision)
    if name == "torch-prepared":
        return PreparedRuntime(model, precision)
    if name == "torch-compiled":
        return CompiledRuntime(model, precision)
    if name not in RUNTIMES:
        raise ConfigError(f"runtime is {name!r}; it must be auto or one of {', '.join(RUNTIMES)}.")
    from opendino.embed.runtimes.exported import CachedExportRuntime

    return CachedExportRuntime(model, "onnx" if name == "onnx" else "openvino", precision)


class PreparedRuntime(TorchRuntime):
    """Runs a copy of the weights that is prepared for a CPU, in fp32 too: the same numbers up to rounding.

    Args:
        model: the backbone, fp32 on the CPU.
        precision: "auto" is fp32; fp32 or bf16.

    Raises:
        ConfigError: where it cannot be: another device or precision, or a torch without oneDNN's packed products.
    """

    name = "torch-prepared"

    def __init__(self, model: VisionTransformer, precision: str = "auto") -> None:
        super().__init__(model, precision)
        why = self._missing()
        if why:
            raise ConfigError(f"runtime is 'torch-prepared', but {why}. Use the runtime torch.")

    def _missing(self) -> str:
        if self.device.type != "cpu" or self.model.cls_token.dtype is not torch.float32:
            return f"the model is {self.model.cls_token.dtype} on {self.device}, and it needs fp32 weights on the CPU"
        if not preparable(self.model):
            return "the model has layers that are not this package's own, such as adapters"
        if self.precision not in ("fp32", "bf16"):
            return f"precision is {self.precision!r}, and it computes in fp32 or bf16"
        dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        return "" if packs(dtype) else f"this torch has no packed {self.precision} products for this processor"

    def _is_prepared(self) -> bool:
        return True

    def _make_prepared(self) -> PreparedViT:
        return PreparedViT(self.model, "fp32" if self.precision == "fp32" else "bf16")

    def identity(self) -> dict[str, Any]:
        """Give the runtime: its fp32 is rounded in another order than PyTorch's."""
        return {"runtime": self.name}


class CompiledRuntime(TorchRuntime):
    """Runs a model through torch.compile, block by block; the model itself stays as it is.

    The first batch of each size takes seconds to minutes.

    Args:
        model: the backbone.
        precision: see `opendino.embed.runtimes.pytorch.resolve_precision`.
        backend: of torch.compile.

    Raises:
        ConfigError: where nothing can be compiled.
    """

    name = "torch-compiled"

    def __init__(self, model: VisionTransformer, precision: str = "auto", backend: str = "inductor") -> None:
        super().__init__(model, precision)
        if backend == "inductor" and not can_compile(self.device):
            raise ConfigError(
                f"runtime is 'torch-compiled', but nothing can be compiled for {self.device} here: it needs "
                f"{'a C++ compiler' if self.device.type == 'cpu' else 'Triton and a CUDA device'}. Use the runtime "
                "torch."
            )
        # The second batch size seen, such as a last, shorter batch, makes the code general instead of building more.
        self._compiled = [torch.compile(block, dynamic=None, backend=backend) for block in model.blocks]

    def _blocks(self) -> Iterable[Callable[[Tensor], Tensor]]:
        return self._compiled

    def _is_prepared(self) -> bool:
        return False

    def identity(self) -> dict[str, Any]:
        """Give the runtime: fused operations are rounded less often than PyTorch's."""
        return {"runtime": self.name}


def can_compile(device: torch.device) -> bool:
    """Say whether torch.compile can build code: on a CPU it needs a C++ compiler, on CUDA Triton."""
    if device.type == "cpu":
        return any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return device.type == "cuda" and bool(torch.utils._triton.has_triton())
