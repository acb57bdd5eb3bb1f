# SPDX-License-Identifier: Apache-2.0
"""Multi-crop augmentation of each peer: JPEG files to batches of normalised float crops, in one process, one thread.

One sample reads all files once, in batches; its clock runs from the first path to the last float tensor. All peers give
2 × 224 and 8 × 98 pixels with the published colours and flips, each with its own drawing of random numbers:

opendino: a batch of `PretrainDataset`, and `apply_photometric` on it, as the trainer calls them.
lightly-train: its `ImageDataset` with its `DINOv2ViTTransform` at default settings, stacked view by view.
torchvision: the published recipe, with Pillow pictures and torchvision's v1 transforms, stacked view by view.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from harness import Spec
from worker import Turns, versions

JPEG_SIZE = (500, 375)
JPEG_BYTES = 51 * 1024
Batches = Callable[[list[str]], dict[str, float]]
"""Augments one batch of files; gives the seconds of its stages, where the peer has stages that can be told apart."""


def serve(spec: Spec, turns: Turns) -> None:
    """Write the photographs, or augment all of them at each turn."""
    folder = Path(spec.work) / "photographs"
    if spec.task == "photographs":
        write_photographs(folder, spec.num_images)
        turns.done()
    paths = [str(p) for p in sorted(folder.glob("*.jpg"))]
    batches = [paths[i : i + spec.batch] for i in range(0, len(paths), spec.batch)]
    augment, setting = PEERS[spec.peer](spec, paths)
    turns.about = {
        "versions": versions(spec.peer),
        "setting": setting,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "file_kib": sum(os.path.getsize(p) for p in paths) / len(paths) / 1024,
    }
    augment(batches[0])
    turns.done()
    while True:
        stages: dict[str, float] = {}
        for batch in batches:
            for name, seconds in augment(batch).items():
                stages[name] = stages.get(name, 0.0) + seconds
        turns.done(images=len(paths), seconds=time.perf_counter() - turns.started, **stages)


def write_photographs(
    folder: Path, count: int, size: tuple[int, int] = JPEG_SIZE, file_bytes: int = JPEG_BYTES
) -> None:
    """Write parts of the two photographs that scikit-learn ships as JPEG files of a size in pixels and in bytes."""
    from sklearn.datasets import load_sample_images

    folder.mkdir(exist_ok=True)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    rng = np.random.default_rng(0)
    for i in range(count):
        whole = photographs[i % len(photographs)]
        width = int(whole.width * rng.uniform(0.8, 0.88))
        height = width * size[1] // size[0]
        left, top = (int(rng.integers(0, n + 1)) for n in (whole.width - width, whole.height - height))
        part = whole.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.LANCZOS)
        files = [as_jpeg(part, quality) for quality in range(70, 99)]
        (folder / f"{i:04d}.jpg").write_bytes(min(files, key=lambda file: abs(len(file) - file_bytes)))


def as_jpeg(picture: Image.Image, quality: int) -> bytes:
    """Give the bytes of a JPEG file."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


# --- opendino ------------------------------------------------------------------------------------------------------


def opendino(spec: Spec, paths: list[str]) -> tuple[Batches, str]:
    """What the trainer does: a batch from the data set, colours for the whole batch."""
    from opendino.images.arrays import read_image
    from opendino.images.sources import open_source
    from opendino.native.build import kernels
    from opendino.pretrain import data
    from opendino.pretrain.crops import CropsConfig
    from opendino.pretrain.memory import keep_freed_memory
    from opendino.pretrain.photometric import apply_photometric

    keep_freed_memory()  # as the engine does on a CPU
    crops = CropsConfig(global_size=spec.size, local_size=spec.local_size, num_local=spec.num_local)
    dataset = data.PretrainDataset(open_source(Path(paths[0]).parent), crops)
    place = {path: i for i, path in enumerate(paths)}
    counter, decoding = 0, 0.0

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal decoding
        started = time.perf_counter()
        image = read_image(*args, **kwargs)
        decoding += time.perf_counter() - started
        return image

    data.read_image = timed

    def augment(batch: list[str]) -> dict[str, float]:
        nonlocal counter, decoding
        started, decoding = time.perf_counter(), 0.0
        joined = dataset.__getitems__([(place[path], counter + i) for i, path in enumerate(batch)])
        counter += len(batch)
        cut = time.perf_counter()
        apply_photometric(joined.global_crops, joined.global_params, crops)
        coloured = time.perf_counter()
        apply_photometric(joined.local_crops, joined.local_params, crops)
        ended = time.perf_counter()
        return {
            "decode": decoding,
            "crops": cut - started - decoding,
            "colours_global": coloured - cut,
            "colours_local": ended - coloured,
        }

    code = "native kernels" if kernels().library else "torch's operations"
    return augment, f"PretrainDataset and apply_photometric by {code}, with freed memory kept as in training"


# --- peers ---------------------------------------------------------------------------------------------------------


def lightly_train(spec: Spec, paths: list[str]) -> tuple[Batches, str]:
    """`ImageDataset` and `DINOv2ViTTransform` of the package, with the settings of its DINOv2 method."""
    os.environ |= {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "LIGHTLY_DID_VERSION_CHECK": "True"}  # asks no server
    import cv2
    from lightly_train._data.image_dataset import ImageDataset
    from lightly_train._methods.dinov2.dinov2_transform import DINOv2ViTTransform, DINOv2ViTTransformArgs

    cv2.setNumThreads(spec.threads)
    args = DINOv2ViTTransformArgs.model_validate(
        {
            "image_size": (spec.size, spec.size),
            "local_view": {"num_views": spec.num_local, "view_size": (spec.local_size, spec.local_size)},
        }
    )
    args.resolve_auto()
    dataset = ImageDataset(Path(paths[0]).parent, [Path(p).name for p in paths], DINOv2ViTTransform(args), 3)
    place = {path: i for i, path in enumerate(paths)}

    def augment(batch: list[str]) -> dict[str, float]:
        stack([dataset[place[path]]["views"] for path in batch])
        return {}

    return augment, "ImageDataset and DINOv2ViTTransform at default settings, cv2 with as many threads"


def torchvision(spec: Spec, paths: list[str]) -> tuple[Batches, str]:
    """The published recipe as its operations stand in torchvision's first interface, on Pillow pictures."""
    from torchvision import transforms as T

    def view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> Callable[[Image.Image], Any]:
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        return T.Compose(
            [
                T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(0.5),
                jitter,
                T.RandomGrayscale(0.2),
                T.RandomApply([T.GaussianBlur(9, (0.1, 2.0))], p=blur),
                T.RandomSolarize(128, solarize),
                T.ToTensor(),
                T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    views = [
        view(spec.size, (0.32, 1.0), 1.0, 0.0),
        view(spec.size, (0.32, 1.0), 0.1, 0.2),
        *[view(spec.local_size, (0.05, 0.32), 0.5, 0.0)] * spec.num_local,
    ]

    def augment(batch: list[str]) -> dict[str, float]:
        stack([one(path) for path in batch])
        return {}

    def one(path: str) -> list[torch.Tensor]:
        with Image.open(path) as file:
            picture = file.convert("RGB")
        return [view(picture) for view in views]

    return augment, "RandomResizedCrop (bicubic), flip, ColorJitter, grey, GaussianBlur, solarize, ToTensor, Normalize"


def stack(samples: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Put the views of a batch together, as each peer's own training loop does."""
    return [torch.stack(list(view)) for view in zip(*samples, strict=True)]


PEERS: dict[str, Callable[[Spec, list[str]], tuple[Batches, str]]] = {
    "opendino": opendino,
    "lightly-train": lightly_train,
    "torchvision": torchvision,
}
