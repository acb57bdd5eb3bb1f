# SPDX-License-Identifier: Apache-2.0
"""The backbone run by PyTorch: as it is, or in bf16 on a CPU as a copy prepared for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from opendino.embed.runtimes.base import Precision, split_tokens
from opendino.embed.runtimes.prepared import PreparedViT, packs, preparable
from opendino.embed.runtimes.stored import StoredModel
from opendino.errors import ConfigError
from opendino.images.preprocess import normalise
from opendino.models.fingerprint import weights_fingerprint
from opendino.models.vit import VisionTransformer

_Computed = Literal["fp32", "bf16", "fp16"]
_DTYPES: dict[_Computed, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchRuntime:
    """Runs a model where it lies; a model in training stays in training and up to date.

    Args:
        model: the backbone; or one in a file, on the CPU in bf16, whose weights then are in memory once: as they are
            prepared. `model` reads it again when it is asked for.
        precision: see `resolve_precision`.
    """

    name: str = "torch"
    takes_floats = True
    gives: tuple[str, ...] = ("cls", "mean", "patches", "registers")
    size: tuple[int, int] | None = None

    def __init__(self, model: VisionTransformer | StoredModel, precision: str = "auto") -> None:
        self._lock = Lock()
        self._prepared: PreparedViT | None = None
        self._prepared_from: list[tuple[int, int]] = []
        self._stored = model if isinstance(model, StoredModel) else None
        self._model: VisionTransformer | None = None
        if isinstance(model, StoredModel):
            model = self._read(model)
        else:
            self._model = model
        self.config, self.spec, self.device = model.config, model.preprocess, model.cls_token.device
        own = torch.float32 if self._stored else model.cls_token.dtype
        self.precision: str = resolve_precision(precision, self.device, own)
        # A plain model on a CPU gets floats: the threads that read normalise better than the one that computes.
        self.takes_pixels: bool = self._is_prepared() or self.device.type != "cpu"
        self.takes_turns: bool = self._is_prepared()

    def _read(self, stored: StoredModel) -> VisionTransformer:
        """Prepare a model from its file; give it back, used up, or whole where it cannot be prepared."""
        found = stored.read("auto")
        if preparable(found):
            self._prepared = PreparedViT(found, "bf16", consume=True)
        else:
            self._model, self._stored = found.float(), None
        return found

    @property
    def model(self) -> VisionTransformer:
        """The backbone; one in a file is read in fp32 when it is first asked for, and kept."""
        if self._model is None:
            assert self._stored is not None
            self._model = self._stored.read(None)
            self._prepared_from = _versions(self._model)
        return self._model

    def vectors(self, images: Tensor, layers: int, what: Sequence[str]) -> dict[str, Tensor]:
        """Give the vectors of images (B, C, H, W), normalised or uint8; see `Runtime`."""
        registers = self.config.num_register_tokens
        if not self._is_prepared():
            return split_tokens(self.tokens(images, layers), registers, what)
        with self._lock:
            prepared = self._prepare()
        images = images if images.dtype is torch.uint8 else images.float()

        @torch.inference_mode()
        def pick(tokens: Tensor) -> dict[str, Tensor]:
            # A copy, so that a cls token does not keep all tokens in memory.
            return {name: found.clone() for name, found in split_tokens(tokens, registers, what).items()}

        parts = prepared.by_pieces(images, layers, pick)
        return {name: torch.cat([part[name] for part in parts]) for name in what}

    @torch.inference_mode()
    def tokens(self, images: Tensor, layers: int) -> Tensor:
        """Give the normalised tokens of the last `layers` blocks, (B, 1 + R + P, L·D) fp32."""
        if self._is_prepared():
            with self._lock:
                prepared = self._prepare()
            return prepared.tokens(images if images.dtype is torch.uint8 else images.float(), layers)
        if images.dtype is torch.uint8:
            images = normalise(images.to(self.device), self.spec)
        model, outputs, was_training = self.model, [], self.model.training
        model.eval()
        try:
            with self._autocast():
                tokens = model.prepare_tokens(images.to(self.device, model.cls_token.dtype))
                for i, block in enumerate(self._blocks()):
                    tokens = block(tokens)
                    if i >= model.n_blocks - layers:
                        outputs.append(model.norm(tokens).float())
        finally:
            model.train(was_training)
        return torch.cat(outputs, dim=-1)

    def _blocks(self) -> Iterable[Callable[[Tensor], Tensor]]:
        return self.model.blocks

    def _is_prepared(self) -> bool:
        """Say whether bf16 products in oneDNN's layout serve: fp32 weights on a CPU that has them."""
        if self._model is None:
            return True
        fp32_on_cpu = self.device.type == "cpu" and self._model.cls_token.dtype is torch.float32
        return self.precision == "bf16" and fp32_on_cpu and packs(torch.bfloat16) and preparable(self._model)

    def _prepare(self) -> PreparedViT:
        """Give the prepared copy of the weights, made again when they were changed."""
        now = self._prepared_from if self._model is None else _versions(self._model)
        if self._prepared is None or now != self._prepared_from:
            self._prepared, self._prepared_from = self._make_prepared(), now
        return self._prepared

    def _make_prepared(self) -> PreparedViT:
        return PreparedViT(self.model, "bf16")

    def weights_sha256(self) -> str:
        """Give the fingerprint of the weights as they are now."""
        if self._model is None and self._stored is not None:
            return self._stored.weights_sha256()
        return weights_fingerprint(self.model)

    def identity(self) -> dict[str, Any]:
        """Give nothing: PyTorch's vectors are the ones that others are told from."""
        return {}

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = _DTYPES[cast(_Computed, self.precision)]
        if dtype == self.model.cls_token.dtype:
            return nullcontext()
        # Autocast leaves the caller's weights as they are, so an Embedder on a model in training stays up to date.
        return torch.autocast(self.device.type, dtype=dtype)


def _versions(model: VisionTransformer) -> list[tuple[int, int]]:
    """Give what changes when a parameter is replaced or written to; of one made in inference mode the former alone."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]


def resolve_precision(precision: str, device: torch.device, model_dtype: torch.dtype = torch.float32) -> _Computed:
    """Give the precision to compute in.

    "auto" is the model's own when it was cast to bf16 or fp16; else fp32 on a CPU, and on CUDA bf16 or fp16. A named
    one is checked and given back.

    Raises:
        ConfigError: for an unknown name, or another one than a cast model has.
    """
    if precision not in get_args(Precision):
        raise ConfigError(f"precision is {precision!r}; it must be one of {', '.join(get_args(Precision))}.")
    if precision == "int8":
        raise ConfigError(
            "precision is 'int8', which is for vectors on a CPU only: Embedder(model, precision='int8'), opendino "
            "embed --precision int8, or an exported file (opendino export onnx --precision int8). Use bf16 here."
        )
    own: _Computed = next((n for n, d in _DTYPES.items() if d == model_dtype), "fp32")
    if own != "fp32":
        if precision not in ("auto", own):
            raise ConfigError(
                f"precision is {precision!r}, but the model's weights are {own}. Give {own}, or fp32 weights."
            )
        return own
    if precision != "auto":
        return cast(_Computed, precision)
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
