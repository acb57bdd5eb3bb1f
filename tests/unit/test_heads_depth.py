# SPDX-License-Identifier: Apache-2.0
"""Depth heads: losses against literal loops, training that resumes to the same bits, and the command."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from opendino.cli import main
from opendino.errors import ConfigError, DataError, WeightsError
from opendino.evaluate.datasets.folders import open_folder_depth
from opendino.heads import depth_training
from opendino.heads.depth import DepthEstimator
from opendino.heads.depth_augment import augment, crop_size
from opendino.heads.depth_data import ArrayDepth, KittiCropped, Order, Truths, kitti_part
from opendino.heads.depth_losses import depth_loss, gradient_loss, scale_invariant_loss
from opendino.heads.depth_modules import DepthModel, LinearDepthHead, depth_blocks, make_depth_head
from opendino.heads.depth_training import DepthRecipe
from opendino.models.config import ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone

SMALL = {"steps": 12, "batch_size": 4, "channels": 8, "workers": 0}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VisionTransformer(ViTConfig(img_size=28, patch_size=7, embed_dim=16, depth=4, num_heads=2)).eval()


def scenes(n=10, shape=(28, 42), seed=0):
    """Images whose brightness is their depth, in smooth blobs."""
    rng = np.random.default_rng(seed)
    images, depths = [], []
    for _ in range(n):
        field = rng.integers(20, 235, (3, 4), dtype=np.uint8)
        grey = np.array(Image.fromarray(field).resize(shape[::-1], Image.Resampling.BICUBIC))
        images.append(np.repeat(grey[..., None], 3, -1))
        depths.append(1 + grey.astype(np.float32) / 40)
    return images, depths


def write_set(root, split, n, seed, shape=(28, 42)):
    images, depths = scenes(n, shape, seed)
    for i, (image, depth) in enumerate(zip(images, depths)):
        for kind in ("images", "depth"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / "images" / split / f"{i}.png")
        Image.fromarray((depth * 1000).astype(np.uint16)).save(root / "depth" / split / f"{i}.png")


# --- losses -----------------------------------------------------------------------------------------------------------


def random_depths(seed=0):
    rng = np.random.default_rng(seed)
    p = torch.from_numpy(rng.uniform(0.5, 9, (2, 13, 15)))
    t = torch.from_numpy(rng.uniform(0.5, 12, (2, 13, 15)))
    t[:, 3:5] = 0
    return p, t


def test_the_scale_invariant_loss_is_the_formula():
    p, t = random_depths()
    g = [
        math.log(float(a) + 1e-3) - math.log(float(b) + 1e-3)
        for a, b in zip(p.flatten(), t.flatten()) if 0 < float(b) <= 10
    ]  # fmt: skip
    mean = sum(g) / len(g)
    variance = sum((x - mean) ** 2 for x in g) / (len(g) - 1)
    assert float(scale_invariant_loss(p, t, 10)) == pytest.approx(math.sqrt(variance + 0.15 * mean**2), abs=1e-9)
    of_mean = float(scale_invariant_loss(p, t, 10, mean_only=True))
    assert of_mean == pytest.approx(math.sqrt(0.15 * mean**2), abs=1e-9)


def test_the_gradient_loss_is_the_formula():
    p, t = random_depths()
    total = 0.0
    for step in (1, 2, 4, 6):
        summed, count = 0.0, 0
        for b in range(2):
            a, c = p[b, ::step, ::step].numpy(), t[b, ::step, ::step].numpy()
            ok = (c > 0) & (c <= 10)
            count += ok.sum()
            g = np.log(a + 1e-3) - np.log(np.maximum(c, 0) + 1e-3)
            for y in range(a.shape[0]):
                for x in range(a.shape[1]):
                    for yy, xx in ((y + 2, x), (y, x + 2)):
                        if yy < a.shape[0] and xx < a.shape[1] and ok[y, x] and ok[yy, xx]:
                            summed += abs(g[y, x] - g[yy, xx])
        total += summed / count
    assert float(gradient_loss(p, t, 10)) == pytest.approx(total, abs=1e-9)
    both = float(depth_loss(p, t, 10))
    assert both == pytest.approx(float(scale_invariant_loss(p, t, 10)) + 0.5 * total, abs=1e-9)


def test_losses_are_differentiable_where_there_is_nothing_to_mend():
    t = torch.full((1, 6, 6), 2.0)
    for warming_up in (False, True):
        p = t.clone().requires_grad_()
        depth_loss(p, t, 10, warming_up=warming_up).backward()
        assert torch.isfinite(p.grad).all()
    assert depth_loss(t, torch.zeros_like(t), 10) is None


# --- modules ----------------------------------------------------------------------------------------------------------


def test_blocks_are_the_published_ones():
    assert depth_blocks(12, "lin4") == (2, 5, 8, 11)
    assert depth_blocks(24, "dpt") == (4, 11, 17, 23)
    assert depth_blocks(40, "lin4") == (9, 19, 29, 39)
    assert depth_blocks(12, "lin1") == (11,)
    assert depth_blocks(4, "lin4") == (0, 1, 2, 3)
    for n in range(4, 41):
        blocks = depth_blocks(n, "lin4")
        assert len(set(blocks)) == 4
        assert blocks[-1] == n - 1
    with pytest.raises(ConfigError, match="four blocks, but the model has 3"):
        depth_blocks(3, "dpt")
    with pytest.raises(ConfigError, match="'lin2'"):
        depth_blocks(12, "lin2")


def test_the_linear_head_in_the_published_order_of_steps():
    torch.manual_seed(0)
    head = LinearDepthHead(8, 4, 0.5, 8.0).double()
    patches, cls = ([torch.randn(3, *s).double() for _ in range(4)] for s in ((8, 5, 7), (8,)))
    joined = [torch.cat([p, c[:, :, None, None].expand_as(p)], 1) for p, c in zip(patches, cls)]
    large = [F.interpolate(x, (20, 28), mode="bilinear", align_corners=False) for x in joined]
    weights = F.conv2d(torch.cat(large, 1), head.conv_depth.weight, head.conv_depth.bias).relu() + 0.1
    bins = torch.linspace(0.5, 8, 256).double()
    expected = (weights / weights.sum(1, keepdim=True) * bins[:, None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(head(patches, cls), expected, rtol=1e-6, atol=1e-6)


def test_a_model_pads_at_the_centre_and_resizes_the_whole_of_it(model):
    head = make_depth_head("lin1", 16, 1e-3, 10)
    network = DepthModel(model, head, (3,), 1e-3, 10).eval()
    x = torch.randn(1, 3, 24, 30)
    with torch.no_grad():
        padded = F.pad(x, (2, 3, 2, 2))  # 30 → 35, 24 → 28: the smaller half on the left and on the top
        ((patches, cls),) = model.get_intermediate_layers(padded, (3,), True, True, norm=False)
        expected = F.interpolate(head([patches], [cls]), (24, 30), mode="bilinear", align_corners=False)
        assert torch.equal(network(x), expected)


def test_settings_out_of_range_are_refused(model):
    with pytest.raises(ConfigError, match="from 5 to 2"):
        DepthEstimator(model, min_depth=5, max_depth=2)
    with pytest.raises(ConfigError, match="steps 0"):
        DepthEstimator(model, steps=0)
    with pytest.raises(ConfigError, match="'live'"):
        DepthEstimator(model, features="live")
    with pytest.raises(ConfigError, match="no head yet"):
        DepthEstimator(model).predict([np.zeros((28, 28, 3), np.uint8)])


# --- data -------------------------------------------------------------------------------------------------------------


def test_augmentation_moves_image_and_depth_together():
    ramp = torch.linspace(20, 100, 40 * 50).reshape(40, 50)
    image, depth = ramp.round().to(torch.uint8).expand(3, -1, -1), ramp / 20
    coloured, mirrored, turned = set(), set(), set()
    for seed in range(40):
        out, far = augment(image, depth, np.random.default_rng(seed), (32, 40))
        assert out.shape == (3, 32, 40)
        assert far.shape == (32, 40)
        assert torch.equal(out, augment(image, depth, np.random.default_rng(seed), (32, 40))[0])
        inside, known = out[0, 2:-2, 2:-2], far[2:-2, 2:-2] > 0
        plain = bool((inside - 20 * far[2:-2, 2:-2]).abs()[known].max() < 3)  # a turned depth is its neighbour's
        coloured.add(not plain)
        mirrored.add(bool(far[16, 10] > far[16, 30]))
        turned.add(bool((far == 0).any()))  # corners that came in from outside
        if not plain:  # a gamma and a factor: still rising with depth
            ranks = [a[known].argsort().argsort().double() for a in (inside, far[2:-2, 2:-2])]
            assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.98
    assert coloured == mirrored == turned == {True, False}


def test_published_crops():
    assert crop_size((480, 640), "eigen") == (416, 544)
    assert crop_size((352, 1216), "garg") == (352, 704)
    assert crop_size((224, 224), "none") == (194, 190)
    image, depth = torch.zeros(3, 480, 640, dtype=torch.uint8), torch.zeros(480, 640)
    image[:, 45:472, 43:608] = 255  # NYU's white border, here black, is taken off
    plain = next(s for s in range(99) if min(np.random.default_rng(s).random(4)[[0, 3]]) > 0.5)
    out, _ = augment(image, depth, np.random.default_rng(plain), (416, 544), "eigen")
    assert (out == 255).all()


def test_kitti_is_cut_to_its_lower_middle(model):
    image = np.zeros((375, 1242, 3), np.uint8)
    image[23:, 13:1229] = 200
    depth = np.where(image[..., 0] > 0, 20, 5).astype(np.float32)
    cut = KittiCropped(ArrayDepth([image], [depth], max_depth=80, crop="garg"))
    assert cut.image(0).shape == (3, 352, 1216)
    assert (cut.image(0) == 200).all()
    assert (cut.depth(0) == 20).all()
    small = torch.zeros(3, 100, 300)
    assert kitti_part(small) is small
    assert isinstance(DepthEstimator(model, "lin1")._as_set(cut.data, None), KittiCropped)


def test_an_epoch_has_every_row_once_and_batches_of_one_kind():
    order = Order(["a"] * 8 + ["b"] * 2, 4, seed=3)
    assert order.per_epoch == 3
    epochs = [[order.at(3 * e + k) for k in range(3)] for e in range(2)]
    for epoch in epochs:
        assert sorted(r for batch in epoch for r in batch) == list(range(10))
        assert all(len({r < 8 for r in batch}) == 1 for batch in epoch)
    assert epochs[0] != epochs[1]
    assert Order(["a"] * 8 + ["b"] * 2, 4, seed=3).at(4) == epochs[1][1], "a step does not depend on those before"


# --- fitting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["lin1", "lin4", "dpt"])
def test_fitting_beats_a_constant(model, head):
    images, depths = scenes(12)
    steps = 60
    fitted = DepthEstimator(model, head, **SMALL | {"steps": steps, "lr": 1e-2, "channels": 16}).fit(images, depths)
    test, truth = scenes(6, seed=1)
    constant = np.mean([np.sqrt(((t - np.median(depths)) ** 2).mean()) for t in truth])
    assert fitted.score(test, truth)["rmse"] < 0.8 * constant


def test_features_from_the_store_give_what_images_give(model, tmp_path):
    images, depths = scenes(3)
    fitted = DepthEstimator(model, "lin4", cache=tmp_path, **SMALL).fit(images, depths)
    direct = fitted.predict(images)
    stored = {p.index: p.depth for p in fitted.predictions(ArrayDepth(images, depths))}
    for i, depth in enumerate(direct):
        assert depth.shape == images[i].shape[:2]
        np.testing.assert_allclose(stored[i], depth, rtol=2e-3)  # tokens are kept in half precision


def test_a_prediction_is_the_mean_with_the_mirror_image(model):
    images, depths = scenes(4)
    fitted = DepthEstimator(model, "lin1", **SMALL).fit(images, depths)
    both = fitted.predict(images[:1])[0]
    fitted.flip = False
    plain, mirrored = fitted.predict([images[0], images[0][:, ::-1].copy()])
    np.testing.assert_allclose(both, (plain + mirrored[:, ::-1]) / 2, rtol=1e-5)
    assert not np.allclose(both, plain)


@pytest.mark.parametrize("features", ["cached", "augmented"])
def test_a_killed_training_ends_in_the_same_bits(model, features, tmp_path, monkeypatch):
    images, depths = scenes(6)
    settings = SMALL | {"features": features}
    whole = DepthEstimator(model, "lin4", **settings).fit(images, depths)
    monkeypatch.setattr(depth_training, "SAVE_EVERY_S", 0.0)

    def kill(step, steps, loss):
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        DepthEstimator(model, "lin4", **settings).fit(images, depths, state=tmp_path / "s.pt", on_step=kill)
    done = []
    resumed = DepthEstimator(model, "lin4", **settings).fit(
        images, depths, state=tmp_path / "s.pt", on_step=lambda step, steps, loss: done.append(step)
    )
    assert done == list(range(8, 13))
    assert resumed.losses_ == whole.losses_
    for a, b in zip(whole.model_.decode_head.parameters(), resumed.model_.decode_head.parameters()):
        assert torch.equal(a, b)
    other = DepthEstimator(model, "lin4", **settings | {"lr": 0.5})
    with pytest.raises(ConfigError, match=r"other settings \(recipe differ\)"):
        other.fit(images, depths, state=tmp_path / "s.pt")
    (tmp_path / "s.pt").write_bytes(b"half a file")
    with pytest.raises(WeightsError, match=r"damaged.*Delete it"):
        other.fit(images, depths, state=tmp_path / "s.pt")


def test_the_learning_rate_is_the_published_schedule():
    recipe = DepthRecipe(steps=38400, lr=1e-4)
    assert recipe.lr_at(0) == pytest.approx(1e-7)
    halfway = 0.5 * (1 + math.cos(math.pi / 6)) * 1e-4 * (1 - 0.5 * 0.999)
    assert recipe.lr_at(6400) == pytest.approx(halfway)
    assert recipe.lr_at(12800) == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)) * 1e-4)
    assert depth_training.scale_steps(38400) == 100
    assert depth_training.scale_steps(40) == 2


def test_images_of_several_sizes(model):
    images, depths = (a + b for a, b in zip(scenes(5), scenes(3, (35, 28), seed=2)))
    for features in ("cached", "augmented"):
        fitted = DepthEstimator(model, "lin1", features=features, **SMALL).fit(images, depths)
        assert [p.shape for p in fitted.predict(images[4:6])] == [(28, 42), (35, 28)]
        assert fitted.score(images, depths)["num_images"] == 8


def test_the_size_can_be_given(model):
    images, depths = scenes(4)
    fitted = DepthEstimator(model, "lin1", size=(56, 56), **SMALL).fit(images, depths)
    assert fitted.predict(images[:1])[0].shape == (28, 42)


def test_maps_without_depth_and_unreadable_files_are_left_out_and_named(model, tmp_path):
    write_set(tmp_path, "train", 6, seed=0)
    Image.fromarray(np.zeros((28, 42), np.uint16)).save(tmp_path / "depth" / "train" / "0.png")
    (tmp_path / "images" / "train" / "1.png").write_bytes(b"no image")
    (tmp_path / "depth" / "train" / "2.png").write_bytes(b"no depth")
    data = open_folder_depth(tmp_path, "train")
    for features in ("augmented", "cached"):
        fitted = DepthEstimator(model, "lin1", features=features, **SMALL).fit(data)
        why = {name.rsplit("/", 1)[1]: reason for name, reason in fitted.left_out_}
        assert set(why) == {"0.png", "1.png", "2.png"}
        assert "no pixel" in why["0.png"]
    scores = fitted.score(data)
    assert (scores["num_images"], scores["without_valid_depth"], scores["unreadable"]) == (3, 1, 2)
    assert Truths(data).empty == [0]


def test_nothing_to_learn_from_or_to_score_is_an_error(model):
    images, depths = scenes(3)
    empty = [np.zeros_like(d) for d in depths]
    for features in ("cached", "augmented"):
        with pytest.raises(DataError, match=r"None of the 3 images.*3 depth maps have no pixel"):
            DepthEstimator(model, "lin1", features=features, **SMALL).fit(images, empty)
    fitted = DepthEstimator(model, "lin1", **SMALL).fit(images, depths)
    with pytest.raises(DataError, match="None of 3 depth maps"):
        fitted.score(images, empty)
    with pytest.raises(DataError, match="None of 1 images"):
        fitted.score(["gone.jpg"], [depths[0]])
    with pytest.raises(DataError, match="one str"):
        fitted.predict("a.jpg")
    with pytest.raises(DataError, match="3 images and 2 depth maps"):
        fitted.fit(images, depths[:2])
    with pytest.raises(DataError, match="without depths"):
        fitted.fit(images)


def test_a_head_is_kept_with_its_backbone(model, tmp_path):
    images, depths = scenes(4)
    fitted = DepthEstimator(model, "dpt", max_depth=9, size=(28, 35), **SMALL).fit(images, depths)
    fitted.save(tmp_path / "h.safetensors")
    loaded = DepthEstimator.load(tmp_path / "h.safetensors", model)
    assert (loaded.head, loaded.max_depth, loaded.size) == ("dpt", 9, (28, 35))
    assert np.array_equal(loaded.predict(images[:1])[0], fitted.predict(images[:1])[0])
    torch.manual_seed(1)
    other = VisionTransformer(model.config)
    with pytest.raises(WeightsError, match="same backbone"):
        DepthEstimator.load(tmp_path / "h.safetensors", other)
    save_backbone(model, tmp_path / "m.safetensors")
    by_name = DepthEstimator(str(tmp_path / "m.safetensors"), "lin1", **SMALL).fit(images, depths)
    by_name.save(tmp_path / "n.safetensors")
    assert DepthEstimator.load(tmp_path / "n.safetensors").predict(images[:1])[0].shape == (28, 42)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rooms(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("rooms")
    save_backbone(model, root / "model.safetensors")
    write_set(root / "a", "train", 8, seed=0)
    write_set(root / "a", "val", 4, seed=1)
    write_set(root / "b", "val", 3, seed=2, shape=(35, 35))
    return root


def call(rooms, capsys, *words):
    start = ["eval", "depth", "--model", str(rooms / "model.safetensors"), "--data", str(rooms / "a")]
    assert main([*start, *map(str, words)]) == 0
    return capsys.readouterr().out


def test_the_command_trains_scores_transfers_and_draws(rooms, capsys, tmp_path):
    small = ["--steps", 6, "--batch-size", 4, "--workers", 0, "--transfer", rooms / "b"]
    page, head = tmp_path / "page.html", tmp_path / "h.safetensors"
    out = json.loads(call(rooms, capsys, *small, "--save-head", head, "--page", page, "--json"))
    assert (out["head"], out["num_train"], out["num_images"]) == ("lin4", 8, 4)
    there = out["transfer"][str(rooms / "b")]
    assert there["num_images"] == 3
    assert there["rmse"] != out["rmse"]
    text = page.read_text()
    assert text.count("data:image/png") == 7
    assert f"{there['rmse']:.4f}" in text
    again = json.loads(call(rooms, capsys, "--head", head, "--workers", 0, "--json"))
    assert again["rmse"] == out["rmse"]
    assert "num_train" not in again
    table = call(rooms, capsys, "--head", head, "--workers", 0, "--transfer", rooms / "b")
    assert f"{out['rmse']:.4f}" in table


def test_the_command_goes_on_where_it_stopped(rooms, capsys, monkeypatch):
    words = ["--steps", 6, "--batch-size", 4, "--workers", 0, "--json"]
    first = call(rooms, capsys, *words)

    def never(*args, **settings):
        raise AssertionError("a finished training was done again")

    monkeypatch.setattr(depth_training, "_step", never)
    monkeypatch.setattr(VisionTransformer, "get_intermediate_layers", never)
    assert call(rooms, capsys, *words) == first


def test_mistakes_on_the_command_line(rooms, capsys, tmp_path):
    base = ["eval", "depth", "--model", str(rooms / "model.safetensors")]
    for words, wanted in (
        (["--data", str(tmp_path / "gone")], "is no folder"),
        (["--data", str(rooms / "b")], "has no split 'train'"),
        (["--data", str(rooms / "a"), "--fit", "pad"], "--fit is 'pad'"),
        (["--data", str(rooms / "a"), "--head", str(tmp_path / "gone.safetensors")], "gone.safetensors"),
    ):
        assert main([*base, *words]) != 0
        error = capsys.readouterr().err
        assert wanted in " ".join(error.split()).replace(" /", "/"), error
        assert "Traceback" not in error
