# SPDX-License-Identifier: Apache-2.0
"""Composites say what is where; train and val share nothing; the folder reads as a segmentation set."""

import zipfile

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from opendino.errors import DataError
from opendino.evaluate.datasets.folders import open_folder_masks
from opendino.sample_data.cutout_masks import split_backgrounds, tiled, write_composites
from opendino.sample_data.cutouts import IGNORED, Cutout, composite, composite_with_mask
from opendino.sample_data.photos import Photograph
from opendino.sample_data.surfaces import unpack_surfaces

SIZE = 64
GREY = Image.new("RGB", (100, 80), (90, 90, 90))


def disc(colour, side=60):
    """A disc with a hard edge."""
    y, x = np.mgrid[0:side, 0:side] - (side - 1) / 2
    alpha = np.where(x**2 + y**2 < (side / 2 - 1) ** 2, 255, 0).astype(np.uint8)
    return Image.fromarray(np.dstack([np.broadcast_to(np.uint8(colour), (side, side, 3)), alpha]))


CUTOUTS = {"red": [Cutout("a/red", disc((250, 20, 20)))], "green": [Cutout("a/green", disc((20, 250, 20)))]}


def test_mask_says_what_is_where():
    for number in range(8):
        image, mask = composite_with_mask(np.random.default_rng(number), CUTOUTS, [GREY], SIZE)
        pixels = np.asarray(image).astype(int)
        assert mask.shape == (SIZE, SIZE)
        assert set(np.unique(mask)) <= {0, 1, 2, IGNORED}
        assert (pixels[mask == 1][:, 0] > pixels[mask == 1][:, 1] + 60).all()
        assert (pixels[mask == 2][:, 1] > pixels[mask == 2][:, 0] + 60).all()
        assert (abs(pixels[mask == 0] - 90) <= 45).all()  # background, up to the faintest of soft edges


def test_last_pasted_covers_and_edges_are_ignored():
    masks = [composite_with_mask(np.random.default_rng(n), CUTOUTS, [GREY], SIZE)[1] for n in range(12)]
    assert any((m == IGNORED).any() and (m > 0).any() for m in masks)
    shares = [((m == IGNORED).sum() / max((m > 0).sum(), 1)) for m in masks if (m > 0).any()]
    assert max(shares) < 0.6  # edges are thin


def test_composite_without_mask_is_the_same_image():
    a = composite(np.random.default_rng(3), CUTOUTS, [GREY], SIZE)
    b, _ = composite_with_mask(np.random.default_rng(3), CUTOUTS, [GREY], SIZE)
    assert np.array_equal(np.asarray(a), np.asarray(b))


def test_backgrounds_of_the_splits_are_disjoint():
    photographs = [Photograph(f"p/{i}", GREY) for i in range(10)]
    train, val = ({p.name for p in split_backgrounds(photographs, s)} for s in ("train", "val"))
    assert len(val) == 3
    assert train | val == {p.name for p in photographs}
    assert not train & val
    shuffled = split_backgrounds(photographs[::-1], "val")
    assert {p.name for p in shuffled} == val


def test_small_texture_is_repeated():
    texture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    big = np.asarray(tiled(texture, 7))
    assert big.shape == (8, 8, 3)
    assert np.array_equal(big[2:4, 6:8], np.asarray(texture))


def test_written_set_opens_and_is_the_same_again(tmp_path):
    with Progress(console=Console(quiet=True)) as progress:
        for name in ("one", "two"):
            write_composites(CUTOUTS, [GREY], tmp_path / name, "val", range(2), SIZE, progress)
            (tmp_path / name / "classes.txt").write_text("background\nred\ngreen\n")
    data = open_folder_masks(tmp_path / "one", "val")
    assert len(data) == 2
    assert list(data.classes) == ["background", "red", "green"]
    assert data.image(0).shape == (3, SIZE, SIZE)
    assert set(data.mask(1).unique().tolist()) <= {0, 1, 2, 255}
    for path in sorted((tmp_path / "one").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def make_jar(package, names, colour=100):
    """A package with a jar of textures."""
    jar = package / "usr/share/sweethome3d/sweethome3d.jar"
    jar.parent.mkdir(parents=True, exist_ok=True)
    texture = package / "texture.jpg"
    pixels = np.random.default_rng(0).integers(0, 2, (8, 8, 3), dtype=np.uint8) * 100 + colour
    Image.fromarray(pixels).save(texture)
    with zipfile.ZipFile(jar, "w") as file:
        for name in names:
            file.write(texture, f"com/eteks/resources/textures/{name}")
        file.writestr("com/eteks/other/readme.txt", "no texture")
    texture.unlink()


def test_textures_come_from_the_jar(tmp_path):
    make_jar(tmp_path, ["woodenFloor.jpg", "bricks.jpg", "notes.png"])
    assert [p.name for p in unpack_surfaces(tmp_path)] == ["bricks.jpg", "woodenFloor.jpg"]
    (tmp_path / "usr/share/sweethome3d/sweethome3d.jar").unlink()
    assert len(unpack_surfaces(tmp_path)) == 2  # it is not opened again


def test_damaged_jar_is_explained(tmp_path):
    jar = tmp_path / "usr/share/sweethome3d/sweethome3d.jar"
    jar.parent.mkdir(parents=True)
    jar.write_bytes(b"no zip")
    with pytest.raises(DataError, match="it is fetched again"):
        unpack_surfaces(tmp_path)
