# SPDX-License-Identifier: Apache-2.0
"""Weights in every layout: recognised, strict, safe; and what a wrong file says."""

import importlib.util
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import opendino
from opendino.cli import main
from opendino.errors import ConfigError, WeightsError
from opendino.models.config import ViTConfig
from opendino.models.convert import convert
from opendino.models.layouts import to_published, to_timm, to_transformers
from opendino.models.registry import get_config
from opendino.models.vit import VisionTransformer
from opendino.models.weights import inflate_stem, save_backbone


def small(registers=0, **fields):
    """A backbone of one 64-channel head, every parameter random."""
    torch.manual_seed(registers)
    shape = {"img_size": 56, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_register_tokens": registers} | fields
    pos_resize = "size_antialias" if registers else "scale_offset"
    model = VisionTransformer(ViTConfig(pos_resize=pos_resize, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def meta_file(folder, model, name="meta.pth"):
    torch.save(model.state_dict(), folder / name)
    return folder / name


def equal(a, b):
    assert set(a) == set(b)
    return all(torch.equal(a[k], b[k]) for k in a)


def complaint(source, **options):
    with pytest.raises(WeightsError) as caught:
        opendino.load(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) > 60
    return text


# --- layouts -------------------------------------------------------------------------------------------------------


def chunked(state):
    return {k.replace("blocks.", "blocks.1.") if k.startswith("blocks.") else k: v for k, v in state.items()}


def teacher(state):
    heads = {"dino_head.mlp.0.weight": torch.ones(2), "ibot_head.last_layer.weight_v": torch.ones(2)}
    return {"teacher": {f"backbone.{k}": v for k, v in chunked(state).items()} | heads}


def whole_checkpoint(state):
    both = {f"{who}.backbone.{k}": v + (who == "student") for who in ("student", "teacher") for k, v in state.items()}
    return {"model": both | {"teacher.dino_head.mlp.0.weight": torch.ones(2)}, "iteration": 3}


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("wrap", [dict, chunked, teacher, whole_checkpoint, lambda s: {"state_dict": {
    f"module.{k}": v for k, v in s.items()}}])  # fmt: skip
def test_published_files_in_every_wrapping(wrap, registers, tmp_path):
    model = small(registers)
    torch.save(wrap(model.state_dict()), tmp_path / "file.pth")
    loaded = opendino.load(tmp_path / "file.pth")
    assert equal(loaded.state_dict(), model.state_dict())
    assert loaded.config.pos_resize == model.config.pos_resize
    assert loaded.load_report.layout == "meta"
    assert not loaded.training


def test_heads_beside_a_backbone_are_reported(tmp_path):
    torch.save(teacher(small().state_dict()), tmp_path / "file.pth")
    heads = opendino.load(tmp_path / "file.pth").load_report.heads
    assert sorted(heads) == ["dino_head.mlp.0.weight", "ibot_head.last_layer.weight_v"]


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("path", [("hf", "timm"), ("timm", "hf")])
def test_round_trips_give_identical_tensors(ffn, registers, path, tmp_path):
    model = small(registers, ffn=ffn)
    source = meta_file(tmp_path, model)
    for step, to in enumerate((*path, "meta")):
        target = tmp_path / f"{step}{ {'hf': '', 'timm': '.safetensors', 'meta': '.pth'}[to] }"
        convert(source, target, to)
        source = target
    back = torch.load(source, weights_only=True)
    assert equal(back, dict(model.state_dict()))


def test_timm_tokens_that_were_trained_on_are_kept(tmp_path):
    model = small(4)
    convert(meta_file(tmp_path, model), tmp_path / "a.safetensors", "timm")
    state = load_file(tmp_path / "a.safetensors")
    plain = opendino.load(_saved(tmp_path / "plain.safetensors", state))
    assert torch.equal(plain.cls_token, model.cls_token + model.pos_embed[:, :1])
    assert not plain.pos_embed[:, 0].any()
    x = torch.randn(1, 3, 56, 56)
    assert torch.allclose(plain(x), model(x), atol=1e-5)


def _saved(path, state):
    save_file(state, path)
    return path


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_transformers_names_of_version_5(ffn):
    model = small(ffn=ffn)
    old = to_transformers(model.state_dict())
    new = {}
    for name, tensor in old.items():
        name = name.replace("attention.attention.query", "attention.q_proj")
        name = name.replace("attention.attention.key", "attention.k_proj")
        name = name.replace("attention.attention.value", "attention.v_proj")
        name = name.replace("attention.output.dense", "attention.o_proj").replace("weights_out", "down_proj")
        if "weights_in" in name:
            gate, up = tensor.chunk(2)
            new |= {name.replace("weights_in", "gate_proj"): gate, name.replace("weights_in", "up_proj"): up}
        else:
            new["dinov2." + name] = tensor
    new["classifier.weight"] = torch.ones(3)
    reading = to_published(new, "test")
    assert equal(reading.state, model.state_dict())
    assert reading.heads == ["classifier.weight"]


def test_our_own_file_keeps_everything(tmp_path):
    config = ViTConfig(img_size=28, embed_dim=24, depth=1, num_heads=2, patch_size=7, pos_resize="size")
    model = VisionTransformer(config)
    save_backbone(model, tmp_path / "own.safetensors")
    loaded = opendino.load(tmp_path / "own.safetensors")
    assert loaded.config == model.config
    assert loaded.preprocess == model.preprocess
    assert equal(loaded.state_dict(), model.state_dict())


def test_sizes_follow_the_overrides(tmp_path):
    source = meta_file(tmp_path, small())
    plain = opendino.load(source)
    resized = opendino.load(source, img_size=98)
    assert resized.pos_embed.shape == (1, 1 + 7 * 7, 64)
    x = torch.randn(1, 3, 98, 98)
    assert torch.allclose(resized(x), plain(x), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 4, 6, 7])
def test_the_inflated_stem_keeps_the_sum(channels, tmp_path):
    source = meta_file(tmp_path, small())
    model, rgb = opendino.load(source, in_chans=channels), opendino.load(source)
    total = rgb.patch_embed.proj.weight.sum(1)
    assert torch.allclose(model.patch_embed.proj.weight.sum(1), total, atol=1e-5)
    grey = torch.randn(1, 1, 28, 28)
    assert torch.allclose(model(grey.expand(-1, channels, -1, -1)), rgb(grey.expand(-1, 3, -1, -1)), atol=1e-4)
    assert model.preprocess.num_channels == channels
    with pytest.raises(WeightsError, match="for 3"):
        inflate_stem(torch.ones(2, 4, 2, 2), 5)


# --- what cannot be loaded -----------------------------------------------------------------------------------------


class Malice:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_malicious_pickle_is_refused_and_does_nothing(save, tmp_path):
    target = tmp_path / "made-by-the-pickle"
    save({"cls_token": Malice(target)}, tmp_path / "evil.pth")
    assert "refused" in complaint(tmp_path / "evil.pth")
    assert not target.exists()


@pytest.mark.parametrize("name", ["meta.pth", "own.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file(name, share, tmp_path):
    model = small()
    meta_file(tmp_path, model)
    save_backbone(model, tmp_path / "own.safetensors")
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    text = complaint(tmp_path / name)
    assert "truncated" in text
    assert name in text


def test_a_renamed_key_is_named(tmp_path):
    state = dict(small().state_dict())
    state["blocks.1.attn.qkv.wieght"] = state.pop("blocks.1.attn.qkv.weight")
    torch.save(state, tmp_path / "renamed.pth")
    text = complaint(tmp_path / "renamed.pth")
    assert "missing: blocks.1.attn.qkv.weight" in text
    assert "unused: blocks.1.attn.qkv.wieght" in text
    loose = opendino.load(tmp_path / "renamed.pth", strict=False)
    assert loose.load_report.missing == ("blocks.1.attn.qkv.weight",)
    assert torch.equal(loose.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])
    assert torch.isfinite(loose(torch.randn(1, 3, 28, 28))).all()


def test_a_wrong_architecture(tmp_path):
    source = meta_file(tmp_path, small())
    text = complaint("vits14", weights=source)
    assert "embed_dim 64" in text
    assert "embed_dim 384" in text
    torch.save({"conv1.weight": torch.ones(3), "fc.bias": torch.ones(1)}, tmp_path / "resnet.pth")
    assert "holds no DINOv2 backbone" in complaint(tmp_path / "resnet.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "no tensors by name" in complaint(tmp_path / "list.pth")


def test_a_wrong_shape_is_named(tmp_path):
    state = dict(small().state_dict())
    state["blocks.1.mlp.fc1.bias"] = torch.ones(3)
    torch.save(state, tmp_path / "shape.pth")
    assert "blocks.1.mlp.fc1.bias is (3,) and must be (256,)" in complaint(tmp_path / "shape.pth")


def test_unknown_number_of_heads(tmp_path):
    source = meta_file(tmp_path, small(embed_dim=48, num_heads=3))
    assert "num_heads" in complaint(source)
    assert opendino.load(source, num_heads=3).config.num_heads == 3


def test_missing_files_and_names(tmp_path, monkeypatch):
    assert "does not exist" in complaint(tmp_path / "nothing.pth")
    assert "holds no weights" in complaint(tmp_path)
    assert "No weights of vitt14 are published" in complaint("vitt14")
    with pytest.raises(ConfigError, match="Did you mean 'vits14'"):
        opendino.load("vits41")
    with pytest.raises(ConfigError, match="Unknown model settings"):
        opendino.load(meta_file(tmp_path, small()), img_szie=3)


def test_offline_without_cache_names_file_address_and_place(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path / "hub"))
    text = complaint("vits14_reg")
    place = tmp_path / "hub" / "checkpoints" / "dinov2_vits14_reg4_pretrain.pth"
    for part in ("https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth", str(place),
                 "facebook/dinov2-with-registers-small"):  # fmt: skip
        assert part in text
    place.parent.mkdir(parents=True)
    torch.save(VisionTransformer(get_config("vits14_reg")).state_dict(), place)
    assert opendino.load("vits14_reg").config.arch == "vits14_reg"


# --- commands and hub ----------------------------------------------------------------------------------------------


def test_convert_command(tmp_path, capsys):
    source = meta_file(tmp_path, small())
    assert main(["convert", str(source), str(tmp_path / "hf"), "--to", "hf", "--json"]) == 0
    assert '"from": "meta"' in capsys.readouterr().out
    assert (tmp_path / "hf" / "preprocessor_config.json").is_file()
    assert main(["convert", str(source), str(tmp_path / "hf"), "--to", "hf"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "x.zip"), "--to", "meta"]) == 2
    assert main(["convert", str(tmp_path / "no.pth"), str(tmp_path / "y"), "--to", "hf"]) == 1


def test_models_command(capsys):
    assert main(["models", "--json"]) == 0
    assert '"parameters": 1136480768' in capsys.readouterr().out


def test_half_precision_files_come_back_as_fp32(tmp_path):
    model = small()
    convert(meta_file(tmp_path, model), tmp_path / "half.safetensors", "meta", "fp16")
    loaded = opendino.load(tmp_path / "half.safetensors")
    assert loaded.cls_token.dtype is torch.float32
    assert torch.equal(loaded.cls_token, model.cls_token.half().float())


def test_hub_entry_points():
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("hubconf", root / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    for name in (f"dinov2_vit{size}14{suffix}" for size in "sblg" for suffix in ("", "_reg")):
        assert callable(getattr(hubconf, name))
    model = torch.hub.load(str(root), "dinov2_vits14_reg", source="local", pretrained=False, img_size=28)
    assert model(torch.zeros(1, 3, 28, 28)).shape == (1, 384)


def test_timm_names_carry_no_mask_token():
    assert "mask_token" not in to_timm(small().state_dict())
