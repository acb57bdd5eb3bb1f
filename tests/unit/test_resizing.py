# SPDX-License-Identifier: Apache-2.0
"""Resizing is torchvision's and stays within two grey levels of Pillow's, and neither needs torchvision's import."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from opendino.images.resizing import centre, resize

SIZES = [(375, 500), (1, 1), (7, 300), (301, 3), (64, 64), (97, 131)]
TARGETS = [(256, 341), (14, 14), (1, 50), (97, 131)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resize_is_torchvisions(size, target, mode):
    pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for image in (pixels.permute(2, 0, 1), pixels.permute(2, 0, 1).contiguous(), pixels[..., :1].permute(2, 0, 1)):
        for one in (image, image.float()):
            want = tv.resize(one, list(target), interpolation=InterpolationMode(mode), antialias=True)
            got = resize(one, *target, mode)
            assert got.dtype == one.dtype
            assert torch.equal(got, want)


def with_overshoot(size):
    array = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    array[: size[0] // 2] = np.where(array[: size[0] // 2] > 127, 255, 0)
    return array


def weights(old, new):
    """Row i: Keys' cubic (a = -1/2) around output i, widened where the image shrinks."""
    scale = max(old / new, 1)
    rows = np.zeros((new, old))
    for i in range(new):
        middle = (i + 0.5) * old / new
        places = np.arange(max(int(middle - 2 * scale + 0.5), 0), min(int(middle + 2 * scale + 0.5), old))
        t = np.abs((places - middle + 0.5) / scale)
        row = np.where(t < 1, (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2) * (t < 2)
        rows[i, places] = row / row.sum()
    return rows


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", TARGETS)
def test_resize_is_the_formula_within_two_levels(size, target):
    array = with_overshoot(size)
    across = np.einsum("xi,yic->yxc", weights(size[1], target[1]), array)
    across = np.floor(across + 0.5).clip(0, 255)  # columns first, in 8 bits between the axes
    want = np.floor(np.einsum("yi,ixc->yxc", weights(size[0], target[0]), across) + 0.5).clip(0, 255)
    got = resize(torch.from_numpy(array).permute(2, 0, 1), *target, "bicubic").permute(1, 2, 0).numpy()
    assert np.abs(want - got).max() <= 2


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (64, 64), (97, 131), (1500, 1125), (40, 320)])
@pytest.mark.parametrize("side", [32, 256])
def test_resize_is_pillows_within_two_levels_where_the_aspect_is_kept(size, side):
    # Pillow 13 shrinks some very tall images along the columns first, unlike all before it; the formula is their test.
    target = tuple(max(round(n * side / min(size)), 1) for n in size)
    array = with_overshoot(size)
    want = np.asarray(Image.fromarray(array).resize(target[::-1], Image.Resampling.BICUBIC)).astype(int)
    got = resize(torch.from_numpy(array).permute(2, 0, 1), *target, "bicubic").permute(1, 2, 0).numpy()
    assert np.abs(want - got).max() <= 2


@pytest.mark.parametrize("size", [(256, 341), (225, 224), (224, 229)])
def test_centre_is_torchvisions(size):
    pixels = torch.arange(size[0] * size[1]).view(1, *size)
    assert torch.equal(centre(pixels, 224, 224), tv.center_crop(pixels, [224, 224]))


def test_reading_and_embedding_import_no_compiler():
    code = (
        "import io, sys, torch, opendino.embed.embedder\n"
        "from PIL import Image\n"
        "from opendino.images.decode import decode_image, jpeg_decoder\n"
        "file = io.BytesIO(); Image.new('RGB', (9, 9)).save(file, 'JPEG')\n"
        "decode_image(file.getvalue()); print(jpeg_decoder() is not None)\n"
        "print([n for n in ('torch._dynamo', 'torchvision', 'triton') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["True", "[]"]
