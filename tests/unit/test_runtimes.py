# SPDX-License-Identifier: Apache-2.0
"""An Embedder on exported files, and on models through other runtimes: the vectors are PyTorch's."""

import numpy as np
import pytest
import torch
from PIL import Image

from opendino.embed.embedder import Embedder
from opendino.embed.resume import describe
from opendino.errors import ConfigError
from opendino.export.exporter import export_backbone
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.vit import VisionTransformer

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}


@pytest.fixture(params=SUFFIXES)
def runtime(request, tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[request.param])
    monkeypatch.setenv("OPENDINO_EXPORTS", str(tmp_path / "exports"))
    return request.param


def tiny(**overrides) -> VisionTransformer:
    torch.manual_seed(0)
    shape = {"img_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_register_tokens": 3}
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


def assert_same(got, want, names=("cls", "mean", "patches", "registers")):
    for name in names:
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=1e-4, err_msg=name)
    assert got.grid == want.grid


@pytest.mark.parametrize("settings", [{}, {"dynamic": True, "uint8_input": True}, {"batch": 2}])
def test_a_file_gives_what_the_model_gives(runtime, settings, photos, tmp_path):
    model, path = tiny(), tmp_path / f"x{SUFFIXES[runtime]}"
    export_backbone(model, path, outputs="cls,patches,registers", layers=2, **settings)
    embedder = Embedder(path, batch_size=3)
    assert (embedder.runtime.name, embedder.precision) == (runtime, "fp32")
    want = Embedder(model, batch_size=3)(photos)
    assert_same(embedder(photos), want)
    embedder.layers = 2
    assert_same(embedder(photos), Embedder(model, layers=2)(photos))
    pixels = [np.asarray(Image.open(p)) for p in photos]
    assert_same(embedder(pixels), Embedder(model, layers=2)(photos))


def test_a_dynamic_file_takes_other_sizes(runtime, photos, tmp_path):
    model, path = tiny(), tmp_path / f"x{SUFFIXES[runtime]}"
    export_backbone(model, path, dynamic=True, outputs="cls,mean,patches,registers")
    for size in (42, (21, 49)):
        assert_same(Embedder(path, size=size, fit="pad")(photos), Embedder(model, size=size, fit="pad")(photos))


def test_a_file_gives_what_it_has_and_no_more(runtime, photos, tmp_path):
    model, path = tiny(), tmp_path / f"x{SUFFIXES[runtime]}"
    export_backbone(model, path, size=35, outputs="cls")
    embedder = Embedder(path)
    got = embedder(photos)
    assert (embedder.what, got.mean, got.patches, got.registers.shape) == (("cls",), None, None, (5, 0, 16))
    assert_same(got, Embedder(model, size=35)(photos), ["cls"])
    for bad in ({"what": ("cls", "patches")}, {"size": 28}, {"precision": "fp16"}, {"weights": "x.pth"}):
        with pytest.raises(ConfigError):
            Embedder(path, **bad)
    with pytest.raises(ConfigError, match="--layers 2"):
        Embedder(path, layers=2)(photos)
    with pytest.raises(ConfigError, match="the model itself"):
        _ = embedder.model


def test_a_model_is_exported_once_and_gives_the_same(runtime, photos, tmp_path):
    model = tiny()
    want = Embedder(model)(photos)
    embedder = Embedder(model, runtime=runtime)
    assert_same(embedder(photos), want)
    assert embedder.model is model
    (made,) = (tmp_path / "exports").iterdir()
    before = [(p.name, p.stat().st_mtime_ns) for p in made.iterdir()]
    assert_same(Embedder(model, runtime=runtime, size=35)(photos), Embedder(model, size=35)(photos))
    assert [(p.name, p.stat().st_mtime_ns) for p in made.iterdir()] == before
    with torch.no_grad():
        model.norm.bias += 1
    changed = Embedder(model, runtime=runtime)(photos)
    assert_same(changed, Embedder(model)(photos))
    assert len(list((tmp_path / "exports").iterdir())) == 2


def test_a_model_without_registers_in_training_stays_so(runtime, photos):
    model = tiny(num_register_tokens=0, drop_path_rate=0.5).train()
    got = Embedder(model, runtime=runtime)(photos)
    assert_same(got, Embedder(model)(photos))
    assert got.registers.shape == (5, 0, 16)
    assert model.training


def test_openvino_computes_in_bf16(photos, tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip("openvino")
    monkeypatch.setenv("OPENDINO_EXPORTS", str(tmp_path / "exports"))
    model = tiny()
    got = Embedder(model, runtime="openvino", precision="bf16")
    assert got.precision == "bf16"
    assert np.abs(got(photos).cls - Embedder(model)(photos).cls).max() < 0.5


def test_a_manifest_tells_runtimes_apart_and_leaves_that_of_pytorch_as_it_was(runtime, tmp_path):
    model, path = tiny(), tmp_path / f"x{SUFFIXES[runtime]}"
    export_backbone(model, path)
    plain, of_file = describe(Embedder(model), "m", "photos"), describe(Embedder(path), "m", "photos")
    assert "runtime" not in plain
    assert of_file["runtime"] == runtime
    assert of_file["weights_sha256"] == plain["weights_sha256"]
    assert describe(Embedder(model, runtime=runtime), "m", "photos")["runtime"] == runtime


def test_precisions_and_runtimes_that_are_none_are_refused(runtime):
    for bad in ({"runtime": "tensorrt"}, {"runtime": runtime, "precision": "int8"}, {"precision": "int4"}):
        with pytest.raises(ConfigError):
            Embedder(tiny(), **bad)
