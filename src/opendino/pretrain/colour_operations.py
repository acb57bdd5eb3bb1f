# SPDX-License-Identifier: Apache-2.0
"""Colour operations on batches of crops, each crop with a parameter of its own, by torch on any device.

Floats in 0–1, (n, C, h, w). Values are those of torchvision's operations to 1e-5; solarized ones to 1/255, the step of
the 8-bit values that the published recipe works on.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

LUMA = (0.2989, 0.587, 0.114)
BLUR_KERNEL = 9
NO_WEIGHT = 1e-6
"""Share of a pixel that a blur leaves out."""


def adjust_brightness_(x: Tensor, factor: Tensor) -> Tensor:
    """Scale (n, C, h, w) by (n,) factors, in place."""
    return x.mul_(column(factor, x)).clamp_(0, 1)


def adjust_contrast_(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from each crop's mean grey by (n,) factors, in place."""
    means = x.flatten(2).mean(2)
    grey = means @ _luma_weights(x.device) if x.shape[1] == 3 else means.mean(1)
    factor = factor.to(x.device)
    return x.mul_(column(factor, x)).add_(column((1 - factor) * grey, x)).clamp_(0, 1)


def adjust_saturation_(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance of (n, 3, h, w) from each pixel's grey by (n,) factors, in place."""
    return torch.lerp(luma(x)[:, None], x, column(factor, x), out=x).clamp_(0, 1)


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
        _turn_hue_(x, column(sixths / steps, x))
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
    kernels = half_kernels(sigma.cpu())
    return convolve(x, kernels.to(x.device), int(kernel_reaches(kernels).max()) if len(sigma) else 1)


def half_kernels(sigma: Tensor) -> Tensor:
    """Give the middle and the right half of (n,) Gaussian kernels of sum 1, as (n, 5)."""
    kernels = torch.exp(-0.5 * (torch.arange(BLUR_KERNEL // 2 + 1) / sigma[:, None]).square())
    return kernels.div_(2 * kernels.sum(1, keepdim=True) - 1)


def kernel_reaches(kernels: Tensor) -> Tensor:
    """Give how far each kernel's weights reach that are more than a millionth, pixels, at least 1."""
    return (kernels[:, 1:] > NO_WEIGHT).sum(1).clamp_min_(1)


def convolve(x: Tensor, kernels: Tensor, reach: int) -> Tensor:
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


def column(values: Tensor, like: Tensor) -> Tensor:
    return values[:, None, None, None].to(like.device)
