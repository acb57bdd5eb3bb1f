# SPDX-License-Identifier: Apache-2.0
"""Whether an exported file gives what the torch model gives: run on photographs, compared in numbers, refused or not.

Shapes: B images, P patches, R registers, L `layers`, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opendino.errors import WeightsError
from opendino.export.content import changed
from opendino.export.images import batch_of, photographs
from opendino.export.metadata import ExportInfo
from opendino.export.session import Session, open_session
from opendino.images.preprocess import Preprocess
from opendino.models.fingerprint import weights_fingerprint
from opendino.models.vit import VisionTransformer

Array = npt.NDArray[Any]
OnCase = Callable[[int, int], None]
BATCHES = (1, 3, 2)


@dataclass(frozen=True)
class Limits:
    """The largest errors that pass, against the fp32 torch model.

    Attributes:
        max_abs: largest difference of a number; tokens have a standard deviation near 1.
        vector: 1 - cosine of the worst cls, mean or register vector.
        patch: 1 - cosine of patch tokens, mean over the patches of a batch.
    """

    max_abs: float
    vector: float
    patch: float


LIMITS = {
    "fp32": Limits(1e-3, 1e-6, 1e-6),
    "fp16": Limits(0.1, 1e-4, 2e-5),
    "int8": Limits(float("inf"), 1e-2, 1e-2),
}


@dataclass(frozen=True)
class Row:
    """Closeness of one output at one size and batch."""

    height: int
    width: int
    batch: int
    output: str
    max_abs: float
    worst: float
    mean: float
    passed: bool


@dataclass(frozen=True)
class Report:
    """What a verification found.

    Attributes:
        file: its path.
        precision: of the file.
        limits: what was held against it.
        rows: one an output, size and batch.
        problems: why it fails although the numbers may be close; empty when there is none.
    """

    file: str
    precision: str
    limits: Limits
    rows: list[Row]
    problems: list[str]

    @property
    def passed(self) -> bool:
        """Whether every row is within its limits and nothing else is wrong."""
        return not self.problems and bool(self.rows) and all(r.passed for r in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Give the report as plain values."""
        limits = {k: v if np.isfinite(v) else None for k, v in asdict(self.limits).items()}
        return asdict(self) | {"limits": limits, "passed": self.passed}

    def why(self) -> str:
        """Say in one sentence what is wrong."""
        bad = [r for r in self.rows if not r.passed]
        said = list(self.problems)
        if bad:
            worst = max(bad, key=lambda r: (r.worst, r.max_abs))
            said.append(
                f"{worst.output} at {worst.height}x{worst.width}, batch {worst.batch}, is off by up to "
                f"{worst.max_abs:.2g} (1 - cosine {worst.worst:.2g} at worst, {worst.mean:.2g} on average), where "
                f"{self.precision} may have max abs {self.limits.max_abs:g}, 1 - cosine {self.limits.vector:g} "
                f"(patches {self.limits.patch:g} on average)"
            )
        return "; ".join(said)


def verify(
    path: str | Path,
    model: VisionTransformer,
    *,
    images: Sequence[Tensor] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    limits: Limits | None = None,
    on_case: OnCase | None = None,
) -> Report:
    """Run an exported file on photographs and compare it with the model in fp32.

    Args:
        path: the file.
        model: what it was exported from, fp32.
        images: (C, H, W), pixels 0–255; default: the photographs that scikit-learn carries.
        sizes: (height, width) to run at; default: the file's own, or for a dynamic file the model's crop, the side of
            its position table, 24 × 32 patches and sides that are no multiples of the patch.
        limits: default: those of the file's precision.
        on_case: told how many batches are done, of how many.

    Raises:
        WeightsError: when the file cannot be opened.
    """
    session = open_session(path)
    info = session.info
    limits = limits or LIMITS[info.precision]
    problems = []
    if info.weights_sha256 != weights_fingerprint(model):
        problems.append(f"{path} says that it was made from other weights than those of the model given")
    if changed(Path(path), info):
        problems.append("its numbers are not those that were exported (another hash): it was changed or damaged")
    if (info.config.embed_dim, info.config.in_chans) != (model.config.embed_dim, model.config.in_chans):
        return Report(str(path), info.precision, limits, [], problems)
    images = images or photographs(None, info.config.in_chans)
    rows = []
    cases = _cases(info, sizes)
    for number, (size, batch) in enumerate(cases):
        pixels = batch_of(images, info.preprocess, size, batch, info.config.patch_size, first=number)
        rows += _compare(session, model, pixels, limits)
        if on_case is not None:
            on_case(number + 1, len(cases))
    return Report(str(path), info.precision, limits, rows, problems)


def check(report: Report) -> None:
    """Raise WeightsError when a report has not passed."""
    if not report.passed:
        raise WeightsError(
            f"{report.file} does not give what the model gives: {report.why()}. It must not be used; export it again."
        )


def default_sizes(info: ExportInfo) -> list[tuple[int, int]]:
    """Give the sizes that a file is verified at."""
    if info.size is not None:
        return [info.size]
    p, crop, own = info.config.patch_size, info.preprocess.crop, info.config.img_size
    return list(dict.fromkeys([(crop, crop), (own, own), (24 * p, 32 * p), (7 * p + 3, 5 * p + 1)]))


def _cases(info: ExportInfo, sizes: Sequence[tuple[int, int]] | None) -> list[tuple[tuple[int, int], int]]:
    wanted = list(sizes or default_sizes(info))
    if info.batch is not None:
        return [(size, info.batch) for size in wanted]
    if len(wanted) == 1:
        return [(wanted[0], batch) for batch in BATCHES[:2]]
    return [(size, BATCHES[(n + 1) % len(BATCHES)]) for n, size in enumerate(wanted)]


def _compare(session: Session, model: VisionTransformer, pixels: Tensor, limits: Limits) -> list[Row]:
    info = session.info
    images = Preprocess(info.preprocess, patch_size=info.config.patch_size).normalise(pixels)
    want = reference(model, images, info.layers)
    got = session.run(pixels.numpy() if info.uint8_input else images.numpy())
    return [_row(name, got[name], want[name], pixels, limits) for name in info.outputs]


def _row(name: str, got: Array, want: Array, pixels: Tensor, limits: Limits) -> Row:
    batch, height, width = pixels.shape[0], pixels.shape[2], pixels.shape[3]
    if got.shape != want.shape or not np.isfinite(got).all():
        return Row(height, width, batch, name, float("inf"), 2.0, 2.0, False)
    largest = float(np.abs(got - want).max())
    away = one_minus_cosine(got, want)
    worst, mean = float(away.max()), float(away.mean())
    close = mean <= limits.patch if name == "patches" else worst <= limits.vector
    return Row(height, width, batch, name, largest, worst, mean, close and largest <= limits.max_abs)


def one_minus_cosine(a: Array, b: Array) -> Array:
    """Give 1 - cosine along the last axis, in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    out: Array = 1 - (a * b).sum(-1) / np.maximum(norms, 1e-30)
    return out


@torch.inference_mode()
def reference(model: VisionTransformer, images: Tensor, layers: int = 1) -> dict[str, Array]:
    """Give every output that a file may have, by the torch model in its own precision.

    Args:
        model: the backbone.
        images: (B, C, H, W), normalised.
        layers: concatenate the vectors of the last so many blocks.
    """
    outputs, regs, was_training = [], model.config.num_register_tokens, model.training
    model.eval()
    try:
        tokens = model.prepare_tokens(images)
        for number, block in enumerate(model.blocks):
            tokens = block(tokens)
            if number >= model.n_blocks - layers:
                outputs.append(model.norm(tokens))
    finally:
        model.train(was_training)
    final = torch.cat(outputs, dim=-1).float()
    patches = final[:, 1 + regs :]
    found = {"cls": final[:, 0], "registers": final[:, 1 : 1 + regs], "patches": patches, "mean": patches.mean(1)}
    return {name: value.numpy() for name, value in found.items()}
