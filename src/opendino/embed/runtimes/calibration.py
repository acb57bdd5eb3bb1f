# SPDX-License-Identifier: Apache-2.0
"""Which runtime and precision is fastest here for a model and close enough to fp32: measured once, then remembered.

Plain torch is always measured beside the others, in turn, so that what is chosen is never slower than it. What is
measured is kept in the user's cache, one file for a machine, weights, image size and batch.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from opendino._version import __version__
from opendino.embed.runtimes.base import Runtime
from opendino.embed.runtimes.machine import device_name, memory, usable_cores
from opendino.embed.runtimes.measure import FLOORS, closeness, refusal, speedup, time_in_turn
from opendino.embed.runtimes.prepared import packs
from opendino.embed.runtimes.pytorch import TorchRuntime, resolve_precision
from opendino.embed.runtimes.remembered import (
    FORMAT,
    Calibration,
    Candidate,
    Pair,
    calibration_path,
    read_calibration,
    write_calibration,
)
from opendino.embed.runtimes.variants import can_compile, make_runtime
from opendino.export.images import batch_of, photographs
from opendino.images.preprocess import Preprocess
from opendino.models.config import ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.native.build import kernels

log = logging.getLogger(__name__)

MARGIN = 1.05
"""Gain below which the simpler runtime stays, and plain torch before all: less is not told from noise."""
CHECK_IMAGES = 4
"""Photographs whose vectors are compared with fp32's; half of them for a model of more than LARGE_FLOPS an image."""
LARGE_FLOPS = 1e11
MOST_IMAGES = 8
"""In a timed call: larger batches are cut into pieces of about this size."""
CALL_SECONDS = 2.0
"""Of plain torch, that a timed call aims at when a model is large; it then has fewer images."""
SECONDS = 0.75
"""Of timing for each candidate, unless two rounds take longer."""
MIN_FLOPS = 1e8
"""Of the forward pass of one image, below which nothing is measured: such a model is faster than images are read."""
REFERENCE: Pair = ("torch", "fp32")


@dataclass(frozen=True)
class Choice:
    """What `auto` chose.

    Attributes:
        runtime: one of `variants.RUNTIMES`.
        precision: that it computes in.
        why: a sentence for the user.
        calibration: what was measured, or None when nothing had to be.
    """

    runtime: str
    precision: str
    why: str
    calibration: Calibration | None = None

    def summary(self) -> dict[str, Any]:
        """Give it JSON-able, in few figures."""
        best = self.calibration.best if self.calibration else None
        figures = {k: getattr(best, k, None) for k in ("speedup", "cls", "patches")}
        return {"runtime": self.runtime, "precision": self.precision, "why": self.why} | figures


def choose_runtime(
    model: VisionTransformer,
    precision: str = "auto",
    *,
    size: int | tuple[int, int] | None = None,
    batch_size: int = 32,
) -> tuple[Runtime, Choice]:
    """Give the fastest runtime for a model that is close enough to fp32, and what is known about the choice.

    Args:
        model: the backbone, where it is to run.
        precision: "auto", or one to stay with; a named one is used even where it is too far from fp32, with a warning.
        size: image side or (height, width), pixels; default: the model's crop.
        batch_size: images in one forward pass.

    Raises:
        ConfigError: for a precision that is not there.
    """
    shape = Preprocess(model.preprocess, size=size, patch_size=model.config.patch_size)
    sides = (shape.height, shape.width)
    if precision not in ("auto", *FLOORS):  # one that is never chosen by itself: it is the named runtime's to take
        return make_runtime(model, "torch", precision), Choice("torch", precision, "it was named")
    plain = resolve_precision(precision, model.cls_token.device, model.cls_token.dtype)
    if model.cls_token.dtype != torch.float32:
        return TorchRuntime(model, precision), Choice("torch", plain, f"the model's weights are {plain}")
    pairs = candidates_for(model, precision)
    if forward_flops(model.config, sides) < MIN_FLOPS or len(pairs) == 1:
        why = "there is nothing else here" if len(pairs) == 1 else "the model is too small for a choice to matter"
        return TorchRuntime(model, precision), Choice("torch", plain, why)
    key = key_of(model, sides, min(batch_size, MOST_IMAGES), pairs, precision)
    path = calibration_path(key)
    found = read_calibration(path, key)
    if found is None:
        log.warning("Measuring which runtime is fastest for this model here; this is done once and takes seconds.")
        found = calibrate(model, pairs, ("torch", plain), key, precision)
        write_calibration(path, found)
        log.warning("Chosen: %s %s, %s.", *found.chosen, sentence(found))
    return make_runtime(model, *found.chosen), Choice(*found.chosen, sentence(found), found)


def candidates_for(model: VisionTransformer, precision: str = "auto") -> list[Pair]:
    """Name the runtimes and precisions that can be tried on the model's device, the fp32 reference first.

    OpenVINO is one where its file of the model has been exported before: exporting and proving it takes longer than
    the rest together.
    """
    device = model.cls_token.device
    pairs: list[Pair] = [REFERENCE]
    if device.type == "cpu":
        pairs += [("torch-prepared", "fp32")] if packs(torch.float32) and _has_room(model) else []
        pairs += [("torch", "bf16")] if packs(torch.bfloat16) else []
        pairs += [("openvino", p) for p in ("fp32", "bf16") if _is_exported(model, p)]
    else:
        bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        halves = (["bf16"] if bf16 else []) + ["fp16"]
        pairs += [("torch", p) for p in halves]
        pairs += [("torch-compiled", p) for p in halves if can_compile(device)]
    if precision == "auto":
        return pairs
    wanted = [p for p in pairs if p[1] == precision]
    asked = [] if ("torch", precision) in wanted else [("torch", precision)]
    return list(dict.fromkeys([*([REFERENCE] if wanted else []), *asked, *wanted]))


def _has_room(model: VisionTransformer) -> bool:
    """Say whether a second fp32 copy of the weights, and the bf16 one, take less than half of the free memory."""
    free = memory()["available"]
    return free is None or 6 * sum(p.numel() for p in model.parameters()) < free / 2


def _is_exported(model: VisionTransformer, precision: str) -> bool:
    if importlib.util.find_spec("openvino") is None or model.training:
        return False
    from opendino.embed.runtimes.exported import CachedExportRuntime

    return CachedExportRuntime(model, "openvino", precision).exported()


def forward_flops(config: ViTConfig, sides: tuple[int, int]) -> float:
    """Count the FLOPs of one image: two for each multiply-add of linear layers, attention products and patches."""
    d, patch = config.embed_dim, config.patch_size
    patches = (sides[0] // patch) * (sides[1] // patch)
    n = 1 + config.num_register_tokens + patches
    feed_forward = (2 if config.ffn == "mlp" else 3) * d * config.hidden_dim
    block = n * (4 * d * d + feed_forward) + 2 * n * n * d
    return 2.0 * (config.depth * block + patches * d * config.in_chans * patch**2)


def calibrate(
    model: VisionTransformer, pairs: Sequence[Pair], plain: Pair, key: dict[str, Any], precision: str = "auto"
) -> Calibration:
    """Measure candidates and choose among them.

    Args:
        model: the backbone.
        pairs: the candidates, the fp32 reference first.
        plain: the one that the others must beat.
        key: what `key_of` gave; it has the images' size and the batch.
        precision: asked for.
    """
    start = perf_counter()
    height, width = key["size"]
    large = forward_flops(model.config, (height, width)) > LARGE_FLOPS
    check = CHECK_IMAGES // 2 if large else CHECK_IMAGES
    images = example_images(model, (height, width), max(check, key["batch"]))
    runtimes, found = {}, {}
    reference: dict[str, Tensor] = {}
    per_image = 0.0
    for pair in pairs:
        try:
            runtime = make_runtime(model, *pair)
            before = perf_counter()
            vectors = fetched(runtime, images[:check], ("cls", "patches"))
        except Exception as error:  # each runtime fails in its own words, and another one can do the work
            if pair == plain:
                raise
            log.info("%s %s did not run: %s", *pair, error)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            found[pair] = Candidate(runtime=pair[0], precision=pair[1], refused=f"it does not run: {reason}")
            continue
        if pair == REFERENCE:
            reference, per_image = vectors, (perf_counter() - before) / check
        found[pair], runtimes[pair] = _checked(pair, vectors, reference, precision), runtime
    count = max(1, min(key["batch"], int(CALL_SECONDS / per_image)))
    calls = {pair: _call(runtime, images[:count]) for pair, runtime in runtimes.items()}
    for pair, call in calls.items():
        if not large or pair[0] == "torch-compiled":  # which builds code for each new number of images
            call()
    named = {" ".join(pair): call for pair, call in calls.items()}
    times = time_in_turn(named, SECONDS * len(named))
    for pair in calls:
        took = sorted(times[" ".join(pair)])
        figures = {
            "images_per_s": round(count / took[len(took) // 2], 3),
            "speedup": round(speedup(times, " ".join(pair), " ".join(plain)), 4),
        }
        found[pair] = found[pair].model_copy(update=figures)
    return Calibration(
        format=FORMAT, key=key, when=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=round(perf_counter() - start, 2), plain=plain, chosen=pick(list(found.values()), plain),
        candidates=list(found.values()),
    )  # fmt: skip


def _checked(pair: Pair, vectors: dict[str, Tensor], reference: dict[str, Tensor], asked: str) -> Candidate:
    close = closeness(vectors, reference)
    why = refusal(pair[1], close)
    if why is None and asked not in ("auto", pair[1]):
        why = f"{asked} is asked for"
    return Candidate(runtime=pair[0], precision=pair[1], cls=close.cls, patches=close.patches, refused=why)


def _call(runtime: Runtime, images: Tensor) -> Callable[[], object]:
    return lambda: fetched(runtime, images, ("cls", "mean"))


def fetched(runtime: Runtime, images: Tensor, what: Sequence[str]) -> dict[str, Tensor]:
    """Give vectors of the last block on the CPU: what a GPU computes is there only when it has been fetched."""
    return {name: v.cpu() for name, v in runtime.vectors(images, 1, what).items()}


def pick(candidates: Sequence[Candidate], plain: Pair) -> Pair:
    """Give the fastest candidate that is not refused, and of those as fast within MARGIN the first in their order.

    So plain torch stays where nothing beats it by MARGIN, and noise does not decide between runtimes. What is slower
    than plain torch is never taken, unless plain torch itself is refused, as bf16 may be on a GPU.
    """
    allowed = [c for c in candidates if c.refused is None and c.speedup is not None]
    if any((c.runtime, c.precision) == plain for c in allowed):
        allowed = [c for c in allowed if (c.speedup or 0.0) >= 1]
    best = max((c.speedup or 0.0 for c in allowed), default=0.0)
    first = next((c for c in allowed if (c.speedup or 0.0) * MARGIN > best), None)
    return (first.runtime, first.precision) if first else plain


def sentence(found: Calibration) -> str:
    """Say what was chosen and how near it is to fp32."""
    best, plain = found.best, " ".join(found.plain)
    if found.chosen == found.plain and best.precision == "fp32":
        return f"nothing that is close enough to fp32 was {MARGIN:g} times as fast, of {len(found.candidates)} tried"
    speed = "plain torch" if found.chosen == found.plain else f"{best.speedup:.1f} times as fast as {plain}"
    if best.cls is None or best.patches is None:
        return speed
    text = f"{speed}; cosine to fp32 {1 - best.cls:.6f} (cls, worst), {1 - best.patches:.6f} (patches, mean)"
    return text if best.refused is None else f"{text}, below the floor"


def example_images(model: VisionTransformer, sides: tuple[int, int], count: int) -> Tensor:
    """Give normalised photographs (count, C, height, width) as the model takes them."""
    fit = Preprocess(model.preprocess, size=sides, patch_size=model.config.patch_size)
    pictures = photographs(None, model.config.in_chans)
    return fit.normalise(batch_of(pictures, model.preprocess, sides, count, model.config.patch_size))


def key_of(
    model: VisionTransformer, sides: tuple[int, int], batch: int, pairs: Sequence[Pair], precision: str
) -> dict[str, Any]:
    """Give all that a calibration depends on, JSON-able."""
    device = model.cls_token.device
    return {
        "machine": device_name(device), "device": device.type, "cores": usable_cores(),
        "threads": torch.get_num_threads(), "kernels": device.type == "cpu" and kernels().library is not None,
        "torch": torch.__version__, "opendino": __version__, "arch": model.config.arch,
        "weights_sha256": TorchRuntime(model).weights_sha256(), "size": list(sides), "batch": batch,
        "precision": precision, "candidates": [list(p) for p in pairs],
    }  # fmt: skip
