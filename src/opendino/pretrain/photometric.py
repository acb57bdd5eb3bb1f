# SPDX-License-Identifier: Apache-2.0
"""Colour augmentation of whole batches, each crop with parameters of its own (method.md §2).

Parameters are drawn per sample from its own generator (`draw_photometric`) and applied to the batch at once
(`apply_photometric`) in the order jitter, grey, blur, solarize, normalise; each operation touches only the crops that
it is drawn for. Values are those of torchvision's operations on floats in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from opendino.errors import ConfigError
from opendino.pretrain.crops import CropsConfig

LUMA = (0.2989, 0.587, 0.114)
BLUR_KERNEL = 9
SOLARIZE_THRESHOLD = 128 / 255
ORDERS = tuple(permutations(range(4)))
IDENTITY = np.array([1, 1, 1, 0], np.float32)
DRAWS = 10


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
        names = [f.name for f in fields(cls)]
        joined = {n: np.stack([getattr(s, n) for s in samples], axis=1) for n in names}
        return cls(**{n: a.reshape(-1, *a.shape[2:]) for n, a in joined.items()})


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
    u = rng.random((len(blur_probs), DRAWS))
    order = np.where(u[:, 0] < config.jitter_prob, np.floor(u[:, 1] * len(ORDERS)), -1)
    strength = np.array(config.jitter)
    smallest = np.maximum(IDENTITY - strength, [0, 0, 0, -0.5])
    factors = smallest + (IDENTITY + strength - smallest) * u[:, 2:6]
    sigma = config.blur_sigma[0] + (config.blur_sigma[1] - config.blur_sigma[0]) * u[:, 8]
    return PhotometricParams(
        order=order.astype(np.int8),
        factors=factors.astype(np.float32),
        grey=u[:, 6] < config.grey_prob,
        sigma=np.where(u[:, 7] < np.array(blur_probs), sigma, 0).astype(np.float32),
        solarize=u[:, 9] < np.array(solarize_probs),
    )


def draw_global_and_local(
    config: CropsConfig, rng: np.random.Generator
) -> tuple[PhotometricParams, PhotometricParams | None]:
    """Draw the colour parameters of one sample: of its two global crops, and of its local crops if it has any."""
    global_params = draw_photometric(config, config.blur_probs[:2], (0.0, config.solarize_prob), rng)
    count = config.num_local
    local_params = draw_photometric(config, [config.blur_probs[2]] * count, [0.0] * count, rng) if count else None
    return global_params, local_params


def apply_photometric(crops: Tensor, params: PhotometricParams, config: CropsConfig) -> Tensor:
    """Apply drawn colour parameters to a batch, and normalise it.

    Saturation, hue and grey are for three channels; other images go without them.

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
    x = crops.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)
    _jitter_(x, params)
    if x.shape[1] == 3:
        _on_subset_(x, params.grey, lambda part, rows: to_grey_(part))
    _on_subset_(x, params.sigma > 0, lambda part, rows: blur(part, torch.from_numpy(params.sigma[rows])))
    _on_subset_(x, params.solarize, lambda part, rows: solarize_(part))
    scale = 1 / x.new_tensor(config.std)
    shift = -x.new_tensor(config.mean) * scale
    return x.mul_(scale[:, None, None]).add_(shift[:, None, None])


def check_channels(config: CropsConfig, channels: int) -> None:
    """Refuse crops whose channel count is not that of mean and std."""
    if len(config.mean) != channels:
        raise ConfigError(
            f"crops.mean and crops.std have {len(config.mean)} values and the images {channels} channels. Give one "
            "value per channel, or set the number of input channels of the model to match."
        )


def adjust_brightness_(x: Tensor, factor: Tensor) -> Tensor:
    """Scale (n, C, h, w) by (n,) factors, in place."""
    return x.mul_(_column(factor)).clamp_(0, 1)


def adjust_contrast_(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from each crop's mean grey by (n,) factors, in place."""
    means = x.mean((2, 3))
    grey = means @ means.new_tensor(LUMA) if x.shape[1] == 3 else means.mean(1)
    return x.mul_(_column(factor)).add_(_column((1 - factor) * grey)).clamp_(0, 1)


def adjust_saturation_(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance of (n, 3, h, w) from each pixel's grey by (n,) factors, in place."""
    grey = luma(x).mul_(_column(1 - factor)[:, 0])
    return x.mul_(_column(factor)).add_(grey[:, None]).clamp_(0, 1)


def adjust_hue_(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of (n, 3, h, w) by (n,) shifts in -0.5–0.5 turns, in place.

    Hue h is counted in sixths of a turn from red, in [-3, 3]. With channels r', g', b' stretched to [0, 1] its distance
    from red is 1 - r' + g' + b', and its sign that of g - b. Lightest value and chroma of each pixel stay, so that
    every channel is the pixel's minimum + chroma · ramp(h). No comparisons: these are the slow operations on a CPU.
    """
    r, g, b = x.unbind(1)
    low = torch.minimum(torch.minimum(r, g), b)
    chroma = torch.maximum(torch.maximum(r, g), b).sub_(low)
    inverse = chroma.clamp_min(1e-12).reciprocal_()
    distance = (g + b).sub_(r).sub_(low).mul_(inverse).add_(1)
    hue = distance.copysign_(g - b).add_(6 * shift[:, None, None])
    hue.sub_((hue * (1 / 6)).floor_().mul_(6))
    torch.addcmul(low, (hue - 3).abs_().sub_(1).clamp_(0, 1), chroma, out=r)
    torch.addcmul(low, (hue - 2).abs_().neg_().add_(2).clamp_(0, 1), chroma, out=g)
    torch.addcmul(low, (hue - 4).abs_().neg_().add_(2).clamp_(0, 1), chroma, out=b)
    return x


def to_grey_(x: Tensor) -> Tensor:
    """Replace the channels of (n, 3, h, w) by their grey, in place."""
    return x.copy_(luma(x)[:, None].expand_as(x))


def luma(x: Tensor) -> Tensor:
    """Give the grey of (n, 3, h, w) as (n, h, w)."""
    return (x[:, 0] * LUMA[0]).add_(x[:, 1], alpha=LUMA[1]).add_(x[:, 2], alpha=LUMA[2])


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur (n, C, h, w) with Gaussian kernels of 9 pixels and (n,) sigmas, reflected at the borders."""
    n, channels, height, width = x.shape
    half = BLUR_KERNEL // 2
    offset = torch.arange(-half, half + 1, dtype=torch.float32)
    weights = torch.softmax(-0.5 * (offset / sigma[:, None]).square(), dim=1)
    weights = weights.to(x.device).repeat_interleave(channels, dim=0)[:, None, None]
    planes = pad(x, (half,) * 4, mode="reflect").reshape(1, n * channels, height + 2 * half, width + 2 * half)
    rows = conv2d(planes, weights, groups=n * channels)
    return conv2d(rows, weights.transpose(2, 3), groups=n * channels).reshape(x.shape)


def solarize_(x: Tensor) -> Tensor:
    """Invert the values of 128/255 and more, in place."""
    return x.copy_(torch.where(x >= SOLARIZE_THRESHOLD, 1 - x, x))


_JITTER: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    adjust_brightness_, adjust_contrast_, adjust_saturation_, adjust_hue_,
)  # fmt: skip


def _jitter_(x: Tensor, params: PhotometricParams) -> None:
    """Run each operation at once on all crops that have it at the same place of their order."""
    usable = range(4) if x.shape[1] == 3 else range(2)
    active = [k for k in usable if (params.factors[:, k] != IDENTITY[k]).any()]
    factors = torch.from_numpy(params.factors).to(x.device)
    steps = np.array((*ORDERS, (-1,) * 4))[params.order]
    for place in range(4):
        for k in active:
            rows = torch.from_numpy(np.flatnonzero(steps[:, place] == k)).to(x.device)
            if len(rows):
                x.index_copy_(0, rows, _JITTER[k](x.index_select(0, rows), factors[rows, k]))


def _on_subset_(x: Tensor, where: np.ndarray[Any, Any], change: Callable[[Tensor, Any], Tensor]) -> None:
    rows = np.flatnonzero(where)
    if len(rows):
        at = torch.from_numpy(rows).to(x.device)
        x.index_copy_(0, at, change(x.index_select(0, at), rows))


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]
