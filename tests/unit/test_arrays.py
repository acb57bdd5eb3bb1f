# SPDX-License-Identifier: Apache-2.0
"""Arrays and TIFF files of any number of channels, 8 and 16 bits, and what is refused."""

import contextlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from opendino.errors import DataError, MissingExtraError
from opendino.images.arrays import read_image
from opendino.images.decode import decode_image


def values(shape, dtype, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def as_wanted(array):
    """(H, W, C) as the documented tensor."""
    scaled = array.astype(np.float64) / (257 if array.dtype == np.uint16 else 1)
    return torch.from_numpy(np.moveaxis(scaled, 2, 0))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">u2"])
@pytest.mark.parametrize("channels", [1, 2, 3, 5, 12])
def test_npy_arrays(dtype, channels, tmp_path):
    array = values((6, 9, channels), np.dtype(dtype).newbyteorder("=")).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    for source in (tmp_path / "a.npy", str(tmp_path / "a.npy"), (tmp_path / "a.npy").read_bytes()):
        found = read_image(source, channels=channels)
        assert found.dtype == (torch.uint8 if array.dtype.itemsize == 1 else torch.float32)
        assert (found.double() - as_wanted(array.astype(array.dtype.newbyteorder("=")))).abs().max() < 1e-4


def test_grey_arrays_serve_one_and_three_channels_and_no_others(tmp_path):
    array = values((6, 9), np.uint8)
    np.save(tmp_path / "a.npy", array)
    for channels in (1, 3):
        assert torch.equal(
            read_image(tmp_path / "a.npy", channels=channels), torch.from_numpy(array).expand(channels, -1, -1)
        )
    with pytest.raises(DataError, match="2 dimensions; the model takes 5 channels"):
        read_image(tmp_path / "a.npy", channels=5)


def test_refused_arrays_say_why(tmp_path):
    cases = [
        (np.zeros((6, 9, 5), np.float32), "holds float32 values; uint8 or uint16"),
        (np.zeros((5, 6, 9), np.uint8), r"shape \(5, 6, 9\), 9 channels; the model takes 5.*np.moveaxis"),
        (np.zeros((6, 9, 4), np.uint8), "4 channels; the model takes 5"),
        (np.zeros((0, 9, 5), np.uint8), r"shape \(0, 9, 5\)"),
        (np.array([{}]), "cannot be read as an array.*pickle"),
    ]
    for array, words in cases:
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(DataError, match=rf"{tmp_path}/a.npy.*{words}"):
            read_image(tmp_path / "a.npy", channels=5)
    with pytest.raises(DataError, match=r"shard.tar/a.npy.*the model takes 5"):
        read_image((tmp_path / "a.npy").read_bytes()[:90], channels=5, name="shard.tar/a.npy, the model takes 5")


def test_damaged_files_are_errors_of_ours(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", values((6, 9, 5), np.uint16))
    write_pages(tmp_path / "a.tif", values((6, 9, 5), np.uint16))
    Image.fromarray(values((6, 9), np.uint16)).save(tmp_path / "a.png")
    for name, channels in (("a.npy", 5), ("a.tif", 5), ("a.png", 1)):
        whole = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
        for k in range(60):
            damaged = whole.copy()
            damaged[rng.integers(0, min(len(whole), 300), 4)] = rng.integers(0, 256, 4)
            damaged = damaged if k % 2 else damaged[: rng.integers(len(whole))]
            with contextlib.suppress(DataError, MissingExtraError):
                assert read_image(damaged.tobytes(), channels=channels).shape[0] == channels
    with pytest.raises(DataError, match="missing.npy cannot be read"):
        read_image(tmp_path / "missing.npy")


def test_pictures_go_to_the_decoder_and_know_their_name(tmp_path):
    Image.fromarray(values((6, 9, 3), np.uint8)).save(tmp_path / "a.png")
    for channels in (1, 3):
        assert torch.equal(
            read_image(tmp_path / "a.png", channels=channels), decode_image(tmp_path / "a.png", channels=channels)
        )
    with pytest.raises(DataError, match="a.png is read as 3 channels.*the model takes 5"):
        read_image(tmp_path / "a.png", channels=5)
    with pytest.raises(DataError, match="^x.tar/a.jpg cannot be read as an image"):
        read_image(b"no image", name="x.tar/a.jpg")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_keeps_its_precision(suffix, tmp_path):
    array = values((6, 9), np.uint16)
    Image.fromarray(array).save(tmp_path / f"a.{suffix}")
    found = read_image(tmp_path / f"a.{suffix}", channels=1)
    assert found.dtype == torch.float32
    assert (found.double() - as_wanted(array[:, :, None])).abs().max() < 1e-4
    assert torch.equal(read_image(tmp_path / f"a.{suffix}"), decode_image(tmp_path / f"a.{suffix}"))


def write_pages(path, array):
    pages = [Image.fromarray(np.ascontiguousarray(array[:, :, k])) for k in range(array.shape[2])]
    pages[0].save(path, save_all=True, append_images=pages[1:])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [2, 3, 5])
def test_grey_pages_are_channels(dtype, channels, tmp_path):
    array = values((6, 9, channels), dtype)
    write_pages(tmp_path / "a.tif", array)
    found = read_image(tmp_path / "a.tif", channels=channels)
    assert (found.double() - as_wanted(array)).abs().max() < 1e-4


def test_plain_tiffs_are_as_before(tmp_path):
    Image.fromarray(values((6, 9, 3), np.uint8)).save(tmp_path / "rgb.tif")
    write_pages(tmp_path / "pages.tif", values((6, 9, 4), np.uint8))
    for name in ("rgb.tif", "pages.tif"):
        for channels in (1, 3):
            assert torch.equal(
                read_image(tmp_path / name, channels=channels), decode_image(tmp_path / name, channels=channels)
            )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("channels", [2, 3, 5])
def test_samples_are_channels(dtype, planar, channels, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    array = values((16, 32, channels), dtype)
    data = array if planar == "contig" else np.moveaxis(array, 2, 0)
    photometric = "rgb" if channels == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", data, planarconfig=planar, photometric=photometric)
    for source in (tmp_path / "a.tif", (tmp_path / "a.tif").read_bytes()):
        found = read_image(source, channels=channels)
        assert (found.double() - as_wanted(array)).abs().max() < 1e-4


def test_a_tiff_of_other_channels_is_refused_with_both_numbers(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(
        tmp_path / "a.tif", values((16, 32, 4), np.uint16), photometric="minisblack", planarconfig="contig"
    )
    with pytest.raises(DataError, match="4 channels; the model takes 5"):
        read_image(tmp_path / "a.tif", channels=5)


def test_without_tifffile_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    path = tmp_path / "a.tif"
    write_pages(path, values((6, 9, 4), np.uint16))
    with pytest.raises(MissingExtraError, match=r"opendino\[scientific\]"):
        read_image(path, channels=5)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match="a.tif cannot be read as an image"):  # one damaged picture stops no run
        read_image(path)
