# SPDX-License-Identifier: Apache-2.0
"""From images to feature vectors: reading, preprocessing, batching and the forward pass behind one call.

Shapes: n images, R registers, P = h·w patches, L `layers`, D width; every vector is L·D wide.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opendino.embed.reading import Decode, Read, Reader
from opendino.embed.runtimes.base import Precision as Precision
from opendino.embed.runtimes.base import Runtime
from opendino.embed.runtimes.calibration import Choice, choose_runtime
from opendino.embed.runtimes.pytorch import TorchRuntime
from opendino.embed.runtimes.pytorch import resolve_precision as resolve_precision
from opendino.embed.runtimes.stored import StoredModel, stays_stored
from opendino.embed.runtimes.variants import make_runtime
from opendino.errors import ConfigError, DataError
from opendino.export.session import is_exported
from opendino.images.ahead import map_ahead
from opendino.images.preprocess import Fit, Preprocess, normalise
from opendino.images.sources import ImageSource, open_source
from opendino.models.vit import VisionTransformer

log = logging.getLogger(__name__)

What = Literal["cls", "mean", "patches"]
RuntimeName = Literal["auto", "torch", "torch-prepared", "torch-compiled", "onnx", "openvino"]
Array = npt.NDArray[np.float32]
ImageInput = Any
"""A path, a PIL image, or a uint8 array (H, W, C)."""


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


class Embedder:
    """Turns images into vectors with a frozen backbone.

    Args:
        model: a VisionTransformer, whatever `opendino.load` takes, or a file that `opendino export` wrote (.onnx or
            .xml).
        precision: "auto" is fp32 on a CPU, and on CUDA bf16 where the card has it, fp16 elsewhere; an exported file has
            its own. With the runtime "auto" it is chosen by measuring, or kept where it is named.
        runtime: "torch"; "auto", the fastest here whose vectors are close enough to fp32, measured once for a model,
            size and batch (docs/runtimes.md); "torch-prepared", a copy of the weights for a CPU; "torch-compiled",
            through torch.compile; or "onnx" or "openvino", which export the model to a cache once, verify it, and run
            it on the CPU.
        batch_size: images in one forward pass.
        device: default: where a given model lies; for a model loaded here CUDA if there is one, else the CPU.
        size: image side in pixels, or (height, width); default: the crop that travels with the model, or the size of an
            exported file that takes one only.
        fit: how an image is brought to that size (`opendino.images.preprocess.Preprocess`). With "aspect" images differ
            in shape; those of a batch that are alike are computed together, and patches cannot be asked for.
        decode: "exact", or "scaled": JPEG files far larger than needed are decoded at a fraction of their sides, which
            is faster and some grey levels away (docs/extraction.md).
        layers: each vector is that of the last `layers` blocks, concatenated in the order of the blocks, each after the
            final LayerNorm; the last D values are the last block's.
        what: which vectors to give, default all; registers are always given.
        workers: threads that read and preprocess ahead of the forward pass; 0 reads in the calling thread.
        weights: passed to `opendino.load` when `model` is not a VisionTransformer.
        calibration: images like yours, a few dozen, that int8 rounds the model's weights for (docs/export.md).

    Attributes:
        runtime: what computes the vectors (`opendino.embed.runtimes.base.Runtime`).
        config: shape of the backbone.
        choice: what "auto" chose and why (`opendino.embed.runtimes.calibration.Choice`); None when it was not asked.

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
        runtime: RuntimeName = "torch",
        batch_size: int = 32,
        device: str | torch.device | None = None,
        size: int | tuple[int, int] | None = None,
        fit: Fit = "crop",
        decode: Decode = "exact",
        layers: int = 1,
        what: Sequence[str] | None = None,
        workers: int | None = None,
        weights: str | Path | None = None,
        calibration: Sequence[ImageInput] | None = None,
    ) -> None:
        self.runtime, self.choice = _as_runtime(model, runtime, precision, device, weights, size, batch_size)
        self.device, self.precision, self.config = self.runtime.device, self.runtime.precision, self.runtime.config
        self.batch_size, self.layers, self.what = batch_size, layers, _checked_what(what, self.runtime)
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1.")
        if not 1 <= layers <= self.config.depth:
            raise ConfigError(f"layers is {layers}; the model has {self.config.depth} blocks: give 1 to that many.")
        self.workers = min(os.cpu_count() or 1, 8) if workers is None else workers
        size = _checked_size(size, self.runtime)
        self.preprocess = Preprocess(self.runtime.spec, size=size, fit=fit, patch_size=self.config.patch_size)
        self.size, self.fit, self.decode = size, fit, decode
        self.reader = Reader(self.runtime, self.preprocess, decode)
        if fit == "aspect":
            self.what = _checked_for_aspect(what, self.what, self.runtime)
        height, width, patch = self.preprocess.height, self.preprocess.width, self.config.patch_size
        self.input_shape = (self.config.in_chans, height, width)
        self.grid = (height // patch, width // patch)
        if calibration is not None:
            self._calibrate(calibration)

    def _calibrate(self, images: Sequence[ImageInput]) -> None:
        calibrate = getattr(self.runtime, "calibrate", None)
        if calibrate is None:
            raise ConfigError(
                f"calibration is given, but precision is {self.precision!r} in the runtime {self.runtime.name}, which "
                "needs none. Give it with precision='int8' and the runtime torch."
            )
        pixels = [read.pixels for read in map(self.reader, images) if read.pixels is not None]
        if not pixels:
            raise DataError(f"None of the {len(images)} calibration images could be read. Give some that can.")
        if len(pixels) < len(images):
            log.warning("%d of %d calibration images could not be read.", len(images) - len(pixels), len(images))
        batch = self.stacked(pixels)
        calibrate(normalise(batch, self.runtime.spec) if batch.dtype is torch.uint8 else batch)

    @property
    def model(self) -> VisionTransformer:
        """The backbone, in fp32 unless a cast one was given.

        An Embedder made from a file that computes in bf16 on a CPU has prepared weights only; the first use of this
        reads the file again and keeps the model.

        Raises:
            ConfigError: when an exported file is run, which has no model.
        """
        model = getattr(self.runtime, "model", None)
        if model is None:
            raise ConfigError(
                "This needs the model itself, and the Embedder runs an exported file, which gives vectors only. Give "
                "the weights that it was exported from."
            )
        assert isinstance(model, VisionTransformer)
        return model

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
        reads = map_ahead(self.reader, items, self.workers, self.batch_size)
        batches = iter(lambda: list(islice(reads, self.batch_size)), [])
        # Two batches at once: while threads finish the pieces of one, others begin the next, and the caller has time.
        ahead = 2 if self.runtime.takes_turns else 0
        setup = partial(torch.set_num_threads, torch.get_num_threads())  # a new thread has what was set last anywhere
        try:
            yield from map_ahead(self._pack, batches, ahead, 1, setup=setup)
        finally:
            reads.close()

    def prepared(self, fitted: Tensor) -> Tensor:
        """Give what the runtime takes from pixels 0–255 (C, H, W) that have their size; `stacked` makes batches."""
        return self.reader.prepared(fitted)

    def stacked(self, images: Sequence[Tensor]) -> Tensor:
        """Give images of one shape, each from `prepared`, as a batch (B, C, H, W)."""
        return self.reader.stacked(images)

    def _pack(self, batch: list[Read]) -> Features:
        """Run the model on the readable images of a batch and put NaN where there is none."""
        names = (*self.what, *(["registers"] if "registers" in self.runtime.gives else []))
        width, regs = self.layers * self.config.embed_dim, self.config.num_register_tokens * ("registers" in names)
        parts = {"cls": (), "mean": (), "patches": (self.grid[0] * self.grid[1],), "registers": (regs,)}
        arrays = {
            name: np.full((len(batch), *shape, width), np.nan, dtype=np.float32)
            for name, shape in parts.items()
            if name in names or name == "registers"
        }
        alike: dict[tuple[int, ...], list[int]] = {}  # one group but for "aspect"
        for i, read in enumerate(batch):
            if read.pixels is not None:
                alike.setdefault(tuple(read.pixels.shape), []).append(i)
        for rows in alike.values():
            images = self.stacked([p for i in rows if (p := batch[i].pixels) is not None])
            for name, vectors in self._vectors(images, names).items():
                arrays[name][rows] = vectors.cpu().numpy()
        return Features(
            arrays.get("cls"), arrays.get("mean"), arrays.get("patches"), arrays["registers"], self.grid,
            [r.path for r in batch], [r.sha256 for r in batch], [r.error for r in batch],
        )  # fmt: skip

    def pooled(self, images: Tensor) -> Tensor:
        """Embed prepared images as (B, (L + 1)·D): cls tokens of L blocks, then the last mean patch token."""
        found = self._vectors(images, ("cls", "mean"))
        return torch.cat([found["cls"], found["mean"][:, -self.config.embed_dim :]], 1)

    def _vectors(self, images: Tensor, what: Sequence[str]) -> dict[str, Tensor]:
        return self.runtime.vectors(images, self.layers, what)


def _as_runtime(
    model: VisionTransformer | str | Path, runtime: str, precision: str, device: str | torch.device | None,
    weights: str | Path | None, size: int | tuple[int, int] | None, batch_size: int,
) -> tuple[Runtime, Choice | None]:  # fmt: skip
    if runtime not in get_args(RuntimeName):
        raise ConfigError(f"runtime is {runtime!r}; it must be one of {', '.join(get_args(RuntimeName))}.")
    if not isinstance(model, VisionTransformer) and is_exported(model):
        from opendino.embed.runtimes.exported import ExportedRuntime

        if weights is not None or _as_device(device) not in (None, torch.device("cpu")):
            raise ConfigError(f"{model} is an exported file: it has its weights in it and runs on the CPU.")
        return ExportedRuntime(model, precision), None
    if runtime == "torch" and stays_stored(model, weights, _as_device(device), precision):
        assert isinstance(model, str | Path)
        return TorchRuntime(StoredModel(model, weights), precision), None
    whole = isinstance(model, VisionTransformer)
    on_cpu = (runtime in ("onnx", "openvino") or precision == "int8") and device is None and not whole
    backbone = _as_model(model, "cpu" if on_cpu else device, weights)
    if runtime == "auto":
        return choose_runtime(backbone, precision, size=size, batch_size=batch_size)
    return make_runtime(backbone, runtime, precision), None


def _checked_size(size: int | tuple[int, int] | None, runtime: Runtime) -> int | tuple[int, int] | None:
    """Give the size to use; a file for one size has no other."""
    own = runtime.size
    if own is None:
        return size
    if size is not None and ((size, size) if isinstance(size, int) else tuple(size)) != own:
        raise ConfigError(
            f"size is {size}, but the exported file takes {own[0]}x{own[1]} only. Leave it out, or export with "
            "--dynamic."
        )
    return own


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


def _checked_what(what: Sequence[str] | None, runtime: Runtime) -> tuple[str, ...]:
    if what is None:
        return tuple(n for n in get_args(What) if n in runtime.gives)
    names = tuple(what.split(",")) if isinstance(what, str) else tuple(what)
    if not names or set(names) - set(get_args(What)):
        raise ConfigError(f"what is {names}; give one or more of {', '.join(get_args(What))}.")
    if set(names) - set(runtime.gives):
        raise ConfigError(
            f"what is {', '.join(names)}, but the exported file gives {', '.join(runtime.gives)}. Export it again with "
            "--outputs of what you need."
        )
    return tuple(n for n in get_args(What) if n in names)


def _checked_for_aspect(what: Sequence[str] | None, names: tuple[str, ...], runtime: Runtime) -> tuple[str, ...]:
    """Leave out patches, whose number differs; refuse them where they are asked for."""
    if runtime.size is not None:
        raise ConfigError(
            f"fit is 'aspect', which gives images of many shapes, and the exported file takes {runtime.size[0]}x"
            f"{runtime.size[1]} only. Export with --dynamic, or give fit crop, resize or pad."
        )
    if what is not None and "patches" in names:
        raise ConfigError(
            "fit is 'aspect', and patches are asked for: each image would have another number of them. Give what "
            "cls,mean, or fit crop, resize or pad."
        )
    return tuple(name for name in names if name != "patches")


def _concat(parts: list[Features]) -> Features:
    def join(name: str) -> Array | None:
        arrays = [getattr(p, name) for p in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    return Features(
        join("cls"), join("mean"), join("patches"), np.concatenate([p.registers for p in parts]), parts[0].grid,
        [x for p in parts for x in p.paths], [x for p in parts for x in p.hashes], [x for p in parts for x in p.errors],
    )  # fmt: skip
