# SPDX-License-Identifier: Apache-2.0
"""The grid of linear classifiers against one torch.optim.SGD loop each, resuming, random crops, and the command."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from opendino.errors import ConfigError, DataError
from opendino.evaluate import linear_grid
from opendino.evaluate.linear import RATES, FixedBatches, default_steps, grid_settings, samples_of, train_grid
from opendino.evaluate.linear_grid import Grid, GridSettings, Kind

D, K = 6, 5


def features(n=70, blocks=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % K
    centres = torch.randn(K, D, generator=torch.Generator().manual_seed(9), dtype=dtype)
    noise = torch.randn(n, blocks + 1, D, generator=generator, dtype=dtype)
    rows = centres[labels][:, None] + noise
    return rows[:, :-1], rows[:, -1], labels


def settings(**change):
    given = {"rates": (0.02, 0.1, 1.0), "steps": 9, "batch_size": 16, "seed": 3} | change
    return grid_settings(70, 4, **given)


def slow(grid_start, wanted, cls, mean, labels):
    """Each classifier by itself: nn.Linear, cross_entropy, SGD and the cosine scheduler of torch."""
    for model in grid_start.models:
        layer = nn.Linear(model.weight.shape[1], K, dtype=torch.float64)
        layer.load_state_dict({"weight": model.weight, "bias": model.bias})
        lr = model.rate * wanted.batch_size / 256
        sgd = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9, weight_decay=0)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, wanted.steps, eta_min=0)
        for step in range(wanted.steps):
            i = torch.from_numpy(samples_of(step, 70, wanted.batch_size, wanted.seed))
            tokens = [cls[i, b] for b in range(4 - model.kind.blocks, 4)]
            x = torch.cat(tokens + ([mean[i]] if model.kind.average else []), 1)
            sgd.zero_grad()
            nn.functional.cross_entropy(layer(x), labels[i]).backward()
            sgd.step()
            cosine.step()
        yield layer


@pytest.mark.parametrize("chunk", [1 << 25, 40])
def test_equals_a_loop_of_sgd_for_each_classifier(chunk, monkeypatch):
    monkeypatch.setattr(linear_grid, "CHUNK_NUMBERS", chunk)
    wanted, (cls, mean, labels) = settings(), features()
    start = Grid(wanted, D, K, dtype=torch.float64)
    grid = train_grid(FixedBatches(cls, mean, labels), wanted, K, dim=D, dtype=torch.float64)
    moved = 0
    for ours, begun, theirs in zip(grid.models, start.models, slow(start, wanted, cls, mean, labels), strict=True):
        torch.testing.assert_close(ours.weight, theirs.weight.data, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.bias, theirs.bias.data, rtol=0, atol=1e-6)
        moved = max(moved, (ours.weight - begun.weight).abs().max())
    assert moved > 0.1, "the case decides nothing"
    assert len(grid.models) == 12


def test_the_published_grid():
    full = grid_settings(1_281_167, 4)
    assert full.kinds == (Kind(1, False), Kind(1, True), Kind(4, False), Kind(4, True))
    assert full.rates == RATES
    assert (len(RATES), full.steps, full.batch_size) == (13, 12_500, 1024)
    assert full.rate(12, 0) == pytest.approx(0.4)
    assert full.rate(12, 6250) == pytest.approx(0.2)
    assert (default_steps(1000, 1000), default_steps(20_000)) == (500, math.ceil(100 * 20_000 / 1024))
    assert grid_settings(7, 2).kinds == (Kind(1, False), Kind(1, True), Kind(2, False), Kind(2, True))
    assert grid_settings(7, 1).kinds == (Kind(1, False), Kind(1, True))
    assert grid_settings(7, 1).batch_size == 7


def test_weights_begin_as_published():
    grid = Grid(GridSettings((Kind(1, False), Kind(4, True)), (0.1, 0.2), 5, 4), 100, 50)
    assert [tuple(m.weight.shape) for m in grid.models] == [(50, 100)] * 2 + [(50, 500)] * 2
    for model in grid.models:
        assert model.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert not model.bias.any()
    assert not torch.equal(grid.models[0].weight, grid.models[1].weight)


def test_each_pass_is_a_permutation_across_batches():
    seen = np.concatenate([samples_of(step, 10, 4, seed=1) for step in range(5)])
    for pass_ in (seen[:10], seen[10:]):
        assert sorted(pass_) == list(range(10))
    assert not np.array_equal(seen[:10], seen[10:])
    assert not np.array_equal(seen[:4], samples_of(0, 10, 4, seed=2))


class Killed(FixedBatches):
    def at(self, step, samples):
        if step == 6:
            raise KeyboardInterrupt
        return super().at(step, samples)


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path):
    wanted, given = settings(), features(dtype=torch.float32)
    state = {"state": tmp_path / "state.safetensors", "save_steps": 2, "save_seconds": 0}
    whole = train_grid(FixedBatches(*given), wanted, K, dim=D)
    with pytest.raises(KeyboardInterrupt):
        train_grid(Killed(*given), wanted, K, dim=D, **state)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    steps = []
    resumed = train_grid(
        FixedBatches(*given), wanted, K, dim=D, **state, on_step=lambda done, total: steps.append(done)
    )
    assert steps == [7, 8, 9]
    for ours, theirs in zip(resumed.models, whole.models, strict=True):
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)
    assert all(torch.equal(a, b) for a, b in zip(resumed.moments, whole.moments))


def test_the_state_of_another_training_is_refused(tmp_path):
    given, state = features(dtype=torch.float32), tmp_path / "state"
    train_grid(FixedBatches(*given), settings(), K, dim=D, state=state, save_steps=1, save_seconds=0)
    with pytest.raises(DataError, match="other features, classes or settings"):
        train_grid(FixedBatches(*given), settings(seed=4), K, dim=D, state=state)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read"):
        train_grid(FixedBatches(*given), settings(), K, dim=D, state=state)


def test_scores_of_all_classifiers_are_those_of_each():
    wanted, (cls, mean, labels) = settings(steps=30), features()
    grid = train_grid(FixedBatches(cls, mean, labels), wanted, K, dim=D, dtype=torch.float64)
    test = features(seed=1)
    each = [100 * (m.logits(*test[:2]).argmax(1) == test[2]).double().mean().item() for m in grid.models]
    assert grid.top1(*test).tolist() == pytest.approx(each)
    assert len(set(each)) > 3


@pytest.mark.parametrize(
    "change", [{"rates": (0.0,)}, {"rates": ()}, {"steps": 0}, {"batch_size": 0}, {"blocks": (0,)}]
)
def test_settings_that_are_not_positive_are_refused(change):
    with pytest.raises(ConfigError, match="positive"):
        settings(**change)


# --- random crops ----------------------------------------------------------------------------------------------------


def test_random_boxes_have_the_published_range():
    from opendino.embed.augmented import random_box

    boxes = [random_box(60, 80, np.random.default_rng(i)) for i in range(2000)]
    areas = np.array([b.height * b.width / 4800 for b in boxes])
    aspects = np.array([b.width / b.height for b in boxes])
    assert 0.07 < areas.min() < 0.1
    assert 0.9 < areas.max() <= 1
    assert 0.72 < aspects.min() < 0.78
    assert 1.28 < aspects.max() < 1.40
    assert 0.45 < np.mean([b.flip for b in boxes]) < 0.55
    assert all(0 <= b.top <= 60 - b.height and 0 <= b.left <= 80 - b.width for b in boxes)
    assert {b.top + b.height for b in boxes} >= {60, 59}
    narrow = random_box(10, 1000, np.random.default_rng(0))
    assert (narrow.height, narrow.width, narrow.top, narrow.left) == (10, 13, 0, 493)


@pytest.fixture
def model_file(tmp_path):
    from opendino.models.config import PreprocessSpec, ViTConfig
    from opendino.models.vit import VisionTransformer
    from opendino.models.weights import save_backbone

    torch.manual_seed(0)
    config = ViTConfig(img_size=28, patch_size=7, embed_dim=16, depth=2, num_heads=2, num_register_tokens=1)
    save_backbone(VisionTransformer(config, PreprocessSpec(resize=28, crop=28)), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def class_folders(root, names, n):
    rng = np.random.default_rng(len(root.name))
    for c, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(n):
            pixels = np.full((24, 36, 3), 60 + 60 * c) + rng.integers(0, 60, (24, 36, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")


def augmented(model_file, folder, **change):
    from opendino.embed.augmented import AugmentedFeatures
    from opendino.embed.embedder import Embedder
    from opendino.images.sources import open_source

    embedder = Embedder(model_file, layers=2, what=("cls", "mean"), **{"batch_size": 3, "workers": 0} | change)
    source = open_source(folder)
    return AugmentedFeatures(embedder, source, source.label_ids(), seed=5)


def test_crops_depend_on_step_and_sample_alone(tmp_path, model_file):
    class_folders(tmp_path / "train", "ab", 4)
    one, other = (augmented(model_file, tmp_path / "train", batch_size=b, workers=w) for b, w in ((3, 0), (5, 2)))
    cls, mean, labels = one.at(7, np.array([6, 1, 2, 0, 5]))
    assert (cls.shape, mean.shape, labels.tolist()) == ((5, 2, 16), (5, 16), [1, 0, 0, 0, 1])
    again = other.at(7, np.array([0, 6]))
    torch.testing.assert_close(again[0], cls[[3, 0]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again[1], mean[[3, 0]], rtol=1e-5, atol=1e-5)
    assert (one.at(8, np.array([0]))[0] - cls[3]).abs().max() > 1e-3


def test_features_of_a_crop_are_those_of_the_backbone(tmp_path, model_file):
    from torchvision.transforms.v2 import functional as tv

    from opendino.embed.augmented import random_box
    from opendino.images.arrays import read_image

    class_folders(tmp_path / "train", "ab", 2)
    given = augmented(model_file, tmp_path / "train")
    cls, mean, _ = given.at(4, np.array([3]))
    image, box = read_image(given.source.read(3)), random_box(24, 36, np.random.default_rng([5, 4, 3]))
    crop = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
    pixels = tv.resize(crop, [28, 28], interpolation=tv.InterpolationMode.BICUBIC, antialias=True)
    pixels = tv.normalize((pixels.flip(2) if box.flip else pixels).float() / 255, (0.485, 0.456, 0.406),
                          (0.229, 0.224, 0.225))  # fmt: skip
    model = given.embedder.model
    with torch.no_grad():
        (_, first), (patches, last) = model.get_intermediate_layers(pixels[None], 2, return_class_token=True)
    torch.testing.assert_close(cls[0], torch.cat([first, last]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean, patches.mean(1), rtol=1e-5, atol=1e-5)


def test_an_unreadable_sample_is_left_out_of_its_batch_and_named(tmp_path, model_file):
    class_folders(tmp_path / "train", "ab", 2)
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"no image")
    given = augmented(model_file, tmp_path / "train")
    assert given.at(0, np.array([0, 1, 2]))[2].tolist() == [0, 1]
    empty = given.at(0, np.array([1]))
    assert [tuple(t.shape) for t in empty] == [(0, 2, 16), (0, 16), (0,)]
    assert [p.rsplit("/", 1)[1] for p in given.unreadable] == ["1.png"]
    wanted = grid_settings(4, 2, steps=3, batch_size=1)
    assert all(m.weight.isfinite().all() for m in train_grid(given, wanted, 2, dim=16).models)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cached", "augmented"])
def test_command_prints_one_json_object(how, tmp_path, model_file, capsys):
    from opendino.cli.evaluate import main

    class_folders(tmp_path / "train", ["dark", "light", "mid"], 4)
    class_folders(tmp_path / "val", ["dark", "light"], 2)
    (tmp_path / "train" / "dark" / "broken.png").write_bytes(b"no image")
    words = ["--model", str(model_file), "--train", str(tmp_path / "train"), "--val", str(tmp_path / "val")]
    words += ["--steps", "20", "--features", how, "--rates", "0.1", "1", "5", "--test", str(tmp_path / "val")]
    assert main(["linear", *words, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert len(got["grid"]) == 12
    assert got["top1"] == max(row["top1"] for row in got["grid"]) == got["test"]["top1"]
    assert got["best"]["name"] == next(row["name"] for row in got["grid"] if row["top1"] == got["top1"])
    assert (got["errors"], got["num_val"], got["steps"], got["features"]) == (1, 4, 20, how)
    assert main(["linear", *words]) == 0
    text = capsys.readouterr().out
    assert "12 classifiers, 20 steps" in text
    assert got["best"]["name"] in text
