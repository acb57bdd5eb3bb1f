# SPDX-License-Identifier: Apache-2.0
"""Meta's depth heads: files fabricated in the released layouts give what the formulas give, written out with torch's
functions; the DPT head also equals transformers'."""

import importlib.util
import logging
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import opendino
from opendino.errors import ConfigError, WeightsError
from opendino.heads.depth import DepthEstimator
from opendino.heads.hub_depth import depth_model, open_depth_head
from opendino.heads.published_depth import fetch_head, head_url, load_published_depth
from opendino.models.config import ViTConfig
from opendino.models.vit import VisionTransformer

D, C = 16, 8


def backbone(depth=4, seed=0, img_size=28, **settings):
    torch.manual_seed(seed)
    return VisionTransformer(
        ViTConfig(img_size=img_size, patch_size=7, embed_dim=D, depth=depth, num_heads=2, **settings)
    ).eval()


def linear_state(layers, dim=D, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {
        "decode_head.conv_depth.weight": torch.randn(256, 2 * dim * layers, 1, 1, generator=g),
        "decode_head.conv_depth.bias": torch.randn(256, generator=g),
    }


def dpt_state(dim=D, channels=C, seed=2):
    g = torch.Generator().manual_seed(seed)
    shapes = {}
    widths = [dim // 8, dim // 4, dim // 2, dim]
    for i, w in enumerate(widths):
        shapes |= {
            f"reassemble_blocks.projects.{i}.conv.weight": (w, dim, 1, 1),
            f"reassemble_blocks.projects.{i}.conv.bias": (w,),
            f"reassemble_blocks.readout_projects.{i}.0.weight": (dim, 2 * dim),
            f"reassemble_blocks.readout_projects.{i}.0.bias": (dim,),
            f"convs.{i}.conv.weight": (channels, w, 3, 3),
            f"fusion_blocks.{i}.project.conv.weight": (channels, channels, 1, 1),
            f"fusion_blocks.{i}.project.conv.bias": (channels,),
        }
        for unit in (2,) if i == 0 else (1, 2):
            for conv in (1, 2):
                shapes[f"fusion_blocks.{i}.res_conv_unit{unit}.conv{conv}.conv.weight"] = (channels, channels, 3, 3)
    resize = "reassemble_blocks.resize_layers"
    shapes |= {f"{resize}.0.weight": (widths[0], widths[0], 4, 4), f"{resize}.0.bias": (widths[0],)}
    shapes |= {f"{resize}.1.weight": (widths[1], widths[1], 2, 2), f"{resize}.1.bias": (widths[1],)}
    shapes |= {f"{resize}.3.weight": (widths[3], widths[3], 3, 3), f"{resize}.3.bias": (widths[3],)}
    shapes |= {"project.conv.weight": (channels, channels, 3, 3), "project.conv.bias": (channels,)}
    half = channels // 2
    shapes |= {"conv_depth.head.0.weight": (half, channels, 3, 3), "conv_depth.head.0.bias": (half,)}
    shapes |= {"conv_depth.head.2.weight": (32, half, 3, 3), "conv_depth.head.2.bias": (32,)}
    shapes |= {"conv_depth.head.4.weight": (1, 32, 1, 1), "conv_depth.head.4.bias": (1,)}
    return {f"decode_head.{k}": torch.randn(s, generator=g) * 0.3 for k, s in shapes.items()}


def write(path, state):
    torch.save({"meta": {"mmcv_version": "1.5.0", "iter": 38400, "CLASSES": None}, "state_dict": state}, path)
    return path


def tokens(model, x, blocks):
    """Un-normalised tokens of images padded at their centre: [(B, D, h, w), (B, D)] per block."""
    h, w = x.shape[-2:]
    miss_h, miss_w = -h % model.patch_size, -w % model.patch_size
    x = F.pad(x, (miss_w // 2, miss_w - miss_w // 2, miss_h // 2, miss_h - miss_h // 2))
    hidden, found = model.prepare_tokens(x), []
    for i, block in enumerate(model.blocks):
        hidden = block(hidden)
        if i in blocks:
            grid = (x.shape[-2] // model.patch_size, x.shape[-1] // model.patch_size)
            patches = hidden[:, 1 + model.num_register_tokens :]
            found.append((patches.transpose(1, 2).reshape(len(x), D, *grid), hidden[:, 0]))
    return found


def literal_linear(state, found, low, high, size):
    maps = [torch.cat([p, c[:, :, None, None].expand_as(p)], 1) for p, c in found]
    grid = [4 * side for side in maps[0].shape[-2:]]
    x = torch.cat([F.interpolate(m, grid, mode="bilinear", align_corners=False) for m in maps], 1)
    logits = F.conv2d(x, state["decode_head.conv_depth.weight"], state["decode_head.conv_depth.bias"])
    weights = torch.relu(logits) + 0.1
    weights = weights / weights.sum(1, keepdim=True)
    depth = torch.einsum("bkhw,k->bhw", weights, torch.linspace(low, high, 256))[:, None].clamp(low, high)
    return F.interpolate(depth, size, mode="bilinear", align_corners=False)


def literal_dpt(state, found, low, high, size):
    s = {k.removeprefix("decode_head."): v for k, v in state.items()}

    def conv(x, name, **how):
        return F.conv2d(x, s[f"{name}.weight"], s.get(f"{name}.bias"), **how)

    def unit(x, name):
        y = conv(torch.relu(x), f"{name}.conv1.conv", padding=1)
        return x + conv(torch.relu(y), f"{name}.conv2.conv", padding=1)

    maps = []
    for i, (patches, cls) in enumerate(found):
        b, d, h, w = patches.shape
        flat = patches.flatten(2).transpose(1, 2)
        joined = torch.cat([flat, cls[:, None].expand(-1, h * w, -1)], -1)
        name = f"reassemble_blocks.readout_projects.{i}.0"
        read = F.gelu(F.linear(joined, s[f"{name}.weight"], s[f"{name}.bias"])).transpose(1, 2).reshape(b, d, h, w)
        x = conv(read, f"reassemble_blocks.projects.{i}.conv")
        name = f"reassemble_blocks.resize_layers.{i}"
        if i < 2:
            x = F.conv_transpose2d(x, s[f"{name}.weight"], s[f"{name}.bias"], stride=(4, 2)[i])
        if i == 3:
            x = conv(x, name, stride=2, padding=1)
        maps.append(conv(x, f"convs.{i}.conv", padding=1))
    out = maps[3]
    for i in range(4):
        name = f"fusion_blocks.{i}"
        if i > 0:
            skip = F.interpolate(maps[3 - i], out.shape[-2:], mode="bilinear", align_corners=False)
            out = out + unit(skip, f"{name}.res_conv_unit1")
        out = unit(out, f"{name}.res_conv_unit2")
        out = F.interpolate(out, scale_factor=2, mode="bilinear", align_corners=True)
        out = conv(out, f"{name}.project.conv")
    out = torch.relu(conv(out, "project.conv", padding=1))
    out = F.interpolate(conv(out, "conv_depth.head.0", padding=1), scale_factor=2, mode="bilinear", align_corners=True)
    out = conv(torch.relu(conv(out, "conv_depth.head.2", padding=1)), "conv_depth.head.4")
    return F.interpolate((torch.relu(out) + low).clamp(low, high), size, mode="bilinear", align_corners=False)


CASES = {
    "dinov2_x_nyu_linear_head.pth": (linear_state(1), "lin1", 10.0, literal_linear),
    "dinov2_x_kitti_linear4_head.pth": (linear_state(4), "lin4", 80.0, literal_linear),
    "dinov2_x_nyu_dpt_head.pth": (dpt_state(), "dpt", 10.0, literal_dpt),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("registers", [0, 2])
def test_a_released_file_gives_the_formula(name, registers, tmp_path):
    state, kind, deepest, literal = CASES[name]
    model = backbone(num_register_tokens=registers)
    estimator = load_published_depth(write(tmp_path / name, state), model)
    assert (estimator.head, estimator.min_depth, estimator.max_depth) == (kind, 1e-3, deepest)
    x = torch.randn(2, 3, 24, 45, generator=torch.Generator().manual_seed(3))  # neither side is a multiple of 7
    with torch.no_grad():
        got = estimator.model_(x)
        blocks = (3,) if kind == "lin1" else (0, 1, 2, 3)
        expected = literal(state, tokens(model, x, blocks), 1e-3, deepest, (24, 45))
    assert got.shape == (2, 1, 24, 45)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * deepest)
    assert got.std() > 1e-3 * deepest, "the case decides nothing"
    assert torch.equal(estimator.model_.whole_inference(x, img_meta=None, rescale=True), got)


def test_the_dpt_head_equals_transformers(tmp_path):
    pytest.importorskip("transformers")
    from transformers import Dinov2Config, DPTConfig
    from transformers.models.dpt.modeling_dpt import DPTDepthEstimationHead, DPTNeck

    model, state = backbone(), dpt_state(channels=256)  # transformers has this number in its code
    ours = load_published_depth(write(tmp_path / "nyu_dpt.pth", state), model).model_.decode_head
    config = DPTConfig(
        backbone_config=Dinov2Config(image_size=28, patch_size=7, hidden_size=D, num_hidden_layers=4),
        neck_hidden_sizes=[D // 8, D // 4, D // 2, D], fusion_hidden_size=256, use_bias_in_fusion_residual=False,
        add_projection=True, is_hybrid=False, reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    neck, head = DPTNeck(config).eval(), DPTDepthEstimationHead(config).eval()
    of_neck, of_head = renamed_for_transformers(state)
    report = neck.load_state_dict(of_neck, strict=False)
    unused = "fusion_stage.layers.0.residual_layer1.convolution"  # the first block adds nothing
    assert not report.unexpected_keys
    assert all(k.startswith(unused) for k in report.missing_keys), report.missing_keys
    head.load_state_dict(of_head)
    g = torch.Generator().manual_seed(3)
    patches, cls = ([torch.randn(2, *s, generator=g) for _ in range(4)] for s in ((D, 3, 5), (D,)))
    with torch.no_grad():
        sequences = [torch.cat([c[:, None], p.flatten(2).transpose(1, 2)], 1) for p, c in zip(patches, cls)]
        expected = head(neck(sequences, 3, 5))  # without the smallest depth
        got = ours(patches, cls)[:, 0] - 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
    assert expected.std() > 0.01 * expected.mean() > 0


def renamed_for_transformers(state):
    """Give the neck's and the head's tensors of a released DPT file under transformers' names."""
    neck, head = {}, {}
    for name, value in state.items():
        first, *rest = name.removeprefix("decode_head.").split(".")
        if first == "reassemble_blocks":
            kind, number, *more = rest
            if kind == "readout_projects":
                neck[f"reassemble_stage.readout_projects.{number}.{'.'.join(more)}"] = value
            else:
                part = "projection" if kind == "projects" else "resize"
                neck[f"reassemble_stage.layers.{number}.{part}.{more[-1]}"] = value
        elif first == "convs":
            neck[f"convs.{rest[0]}.{rest[-1]}"] = value
        elif first == "fusion_blocks":
            number, kind, *more = rest
            if kind == "project":
                to = f"projection.{more[-1]}"
            else:
                to = f"residual_layer{kind[-1]}.convolution{more[0][-1]}.{more[-1]}"
            neck[f"fusion_stage.layers.{number}.{to}"] = value
        elif first == "project":
            head[f"projection.{rest[-1]}"] = value
        else:
            head[".".join(rest)] = value
    return neck, head


def test_what_does_not_fit_is_refused_in_a_paragraph(tmp_path):
    model = backbone()
    with pytest.raises(WeightsError, match=r"takes 48 values.*gives 32.*give 128"):
        load_published_depth(write(tmp_path / "nyu.pth", linear_state(1, dim=24)), model)
    short = dpt_state()
    del short["decode_head.project.conv.bias"]
    with pytest.raises(WeightsError, match=r"missing: project\.conv\.bias"):
        load_published_depth(write(tmp_path / "nyu.pth", short), model)
    more = linear_state(1) | {"decode_head.bn.weight": torch.ones(2)}
    with pytest.raises(WeightsError, match=r"unknown: bn\.weight"):
        load_published_depth(write(tmp_path / "nyu.pth", more), model)
    with pytest.raises(WeightsError, match=r"missing.*of another shape|of another shape"):
        load_published_depth(write(tmp_path / "nyu.pth", dpt_state(dim=24)), model)
    with pytest.raises(WeightsError, match="no known depth head"):
        load_published_depth(write(tmp_path / "x.pth", {"decode_head.conv_seg.weight": torch.ones(2)}), model)
    with pytest.raises(WeightsError, match="which no released depth head has"):
        load_published_depth(write(tmp_path / "x.pth", {"weight": torch.ones(2)}), model)
    with pytest.raises(WeightsError, match="does not exist"):
        load_published_depth(tmp_path / "gone.pth", model)
    with pytest.raises(ConfigError, match="range of .* cannot be told"):
        load_published_depth(write(tmp_path / "mine.pth", linear_state(1)), model)
    assert load_published_depth(tmp_path / "mine.pth", model, max_depth=20).max_depth == 20


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "nyu.pth").write_bytes(pickle.dumps({"state_dict": Evil()}, protocol=2))
    with pytest.raises(WeightsError):
        load_published_depth(tmp_path / "nyu.pth", backbone())
    assert not (tmp_path / "ran").exists()


def test_a_backbone_in_the_file_is_left_aside_and_said(tmp_path, caplog):
    state = linear_state(1) | {"backbone.cls_token": torch.zeros(1, 1, D)}
    with caplog.at_level(logging.WARNING):
        assert load_published_depth(write(tmp_path / "nyu.pth", state), backbone()).head == "lin1"
    assert "backbone (1 tensors)" in caplog.text


def test_addresses_are_the_published_ones():
    base = "https://dl.fbaipublicfiles.com/dinov2"
    assert head_url("vits14", "lin1", "NYU") == f"{base}/dinov2_vits14/dinov2_vits14_nyu_linear_head.pth"
    assert head_url("vitg14", "lin4", "KITTI") == f"{base}/dinov2_vitg14/dinov2_vitg14_kitti_linear4_head.pth"
    assert head_url("dinov2_vitl14", "dpt", "NYU") == f"{base}/dinov2_vitl14/dinov2_vitl14_nyu_dpt_head.pth"
    with pytest.raises(ConfigError, match="NYU and KITTI"):
        head_url("vits14", "dpt", "SUN")


def test_an_absent_file_offline_is_named_with_address_and_place(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError) as caught:
        fetch_head("vits14", "lin4", "KITTI")
    text, file = str(caught.value), "dinov2_vits14_kitti_linear4_head.pth"
    assert f"dl.fbaipublicfiles.com/dinov2/dinov2_vits14/{file}" in text
    assert str(tmp_path / "checkpoints" / file) in text
    (tmp_path / "checkpoints").mkdir()
    write(tmp_path / "checkpoints" / file, linear_state(4))
    model = depth_model(backbone(), "vits14", "lin4", weights="KITTI")
    assert model.max_depth == 80


def test_the_hub_entry_points(tmp_path):
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("hubconf", root / "hubconf.py")
    hub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub)
    for size in "sblg":
        assert callable(getattr(hub, f"dinov2_vit{size}14_ld"))
        assert callable(getattr(hub, f"dinov2_vit{size}14_dd"))
    x = torch.zeros(1, 3, 30, 28)
    fresh = hub.dinov2_vits14_dd(pretrained=False, img_size=28, depth=4)
    assert fresh(x).shape == (1, 1, 30, 28)
    file = tmp_path / "dinov2_vits14_pretrain.pth"
    torch.save(opendino.load("vits14", weights="random", img_size=28).state_dict(), file)
    given = {"backbone_weights": file, "img_size": 28}
    head = write(tmp_path / "dinov2_vits14_kitti_linear_head.pth", linear_state(1, dim=384))
    model = hub.dinov2_vits14_ld(layers=1, weights=head, **given)
    assert (model.max_depth, model.blocks) == (80, (11,))
    assert not model.training
    assert {k.split(".")[0] for k in model.state_dict()} == {"backbone", "decode_head"}
    with pytest.raises(ConfigError, match="lin1 head, but lin4"):
        hub.dinov2_vits14_ld(weights=head, **given)
    with pytest.raises(ConfigError, match="layers is 2"):
        hub.dinov2_vits14_ld(layers=2, pretrained=False, img_size=28, depth=1)


def test_a_head_of_ours_opens_by_the_same_call(tmp_path):
    model = backbone()
    theirs = load_published_depth(write(tmp_path / "nyu.pth", linear_state(4)), model)
    theirs.save(tmp_path / "ours.safetensors")
    ours = open_depth_head(tmp_path / "ours.safetensors", model)
    assert isinstance(ours, DepthEstimator)
    x = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(ours.model_(x), theirs.model_(x))
