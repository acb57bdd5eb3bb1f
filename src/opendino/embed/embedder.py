# SPDX-License-Identifier: Apache-2.0
"""From images to feature vectors: reading, preprocessing, batching and the forward pass behind one call.

Shapes: n images, R registers, P = h·w patches, L `layers`, D width; every vector is L·D wide.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opendino.errors import ConfigError, DataError, MissingExtraError
from opendino.images.ahead import map_ahead
from opendino.images.arrays import read_image
from opendino.images.preprocess import Preprocess, crop_box
from opendino.images.sources import ImageSource, SourceImage, open_source
from opendino.models.vit import VisionTransformer

log = logging.getLogger(__name__)

What = Literal["cls", "mean", "patches"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Fit = Literal["crop", "resize", "pad"]
Array = npt.NDArray[np.float32]
ImageInput = Any
"""A path, a PIL image, or a uint8 array (H, W, C)."""

_Computed = Literal["fp32", "bf16", "fp16"]
_DTYPES: dict[_Computed, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Features:
    """Vectors of n images, numpy float32, one row an image in the order given.

    An image that could not be read keeps its row: NaN in every vector, and the reason in `errors`.

    Attributes:
        cls: (n, L·D) final cls tokens, or None when `what` leaves them out.
        mean: (n, L·D) mean of the patch tokens, or None.
        patches: (n, P, L·D), or None.
        registers: (n, R, L·D); R may be 0.
        grid: (h, w), patches; P = h·w, row by row.
        paths: path as text, or "" for an image given in memory.
        hashes: sha256 of the file's bytes; None for an image in memory or a file that could not be opened.
        errors: None, or why the image has no vectors.
    """

    cls: Array | None
    mean: Array | None
    patches: Array | None
    registers: Array
    grid: tuple[int, int]
    paths: list[str]
    hashes: list[str | None]
    errors: list[str | None]

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class _Read:
    path: str
    pixels: Tensor | None  # (C, H, W)
    sha256: str | None = None
    error: str | None = None


class Embedder:
    """Turns images into vectors with a frozen backbone.

    Args:
        model: a VisionTransformer, or whatever `opendino.load` takes.
        precision: "auto" is fp32 on a CPU, and on CUDA bf16 where the card has it, fp16 elsewhere.
        batch_size: images in one forward pass.
        device: default: where a given model lies; for a model loaded here CUDA if there is one, else the CPU.
        size: image side in pixels, or (height, width); default: the crop that travels with the model.
        fit: how an image is brought to that size (`opendino.images.preprocess`).
        layers: each vector is that of the last `layers` blocks, concatenated in the order of the blocks, each after the
            final LayerNorm; the last D values are the last block's.
        what: which vectors to give; registers are always given.
        workers: threads that read and preprocess ahead of the forward pass; 0 reads in the calling thread.
        weights: passed to `opendino.load` when `model` is not a VisionTransformer.

    Raises:
        ConfigError: for a setting out of range.

    Example:
        >>> vectors = Embedder("vits14")(["a.jpg", "b.jpg"]).cls  # doctest: +SKIP
    """

    def __init__(
        self,
        model: VisionTransformer | str | Path,
        *,
        precision: Precision = "auto",
        batch_size: int = 32,
        device: str | torch.device | None = None,
        size: int | tuple[int, int] | None = None,
        fit: Fit = "crop",
        layers: int = 1,
        what: Sequence[str] = ("cls", "mean", "patches"),
        workers: int | None = None,
        weights: str | Path | None = None,
    ) -> None:
        self.model = _as_model(model, device, weights)
        self.device = self.model.cls_token.device
        self.precision = resolve_precision(precision, self.device, self.model.cls_token.dtype)
        self.batch_size, self.layers, self.what = batch_size, layers, _checked_what(what)
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1.")
        if not 1 <= layers <= self.model.config.depth:
            raise ConfigError(
                f"layers is {layers}; the model has {self.model.config.depth} blocks: give 1 to that many."
            )
        self.workers = min(os.cpu_count() or 1, 8) if workers is None else workers
        self.preprocess = Preprocess(self.model.preprocess, size=size, fit=fit, patch_size=self.model.config.patch_size)
        self.size, self.fit = size, fit
        blank = torch.zeros(self.model.config.in_chans, 64, 64, dtype=torch.uint8)
        self.input_shape = tuple(self.preprocess(blank).shape)  # (C, H, W)
        self.grid = self.model.grid_of(torch.empty(1, *self.input_shape))

    def __call__(self, inputs: Sequence[ImageInput]) -> Features:
        """Embed a list of images and keep all vectors in memory; see `stream` for more than fit.

        Args:
            inputs: paths, PIL images, uint8 arrays (H, W, C), mixed as you like.

        Raises:
            DataError: for an array or object that is no image. A file that cannot be read is a row with an error, and
                is logged.
        """
        if isinstance(inputs, str | Path | np.ndarray):
            raise DataError(
                f"An Embedder was called with one {type(inputs).__name__}; it needs a list of images: [image]."
            )
        parts = list(self.stream(list(inputs))) or [self._pack([])]
        for part in parts:
            for path, error in zip(part.paths, part.errors, strict=True):
                if error:
                    log.warning("No vectors for %s: %s", path, error)
        return _concat(parts)

    def stream(self, source: ImageSource | str | Path | Iterable[ImageInput]) -> Iterator[Features]:
        """Embed in batches of at most `batch_size` rows, in order, holding about three batches of pixels at a time.

        Args:
            source: an opened source, something `open_source` takes, or any iterable of images, read lazily.
        """
        if isinstance(source, str | Path):
            source = open_source(source)
        items: Iterable[ImageInput] = source.images() if isinstance(source, ImageSource) else source
        reads = map_ahead(self._read, items, self.workers, 2 * self.batch_size)
        while batch := list(islice(reads, self.batch_size)):
            yield self._pack(batch)

    def _read(self, item: ImageInput) -> _Read:
        if not isinstance(item, str | Path | SourceImage):
            return _Read("", self._checked(self.preprocess(item)))
        path, sha256 = item.path if isinstance(item, SourceImage) else str(item), None
        try:
            data = item.data() if isinstance(item, SourceImage) else Path(path).read_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            pixels = read_image(data, channels=self.model.config.in_chans, name=path)
            if isinstance(item, SourceImage) and item.box is not None:
                pixels = crop_box(pixels, item.box, path)
            return _Read(path, self._checked(self.preprocess.of_file(pixels)), sha256)
        except MissingExtraError:
            raise
        except (DataError, OSError) as error:
            return _Read(path, None, sha256, str(error) or type(error).__name__)

    def _checked(self, pixels: Tensor) -> Tensor:
        if tuple(pixels.shape) != self.input_shape:
            raise DataError(
                f"An image became {tuple(pixels.shape)} after preprocessing; all must become {self.input_shape}. "
                "Give an image with the model's number of channels."
            )
        return pixels

    def _pack(self, batch: list[_Read]) -> Features:
        """Run the model on the readable images of a batch and put NaN where there is none."""
        good = [i for i, r in enumerate(batch) if r.pixels is not None]
        config = self.model.config
        width, regs = self.layers * config.embed_dim, config.num_register_tokens
        names = {"cls": (width,), "mean": (width,), "patches": (self.grid[0] * self.grid[1], width)}
        shapes = {k: s for k, s in names.items() if k in self.what} | {"registers": (regs, width)}
        arrays = {k: np.full((len(batch), *s), np.nan, dtype=np.float32) for k, s in shapes.items()}
        if good:
            tokens = self._tokens(torch.stack([r.pixels for r in batch if r.pixels is not None]))  # (g, N, L·D)
            patches = tokens[:, 1 + regs :]
            values = {"cls": tokens[:, 0], "registers": tokens[:, 1 : 1 + regs], "patches": patches}
            values["mean"] = patches.mean(1)
            for name, array in arrays.items():
                array[good] = values[name].cpu().numpy()
        return Features(
            arrays.get("cls"), arrays.get("mean"), arrays.get("patches"), arrays["registers"], self.grid,
            [r.path for r in batch], [r.sha256 for r in batch], [r.error for r in batch],
        )  # fmt: skip

    def pooled(self, images: Tensor) -> Tensor:
        """Embed preprocessed images as (B, (L + 1)·D): cls tokens of L blocks, then the last mean patch token."""
        tokens, regs, dim = self._tokens(images), self.model.config.num_register_tokens, self.model.config.embed_dim
        return torch.cat([tokens[:, 0], tokens[:, 1 + regs :, -dim:].mean(1)], 1)

    @torch.inference_mode()
    def _tokens(self, images: Tensor) -> Tensor:
        """Give the normalised tokens of the last `layers` blocks, (B, 1 + R + P, L·D) fp32."""
        model, outputs, was_training = self.model, [], self.model.training
        model.eval()
        try:
            with self._autocast():
                tokens = model.prepare_tokens(images.to(self.device, model.cls_token.dtype))
                for i, block in enumerate(model.blocks):
                    tokens = block(tokens)
                    if i >= model.n_blocks - self.layers:
                        outputs.append(model.norm(tokens).float())
        finally:
            model.train(was_training)
        return torch.cat(outputs, dim=-1)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = _DTYPES[self.precision]
        if dtype == self.model.cls_token.dtype:
            return nullcontext()
        # Autocast leaves the caller's weights as they are, so an Embedder on a model in training stays up to date.
        return torch.autocast(self.device.type, dtype=dtype)


def resolve_precision(precision: str, device: torch.device, model_dtype: torch.dtype = torch.float32) -> _Computed:
    """Give the precision to compute in.

    "auto" is the model's own when it was cast to bf16 or fp16; else fp32 on a CPU, and on CUDA bf16 or fp16. A named
    one is checked and given back.

    Raises:
        ConfigError: for an unknown name, or another one than a cast model has.
    """
    if precision not in get_args(Precision):
        raise ConfigError(f"precision is {precision!r}; it must be one of {', '.join(get_args(Precision))}.")
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


def _as_model(
    model: VisionTransformer | str | Path, device: str | torch.device | None, weights: str | Path | None
) -> VisionTransformer:
    where = _as_device(device)
    if isinstance(model, VisionTransformer):
        return model if where is None else model.to(where)
    from opendino.models.weights import load

    default = "cuda" if torch.cuda.is_available() else "cpu"
    return load(model, weights=weights, device=default if where is None else str(where))


def _as_device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA fails an assertion
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device is {str(device)!r}, which cannot be used here: {reason} Give cpu.") from error


def _checked_what(what: Sequence[str]) -> tuple[str, ...]:
    names = tuple(what.split(",")) if isinstance(what, str) else tuple(what)
    if not names or set(names) - set(get_args(What)):
        raise ConfigError(f"what is {names}; give one or more of {', '.join(get_args(What))}.")
    return tuple(n for n in get_args(What) if n in names)


def _concat(parts: list[Features]) -> Features:
    def join(name: str) -> Array | None:
        arrays = [getattr(p, name) for p in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    return Features(
        join("cls"), join("mean"), join("patches"), np.concatenate([p.registers for p in parts]), parts[0].grid,
        [x for p in parts for x in p.paths], [x for p in parts for x in p.hashes], [x for p in parts for x in p.errors],
    )  # fmt: skip
