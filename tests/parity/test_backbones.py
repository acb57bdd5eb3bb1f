# SPDX-License-Identifier: Apache-2.0
"""Our features equal those of transformers, timm and a slow reference, with every weight random."""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

import opendino
from opendino.models.config import ViTConfig
from opendino.models.convert import convert
from opendino.models.vit import VisionTransformer

spec = importlib.util.spec_from_file_location("reference", Path(__file__).with_name("reference.py"))
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)

SIZES = [(224, 224), (518, 518), (336, 448), (230, 317)]
REFERENCE_SIZES = [(98, 98), (224, 224), (336, 448), (518, 518), (700, 700)]
TOLERANCE = 2e-4


def randomise(model, seed=0):
    """Draw every parameter: LayerScale, positions, registers, mask token, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            around_one = name.endswith(("gamma", "lambda1")) or ("norm" in name and name.endswith("weight"))
            wide = parameter.ndim >= 3 and "proj" not in name
            parameter.copy_(1 + 0.3 * noise if around_one else noise * (0.5 if wide else 0.04))
    return model.eval()


def image(height, width, batch=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height * 1000 + width))


def all_tokens(model, x):
    f = model.forward_features(x)
    return torch.cat([f["x_norm_clstoken"][:, None], f["x_norm_regtokens"], f["x_norm_patchtokens"]], dim=1)


def difference(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max())


def transformers_model(registers, swiglu=False, **shape):
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 518} | shape
    if registers:
        return randomise(
            Dinov2WithRegistersModel(
                Dinov2WithRegistersConfig(**shape, patch_size=14, use_swiglu_ffn=swiglu, num_register_tokens=4)
            )
        )
    return randomise(Dinov2Model(Dinov2Config(**shape, patch_size=14, use_swiglu_ffn=swiglu)))


@torch.no_grad()
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("registers", [False, True])
def test_equals_transformers_at_every_size(registers, swiglu, tmp_path):
    theirs = transformers_model(registers, swiglu)
    theirs.save_pretrained(tmp_path)
    # transformers resizes to a target size without antialias where the published convention has a scale factor.
    convention = {} if registers else {"pos_resize": "size"}
    ours = opendino.load(tmp_path, **convention)
    for size in SIZES:
        x = image(*size, batch=2)
        assert difference(all_tokens(ours, x), theirs(x).last_hidden_state) <= TOLERANCE, size


@torch.no_grad()
@pytest.mark.parametrize("registers", [False, True])
def test_a_whole_vits14_equals_transformers(registers, tmp_path):
    theirs = transformers_model(registers, hidden_size=384, num_hidden_layers=12, num_attention_heads=6)
    theirs.save_pretrained(tmp_path)
    name = "vits14_reg" if registers else "vits14"
    ours = opendino.load(name, weights=tmp_path, **({} if registers else {"pos_resize": "size"}))
    assert ours.config.arch == name
    for size in [(224, 224), (230, 317)]:
        assert difference(all_tokens(ours, image(*size)), theirs(image(*size)).last_hidden_state) <= TOLERANCE, size


@torch.no_grad()
def test_the_published_convention_differs_from_transformers_and_is_the_default(tmp_path):
    theirs = transformers_model(registers=False)
    theirs.save_pretrained(tmp_path)
    ours = opendino.load(tmp_path)
    assert ours.config.pos_resize == "scale_offset"
    assert difference(all_tokens(ours, image(224, 224)), theirs(image(224, 224)).last_hidden_state) > 10 * TOLERANCE
    assert difference(all_tokens(ours, image(518, 518)), theirs(image(518, 518)).last_hidden_state) <= TOLERANCE


TIMM_MODELS = {
    "vit_small_patch14_dinov2": {"depth": 2, "embed_dim": 64, "num_heads": 1},
    "vit_small_patch14_reg4_dinov2": {"depth": 2, "embed_dim": 64, "num_heads": 1},
    "vit_giant_patch14_dinov2": {"depth": 2, "embed_dim": 192, "num_heads": 3},
    "vit_giant_patch14_reg4_dinov2": {"depth": 2, "embed_dim": 192, "num_heads": 3},
}


@torch.no_grad()
@pytest.mark.parametrize("name", TIMM_MODELS)
def test_equals_timm_at_every_size(name, tmp_path):
    theirs = randomise(timm.create_model(name, dynamic_img_size=True, **TIMM_MODELS[name]))
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    ours = opendino.load(tmp_path / "timm.pth", pos_resize="size_antialias")
    for height, width in SIZES:
        x = image(height, width)
        # timm refuses sides that are no multiple of the patch; we crop at the bottom and right.
        cropped = x[..., : height // 14 * 14, : width // 14 * 14]
        assert difference(all_tokens(ours, x), theirs.forward_features(cropped)) <= TOLERANCE, (height, width)


@torch.no_grad()
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("convention", ["scale_offset", "size_antialias"])
def test_equals_the_slow_reference_in_both_conventions(convention, ffn):
    registers = 4 if convention == "size_antialias" else 0
    shape = {"embed_dim": 16, "depth": 2, "num_heads": 2, "ffn": ffn, "num_register_tokens": registers}
    model = randomise(VisionTransformer(ViTConfig(img_size=518, pos_resize=convention, **shape)))
    for size in REFERENCE_SIZES:
        x = image(*size)
        wanted = reference.forward(
            model.state_dict(), x[0], patch=14, depth=2, heads=2, convention=convention, mask=None
        )
        assert difference(all_tokens(model, x)[0].double(), torch.from_numpy(wanted)) <= 1e-4, size


@torch.no_grad()
def test_masked_patches_equal_the_slow_reference():
    model = randomise(VisionTransformer(ViTConfig(img_size=518, embed_dim=16, depth=2, num_heads=2)))
    x = image(98, 112)
    mask = torch.rand(1, 7 * 8, generator=torch.Generator().manual_seed(0)) < 0.4
    wanted = reference.forward(
        model.state_dict(), x[0], patch=14, depth=2, heads=2, convention="scale_offset", mask=mask[0]
    )
    found = model.forward_features(x, mask)["x_norm_patchtokens"][0].double()
    assert difference(found, torch.from_numpy(wanted[1:])) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 4])
def test_what_we_write_loads_into_transformers_and_timm(registers, tmp_path):
    shape = {"embed_dim": 384, "depth": 12, "num_heads": 6, "num_register_tokens": registers}
    model = randomise(VisionTransformer(ViTConfig(img_size=518, **shape)))
    torch.save(model.state_dict(), tmp_path / "ours.pth")
    convert(tmp_path / "ours.pth", tmp_path / "hf", "hf")
    convert(tmp_path / "ours.pth", tmp_path / "timm", "timm")
    x = image(518, 518)
    wanted = all_tokens(model, x)
    family = Dinov2WithRegistersModel if registers else Dinov2Model
    theirs, info = family.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert difference(theirs.eval()(x).last_hidden_state, wanted) <= TOLERANCE
    timm_model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert difference(timm_model.forward_features(x), wanted) <= TOLERANCE
