# SPDX-License-Identifier: Apache-2.0
"""Channel statistics against numpy over all pixels, and what the command prints."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from opendino.cli import main
from opendino.cli.pretrain import read_arguments
from opendino.errors import ConfigError, DataError
from opendino.images.sources import open_source
from opendino.images.statistics import channel_statistics


def save_arrays(folder, dtype, channels, count=5):
    rng = np.random.default_rng(0)
    top = np.iinfo(dtype).max
    pixels = []
    for i in range(count):
        array = (rng.beta(2, 3, (11 + i, 13, channels)) * top).astype(dtype)
        np.save(folder / f"{i}.npy", array)
        pixels.append(array.reshape(-1, channels) / top)
    return np.concatenate(pixels)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.uint8, 1e-12), (np.uint16, 1e-6)])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_statistics_are_those_of_all_pixels(dtype, tolerance, channels, workers, tmp_path):
    pixels = save_arrays(tmp_path, dtype, channels)
    found = channel_statistics(open_source(tmp_path), channels=channels, workers=workers)
    np.testing.assert_allclose(found.mean, pixels.mean(0), rtol=tolerance)
    np.testing.assert_allclose(found.std, pixels.std(0), rtol=tolerance)
    assert (found.images, found.pixels, found.errors) == (5, len(pixels), ())


def test_a_sample_is_the_same_each_time_and_another_than_the_first_images(tmp_path):
    save_arrays(tmp_path, np.uint8, 1, count=20)
    source = open_source(tmp_path)
    seen = []
    a = channel_statistics(source, channels=1, max_images=4, on_image=lambda *n: seen.append(n))
    assert a == channel_statistics(source, channels=1, max_images=4, workers=0)
    assert a.images == 4
    assert seen == [(1, 0, 4), (2, 0, 4), (3, 0, 4), (4, 0, 4)]
    assert a.mean != channel_statistics(source, channels=1).mean


def test_unreadable_images_are_left_out_and_counted(tmp_path):
    pixels = save_arrays(tmp_path, np.uint8, 5)
    (tmp_path / "9.npy").write_bytes(b"broken")
    np.save(tmp_path / "8.npy", np.zeros((4, 4, 2), np.uint8))
    found = channel_statistics(open_source(tmp_path), channels=5)
    np.testing.assert_allclose(found.mean, pixels.mean(0), rtol=1e-12)
    assert [path.rsplit("/", 1)[1] for path, _ in found.errors] == ["8.npy", "9.npy"]
    with pytest.raises(DataError, match=r"No image of .* could be read; the first is .*0.npy: .*takes 4 channels"):
        channel_statistics(open_source(tmp_path), channels=4)
    with pytest.raises(ConfigError, match="at least 1"):
        channel_statistics(open_source(tmp_path), channels=0)


def test_the_command_prints_what_pretrain_takes(tmp_path, capsys):
    pixels = save_arrays(tmp_path, np.uint8, 5)
    assert main(["stats", str(tmp_path), "--channels", "5", "--out", str(tmp_path / "stats.yaml")]) == 0
    text = capsys.readouterr().out
    for values in (yaml.safe_load(text), yaml.safe_load((tmp_path / "stats.yaml").read_text())):
        np.testing.assert_allclose(values["crops"]["mean"], pixels.mean(0), atol=6e-5)
        np.testing.assert_allclose(values["crops"]["std"], pixels.std(0), atol=6e-5)
    flags = text.splitlines()[-1].removeprefix("# ").split()
    config, _ = read_arguments(["--data", "x", "--out", "y", "--model.in-chans", "5", *flags])
    assert list(config.crops.mean) == yaml.safe_load(text)["crops"]["mean"]
    assert main(["stats", str(tmp_path), "--channels", "5", "--images", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 2


def test_pictures_are_three_channels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_allclose(channel_statistics(open_source(tmp_path)).mean, pixels.reshape(-1, 3).mean(0) / 255)
