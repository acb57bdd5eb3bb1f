# SPDX-License-Identifier: Apache-2.0
"""Starting from a weight file of the public kind: what is taken, what is frozen, what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import opendino
from opendino.cli.pretrain import read_arguments
from opendino.embed.embedder import Embedder
from opendino.errors import ConfigError, WeightsError
from opendino.models.config import ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone
from opendino.pretrain.config import InitSettings, PretrainConfig
from opendino.pretrain.initialise import backbone_rate, fit_stem, layerwise_decay, with_start
from opendino.pretrain.lengths import with_steps
from opendino.pretrain.trainer import Trainer

SMALL = [
    "--recipe", "vitt14_continue", "--batch-size", "4", "--num-workers", "0", "--precision", "fp32", "--device", "cpu",
    "--crops.global-size", "28", "--crops.local-size", "14", "--crops.num-local", "2", "--heads.num-prototypes", "8",
    "--heads.hidden-dim", "8", "--heads.bottleneck-dim", "4", "--guard.images", "8",
    "--guard.every", "100",
]  # fmt: skip


def backbone(width=64, **settings):
    torch.manual_seed(1)
    shape = {"img_size": 518, "embed_dim": width, "depth": 2, "num_heads": max(width // 64, 1)}
    model = VisionTransformer(ViTConfig(**{**shape, **settings}))
    with torch.no_grad():
        for name, value in model.named_parameters():  # a trained table is smooth, and its gammas are about 1
            if name == "pos_embed":
                value[:, 1:] += torch.linspace(-1, 1, value.shape[1] - 1).view(1, -1, 1) * 0.3
            elif name.endswith("gamma"):
                value += 0.1 * torch.randn_like(value)
            elif name == "cls_token":
                value += torch.randn_like(value)
    return model.eval()


@pytest.fixture
def public(tmp_path):
    """A bare .pth with published names, a 518 px table and no heads."""
    path = tmp_path / "public.pth"
    torch.save(backbone().state_dict(), path)
    return path


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        field = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(field).resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def settings(images, out, init, *more):
    return read_arguments(
        [*SMALL, "--data", str(images), "--out", str(out), "--steps", "6", "--init", str(init), *map(str, more)]
    )[0]


def test_step_0_has_the_features_of_the_file(public, images, tmp_path, caplog):
    config = settings(images, tmp_path / "run", public)
    assert (config.model.embed_dim, config.model.depth, config.model.patch_size) == (64, 2, None)
    run = Trainer(config)
    files = [str(p) for p in sorted(images.iterdir())]
    own = Embedder(opendino.load(public), size=28, fit="resize")(files)
    for network in (run.model.student, run.model.teacher):
        there = Embedder(network["backbone"], size=28, fit="resize")(files)
        assert np.abs(own.cls - there.cls).max() < 1e-5
        assert np.abs(own.patches - there.patches).max() < 1e-5
    gammas = {k: v for k, v in opendino.load(public).state_dict().items() if k.endswith("gamma")}
    assert all(torch.equal(run.teacher.state_dict()[k], v) for k, v in gammas.items())
    run.train()
    for words in (
        "position table 37×37 → 2×2",
        "scale_offset",
        "LayerScale kept",
        "new heads",
        "stands still for 1 of 6",
    ):
        assert words in caplog.text
    assert "learning rate of the backbone 0.00025 at most (0.5 of the heads' 0.0005), × 0.9 a layer" in caplog.text
    event = json.loads((run.run / "events.jsonl").read_text().splitlines()[0])
    assert event["event"] == "start"
    assert "public.pth" in event["reason"]
    saved = opendino.load(run.run)
    assert saved.config.grid == 2


def test_registers_bring_their_own_position_convention(tmp_path, images):
    model = backbone(num_register_tokens=4, pos_resize="size_antialias")
    torch.save(model.state_dict(), tmp_path / "reg.pth")
    run = Trainer(settings(images, tmp_path / "run", tmp_path / "reg.pth"))
    assert run.teacher.config.pos_resize == "size_antialias"
    x = torch.randn(2, 3, 28, 28)
    assert (run.teacher.eval()(x) - model(x)).abs().max() < 1e-5


def test_the_warm_up_leaves_the_backbone_bit_equal_and_moves_the_heads(public, images, tmp_path):
    config = settings(images, tmp_path / "run", public, "--init.warm-heads-steps", 3, "--optim.lr", 0.05)
    states = []
    run = Trainer(config, on_step=lambda r: states.append({k: v.clone() for k, v in run.model.state_dict().items()}))
    first = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.train()
    rates = [json.loads(line).get("backbone_lr") for line in (run.run / "metrics.jsonl").read_text().splitlines()[1:]]
    assert rates[:3] == [0.0, 0.0, 0.0]
    assert all(0 < r < 0.05 for r in rates[3:])
    body = [k for k in first if ".backbone." in k]
    assert {k.split(".")[0] for k in body} == {"student", "teacher"}
    for state in states[:3]:
        assert all(torch.equal(first[k], state[k]) for k in body)
    assert not torch.equal(first["student.dino_head.mlp.0.weight"], states[2]["student.dino_head.mlp.0.weight"])
    assert not torch.equal(first["teacher.dino_head.mlp.0.weight"], states[2]["teacher.dino_head.mlp.0.weight"])
    for network in ("student", "teacher"):
        moved = [k for k in body if k.startswith(network) and not torch.equal(first[k], states[-1][k])]
        assert f"{network}.backbone.blocks.1.mlp.fc1.weight" in moved


def test_moments_of_the_backbone_begin_when_it_does(public, images, tmp_path):
    config = settings(images, tmp_path / "run", public, "--init.warm-heads-steps", 6)
    run = Trainer(config)
    run.train()
    state = run.engine.tensors()
    assert float(state["optimizer.backbone.norm.weight.step"]) == 0
    assert float(state["optimizer.dino_head.mlp.0.weight.step"]) == 6


def test_heads_of_a_run_are_taken_where_they_fit(public, images, tmp_path, caplog):
    Trainer(settings(images, tmp_path / "first", public)).train()
    second = Trainer(settings(images, tmp_path / "second", tmp_path / "first"))
    heads = load_file(tmp_path / "first" / "heads.safetensors")
    for mine in (second.model.student.state_dict(), second.model.teacher.state_dict()):
        assert all(torch.equal(v, mine[k]) for k, v in heads.items())
    assert second.engine.start.warm_steps == 0
    other = Trainer(settings(images, tmp_path / "third", tmp_path / "first", "--heads.hidden-dim", 16))
    assert "do not fit" in other.engine.start.text
    assert other.engine.start.warm_steps == 1
    fresh = Trainer(settings(images, tmp_path / "fourth", tmp_path / "first", "--init.heads", "new"))
    assert not fresh.engine.start.heads_taken
    with pytest.raises(WeightsError, match="do not fit this run.*--heads settings"):
        Trainer(settings(images, tmp_path / "x", tmp_path / "first", "--heads.hidden-dim", 16, "--init.heads", "run"))
    with pytest.raises(WeightsError, match="has none. Give a run folder"):
        Trainer(settings(images, tmp_path / "y", public, "--init.heads", "run"))


def test_other_architectures_than_the_file_has_are_refused(public, images, tmp_path):
    with pytest.raises(ConfigError, match=r"depth 2; the run asks for depth 3. Leave the --model flags out"):
        Trainer(settings(images, tmp_path / "run", public, "--model.depth", 3))
    with pytest.raises(ConfigError, match="no multiple of the patch.*14 pixels. Give 28 or 42"):
        settings(images, tmp_path / "run", public, "--crops.global-size", 30)
    with pytest.raises(WeightsError, match="does not exist"):
        settings(images, tmp_path / "run", tmp_path / "none.pth")


def test_the_number_of_heads_can_be_told(images, tmp_path):
    model = backbone(48, num_heads=3)
    torch.save(model.state_dict(), tmp_path / "odd.pth")
    run = Trainer(settings(images, tmp_path / "run", tmp_path / "odd.pth", "--model.num-heads", 3))
    x = torch.randn(2, 3, 28, 28)
    assert (run.teacher.eval()(x) - model(x)).abs().max() < 1e-5


def test_weights_without_layer_scale_get_one_that_changes_nothing(images, tmp_path):
    model = backbone(init_values=None, patch_size=7, img_size=224, qkv_bias=False)
    save_backbone(model, tmp_path / "plain.safetensors")
    run = Trainer(settings(images, tmp_path / "run", tmp_path / "plain.safetensors"))
    assert run.config.model.qkv_bias is False
    x = torch.randn(2, 3, 28, 28)
    assert (run.teacher.eval()(x) - model(x)).abs().max() < 1e-5
    assert "no LayerScale" in run.engine.start.text


@pytest.mark.parametrize("layout", ["hf", "timm"])
def test_files_of_others_start_with_the_same_features(layout, public, images, tmp_path):
    from opendino.cli import main

    other = tmp_path / {"hf": "folder", "timm": "file.safetensors"}[layout]
    assert main(["convert", str(public), str(other), "--to", layout]) == 0
    run = Trainer(settings(images, tmp_path / "run", other))
    x = torch.randn(2, 3, 28, 28)
    assert (run.teacher.eval()(x) - opendino.load(public)(x)).abs().max() < 1e-5


# --- channels ---------------------------------------------------------------------------------------------------------


def test_stems_by_hand():
    weight = torch.tensor([[[[3.0]], [[6.0]], [[9.0]]]])  # (1, 3, 1, 1)

    def stem(channels, how):
        return fit_stem(weight, channels, InitSettings(weights="FILE", stem=how)).flatten().tolist()

    assert stem(1, "mean") == [18.0]
    assert stem(4, "mean") == [4.5] * 4
    assert stem(4, "colours") == [1.5, 6.0, 9.0, 1.5]
    assert stem(5, "keep") == [3.0, 6.0, 9.0, 0.0, 0.0]
    with pytest.raises(
        WeightsError, match="FILE has a patch embedding for 3 channels.*only be added.*--init.stem mean"
    ):
        stem(1, "keep")
    five = torch.ones(1, 5, 1, 1)
    assert fit_stem(five, 2, InitSettings()).flatten().tolist() == [2.5, 2.5]
    with pytest.raises(WeightsError, match="only a stem for 3"):
        fit_stem(five, 2, InitSettings(stem="colours"))


def test_grey_images_give_a_one_channel_run_the_features_of_the_file(public, images, tmp_path):
    run = Trainer(settings(images, tmp_path / "run", public, "--model.in-chans", 1))
    grey = torch.randn(2, 1, 28, 28)
    there = run.teacher.eval()(grey)
    assert (there - opendino.load(public)(grey.expand(-1, 3, -1, -1))).abs().max() < 1e-5
    assert run.config.crops.mean == (pytest.approx((0.485 + 0.456 + 0.406) / 3, abs=1e-6),)
    assert "patch embedding for 3 channels → 1 (each gets the mean over the file's channels" in run.engine.start.text
    run.train()
    assert opendino.load(run.run).config.in_chans == 1


def test_further_channels_can_begin_silent(public, images, tmp_path):
    config = settings(images, tmp_path / "run", public, "--model.in-chans", 5, "--init.stem", "keep")
    run = Trainer(config)
    x = torch.randn(2, 5, 28, 28)
    assert (run.teacher.eval()(x) - opendino.load(public)(x[:, :3])).abs().max() < 1e-5
    assert len(config.crops.std) == 5


# --- rates ------------------------------------------------------------------------------------------------------------


def test_rates_of_a_run_from_weights_and_of_one_without():
    optim = {"lr": 1.0, "lr_rule": "none", "warmup_steps": 4, "layerwise_decay": 0.9}
    plain, init = PretrainConfig(optim=optim), PretrainConfig(optim=optim, init={"weights": "x"})
    assert (layerwise_decay(plain), layerwise_decay(init)) == (0.9, 0.75)
    kept = PretrainConfig(optim=optim, init={"weights": "x", "layerwise_decay": None})
    assert layerwise_decay(kept) == 0.9
    assert [backbone_rate(init, s, 1.0, 2) for s in range(7)] == pytest.approx([0, 0, 0.025, 0.05, 0.075, 0.1, 0.1])
    assert backbone_rate(init, 0, 0.5, 0) == pytest.approx(0.05)  # without a warm-up of heads it follows the heads
    assert with_steps(PretrainConfig(steps=100, init={"warm_heads_steps": 20}), 50).init.warm_heads_steps == 10


def test_statistics_and_channels_of_the_recipe_win(public):
    config = PretrainConfig(init={"weights": str(public)}, model={"in_chans": 4}, crops={"mean": (0.5,), "std": (0.2,)})
    assert (with_start(config).model.in_chans, with_start(config).crops.mean) == (4, (0.5,))
    silent = PretrainConfig(init={"weights": str(public)}, model={"in_chans": 2})
    assert len(with_start(silent).crops.mean) == 2


def test_help_reads_no_weights():
    with pytest.raises(SystemExit) as stop:
        read_arguments(["--recipe", "vits14_continue", "--help"])
    assert stop.value.code == 0
