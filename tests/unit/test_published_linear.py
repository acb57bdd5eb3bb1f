# SPDX-License-Identifier: Apache-2.0
"""Released linear classifiers: files made in their layout load strictly and give a literal re-computation's logits."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opendino.errors import ConfigError, WeightsError
from opendino.heads import Linear
from opendino.heads.hub import linear_classifier, linear_head_file
from opendino.heads.published_linear import LinearClassifier, load_linear_head, read_linear_head
from opendino.heads.released import fetch_head
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.vit import VisionTransformer

D = 16


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    config = ViTConfig(img_size=28, patch_size=7, embed_dim=D, depth=5, num_heads=2, num_register_tokens=4)
    return VisionTransformer(config, PreprocessSpec(resize=28, crop=28)).eval()


def released_file(path, layers, dim=D, classes=1000):
    """A file as published: the state dict of one nn.Linear."""
    torch.manual_seed(layers)
    torch.save(torch.nn.Linear((1 + layers) * dim, classes).state_dict(), path)
    return path


def literal(backbone, state, images, layers):
    """Block by block, token by token, without the package's own ways to intermediate layers."""
    tokens, each = backbone.prepare_tokens(images), []
    for block in backbone.blocks:
        tokens = block(tokens)
        each.append(torch.nn.functional.layer_norm(tokens, (D,), backbone.norm.weight, backbone.norm.bias, 1e-6))
    x = torch.cat([t[:, 0] for t in each[-layers:]] + [each[-1][:, 5:].sum(1) / (each[-1].shape[1] - 5)], 1)
    return torch.stack([state["weight"] @ row + state["bias"] for row in x])


@pytest.mark.parametrize("layers", [1, 4])
def test_logits_are_those_of_a_literal_computation(layers, backbone, tmp_path):
    path = released_file(tmp_path / "head.pth", layers)
    weight, bias, found = read_linear_head(path, D)
    model = LinearClassifier(backbone, layers).eval()
    model.linear_head.load_state_dict({"weight": weight, "bias": bias})
    images = torch.randn(3, 3, 28, 35, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(images), literal(backbone, torch.load(path), images, layers),
                                   rtol=0, atol=1e-6)  # fmt: skip
    assert found == layers
    assert model(images).shape == (3, 1000)
    assert {k.split(".")[0] for k in model.state_dict()} == {"backbone", "linear_head"}


@pytest.mark.parametrize("layers", [1, 4])
def test_a_released_file_becomes_a_head_that_takes_images_and_can_be_saved(layers, backbone, tmp_path):
    path = released_file(tmp_path / "head.pth", layers, classes=7)
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    head = load_linear_head(path, backbone, classes=list("abcdefg"))
    pixels = head._embedder.preprocess(Image.fromarray(image))[None]
    with torch.no_grad():
        expected = literal(backbone, torch.load(path), pixels, layers)
    np.testing.assert_allclose(head.decision_function([image]), expected, atol=1e-5)
    assert head.predict([image])[0] == "abcdefg"[int(expected.argmax())]
    head.save(tmp_path / "own")
    again = Linear.load(tmp_path / "own", backbone)
    np.testing.assert_allclose(again.decision_function([image]), head.decision_function([image]), atol=1e-6)
    assert load_linear_head(path, embed_dim=D).classes_.tolist() == list(range(7))


class Evil:
    def __reduce__(self):
        return (print, ("never",))


@pytest.mark.parametrize(
    ("content", "layers", "words"),
    [
        ({"weight": torch.zeros(10, 3 * D), "bias": torch.zeros(10)}, None, r"32 \(1 layer\) or 80 \(4 layers\)"),
        ({"weight": torch.zeros(10, 2 * D), "bias": torch.zeros(10)}, 4, r"80 \(4 layers\).*number of layers"),
        ({"weight": torch.zeros(10, 2 * D), "bias": torch.zeros(9)}, None, "bias of"),
        ({"weight": torch.zeros(10, 2 * D)}, None, "`weight` and `bias` alone"),
        ({"weight": torch.zeros(1), "bias": torch.zeros(1), "extra": torch.zeros(1)}, None, "bias, extra, weight"),
        ({"weight": Evil(), "bias": torch.zeros(1)}, None, "refused"),
    ],
)
def test_other_files_are_refused(content, layers, words, tmp_path, capsys):
    torch.save(content, tmp_path / "head.pth")
    with pytest.raises(WeightsError, match=words):
        read_linear_head(tmp_path / "head.pth", D, layers)
    assert "never" not in capsys.readouterr().out


def test_mistakes_are_explained(backbone, tmp_path):
    path = released_file(tmp_path / "head.pth", 1, classes=7)
    with pytest.raises(ConfigError, match="1 and on 4"):
        LinearClassifier(backbone, 2)
    with pytest.raises(ConfigError, match="7 classes and 2 names"):
        load_linear_head(path, backbone, classes=["a", "b"])
    with pytest.raises(ConfigError, match="embed_dim="):
        load_linear_head(path)
    with pytest.raises(WeightsError, match="does not exist"):
        read_linear_head(tmp_path / "none.pth", D)
    with pytest.raises(ConfigError, match="No head was released"):
        linear_head_file("vitt14", 1)
    shallow = VisionTransformer(ViTConfig(img_size=28, patch_size=7, embed_dim=D, depth=2, num_heads=2))
    with pytest.raises(ConfigError, match="2 blocks"):
        LinearClassifier(shallow, 4)


def test_names_of_the_released_files():
    assert linear_head_file("vits14", 1) == ("dinov2_vits14", "dinov2_vits14_linear_head.pth")
    assert linear_head_file("dinov2_vitg14_reg", 4) == ("dinov2_vitg14", "dinov2_vitg14_reg4_linear4_head.pth")


def test_a_head_that_is_not_there_is_named_with_address_and_place(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError) as caught:
        linear_classifier("vits14", 4)
    text = str(caught.value)
    assert "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_linear4_head.pth" in text
    assert str(tmp_path / "checkpoints" / "dinov2_vits14_linear4_head.pth") in text
    (tmp_path / "checkpoints").mkdir()
    kept = released_file(tmp_path / "checkpoints" / "dinov2_vits14_linear4_head.pth", 4)
    assert fetch_head("dinov2_vits14", kept.name) == kept


def test_hubconf_builds_classifiers(tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("hubconf", root / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    names = [f"dinov2_vit{size}14{reg}_lc" for size in "sblg" for reg in ("", "_reg")]
    assert all(callable(getattr(hubconf, name)) for name in names)
    small = {"img_size": 28, "depth": 4, "embed_dim": 384}
    model = hubconf.dinov2_vits14_reg_lc(layers=1, pretrained=False, **small)
    assert (model.layers, model.linear_head.in_features, model.training) == (1, 768, False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    head = released_file(tmp_path / "checkpoints" / "dinov2_vits14_linear4_head.pth", 4, dim=384)
    whole = hubconf.dinov2_vits14_lc(pretrained=False)
    torch.save(whole.backbone.state_dict(), tmp_path / "backbone.pth")
    loaded = hubconf.dinov2_vits14_lc(backbone_weights=tmp_path / "backbone.pth")
    assert torch.equal(loaded.linear_head.weight, torch.load(head)["weight"])
    assert torch.equal(loaded.backbone.cls_token, whole.backbone.cls_token)
