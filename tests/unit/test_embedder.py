# SPDX-License-Identifier: Apache-2.0
"""Vectors from paths, PIL images and arrays, in batches."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from opendino.embed.embedder import Embedder, resolve_precision
from opendino.errors import ConfigError, DataError
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.vit import VisionTransformer


def tiny(**overrides) -> VisionTransformer:
    torch.manual_seed(0)
    shape = {"img_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_register_tokens": 3}
    model = VisionTransformer(ViTConfig(**{**shape, **overrides}), PreprocessSpec(resize=32, crop=28)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for i in range(5):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (40, 33 + 7 * i, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


def test_equals_the_model_on_preprocessed_images(photos):
    model = tiny()
    embedder = Embedder(model, batch_size=2)
    got = embedder(photos)
    images = torch.stack([embedder.preprocess(Image.open(p)) for p in photos])
    with torch.no_grad():
        want = model.forward_features(images)
    np.testing.assert_allclose(got.cls, want["x_norm_clstoken"], atol=1e-5)
    np.testing.assert_allclose(got.patches, want["x_norm_patchtokens"], atol=1e-5)
    np.testing.assert_allclose(got.mean, want["x_norm_patchtokens"].mean(1), atol=1e-5)
    np.testing.assert_allclose(got.registers, want["x_norm_regtokens"], atol=1e-5)
    assert got.cls.dtype == np.float32
    assert got.grid == (4, 4)
    assert got.paths == [str(p) for p in photos]
    assert got.hashes == [hashlib.sha256(p.read_bytes()).hexdigest() for p in photos]
    assert got.errors == [None] * 5


def test_several_layers_are_concatenated(photos):
    model = tiny()
    embedder = Embedder(model, layers=2)
    images = torch.stack([embedder.preprocess(Image.open(p)) for p in photos])
    with torch.no_grad():
        want = model.get_intermediate_layers(images, n=2, return_class_token=True)
    got = embedder(photos)
    np.testing.assert_allclose(got.cls, torch.cat([c for _, c in want], -1), atol=1e-5)
    np.testing.assert_allclose(got.patches, torch.cat([p for p, _ in want], -1), atol=1e-5)


def test_paths_pil_and_arrays_agree(photos):
    embedder = Embedder(tiny())
    image = Image.open(photos[1])
    got = embedder([photos[1], str(photos[1]), image, np.asarray(image)])
    for row in got.cls[1:]:
        np.testing.assert_allclose(row, got.cls[0], atol=1e-5)
    assert got.paths[2:] == ["", ""]


def test_an_unreadable_file_keeps_its_row(photos, tmp_path, caplog):
    (tmp_path / "broken.png").write_bytes(b"no image")
    got = Embedder(tiny(), batch_size=2)([photos[0], tmp_path / "broken.png", tmp_path / "gone.png", photos[1]])
    assert [e is None for e in got.errors] == [True, False, False, True]
    assert np.isnan(got.cls[1:3]).all()
    assert np.isnan(got.patches[1:3]).all()
    assert np.isfinite(got.cls[[0, 3]]).all()
    assert "broken.png" in caplog.text
    assert str(tmp_path / "broken.png") in got.errors[1]


def test_batches_of_only_unreadable_files_have_the_shape_of_others(tmp_path):
    got = Embedder(tiny(), what=("patches",))([tmp_path / "gone.png"])
    assert got.patches.shape == (1, 16, 16)
    assert got.cls is None


def test_no_images_give_empty_arrays():
    assert Embedder(tiny())([]).cls.shape == (0, 16)


def test_stream_is_lazy_and_in_order(photos):
    drawn = []

    def endless():
        while True:
            drawn.append(photos[len(drawn) % 5])
            yield drawn[-1]

    stream = Embedder(tiny(), batch_size=3, workers=2).stream(endless())
    first, second = next(stream), next(stream)
    assert first.paths + second.paths == [str(p) for p in drawn[:6]]
    assert len(drawn) <= 6 + 2 * 3 + 1
    stream.close()


def test_stream_takes_a_folder(photos):
    got = [p for batch in Embedder(tiny(), batch_size=2, workers=0).stream(photos[0].parent) for p in batch.paths]
    assert sorted(got) == sorted(str(p) for p in photos)


def test_size_sets_the_grid(photos):
    embedder = Embedder(tiny(), size=(28, 42), fit="resize")
    assert embedder.grid == (4, 6)
    assert embedder(photos[:1]).patches.shape == (1, 24, 16)


def test_a_model_in_training_is_left_in_training(photos):
    model = tiny(drop_path_rate=0.5).train()
    embedder = Embedder(model)
    assert np.array_equal(embedder(photos).cls, embedder(photos).cls)
    assert model.training


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_close_and_gives_fp32(photos, precision):
    model = tiny()
    got, want = Embedder(model, precision=precision)(photos).cls, Embedder(model)(photos).cls
    assert got.dtype == np.float32
    assert not np.array_equal(got, want)
    assert np.abs(got - want).max() < 0.1 * np.abs(want).max()
    assert model.cls_token.dtype == torch.float32


def test_a_cast_model_keeps_its_precision(photos):
    model = tiny().bfloat16()
    assert Embedder(model).precision == "bf16"
    assert np.isfinite(Embedder(model)(photos).cls).all()
    with pytest.raises(ConfigError, match="weights are bf16"):
        Embedder(model, precision="fp32")


def test_auto_is_fp32_on_a_cpu():
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"


@pytest.mark.parametrize(
    "bad", [{"precision": "fp8"}, {"layers": 3}, {"layers": 0}, {"what": ["cl"]}, {"device": "gpu"}, {"batch_size": 0}]
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError):
        Embedder(tiny(), **bad)


def test_one_image_instead_of_a_list_and_float_arrays_are_refused(photos):
    embedder = Embedder(tiny())
    with pytest.raises(DataError, match="list"):
        embedder(str(photos[0]))
    with pytest.raises(DataError):
        embedder([np.zeros((30, 30, 3), np.float32)])
