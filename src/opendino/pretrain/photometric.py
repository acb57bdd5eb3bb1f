# SPDX-License-Identifier: Apache-2.0
"""Colour augmentation of whole batches, each crop with parameters of its own (method.md §2).

Parameters are drawn per sample from its own generator (`draw_photometric`) and applied to the batch at once
(`apply_photometric`) in the order jitter, grey, blur, solarize, normalise; each operation touches only the crops that
it is drawn for. On a CPU a compiled kernel does this crop by crop where there is one (`opendino.pretrain.native`), with
results equal to 1e-5; the operations here are its reference, and what runs everywhere else. Values are those of
torchvision's operations on floats in [0, 1], to 1e-5; solarized ones to 1/255, the step of the 8-bit values that the
published recipe works on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from opendino.errors import ConfigError
from opendino.pretrain.crops import CropsConfig
from opendino.pretrain.native import colours
from opendino.pretrain.native.build import kernels as native_kernels

LUMA = (0.2989, 0.587, 0.114)
BLUR_KERNEL = 9
NO_WEIGHT = 1e-6
"""Share of a pixel that a blur leaves out."""
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
    kernels = _half_kernels(torch.from_numpy(params.sigma).clamp_min(MIN_SIGMA))
    reaches = np.where(blurred, _reaches(kernels).numpy(), 0)
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

    def convolve(part: Tensor, rows: Rows) -> Tensor:
        return _convolve(part, kernels[_index(rows)], int(reaches[rows].max()))

    with torch.no_grad():
        for rows in _chunks(crops, params):
            x = _take(crops, rows).to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)
            x = _jitter(x, params.order[rows], params.factors[rows], active)
            x = _grey(x, rows, params.grey)
            x = _on_subset(x, rows, reaches > 0, convolve)
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


def adjust_brightness_(x: Tensor, factor: Tensor) -> Tensor:
    """Scale (n, C, h, w) by (n,) factors, in place."""
    return x.mul_(_column(factor, x)).clamp_(0, 1)


def adjust_contrast_(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from each crop's mean grey by (n,) factors, in place."""
    means = x.flatten(2).mean(2)
    grey = means @ _luma_weights(x.device) if x.shape[1] == 3 else means.mean(1)
    factor = factor.to(x.device)
    return x.mul_(_column(factor, x)).add_(_column((1 - factor) * grey, x)).clamp_(0, 1)


def adjust_saturation_(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance of (n, 3, h, w) from each pixel's grey by (n,) factors, in place."""
    return torch.lerp(luma(x)[:, None], x, _column(factor, x), out=x).clamp_(0, 1)


def adjust_hue_(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of (n, 3, h, w) by (n,) shifts in -0.5–0.5 turns, in place.

    The lightest and the darkest value of a pixel stay. As the hue turns, each channel goes up, stays, goes down and
    stays for 1, 2, 1 and 2 sixths of a turn. Drawn on without its flat parts, channel c stands at 2·c - mid, mid being
    the pixel's middle value; a turn of t sixths moves it by t · chroma down or up, as the hue lies on the one or the
    other side of that channel's colour, and the flat parts are a clamp. This holds for at most one sixth, and larger
    turns are made in steps.
    """
    sixths = 6 * shift
    steps = max(math.ceil(float(sixths.abs().max())), 1) if len(shift) else 0
    for _ in range(steps):
        _turn_hue_(x, _column(sixths / steps, x))
    return x


def _turn_hue_(x: Tensor, sixths: Tensor) -> None:
    r, g, b = x.split(1, dim=1)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    minus_mid = torch.add(low, high).sub_(r).sub_(g).sub_(b)
    swing = high.sub(low).mul_(sixths)
    side = torch.empty_like(x)
    for one, other, out in zip((g, b, r), (b, r, g), side.split(1, dim=1), strict=True):
        torch.sub(one, other, out=out)
    torch.add(minus_mid, x, alpha=2, out=x).addcmul_(side.sign_(), swing, value=-1)
    torch.clamp(x, low, high, out=x)


def to_grey_(x: Tensor) -> Tensor:
    """Replace the channels of (n, 3, h, w) by their grey, in place."""
    return x.copy_(luma(x)[:, None].expand_as(x))


@cache
def _luma_weights(device: torch.device) -> Tensor:
    return torch.tensor(LUMA, device=device)


def luma(x: Tensor) -> Tensor:
    """Give the grey of (n, 3, h, w) as (n, h, w)."""
    r, g, b = x.unbind(1)
    return (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur (n, C, h, w) with Gaussian kernels of 9 pixels and (n,) sigmas, reflected at the borders."""
    kernels = _half_kernels(sigma.cpu())
    return _convolve(x, kernels.to(x.device), int(_reaches(kernels).max()) if len(sigma) else 1)


def _half_kernels(sigma: Tensor) -> Tensor:
    """Give the middle and the right half of (n,) Gaussian kernels of sum 1, as (n, 5)."""
    kernels = torch.exp(-0.5 * (torch.arange(BLUR_KERNEL // 2 + 1) / sigma[:, None]).square())
    return kernels.div_(2 * kernels.sum(1, keepdim=True) - 1)


def _reaches(kernels: Tensor) -> Tensor:
    """Give how far each kernel's weights reach that are more than a millionth, pixels, at least 1."""
    return (kernels[:, 1:] > NO_WEIGHT).sum(1).clamp_min_(1)


def _convolve(x: Tensor, kernels: Tensor, reach: int) -> Tensor:
    """Convolve (n, C, h, w) with (n, 5) half kernels up to a reach, along the rows and then along the columns.

    A sum of shifted copies. Each crop lies padded in one stretch of memory, where a shift by a column or by a row is an
    offset; what runs over the edges ends in the padding.
    """
    n, channels, height, width = x.shape
    weights = kernels[:, :, None].unbind(1)
    padded = pad(x, (reach,) * 4, mode="reflect")
    tall, wide = padded.shape[2:]
    values = padded.view(n, -1)
    for step in (1, wide):
        length = values.shape[1] - 2 * reach * step
        shifted = values.as_strided((2 * reach + 1, n, length), (step, values.stride(0), 1)).unbind()
        values = shifted[reach] * weights[0]
        for d in range(1, reach + 1):
            values.addcmul_(shifted[reach - d], weights[d]).addcmul_(shifted[reach + d], weights[d])
    return values.as_strided((n, channels, height, width), (values.stride(0), tall * wide, wide, 1))


def solarize_(x: Tensor) -> Tensor:
    """Invert the values of 128/255 and more, in place.

    The smaller of x and 1 - x: between 127/255 and 128/255, where no 8-bit value lies, this is at most 1/255 from
    inverting at 128/255, and it has no jump.
    """
    return torch.minimum(x, 1 - x, out=x)


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


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values[:, None, None, None].to(like.device)
