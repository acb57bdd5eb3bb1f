# SPDX-License-Identifier: Apache-2.0
"""Patch features as colours: their first three principal components as red, green and blue (DINOv2 §7.3).

Shapes: P patches of one image, M patches of all, D width.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from opendino.errors import DataError
from opendino.models.vit import VisionTransformer
from opendino.views.inputs import enlarge, model_input

Rule = Literal["otsu", "zero"]
"""How the first component is cut into object and background.

otsu: at Otsu's threshold, which parts its histogram into the two tightest halves.
zero: at its mean, as in the paper's figure.
Either way the side that holds the smaller share of the patches on the images' borders is the object.
"""

NUM_COMPONENTS = 3
COLOUR_RANGE = (1.0, 99.0)  # percentiles of a component that become 0 and 255


@dataclass(frozen=True)
class Foreground:
    """The cut between object and background: (x − mean)·direction > threshold is object.

    Attributes:
        mean: (D,).
        direction: (D,), unit norm.
        threshold: in units of the features.
        rule: by which it was found.
    """

    mean: np.ndarray
    direction: np.ndarray
    threshold: float
    rule: str

    def mask(self, tokens: np.ndarray) -> np.ndarray:
        """Tell for patch features (P, D) which are object, bool (P,)."""
        return np.asarray((tokens - self.mean) @ self.direction > self.threshold)


@dataclass(frozen=True)
class PCABasis:
    """Three principal components and the colour range of each; the same basis gives the same colours anywhere.

    Attributes:
        mean: (D,).
        components: (3, D), orthonormal rows, each with its largest loading positive.
        explained: (3,), share of the variance.
        low: (3,), value of each component that becomes 0.
        high: (3,), value that becomes 255.
        foreground: how background is told apart and painted black, or None to colour everything.
    """

    mean: np.ndarray
    components: np.ndarray
    explained: np.ndarray
    low: np.ndarray
    high: np.ndarray
    foreground: Foreground | None = None

    def project(self, tokens: np.ndarray) -> np.ndarray:
        """Give the components of patch features, (P, D) → (P, 3)."""
        self._check(tokens)
        return np.asarray((tokens - self.mean) @ self.components.T)

    def colours(self, tokens: np.ndarray) -> np.ndarray:
        """Give the colours of patch features, (P, D) → uint8 (P, 3); background is black."""
        scaled = (self.project(tokens) - self.low) / np.maximum(self.high - self.low, 1e-12)
        colours: np.ndarray = (scaled.clip(0, 1) * 255).round().astype(np.uint8)
        if self.foreground is not None:
            colours[~self.foreground.mask(tokens)] = 0
        return colours

    def _check(self, tokens: np.ndarray) -> None:
        if tokens.shape[-1] != len(self.mean):
            raise DataError(
                f"The PCA basis is for features of width {len(self.mean)}; the model's have {tokens.shape[-1]}. "
                "Use the model that the basis was fitted with, or fit a new one."
            )

    def save(self, path: str | Path) -> None:
        """Write the basis as .npz, aside and renamed."""
        arrays: dict[str, Any] = {k: getattr(self, k) for k in ("mean", "components", "explained", "low", "high")}
        if self.foreground is not None:
            arrays |= {f"foreground_{k}": v for k, v in vars(self.foreground).items()}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        with aside.open("wb") as file:
            np.savez(file, **arrays)
        aside.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> PCABasis:
        """Read what `save` wrote.

        Raises:
            DataError: when the file is missing or is no PCA basis.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {k: file[k] for k in file.files}
            cut = {k.removeprefix("foreground_"): arrays.pop(k) for k in list(arrays) if k.startswith("foreground_")}
            foreground = (
                Foreground(cut["mean"], cut["direction"], float(cut["threshold"]), str(cut["rule"])) if cut else None
            )
            return cls(**arrays, foreground=foreground)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path} cannot be read as a PCA basis ({error}). Give the .npz file that --basis or "
                "PCABasis.save wrote."
            ) from error


# --- fitting -------------------------------------------------------------------------------------------------------


def principal_components(tokens: np.ndarray, num: int = NUM_COMPONENTS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give mean (D,), components (num, D) and explained share of variance (num,) of features (M, D), in float64.

    From the eigenvectors of the D × D covariance, so the cost grows with M only through one product. The sign of a
    component is chosen so that its loading of largest magnitude is positive.

    Raises:
        DataError: when there are fewer than num + 1 patches, or features with NaN or infinity.
    """
    if len(tokens) <= num:
        raise DataError(
            f"Only {len(tokens)} patches are left to fit {num} principal components on. Give more or larger images, "
            "or leave the foreground option out."
        )
    if not np.isfinite(tokens).all():
        raise DataError("The model's patch features hold NaN or infinity: its weights are damaged or training failed.")
    mean = tokens.mean(0, dtype=np.float64)
    centred = tokens - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / (len(tokens) - 1))  # ascending
    components = vectors[:, ::-1][:, :num].T
    largest = np.abs(components).argmax(1)
    components = components * np.where(components[np.arange(num), largest] < 0, -1.0, 1.0)[:, None]
    return mean, components, values[::-1][:num].clip(0) / max(float(values.clip(0).sum()), 1e-300)


def fit_basis(
    tokens: Sequence[np.ndarray], grids: Sequence[tuple[int, int]], foreground: Rule | None = None
) -> PCABasis:
    """Fit one basis over the patches of all given images.

    Args:
        tokens: patch features of each image, (P_i, D).
        grids: (h, w) of each, h·w = P_i.
        foreground: rule by which background is left out of the fit and painted black; None keeps everything.
    """
    everything = np.concatenate(tokens).astype(np.float64)
    cut = None
    if foreground is not None:
        cut = find_foreground(everything, np.concatenate([border_mask(g) for g in grids]), foreground)
        everything = everything[cut.mask(everything)]
    mean, components, explained = principal_components(everything)
    low, high = np.percentile((everything - mean) @ components.T, COLOUR_RANGE, axis=0)
    return PCABasis(mean, components, explained, low, high, cut)


def find_foreground(tokens: np.ndarray, border: np.ndarray, rule: Rule) -> Foreground:
    """Cut features (M, D) along their first component; `border` (M,) marks patches on the images' borders."""
    mean, components, _ = principal_components(tokens, num=1)
    direction = components[0]
    values = (tokens - mean) @ direction
    threshold = otsu_threshold(values) if rule == "otsu" else 0.0
    above = values > threshold
    if above.any() and not above.all() and border[above].mean() > border[~above].mean():
        direction, threshold = -direction, -threshold
    return Foreground(mean, direction, threshold, rule)


def otsu_threshold(values: np.ndarray) -> float:
    """Give the cut (M,) → float with the largest variance between the two sides, at one of 255 levels (Otsu 1979)."""
    counts, edges = np.histogram(values, bins=256)
    centres = (edges[:-1] + edges[1:]) / 2
    below = counts.cumsum()[:-1].astype(np.float64)
    above = counts.sum() - below
    total = (counts * centres).cumsum()
    between = below * above * (total[:-1] / below.clip(1) - (total[-1] - total[:-1]) / above.clip(1)) ** 2
    return float(edges[1 + between.argmax()])


def border_mask(grid: tuple[int, int]) -> np.ndarray:
    """Mark the patches on the border of a grid (h, w), bool (h·w,)."""
    mask = np.ones(grid, bool)
    mask[1:-1, 1:-1] = False
    return mask.ravel()


# --- from images ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def patch_tokens(
    model: VisionTransformer, image: Any, size: int | None = None
) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
    """Give normalised patch features (P, D) float32, their grid (h, w), and the picture's (height, width)."""
    x, shape = model_input(model, image, size)
    tokens = model.forward_features(x)["x_norm_patchtokens"][0]
    return tokens.float().cpu().numpy(), model.grid_of(x), shape


def pca_pictures(
    model: VisionTransformer,
    images: Sequence[Any],
    *,
    size: int | None = None,
    foreground: Rule | None = None,
    basis: PCABasis | None = None,
) -> list[Image.Image]:
    """Draw images by the principal components of their patches, fitted over all of them together.

    Args:
        model: in eval mode.
        images: paths, PIL images or uint8 HWC arrays.
        size: shorter side given to the model, pixels; None is the crop that travels with it.
        foreground: rule that paints the background black; ignored with `basis`.
        basis: an earlier basis to reuse; None fits one.

    Returns:
        One RGB picture per image, as large as the image.
    """
    seen = [patch_tokens(model, image, size) for image in images]
    basis = basis or fit_basis([t for t, _, _ in seen], [g for _, g, _ in seen], foreground)
    return [draw(basis, *one) for one in seen]


def draw(basis: PCABasis, tokens: np.ndarray, grid: tuple[int, int], shape: tuple[int, int]) -> Image.Image:
    """Draw patch features (P, D) of a grid (h, w) as an RGB picture of (height, width) pixels."""
    return enlarge(basis.colours(tokens).reshape(*grid, NUM_COMPONENTS), shape)
