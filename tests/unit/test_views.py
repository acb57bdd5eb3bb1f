# SPDX-License-Identifier: Apache-2.0
"""PCA and attention pictures: numbers against references, reuse of a basis, and the command."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from opendino.cli.visualize import main
from opendino.errors import ConfigError, DataError
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone
from opendino.views.attention import attention_maps, attention_pictures, cls_attention, head_pictures, heat
from opendino.views.pca import (
    PCABasis,
    border_mask,
    fit_basis,
    otsu_threshold,
    patch_tokens,
    pca_pictures,
    principal_components,
)


def tiny(**overrides) -> VisionTransformer:
    torch.manual_seed(0)
    shape = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}
    spec = PreprocessSpec(resize=32, crop=28)
    return VisionTransformer(ViTConfig(**{**shape, **overrides}), spec).eval()


def picture(width=60, height=40, seed=0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def slow_attention(model, x):
    """The whole N × N matrix of every head of the last block, from the output of the block before."""
    inputs = []
    hook = model.blocks[-1].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(x)
        hook.remove()
        last = model.blocks[-1]
        qkv = last.attn.qkv(last.norm1(inputs[0]))
    width, heads = model.embed_dim, model.num_heads
    rows = []
    for h in range(heads):
        d = width // heads
        q, k = (qkv[..., part * width + h * d : part * width + (h + 1) * d] for part in (0, 1))
        rows.append(torch.softmax(q @ k.transpose(1, 2) / d**0.5, dim=-1)[:, 0])
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("registers", [0, 3])
def test_cls_attention_equals_a_slow_reference_and_sums_to_one(registers):
    model, x = tiny(num_register_tokens=registers), torch.randn(2, 3, 28, 42)
    torch.nn.init.normal_(model.blocks[-1].attn.qkv.weight, std=0.5)  # so that rows are not flat
    rows = cls_attention(model, x)
    assert rows.shape == (2, 2, 1 + registers + 24)
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 2))
    torch.testing.assert_close(rows, slow_attention(model, x))
    assert rows.std() > 0.01


def test_attention_maps_leave_registers_out():
    model, x = tiny(num_register_tokens=3), torch.randn(1, 3, 28, 42)
    maps = attention_maps(model, x)
    assert maps.shape == (1, 2, 4, 6)
    assert torch.equal(maps.flatten(2), cls_attention(model, x)[..., 4:])


def test_attention_pictures_are_as_large_as_the_image_and_mean_comes_first():
    model, image = tiny(), picture(60, 40)
    pictures = head_pictures(model, image)
    assert len(pictures) == 3
    assert {p.size for p in pictures} == {(60, 40)}
    assert attention_pictures(model, [image])[0].tobytes() == pictures[0].tobytes()


def test_heat_goes_from_dark_to_bright():
    colours = heat(np.array([[0.0, 0.5, 1.0]])).astype(int).sum(-1)[0]
    assert colours[0] < colours[1] < colours[2]


def test_principal_components_equal_sklearns_up_to_sign():
    x = np.random.default_rng(0).normal(size=(200, 12)) * np.arange(1, 13) + 5
    mean, components, explained = principal_components(x)
    reference = PCA(3).fit(x)
    np.testing.assert_allclose(mean, reference.mean_)
    np.testing.assert_allclose(np.abs((components * reference.components_).sum(1)), 1, atol=1e-9)
    np.testing.assert_allclose(explained, reference.explained_variance_ratio_)
    assert (components[np.arange(3), np.abs(components).argmax(1)] > 0).all()


@pytest.mark.parametrize("rule", [None, "otsu", "zero"])
def test_a_saved_basis_gives_the_same_colours(tmp_path, rule):
    rng = np.random.default_rng(0)
    tokens = [rng.normal(size=(30, 8)), rng.normal(size=(20, 8))]
    basis = fit_basis(tokens, [(5, 6), (4, 5)], rule)
    basis.save(tmp_path / "basis.npz")
    again = PCABasis.load(tmp_path / "basis.npz")
    assert np.array_equal(basis.colours(tokens[1]), again.colours(tokens[1]))
    assert (again.foreground.rule if rule else again.foreground) == rule
    assert [p.name for p in tmp_path.iterdir()] == ["basis.npz"]


@pytest.mark.parametrize("rule", ["otsu", "zero"])
@pytest.mark.parametrize("sign", [1, -1])
def test_foreground_is_what_touches_the_border_less(rule, sign):
    grid = (8, 8)
    inside = np.zeros(grid, bool)
    inside[2:6, 2:6] = True
    tokens = np.random.default_rng(0).normal(scale=0.1, size=(64, 6))
    tokens[:, 0] += sign * 3 * inside.ravel()
    basis = fit_basis([tokens], [grid], rule)
    assert np.array_equal(basis.foreground.mask(tokens), inside.ravel())
    colours = basis.colours(tokens)
    assert not colours[~inside.ravel()].any()
    assert colours[inside.ravel()].any()


def test_otsu_parts_two_heaps():
    values = np.concatenate([np.full(50, 1.0), np.full(10, 4.0)])
    assert 1 < otsu_threshold(values) < 4


def test_border_of_a_grid():
    assert border_mask((3, 4)).sum() == 10


def test_pca_pictures_show_the_whole_image_at_its_own_size():
    pictures = pca_pictures(tiny(num_register_tokens=2), [picture(60, 40), picture(30, 70, seed=1)])
    assert [(p.size, p.mode) for p in pictures] == [((60, 40), "RGB"), ((30, 70), "RGB")]


def test_patch_tokens_keep_the_proportions():
    tokens, grid, shape = patch_tokens(tiny(), picture(80, 40), size=28)
    assert (grid, shape, tokens.shape) == ((4, 8), (40, 80), (32, 32))


def test_what_cannot_be_fitted_or_reused_is_refused(tmp_path):
    with pytest.raises(DataError, match="Only 3 patches"):
        fit_basis([np.zeros((3, 8))], [(1, 3)])
    with pytest.raises(DataError, match="NaN"):
        fit_basis([np.full((9, 8), np.nan)], [(3, 3)])
    basis = fit_basis([np.random.default_rng(0).normal(size=(9, 8))], [(3, 3)])
    with pytest.raises(DataError, match="width 8"):
        basis.colours(np.zeros((9, 16)))
    (tmp_path / "x.npz").write_bytes(b"no archive")
    for path in (tmp_path / "x.npz", tmp_path / "absent.npz"):
        with pytest.raises(DataError, match="PCA basis"):
            PCABasis.load(path)
    with pytest.raises(ConfigError, match="one patch"):
        pca_pictures(tiny(), [picture()], size=3)


@pytest.fixture
def folder(tmp_path):
    for i in range(2):
        (tmp_path / f"f{i}").mkdir()
        picture(60, 40, seed=i).save(tmp_path / f"f{i}" / "same.png")
    (tmp_path / "f0" / "broken.jpg").write_bytes(b"no image")
    return tmp_path


def test_visualize_writes_pictures_and_reuses_a_basis(folder, capsys):
    save_backbone(tiny(), folder / "model.safetensors")
    common = [str(folder / "f0"), str(folder / "f1"), "--model", str(folder / "model.safetensors"), "--size", "28"]
    for out in ("a", "b"):
        assert main(["pca", *common, "--out", str(folder / out), "--basis", str(folder / "basis.npz")]) == 0
    assert sorted(p.name for p in (folder / "a").iterdir()) == ["same-2.png", "same.png"]
    assert (folder / "a" / "same.png").read_bytes() == (folder / "b" / "same.png").read_bytes()
    assert "broken.jpg" in capsys.readouterr().err.replace("\n", "")
    assert main(["attention", *common, "--out", str(folder / "c")]) == 0
    assert len(list((folder / "c").iterdir())) == 6
    assert Image.open(folder / "c" / "same_mean.png").size == (60, 40)
