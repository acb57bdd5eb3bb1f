# SPDX-License-Identifier: Apache-2.0
"""Histograms of gradients and colours against a loop over pixels, components against numpy, and a run with them."""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from opendino.errors import ConfigError
from opendino.images.sources import open_source
from opendino.pretrain.config import InitSettings, MaskSettings, PretrainConfig, load_recipe, parse_config
from opendino.pretrain.engine import Engine
from opendino.pretrain.hog import Components, HogTargets, crop_descriptors, patch_descriptors
from opendino.pretrain.initialise import with_start
from opendino.pretrain.paste import paste
from opendino.pretrain.stages import timeline
from opendino.pretrain.student_teacher import Crops, StudentTeacher
from opendino.pretrain.trainer import Trainer


def pictures(number=3, side=28, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((number, 3, side, side), np.float32))


def slow_cells(image, side):
    """Gradient lengths by field and direction, one pixel at a time."""
    grey = np.tensordot([0.299, 0.587, 0.114], image, 1)
    h, w = grey.shape
    found = np.zeros((side, side, 9))
    for i in range(h):
        for j in range(w):
            rows = grey[i + 1, j] - grey[i - 1, j] if 0 < i < h - 1 else 0.0
            columns = grey[i, j + 1] - grey[i, j - 1] if 0 < j < w - 1 else 0.0
            number = min(int(math.degrees(math.atan2(rows, columns)) % 180 / 20), 8)
            found[i * side // h, j * side // w, number] += math.hypot(rows, columns)
    return found * side * side / (h * w)


def slow_colours(image, side):
    h, w = image.shape[1:]
    found = np.zeros((side, side, 64))
    for i in range(h):
        for j in range(w):
            red, green, blue = (min(int(v * 4), 3) for v in image[:, i, j])
            found[i * side // h, j * side // w, 16 * red + 4 * green + blue] += side * side / (h * w)
    return found


def bounded(x):
    return x / math.sqrt((x**2).sum() + 1e-10)


def unit(x):
    return x / np.linalg.norm(x)


def slow_blocks(image, side):
    cells = slow_cells(image, side)
    blocks = []
    for i in range(side - 1):
        for j in range(side - 1):
            block = np.concatenate([cells[i + a, j + b] for a in (0, 1) for b in (0, 1)])
            blocks.append(bounded(np.minimum(bounded(block), 0.2)))
    return np.concatenate(blocks)


@pytest.mark.parametrize("side", [32, 56])
def test_crop_descriptors_equal_a_loop(side):
    images = pictures(side=side)
    for image, found in zip(images.double().numpy(), crop_descriptors(images).numpy()):
        small = np.zeros((3, 16, 16))
        for i in range(16):  # a pixel of the small crop is the mean of all pixels that it touches
            for j in range(16):
                rows = slice(i * side // 16, -(-(i + 1) * side // 16))
                columns = slice(j * side // 16, -(-(j + 1) * side // 16))
                small[:, i, j] = image[:, rows, columns].mean((1, 2))
        small = unit(small.ravel() - small.mean())
        colours = np.sqrt(slow_colours(image, 4)).ravel()
        gradients = [unit(slow_blocks(image, 8)), unit(slow_blocks(image, 4))]
        wanted = unit(np.concatenate([*gradients, unit(colours), 0.7 * small]))
        np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_patch_descriptors_equal_a_loop():
    images = pictures(side=84)
    for image, found in zip(images.double().numpy(), patch_descriptors(images, 14).numpy()):
        fine, colours = slow_cells(image, 12), slow_colours(image, 6)
        own = np.zeros((6, 6, 100))
        for i in range(6):
            for j in range(6):
                four = [fine[2 * i + a, 2 * j + b] for a in (0, 1) for b in (0, 1)]
                own[i, j] = np.concatenate([bounded(np.concatenate(four)), unit(np.sqrt(colours[i, j]))])
        for i in range(6):
            for j in range(6):
                near = [own[max(i - n, 0) : i + n + 1, max(j - n, 0) : j + n + 1] for n in (1, 2, 4)]
                wanted = np.concatenate([own[i, j], *[x.reshape(-1, 100).mean(0) for x in near]])
                np.testing.assert_allclose(found[6 * i + j], wanted, atol=2e-6)


@pytest.mark.parametrize("width", [6, 20])
def test_components_are_half_whitened_principal_components(width):
    rows = np.random.default_rng(1).normal(size=(200, 12)) @ np.diag(np.arange(12, 0, -1)) + 3
    found = Components(12, width)
    found.fit(torch.from_numpy(rows))
    centred = rows - rows.mean(0)
    _, values, vectors = np.linalg.svd(centred, full_matrices=False)
    number = min(width, 12)
    scores = centred @ vectors[:number].T / np.sqrt(values[:number] / math.sqrt(len(rows)))
    got = found(torch.from_numpy(rows).float()).numpy()
    np.testing.assert_allclose(np.abs(got[:, :number]), np.abs(scores), atol=1e-4)
    assert not got[:, number:].any()
    again = Components(12, width)
    again.fit(torch.from_numpy(rows))
    assert torch.equal(again.basis, found.basis)


def test_the_loss_is_the_distance_from_the_targets_of_the_crops_as_they_are_seen():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    targets = HogTargets(16, 14, mean, std)
    rgb = pictures(8)
    seen = (rgb - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    targets.fit(seen)
    looked_at = torch.zeros(8, 4, dtype=torch.bool)
    looked_at[0, 1] = looked_at[5, 3] = True
    cls, patches = torch.randn(8, 16, requires_grad=True), torch.randn(2, 16)
    total, parts = targets.loss(cls, patches, seen, looked_at)
    whole = targets.crop_components(crop_descriptors(rgb))
    by_patch = targets.patch_components(patch_descriptors(rgb, 14))
    wanted = (1 - torch.nn.functional.cosine_similarity(cls, whole)).mean()
    wanted_patch = (1 - torch.nn.functional.cosine_similarity(patches, by_patch[[0, 5], [1, 3]])).mean()
    torch.testing.assert_close(parts["hog_cls"], wanted.detach())
    torch.testing.assert_close(parts["hog_patch"], wanted_patch)
    torch.testing.assert_close(total, wanted + wanted_patch)
    total.backward()
    assert cls.grad.abs().sum() > 0
    nothing = torch.zeros_like(looked_at)
    assert targets.loss(cls, patches[:0], seen, nothing)[1]["hog_patch"] == 0


SMALL = """
model: {{arch: vits14, embed_dim: 16, depth: 2, num_heads: 2, init_values: 1.0, in_chans: {chans}}}
crops: {{global_size: 28, local_size: 14, num_local: 0, mean: {mean}, std: {mean}}}
heads: {{num_prototypes: 8, hidden_dim: 8, bottleneck_dim: 4}}
loss: {{hog_weight: {weight}}}
optim: {{lr: 1.0e-3, lr_rule: none, warmup_steps: 1}}
steps: 6
batch_size: 4
num_workers: 0
"""


def settings(weight=2.0, chans=3, **more):
    text = SMALL.format(weight=weight, chans=chans, mean=[0.5] * chans)
    return parse_config(text, "test").model_copy(update=more)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)).save(
            tmp_path / "images" / f"{i}.png"
        )
    return tmp_path


def test_a_run_learns_the_targets_and_keeps_them_in_its_checkpoint(folder):
    records = []
    config = settings(data=str(folder / "images"), out=str(folder / "run"), steps=30, probe_every=100)
    trainer = Trainer(config, on_step=records.append)
    before = {k: v.clone() for k, v in trainer.engine.tensors().items() if ".hog." in k}
    trainer.train()
    assert before["model.hog.crop_components.basis"].abs().sum() > 0
    assert records[-1]["hog_cls"] < records[0]["hog_cls"] - 0.05
    assert all(torch.equal(v, trainer.engine.tensors()[k]) for k, v in before.items())
    total = records[0]["dino"] + records[0]["ibot"] + 0.1 * records[0]["koleo"]
    assert records[0]["loss"] == pytest.approx(total + 2 * (records[0]["hog_cls"] + records[0]["hog_patch"]), rel=1e-4)


def test_a_run_from_a_run_has_its_components_and_not_those_of_its_own_crops(folder):
    place = {"data": str(folder / "images"), "probe_every": 100}
    Trainer(settings(out=str(folder / "run"), **place)).train()
    second = settings(out=str(folder / "second"), init=InitSettings(weights=str(folder / "run"), heads="run"), **place)
    narrow = second.crops.model_copy(update={"global_scale": (0.05, 0.1)})
    other = second.model_copy(update={"crops": narrow, "out": str(folder / "third")})
    first, begun = (Trainer(with_start(c)).engine.model.hog for c in (second, other))
    kept = load_file(folder / "run" / "heads.safetensors")
    for name, value in begun.state_dict().items():
        assert torch.equal(value, kept[f"hog.{name}"])
        assert torch.equal(value, first.state_dict()[name])
    alone = settings(data=str(folder / "images"), crops=narrow)
    engine = Engine(alone)
    engine.begin(open_source(folder / "images"))
    assert not torch.equal(engine.model.hog.crop_components.basis, begun.crop_components.basis)


def test_components_of_another_shape_are_found_anew_and_the_others_are_kept(folder):
    place = {"data": str(folder / "images"), "probe_every": 100}
    Trainer(settings(out=str(folder / "run"), **place)).train()
    kept = load_file(folder / "run" / "heads.safetensors")
    narrow = {k: v[:50].contiguous() if k.startswith("hog.patch") else v for k, v in kept.items()}
    save_file(narrow, folder / "run" / "heads.safetensors")
    second = settings(out=str(folder / "second"), init=InitSettings(weights=str(folder / "run"), heads="run"), **place)
    other = second.model_copy(update={"crops": second.crops.model_copy(update={"global_scale": (0.05, 0.1)})})
    found = Trainer(with_start(other)).engine.model.hog
    assert found.given == {"crop_components"}
    assert torch.equal(found.crop_components.basis, kept["hog.crop_components.basis"])
    assert found.patch_components.basis.abs().sum() > 0
    assert not torch.equal(found.patch_components.basis, kept["hog.patch_components.basis"])


def test_the_components_come_from_all_over_the_source_whatever_the_process(folder):
    source = open_source(folder / "images")
    first, second = (Engine(settings(data=str(folder / "images"))) for _ in range(2))
    for engine in (first, second):
        engine.begin(source)
    for a, b in zip(first.model.hog.buffers(), second.model.hog.buffers(), strict=True):
        assert torch.equal(a, b)


def test_without_a_weight_there_are_no_targets():
    model = StudentTeacher(settings(weight=0.0))
    assert model.hog is None
    assert not any("hog" in k for k in model.state_dict())
    assert load_recipe("vitt14_demo").loss.hog_weight == 0


def test_other_than_three_channels_are_refused():
    with pytest.raises(ConfigError, match="3 channels, got 2"):
        StudentTeacher(settings(chans=2))


def test_stages_have_the_targets_all_or_none(folder):
    stages = [{"name": "first", "steps": 3}, {"name": "second", "steps": 3, "loss": {"hog_weight": 0.0}}]
    config = settings(data=str(folder / "images")).model_dump() | {"stages": stages}
    with pytest.raises(ConfigError, match="Stage 'second' has loss.hog_weight 0 and the recipe 2"):
        timeline(PretrainConfig.model_validate(config))


def test_stages_have_the_same_numbers_of_identity(folder):
    stages = [{"name": "first", "steps": 3}, {"name": "second", "steps": 3, "loss": {"hog_identity": 4}}]
    config = settings(data=str(folder / "images")).model_dump() | {"stages": stages}
    with pytest.raises(ConfigError, match="Stage 'second' has loss.hog_identity 4 and the recipe 0"):
        timeline(PretrainConfig.model_validate(config))


def test_a_distillation_refuses_them():
    with pytest.raises(ConfigError, match="set loss.hog_weight to 0"):
        parse_config("{teacher: vits14, loss: {hog_weight: 1.0}}", "test")


def test_all_patches_are_described_while_ibot_looks_at_the_masked_ones():
    config = settings(weight=2.0)
    model = StudentTeacher(config)
    every = copy.deepcopy(model)
    every.settings = config.loss.model_copy(update={"hog_patches": "all"})
    for one in (model, every):
        one.hog.fit(pictures(40))
    masks = torch.zeros(8, 4, dtype=torch.bool)
    masks[1, 2] = masks[6, 0] = True
    crops = Crops(pictures(8) * 2 - 1, None, masks)
    [targets] = model.targets([crops], 0.07)
    _, few = model.loss(crops, targets)
    total, parts = every.loss(crops, targets)
    for name in ("dino", "ibot", "koleo", "hog_cls"):
        torch.testing.assert_close(parts[name], few[name])
    tokens = model.student["backbone"].forward_features(crops.global_crops, masks)["x_norm_patchtokens"].flatten(0, 1)
    wanted = model.hog.patch_components(patch_descriptors(crops.global_crops * 0.5 + 0.5, 14)).flatten(0, 1)
    distance = (1 - torch.cosine_similarity(tokens, wanted)).mean().detach()
    torch.testing.assert_close(parts["hog_patch"], distance, atol=1e-5, rtol=0)
    assert parts["hog_patch"] != few["hog_patch"]
    others = parts["dino"] + parts["ibot"] + 0.1 * parts["koleo"]
    torch.testing.assert_close(total.detach(), others + 2 * (parts["hog_cls"] + distance), atol=1e-4, rtol=0)


def test_without_dino_and_ibot_heads_stay_as_they_are_and_the_teacher_follows(folder):
    losses = {"dino_weight": 0.0, "ibot_weight": 0.0, "koleo_weight": 0.0, "hog_weight": 1.0, "hog_patches": "all"}
    config = settings(data=str(folder / "images"), out=str(folder / "run"), probe_every=100)
    config = config.model_copy(update={"loss": config.loss.model_copy(update=losses), "masks": MaskSettings(share=0.0)})
    records = []
    trainer = Trainer(config, on_step=records.append)
    begun = {k: v.clone() for k, v in trainer.engine.model.student.state_dict().items()}
    trainer.train()
    heads = load_file(folder / "run" / "heads.safetensors")
    for name in (k for k in begun if "_head." in k):
        assert torch.equal(heads[name], begun[name]), name
    name = "blocks.0.mlp.fc1.weight"
    assert not torch.equal(trainer.teacher.state_dict()[name], begun[f"backbone.{name}"])
    assert records[-1]["loss"] == pytest.approx(records[-1]["hog_cls"] + records[-1]["hog_patch"], rel=1e-5)
    assert "dino" not in records[-1]
    assert records[0]["feature_rank"] > 0  # of the student's tokens


def test_stages_may_stop_to_ask_the_teacher_and_begin_again(folder):
    alone = {"dino_weight": 0.0, "ibot_weight": 0.0, "koleo_weight": 0.0}
    losses = {"first": {}, "alone": alone, "last": {}}
    stages = [{"name": name, "steps": 3, "loss": loss} for name, loss in losses.items()]
    values = settings(data=str(folder / "images"), out=str(folder / "run"), probe_every=100).model_dump(
        exclude={"steps"}
    )
    records = []
    trainer = Trainer(PretrainConfig.model_validate(values | {"stages": stages}), on_step=records.append)
    trainer.train()
    assert ["dino" in r for r in records] == [True] * 3 + [False] * 3 + [True] * 3
    norms = [r["grad_norm_dino_head"] for r in records]
    assert min(norms[:3] + norms[6:]) > 0
    assert norms[3:6] == [0.0] * 3


def stopped_and_whole(config, folder):
    """Train without a stop, and with one and again; both must end alike. Gives the records of the first."""
    records = []
    Trainer(config.model_copy(update={"out": str(folder / "whole")}), on_step=records.append).train()

    def stop(record):
        if record["step"] == 4:
            raise KeyboardInterrupt

    parts = config.model_copy(update={"out": str(folder / "parts")})
    with pytest.raises(KeyboardInterrupt):
        Trainer(parts, on_step=stop).train()
    Trainer(parts).train()
    first, second = (load_file(folder / name / "weights" / "teacher.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    return records


def test_a_run_that_does_not_ask_the_teacher_goes_on_after_a_stop(folder):
    losses = {"dino_weight": 0.0, "ibot_weight": 0.0, "koleo_weight": 0.0, "hog_weight": 1.0}
    config = settings(data=str(folder / "images"), probe_every=100, checkpoint_every=3)
    config = config.model_copy(update={"loss": config.loss.model_copy(update=losses)})
    stopped_and_whole(config, folder)


def with_identity(identity=6, share=0.5, **more):
    config = settings(**more)
    losses = {"hog_identity": identity, "hog_paste": share, "hog_patches": "all"}
    return config.model_copy(update={"loss": config.loss.model_copy(update=losses)})


def test_the_last_numbers_of_a_patch_predict_the_crop_that_it_is_from():
    torch.manual_seed(0)
    model = StudentTeacher(with_identity())
    model.hog.fit(pictures(40))
    before = torch.cat([pictures(6), torch.ones(2, 3, 28, 28)])
    before[6:, :, 8:20, 8:20] = torch.tensor([0.9, 0.1, 0.2]).view(3, 1, 1)
    seen, identity = model.hog.identified(before * 2 - 1, 1.0, torch.Generator().manual_seed(0))
    pasted, source = paste(before, 1.0, 14, torch.Generator().manual_seed(0))
    torch.testing.assert_close(seen, pasted * 2 - 1)
    whole = model.hog.crop_components(crop_descriptors(before))
    torch.testing.assert_close(identity, whole[:, :6][source], atol=1e-4, rtol=1e-4)
    crops = Crops(seen, None, torch.zeros(8, 4, dtype=torch.bool), identity=identity)
    _, parts = model.loss(crops, model.targets([crops], 0.07)[0])
    tokens = model.student["backbone"].forward_features(seen)["x_norm_patchtokens"]
    own = model.hog.patch_components(patch_descriptors(pasted, 14))[..., :10]
    for name, guess, wanted in (("hog_patch", tokens[..., :10], own), ("hog_identity", tokens[..., 10:], identity)):
        distance = (1 - torch.cosine_similarity(guess, wanted, dim=-1)).mean().detach()
        torch.testing.assert_close(parts[name], distance, atol=1e-3, rtol=0)  # a level may flip by rounding


def test_micro_batches_have_the_identity_of_their_crops():
    identity = torch.arange(8 * 4 * 2).view(8, 4, 2)
    crops = Crops(torch.zeros(8, 3, 28, 28), None, torch.zeros(8, 4, dtype=torch.bool), identity=identity)
    first, second = crops.split(2)
    assert torch.equal(first.identity, identity[[0, 1, 4, 5]])
    assert torch.equal(second.identity, identity[[2, 3, 6, 7]])


def test_a_run_that_pastes_goes_on_after_a_stop(folder):
    white = np.full((40, 40, 3), 255, np.uint8)
    white[10:30, 12:28] = 90, 0, 160
    Image.fromarray(white).save(folder / "images" / "drawing.png")
    config = with_identity(data=str(folder / "images"), probe_every=100, checkpoint_every=3)
    records = stopped_and_whole(config, folder)
    assert all(0 < r["hog_identity"] < 2 for r in records)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("{hog_identity: 8}", "hog_identity is 8 and hog_weight 0"),
        ("{hog_weight: 1.0, hog_paste: 0.5}", "hog_paste is 0.5 and hog_identity 0"),
    ],
)
def test_settings_that_say_nothing_are_refused(loss, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(f"{{model: {{arch: vits14}}, loss: {loss}}}", "test")


def test_identity_leaves_something_to_the_patch():
    with pytest.raises(ConfigError, match="some of the 16 numbers"):
        StudentTeacher(with_identity(identity=16))
