# SPDX-License-Identifier: Apache-2.0
"""Colour augmentation of whole batches, each crop with parameters of its own (method.md §2).

Parameters are drawn per sample from its own generator (`draw_photometric`) and applied to the batch at once
(`apply_photometric`) in the order jitter, grey, blur, solarize, normalise; each operation touches only the crops that
it is drawn for. On a CPU a compiled kernel does this crop by crop where there is one (`opendino.native`), with
results equal to 1e-5; the operations of `colour_operations` are its reference, and what runs everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opendino.errors import ConfigError
from opendino.native import colours
from opendino.native.build import kernels as native_kernels
from opendino.pretrain.colour_operations import (
    BLUR_KERNEL,
    adjust_brightness_,
    adjust_contrast_,
    adjust_hue_,
    adjust_saturation_,
    convolve,
    half_kernels,
    kernel_reaches,
    luma,
    solarize_,
    to_grey_,
)
from opendino.pretrain.crops import CropsConfig

CHUNK_VALUES = 8 * 3 * 98 * 98
"""Values that go through the colour operations together on a CPU: 0.9 MB, about a core's own cache."""
MIXED_CHUNKS = 4
"""How many times as many go together when their orders differ: 25 groups of calls each time."""
ORDERS = tuple(permutations(range(4)))
STEPS = np.array((*ORDERS, (-1,) * 4))
"""Operations of each order, (25, 4); the last row, which index -1 means, has none."""
IDENTITY = np.array([1, 1, 1, 0], np.float32)
DRAWS = 10
MIN_SIGMA = 1e-2
"""Stands for no blur where a kernel is computed and not used."""
Array = np.ndarray[Any, Any]
Rows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class PhotometricParams:
    """What happens to the colours of n crops.

    Attributes:
        order: (n,) int8, which of the 24 orders the jitter operations run in; -1 for crops without jitter.
        factors: (n, 4) float32, brightness, contrast and saturation factors and the hue shift in turns.
        grey: (n,) bool.
        sigma: (n,) float32 of the blur, pixels; 0 for crops without blur.
        solarize: (n,) bool.
    """

    order: np.ndarray[Any, np.dtype[np.int8]]
    factors: np.ndarray[Any, np.dtype[np.float32]]
    grey: np.ndarray[Any, np.dtype[np.bool_]]
    sigma: np.ndarray[Any, np.dtype[np.float32]]
    solarize: np.ndarray[Any, np.dtype[np.bool_]]

    def __len__(self) -> int:
        return len(self.order)

    @classmethod
    def crop_major(cls, samples: Sequence[PhotometricParams]) -> PhotometricParams:
        """Join the parameters of B samples with k crops each into (k·B,), first crops of all samples first."""
        return cls.join(samples, [1] * len(samples))

    @classmethod
    def join(cls, parts: Sequence[PhotometricParams], sizes: Sequence[int]) -> PhotometricParams:
        """Join crop-major parameters of parts of a batch, with so many samples each, into those of the batch."""

        def joined(name: str) -> Array:
            arrays = [getattr(part, name) for part in parts]
            by_crop = [a.reshape(-1, n, *a.shape[1:]) for a, n in zip(arrays, sizes, strict=True)]
            whole = np.concatenate(by_crop, axis=1)
            return whole.reshape(-1, *whole.shape[2:])

        return cls(**{f.name: joined(f.name) for f in fields(cls)})


def draw_photometric(
    config: CropsConfig, blur_probs: Sequence[float], solarize_probs: Sequence[float], rng: np.random.Generator
) -> PhotometricParams:
    """Draw the colour parameters of one sample's n crops.

    Args:
        config: probabilities and strengths.
        blur_probs: n probabilities of blur.
        solarize_probs: n probabilities of solarization.
        rng: always gives 10 · n numbers.
    """
    return _params_from(rng.random((len(blur_probs), DRAWS)), config, np.array(blur_probs), np.array(solarize_probs))


def _params_from(u: Array, config: CropsConfig, blur_probs: Array, solarize_probs: Array) -> PhotometricParams:
    """Make parameters out of uniform numbers (..., DRAWS) and probabilities that fit (...)."""
    order = np.where(u[..., 0] < config.jitter_prob, np.floor(u[..., 1] * len(ORDERS)), -1)
    strength = np.array(config.jitter)
    smallest = np.maximum(IDENTITY - strength, [0, 0, 0, -0.5])
    factors = smallest + (IDENTITY + strength - smallest) * u[..., 2:6]
    sigma = config.blur_sigma[0] + (config.blur_sigma[1] - config.blur_sigma[0]) * u[..., 8]
    return PhotometricParams(
        order=order.astype(np.int8),
        factors=factors.astype(np.float32),
        grey=u[..., 6] < config.grey_prob,
        sigma=np.where(u[..., 7] < blur_probs, sigma, 0).astype(np.float32),
        solarize=u[..., 9] < solarize_probs,
    )


def draw_global_and_local(
    config: CropsConfig, rng: np.random.Generator
) -> tuple[PhotometricParams, PhotometricParams | None]:
    """Draw the colour parameters of one sample: of its two global crops, and of its local crops if it has any."""
    return global_and_local_from(rng.random((1, numbers_for_colours(config))), config)


def numbers_for_colours(config: CropsConfig) -> int:
    """Give how many uniform numbers the colours of one sample take."""
    return DRAWS * (2 + config.num_local)


def global_and_local_from(numbers: Array, config: CropsConfig) -> tuple[PhotometricParams, PhotometricParams | None]:
    """Make the colour parameters of B samples out of uniform numbers (B, `numbers_for_colours`).

    Returns:
        Of the global crops, (2·B,), and of the local crops, (L·B,) or None when L is 0; crop-major.
    """
    count = 2 + config.num_local
    u = numbers.reshape(len(numbers), count, DRAWS).swapaxes(0, 1)
    blur_probs = np.array([*config.blur_probs[:2], *[config.blur_probs[2]] * config.num_local])
    solarize_probs = np.array([0.0, config.solarize_prob, *[0.0] * config.num_local])
    params = _params_from(u, config, blur_probs[:, None], solarize_probs[:, None])

    def part(crops: slice) -> PhotometricParams:
        values = {f.name: getattr(params, f.name)[crops] for f in fields(params)}
        return PhotometricParams(**{name: v.reshape(-1, *v.shape[2:]) for name, v in values.items()})

    return part(slice(2)), part(slice(2, None)) if config.num_local else None


def apply_photometric(crops: Tensor, params: PhotometricParams, config: CropsConfig) -> Tensor:
    """Apply drawn colour parameters to a batch, and normalise it.

    Saturation, hue and grey are for three channels; other images go without them. On a CPU a few crops at a time go
    through all operations, so that they stay in its cache; other devices take the whole batch at once.

    Args:
        crops: uint8 (n, C, s, s), on any device.
        params: of the n crops.
        config: for mean and std, C values each.

    Returns:
        float32 (n, C, s, s), on the same device.

    Raises:
        ConfigError: when mean and std are for another number of channels.
    """
    check_channels(config, crops.shape[1])
    blurred = params.sigma > 0
    kernels = half_kernels(torch.from_numpy(params.sigma).clamp_min(MIN_SIGMA))
    reaches = np.where(blurred, kernel_reaches(kernels).numpy(), 0)
    scale = 1 / torch.tensor(config.std)
    shift = -torch.tensor(config.mean) * scale
    library = native_kernels().library if _suits_native(crops) else None
    if library is None:
        return _apply_by_torch(crops, params, kernels, reaches, scale, shift)
    steps = _steps(params, crops.shape[1])
    return colours.colour_crops(
        library,
        crops,
        steps=steps,
        factors=params.factors,
        grey=params.grey,
        solarize=params.solarize,
        kernels=kernels.numpy(),
        reaches=reaches,
        scale=scale.numpy(),
        shift=shift.numpy(),
    )


def _suits_native(crops: Tensor) -> bool:
    large = min(crops.shape[-2:]) > BLUR_KERNEL // 2  # else torch says what a blur needs
    return crops.device.type == "cpu" and crops.dtype in (torch.uint8, torch.float32) and large


def _steps(params: PhotometricParams, channels: int) -> Rows:
    """Give the jitter operations of each crop in their order, (n, 4); -1 for those that change nothing."""
    steps = STEPS[params.order]
    idle = params.factors == IDENTITY
    if channels != 3:
        idle[:, 2:] = True
    return np.where(np.take_along_axis(idle, steps.clip(0), axis=1), -1, steps)


def _apply_by_torch(
    crops: Tensor, params: PhotometricParams, kernels: Tensor, reaches: Rows, scale: Tensor, shift: Tensor
) -> Tensor:
    out = _empty(crops.shape, crops.device)
    scale, shift = (v[:, None, None].to(crops.device) for v in (scale, shift))
    active, kernels = _active(params, crops.shape[1]), kernels.to(crops.device)

    def blurred(part: Tensor, rows: Rows) -> Tensor:
        return convolve(part, kernels[_index(rows)], int(reaches[rows].max()))

    with torch.no_grad():
        for rows in _chunks(crops, params):
            x = _take(crops, rows).to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)
            x = _jitter(x, params.order[rows], params.factors[rows], active)
            x = _grey(x, rows, params.grey)
            x = _on_subset(x, rows, reaches > 0, blurred)
            x = _on_subset(x, rows, params.solarize, lambda part, rows: solarize_(part))
            if _is_range(rows):
                torch.mul(x, scale, out=out[rows[0] : rows[-1] + 1]).add_(shift)
            else:
                _put_(out, rows, x.mul_(scale).add_(shift))
    return out


def check_channels(config: CropsConfig, channels: int) -> None:
    """Refuse crops whose channel count is not that of mean and std."""
    if len(config.mean) != channels:
        raise ConfigError(
            f"crops.mean and crops.std have {len(config.mean)} values and the images {channels} channels. Give one "
            "value per channel, or set the number of input channels of the model to match."
        )


_JITTER: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    adjust_brightness_, adjust_contrast_, adjust_saturation_, adjust_hue_,
)  # fmt: skip


def _empty(shape: torch.Size, device: torch.device) -> Tensor:
    """Give uninitialised float32; on a CPU from NumPy, which asks for huge pages: fewer page faults, 2 µs each."""
    if device.type == "cpu":
        return torch.from_numpy(np.empty(shape, np.float32))
    return torch.empty(shape, device=device)


def _chunks(crops: Tensor, params: PhotometricParams) -> Iterator[Rows]:
    """Give the rows to do at once: on a CPU a cacheful.

    Those with the same order of operations go together, without copies in and out, unless that makes chunks far smaller
    than the cache: small crops lose more by many calls than by copies.
    """
    if crops.device.type != "cpu":
        if len(params):
            yield np.arange(len(params))
        return
    at_once = max(CHUNK_VALUES // max(crops[:1].numel(), 1), 1)
    if len(params) // len(ORDERS) < at_once // 2:
        at_once *= MIXED_CHUNKS
        yield from (np.arange(i, min(i + at_once, len(params))) for i in range(0, len(params), at_once))
        return
    rows = np.argsort(params.order, kind="stable")
    for same in np.split(rows, 1 + np.flatnonzero(np.diff(params.order[rows]))):
        yield from (same[i : i + at_once] for i in range(0, len(same), at_once))


def _grey(x: Tensor, rows: Rows, grey: np.ndarray[Any, Any]) -> Tensor:
    """Grey the chosen crops; the three channels of a single one become one, which is less to blur."""
    if x.shape[1] != 3:
        return x
    if len(rows) == 1:
        return luma(x)[:, None] if grey[rows[0]] else x
    return _on_subset(x, rows, grey, lambda part, rows: to_grey_(part))


def _active(params: PhotometricParams, channels: int) -> list[int]:
    """Give the jitter operations that can be run and that change something."""
    return [k for k in range(4 if channels == 3 else 2) if (params.factors[:, k] != IDENTITY[k]).any()]


def _jitter(x: Tensor, order: np.ndarray[Any, Any], factors_of: np.ndarray[Any, Any], active: Sequence[int]) -> Tensor:
    """Run each operation at once on all crops that have it at the same place of their order; works in place."""
    factors = torch.from_numpy(factors_of).unbind(1)
    if order.min() == order.max():
        for k in STEPS[order[0]]:
            x = _JITTER[k](x, factors[k]) if k in active else x
        return x
    steps = STEPS[order]
    for place in range(4):
        for k in active:
            at = np.flatnonzero(steps[:, place] == k)
            if len(at):
                _put_(x, at, _JITTER[k](_take(x, at), factors[k][_index(at)]))
    return x


def _on_subset(x: Tensor, rows: Rows, chosen: np.ndarray[Any, Any], change: Callable[[Tensor, Rows], Tensor]) -> Tensor:
    """Change those of some crops that are chosen; may work in place.

    Args:
        x: crops.
        rows: what their places in the batch are.
        chosen: whether to change them, for the whole batch.
        change: takes crops and their places, and may work in place.
    """
    if len(rows) == 1:  # the usual case on a CPU
        return change(x, rows) if chosen[rows[0]] else x
    at = np.flatnonzero(chosen[rows])
    if len(at) == len(rows):
        return change(x, rows)
    if len(at):
        part = _take(x, at)
        changed = change(part, rows[at])
        if changed is not part or not _is_range(at):
            _put_(x, at, changed)
    return x


def _is_range(rows: Rows) -> bool:
    return len(rows) == 1 or (int(rows[-1] - rows[0]) == len(rows) - 1 and bool((np.diff(rows) == 1).all()))


def _index(rows: Rows) -> Tensor | slice:
    return slice(int(rows[0]), int(rows[-1]) + 1) if _is_range(rows) else torch.from_numpy(rows)


def _take(x: Tensor, rows: Rows) -> Tensor:
    """Give some crops, without copying them where they lie one after the other."""
    index = _index(rows)
    return x[index] if isinstance(index, slice) else x.index_select(0, index.to(x.device))


def _put_(x: Tensor, rows: Rows, values: Tensor) -> None:
    index = _index(rows)
    if isinstance(index, slice):
        x[index] = values
    elif x.device.type == "cpu":  # where index_copy_ is many times slower
        for row, value in zip(rows.tolist(), values, strict=True):
            x[row].copy_(value)
    else:
        x.index_copy_(0, index.to(x.device), values)
