# SPDX-License-Identifier: Apache-2.0
"""The open model: a deeper backbone of the same function, and what comes with the package."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import opendino
from opendino.cli import main
from opendino.embed.embedder import Embedder
from opendino.errors import ConfigError, DataError
from opendino.models.packaged import packaged_heads, packaged_weights
from opendino.models.registry import get_config
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone
from opendino.pretrain.config import load_recipe
from opendino.pretrain.distill.teacher import FrozenTeacher
from opendino.pretrain.initialise import with_start
from opendino.pretrain.trainer import Trainer

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
from open_model.deepen import deepen  # noqa: E402
from open_model.release import stages_until  # noqa: E402
from open_model.train import released_stages, started_from  # noqa: E402

sys.path.remove(BENCHMARKS)


def small(depth=2, init_values=0.5):
    torch.manual_seed(0)
    return VisionTransformer(get_config("vitt14", depth=depth, init_values=init_values, img_size=28)).eval()


def test_a_deeper_backbone_computes_the_same_until_it_is_trained():
    model = small()
    deeper = deepen(model, 6)
    images = torch.randn(3, 3, 28, 28)
    assert len(deeper.blocks) == 6
    torch.testing.assert_close(deeper.eval()(images), model(images))
    gammas = [bool(block.ls1.gamma.abs().sum() + block.ls2.gamma.abs().sum()) for block in deeper.blocks]
    assert gammas == [True, False, False] * 2
    deeper(images).square().sum().backward()
    assert deeper.blocks[1].ls1.gamma.grad.abs().sum() > 0  # training can open them
    assert deeper.blocks[1].ls2.gamma.grad.abs().sum() > 0


@pytest.mark.parametrize(("depth", "init_values"), [(5, 0.5), (4, None)])
def test_other_depths_and_backbones_without_layer_scale_are_refused(depth, init_values):
    with pytest.raises(ConfigError, match="become a multiple"):
        deepen(small(init_values=init_values), depth)


def test_a_stage_starts_from_the_one_before_or_from_the_released_file_that_ended_with_it(tmp_path):
    last = len(released_stages())
    config = load_recipe(f"vitt14_open_{last}")
    assert released_stages()[-1]["recipe"] == config.recipe
    begun = started_from(config, tmp_path / f"stage{last}", tmp_path / "start")
    assert begun.init.weights == "vitt14_open"
    with pytest.raises(DataError, match=f"the released vitt14_open ends with vitt14_open_{last}"):
        started_from(config, tmp_path / "stage1", tmp_path / "start")
    run = tmp_path / "stage1"
    (run / "weights").mkdir(parents=True)
    save_backbone(small(depth=4), run / "weights" / "teacher.safetensors")
    (run / "heads.safetensors").write_bytes(packaged_heads("vitt14_open").read_bytes())
    begun = started_from(config, run, tmp_path / "start")
    assert begun.init.weights == str(tmp_path / "start")
    assert opendino.load(begun.init.weights).config.depth == 12


def test_a_release_knows_the_stages_of_the_one_before(tmp_path):
    known = released_stages()
    assert stages_until(len(known), tmp_path) == known
    with pytest.raises(DataError, match=f"does not know vitt14_open_{len(known) + 1}"):
        stages_until(len(known) + 1, tmp_path)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **more):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr("socket.socket.connect", refuse)


def test_it_is_loaded_without_a_network_and_describes_pictures(pictures):
    model = opendino.load("vitt14_open")
    shape = get_config("vitt14").model_dump(exclude={"arch", "img_size", "init_values"})
    assert model.config.model_dump(exclude={"arch", "img_size", "init_values"}) == shape
    assert packaged_weights("vitt14_open").stat().st_size < 12e6
    features = Embedder("vitt14_open")(pictures)
    assert features.cls.shape == (len(pictures), 192)
    assert features.errors == [None] * len(pictures)


def test_other_names_are_not_packaged():
    assert packaged_weights("vitt14") is None
    assert packaged_heads("dinov2_vits14") is None
    assert packaged_weights("no/such/model") is None


def test_models_says_where_it_is(capsys):
    assert main(["models", "--json"]) == 0
    row = next(r for r in json.loads(capsys.readouterr().out)["models"] if r["name"] == "vitt14_open")
    assert row["packaged"]
    assert Path(row["cached"]).is_file()


def test_its_heads_go_on_with_it(pictures, tmp_path):
    place = {"data": str(pictures[0].parent), "out": str(tmp_path / "run"), "batch_size": 4}
    trainer = Trainer(with_start(load_recipe("vitt14_demo_open")).model_copy(update=place))
    assert trainer.engine.start.heads_taken
    teacher = FrozenTeacher("vitt14_open")
    assert teacher.heads is not None
    own = trainer.engine.model.teacher["dino_head"].state_dict()
    assert torch.equal(own["last_layer.weight"], teacher.heads["dino_head"].state_dict()["last_layer.weight"])
    size = trainer.config.crops.global_size  # the position table is now that of the crops
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(trainer.teacher.eval()(images), opendino.load("vitt14_open")(images), atol=1e-3, rtol=0)


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    paths = [tmp_path / "pictures" / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (60, 80, 3), np.uint8)).save(path)
    return paths
