# SPDX-License-Identifier: Apache-2.0
"""Histograms of gradients and colours as further targets of the student, for runs of few images.

MaskFeat (Wei et al. 2022) has masked patches predict histograms of oriented gradients. Here a cls token also predicts
those of its whole crop, at two scales and with the crop at 16×16 pixels, and colours go with gradients. Principal
components of the descriptors, as many as the backbone is wide and half whitened, are compared with the tokens
themselves by cosine, without a head: near tokens then mean near descriptors from the first steps on. The last numbers
of a patch token may predict the whole crop instead (`loss.hog_identity`), which says something only once drawings of
other crops are pasted over it (`opendino.pretrain.paste`). None of it is part of DINOv2; `loss.hog_weight` is 0 unless
a recipe says so.

Shapes: B crops, C channels, P = g·g patches, D width, F numbers of a descriptor, I numbers of identity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opendino.pretrain.paste import paste

DIRECTIONS, LEVELS = 9, 4
"""Unsigned directions of 20 degrees each; levels per colour channel."""
CELLS, FIELDS = (8, 4), 4
"""Cells a side of a crop at either scale, and its colour fields a side."""
CLIP, EPS = 0.2, 1e-5
"""Bounds of Dalal and Triggs' block normalisation (2005)."""
THUMB, THUMB_WEIGHT = 16, 0.7
"""Side of the small crop, pixels, and its weight beside gradients and colours."""
CROP_FEATURES = sum((c - 1) ** 2 for c in CELLS) * 4 * DIRECTIONS + FIELDS**2 * LEVELS**3 + 3 * THUMB**2
SUBCELLS = 2
"""Cells a side of a patch."""
AROUND = (3, 5, 9)
"""Sides of the neighbourhoods whose means a patch's descriptor also has, patches."""
PATCH_FEATURES = (1 + len(AROUND)) * (SUBCELLS**2 * DIRECTIONS + LEVELS**3)
TARGETS = "hog."
"""What the components' names begin with in a file of heads."""
WHITENING = 0.5
"""Power of the standard deviation that a component is divided by."""


def crop_descriptors(rgb: Tensor) -> Tensor:
    """Describe whole crops: gradients in 8×8 and in 4×4 cells, colours of 4×4 fields, the crop at 16×16 pixels.

    Gradients are normalised over blocks of 2×2 cells; the small crop has its mean taken off and weighs 0.7.

    Args:
        rgb: (B, 3, H, W), 0 to 1.

    Returns:
        (B, 7·7·36 + 3·3·36 + 16·64 + 3·16·16) of length one, fp32.
    """
    colours = _colours(rgb, FIELDS).sqrt().flatten(1)
    small = F.adaptive_avg_pool2d(rgb, THUMB).flatten(1)
    parts = [_blocks(rgb, cells) for cells in CELLS] + [colours, small - small.mean(1, keepdim=True)]
    weights = [1.0] * (len(parts) - 1) + [THUMB_WEIGHT]
    return F.normalize(torch.cat([F.normalize(p, dim=1) * w for p, w in zip(parts, weights, strict=True)], 1), dim=1)


def _blocks(rgb: Tensor, cells: int) -> Tensor:
    """Give gradients of blocks of 2×2 cells: (B, (cells − 1)² · 36)."""
    found = _directions(rgb, cells).unflatten(1, (cells, cells))
    side = cells - 1
    blocks = torch.cat([found[:, i : i + side, j : j + side] for i in (0, 1) for j in (0, 1)], -1)
    return _bounded_length(_bounded_length(blocks).clamp(max=CLIP)).flatten(1)


def patch_descriptors(rgb: Tensor, patch_size: int) -> Tensor:
    """Describe patches: gradients of 2×2 cells and colours of the patch, and their means over 3×3, 5×5 and 9×9 patches.

    Neighbourhoods end at the border of the crop.

    Args:
        rgb: (B, 3, g·patch_size, g·patch_size), 0 to 1.
        patch_size: side of a patch, pixels.

    Returns:
        (B, P, 4 · (36 + 64)), fp32.
    """
    side = rgb.shape[-1] // patch_size
    fine = _directions(rgb, side * SUBCELLS).unflatten(1, (side, SUBCELLS, side, SUBCELLS))
    gradients = _bounded_length(fine.permute(0, 1, 3, 2, 4, 5).flatten(3))  # (B, g, g, 36)
    colours = _colours(rgb, side).sqrt().unflatten(1, (side, side))
    own = torch.cat([gradients, F.normalize(colours, dim=-1)], -1).permute(0, 3, 1, 2)
    around = [F.avg_pool2d(own, n, 1, n // 2, count_include_pad=False) for n in AROUND]
    return torch.cat([own, *around], 1).flatten(2).transpose(1, 2)


class Components(nn.Module):
    """Principal components of descriptors, half whitened.

    Args:
        features: F.
        width: D; components that there are not stay zero.
    """

    mean: Tensor
    basis: Tensor
    """(F,) and (F, D)."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("basis", torch.zeros(features, width))

    @torch.no_grad()
    def fit(self, rows: Tensor) -> None:
        """Find them in descriptors (n, F)."""
        mean = rows.double().mean(0)
        centred = rows.double() - mean
        if len(rows) < len(mean):
            lengths, across = torch.linalg.svd(centred, full_matrices=False)[1:]
            values, vectors = lengths.flip(0).square() / len(rows), across.T.flip(1)
        else:
            values, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
        number = min(len(values), self.basis.shape[1])
        scale = values[-number:].clamp_min(values[-1] * 1e-6).sqrt()
        # Largest first; eigenvectors have no sign of their own, so their largest entry is made positive.
        vectors = vectors[:, -number:].flip(1)
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        self.mean.copy_(mean)
        self.basis.zero_()[:, :number] = (vectors / scale.flip(0).pow(WHITENING)).float()

    def forward(self, rows: Tensor) -> Tensor:
        """Turn descriptors (…, F) into targets (…, D)."""
        return (rows - self.mean) @ self.basis


class HogTargets(nn.Module):
    """The targets of one backbone, and their loss. The components are found once and kept in checkpoints.

    Args:
        width: D.
        patch_size: side of a patch, pixels.
        mean: that crops are normalised with, three values.
        std: likewise.
        identity: I, how many of the last numbers of a patch token predict the whole crop that the patch is from.

    Attributes:
        given: names of the components that are those of the run that this one starts from.
    """

    given: frozenset[str] = frozenset()
    crop_components: Components
    patch_components: Components

    def __init__(
        self, width: int, patch_size: int, mean: Sequence[float], std: Sequence[float], identity: int = 0
    ) -> None:
        super().__init__()
        self.patch_size, self.identity = patch_size, identity
        self.crop_components = Components(CROP_FEATURES, width)
        self.patch_components = Components(PATCH_FEATURES, width)
        self.register_buffer("colour_mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("colour_std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @torch.no_grad()
    def fit(self, crops: Tensor) -> None:
        """Find the components that were not given in normalised crops (B, 3, H, W)."""
        rgb = self._rgb(crops)
        if "crop_components" not in self.given:
            self.crop_components.fit(crop_descriptors(rgb))
        if "patch_components" not in self.given:
            self.patch_components.fit(patch_descriptors(rgb, self.patch_size).flatten(0, 1))

    @property
    def complete(self) -> bool:
        """Whether all components were given."""
        return self.given >= dict(self.named_children()).keys()

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the components of another run where they have the shapes of these; `given` names them."""
        for name, part in self.named_children():
            own = part.state_dict()
            theirs = {k: tensors[f"{name}.{k}"] for k in own if f"{name}.{k}" in tensors}
            if theirs.keys() == own.keys() and all(own[k].shape == v.shape for k, v in theirs.items()):
                part.load_state_dict(theirs)
                self.given |= {name}

    @torch.no_grad()
    def identified(self, crops: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Paste drawings on crops, and say which crop each patch is from by the first components of that crop.

        Args:
            crops: (B, 3, H, W), normalised.
            share: of the crops that drawings are pasted on.
            generator: see `paste`.

        Returns:
            Crops like those given, and (B, P, I), fp32.
        """
        rgb = self._rgb(crops)
        first = self.crop_components(crop_descriptors(rgb))[:, : self.identity]
        rgb, source = paste(rgb, share, self.patch_size, generator)
        mean, std = cast(Tensor, self.colour_mean), cast(Tensor, self.colour_std)
        return ((rgb - mean) / std).to(crops.dtype), first[source]

    def loss(
        self, cls: Tensor, patches: Tensor, crops: Tensor, looked_at: Tensor, identity: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Give 1 − cosine of cls tokens and their crops', and of patch tokens and their patches' targets.

        With an identity, the first D − I numbers of a patch token are compared with as many of its patch, the last I
        with it.

        Args:
            cls: (B, D).
            patches: (M, D), those of `looked_at` in row-major order.
            crops: (B, 3, H, W), normalised.
            looked_at: bool (B, P).
            identity: (B, P, I) of `identified`.

        Returns:
            The sum of the means, and these as "hog_cls", "hog_patch" and, with an identity, "hog_identity", detached.
        """
        with torch.no_grad(), torch.autocast(crops.device.type, enabled=False):
            rgb = self._rgb(crops)
            whole = self.crop_components(crop_descriptors(rgb))
            parts = self.patch_components(patch_descriptors(rgb, self.patch_size)[looked_at])
        losses, own = {"hog_cls": _distance(cls, whole)}, patches.shape[-1] - self.identity
        losses["hog_patch"] = _distance(patches[:, :own], parts[:, :own])
        if identity is not None:
            losses["hog_identity"] = _distance(patches[:, own:], identity[looked_at])
        return torch.stack(list(losses.values())).sum(), {k: v.detach() for k, v in losses.items()}

    def _rgb(self, crops: Tensor) -> Tensor:
        mean, std = cast(Tensor, self.colour_mean), cast(Tensor, self.colour_std)
        return (crops.float() * std + mean).clamp(0, 1)


def _distance(tokens: Tensor, targets: Tensor) -> Tensor:
    if not len(tokens):
        return tokens.float().sum()
    return (1 - F.cosine_similarity(tokens.float(), targets, dim=-1)).mean()


def _directions(rgb: Tensor, side: int) -> Tensor:
    """Add up gradient lengths per cell and direction: (B, side·side, 9)."""
    red, green, blue = rgb.unbind(1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    rows, columns = torch.zeros_like(grey), torch.zeros_like(grey)
    rows[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    columns[:, :, 1:-1] = grey[:, :, 2:] - grey[:, :, :-2]
    turn = torch.atan2(rows, columns).remainder(math.pi) * (DIRECTIONS / math.pi)
    return _histograms(turn.long().clamp_(max=DIRECTIONS - 1), torch.hypot(rows, columns), side, DIRECTIONS)


def _colours(rgb: Tensor, side: int) -> Tensor:
    """Count the pixels of each of 4·4·4 colours per field: (B, side·side, 64)."""
    red, green, blue = (rgb * LEVELS).long().clamp_(max=LEVELS - 1).unbind(1)
    return _histograms((red * LEVELS + green) * LEVELS + blue, torch.ones_like(rgb[:, 0]), side, LEVELS**3)


def _histograms(number: Tensor, weight: Tensor, side: int, size: int) -> Tensor:
    """Add up weights per field and number: both (B, H, W) → (B, side·side, size), as shares of a mean field."""
    batch, height, width = number.shape
    row = torch.arange(height, device=number.device) * side // height
    column = torch.arange(width, device=number.device) * side // width
    place = (row[:, None] * side + column) * size + number
    total = weight.new_zeros(batch, side * side * size)
    total.scatter_add_(1, place.flatten(1), weight.flatten(1))
    shares: Tensor = total.unflatten(1, (side * side, size)) * (side * side / (height * width))
    return shares


def _bounded_length(x: Tensor) -> Tensor:
    """Scale rows to length one; short ones stay short."""
    out: Tensor = x / (x.square().sum(-1, keepdim=True) + EPS**2).sqrt()
    return out
