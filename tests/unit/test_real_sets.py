# SPDX-License-Identifier: Apache-2.0
"""The table of real sets: descriptors and heads against slow references, and two scripts that must agree."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from sklearn.linear_model import Ridge as SklearnRidge
from torchmetrics.classification import MulticlassJaccardIndex

from opendino.models.config import ViTConfig
from opendino.models.vit import VisionTransformer

FOLDER = Path(__file__).parents[2] / "benchmarks" / "real_sets"
MODULES = ("build", "check", "dense", "describers", "handmade", "table", "train", "truths")


@pytest.fixture(scope="module")
def scripts():
    """The modules of benchmarks/real_sets, without leaving their short names behind."""
    sys.path.insert(0, str(FOLDER))
    kept = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    try:
        yield {name: __import__(name) for name in MODULES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


def random_image(seed, side=40):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


# --- descriptors ---------------------------------------------------------------------------------------------------


def slow_hog(grey):
    """Histogram of oriented gradients, pixel by pixel and block by block."""
    cells = np.zeros((8, 8, 9))
    for y in range(64):
        for x in range(64):
            dy = grey[y + 1, x] - grey[y - 1, x] if 0 < y < 63 else 0.0
            dx = grey[y, x + 1] - grey[y, x - 1] if 0 < x < 63 else 0.0
            angle = np.degrees(np.arctan2(dy, dx)) % 180
            cells[y // 8, x // 8, int(angle // 20) % 9] += (dx * dx + dy * dy) ** 0.5 / 64
    out = []
    for y in range(7):
        for x in range(7):
            block = cells[y : y + 2, x : x + 2].ravel()
            block = np.minimum(block / np.sqrt((block**2).sum() + 1e-10), 0.2)
            out.append(block / np.sqrt((block**2).sum() + 1e-10))
    return np.concatenate(out)


def test_hog_equals_a_loop_over_pixels(scripts):
    image = random_image(0)
    grey = np.asarray(image.convert("L").resize((64, 64), Image.Resampling.BILINEAR), float) / 255
    slow = slow_hog(grey)
    assert np.allclose(scripts["handmade"].gradient_histograms(image), slow / np.linalg.norm(slow), atol=1e-12)


def test_colours_are_counted_by_quarter(scripts):
    image = Image.new("RGB", (64, 64), (255, 0, 0))
    image.paste((0, 0, 130), (32, 0, 64, 32))  # upper right quarter
    counts = scripts["handmade"].colour_histograms(image).reshape(4, 64) ** 2
    assert counts[0, 3 * 16] == pytest.approx(0.25)
    assert counts[1, 2] == pytest.approx(0.25)
    assert counts[3, 3 * 16] == pytest.approx(0.25)


def test_patches_are_described_where_they_are(scripts):
    rgb = np.zeros((42, 42, 3), np.uint8)
    rgb[14:28, 28:42] = 255  # middle row, right column
    raw = scripts["handmade"].describe_patches("raw", rgb)
    assert raw.shape == (3, 3, 48 * 2)
    assert (raw[1, 2, :48] == 1).all()
    assert (raw[0, 0, :48] == 0).all()
    assert np.allclose(raw[1, 1, 48:96], 1 / 9)  # one of its nine neighbours is white
    colour = scripts["handmade"].describe_patches("hog+colour", rgb)
    assert colour.shape == (3, 3, (64 + 8) * 2)
    assert colour[1, 2, 63] == colour[0, 0, 0] == 1
    assert np.array_equal(scripts["handmade"].describe_patches("hog", rgb)[..., :8], colour[..., 64:72])


def test_backbone_describes_boxes_and_patches(scripts, tmp_path):
    for i in range(3):
        random_image(i).save(tmp_path / f"{i}.png")
    config = ViTConfig(arch="tiny", embed_dim=16, depth=2, num_heads=2, img_size=28)
    row = scripts["describers"].Backbone("trained", VisionTransformer(config))
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    whole = np.concatenate(list(row.images(paths, [None] * 3, 28)))
    boxed = np.concatenate(list(row.images(paths, [None, (4, 4, 30, 30), None], 28)))
    assert whole.shape == (3, 16)
    assert np.allclose(whole[[0, 2]], boxed[[0, 2]], atol=1e-5)
    assert not np.allclose(whole[1], boxed[1], atol=1e-3)
    assert np.concatenate(list(row.patches(paths, 42))).shape == (3, 3, 3, 16)
    other = scripts["describers"].Backbone("trained", VisionTransformer(config))
    assert other.key != row.key


# --- heads ---------------------------------------------------------------------------------------------------------


def test_ridge_equals_scikit_learn(scripts, monkeypatch):
    dense, rng = scripts["dense"], np.random.default_rng(0)
    monkeypatch.setattr(dense, "CHUNK", 2)
    x, y = rng.normal(3, 2, (5, 4, 4, 6)).astype(np.float16), rng.normal(size=(5, 4, 4, 2))
    keep = rng.random((5, 4, 4)) < 0.8
    fitted = dense.fit_ridge(x, y, keep)
    seen = dense.in_context(x)
    rows = seen[keep]
    mean, std = rows.mean(0), rows.std(0)
    reference = SklearnRidge(alpha=dense.RIDGE * len(rows)).fit((rows - mean) / std, y[keep])
    expected = reference.predict((seen.reshape(-1, 18) - mean) / std)
    assert np.allclose(fitted(x).reshape(-1, 2), expected, atol=1e-9)


def test_patches_are_seen_in_context(scripts):
    x = np.arange(8.0).reshape(1, 2, 2, 2)
    seen = scripts["dense"].in_context(x)
    assert seen[0, 1, 0].tolist() == [4, 5, 3, 4, 0, -0.5, 0, 0.25, 0, 0]
    assert np.allclose(seen[0].reshape(4, -1), scripts["check"].with_surroundings(x[0]))


def test_miou_equals_torchmetrics(scripts):
    rng = np.random.default_rng(1)
    true, guess = rng.integers(0, 4, (3, 8, 8), dtype=np.uint8), rng.integers(0, 4, (3, 8, 8), dtype=np.uint8)
    true[rng.random(true.shape) < 0.1] = 255
    reference = MulticlassJaccardIndex(4, average="macro", ignore_index=255)
    expected = reference(torch.from_numpy(guess.astype(int)), torch.from_numpy(true.astype(int)))
    assert scripts["dense"].mean_iou(guess, true, 4) == pytest.approx(100 * float(expected), abs=1e-4)
    by_hand = scripts["dense"].mean_iou(np.uint8([[0, 0, 1]]), np.uint8([[0, 1, 255]]), 3)
    assert by_hand == pytest.approx(25)  # 1 of 2, and 0 of 1; the third class is nowhere


def test_class_shares_and_patch_depths_by_hand(scripts):
    masks = np.zeros((1, 4, 4), np.uint8)
    masks[0, :2, 2:] = [[1, 1], [1, 255]]
    shares = scripts["dense"].class_shares(masks, 2, 2)
    assert shares[0, 0, 1].tolist() == [0, 0.75]
    assert shares[0, 1, 1].tolist() == [1, 0]


def test_depth_errors_by_hand(scripts):
    true = np.array([[[1000, 2000], [0, 4000]], [[1000, 0], [0, 0]]], np.uint16)
    guess = np.array([[[1.0, 3.0], [9.0, 4.0]], [[1.2, 5.0], [5.0, 5.0]]])
    errors = scripts["dense"].depth_errors(guess, true)
    assert errors["rmse"] == pytest.approx(((1 / 3) ** 0.5 + 0.2) / 2)
    assert errors["abs_rel"] == pytest.approx((0.5 / 3 + 0.2) / 2)
    assert errors["d1"] == pytest.approx((200 / 3 + 100) / 2)


def test_enlarging_agrees(scripts):
    grid = np.random.default_rng(2).normal(size=(5, 5, 3))
    ours = scripts["dense"].enlarge(grid[None], 20)[0].permute(1, 2, 0).numpy()
    assert np.allclose(ours, scripts["check"].bilinear(grid, 20), atol=1e-12)


# --- both scripts on the same vectors ------------------------------------------------------------------------------


def made_up(seed=0):
    """Vectors and truths of all tasks, small, with something to be learned."""
    rng = np.random.default_rng(seed)
    label = np.arange(120) % 4
    split = np.where(np.arange(120) % 3 == 0, "test", "train")
    centres = rng.normal(size=(4, 8))
    queries = [
        {"row": 0, "easy": [4, 8], "hard": [12], "junk": [16, 0]},
        {"row": 3, "easy": [], "hard": [7], "junk": [3]},
    ]
    masks = np.repeat(np.repeat(rng.integers(0, 3, (6, 4, 4)), 7, 1), 7, 2).astype(np.uint8)
    depth = (1000 * np.repeat(np.repeat(rng.uniform(1, 6, (6, 4, 4)), 7, 1), 7, 2)).astype(np.uint16)
    masks[:, 0], depth[:, 0] = 255, 0
    middle = slice(3, None, 7)
    seen = np.stack([masks[:, middle, middle] == c for c in range(3)], -1) + rng.normal(0, 0.5, (6, 4, 4, 3))
    far = np.stack([depth[:, middle, middle] / 1000, np.ones((6, 4, 4))], -1) + rng.normal(0, 0.5, (6, 4, 4, 2))
    x = centres[label] + rng.normal(size=(120, 8))
    vectors = {
        "emoji": x, "fashion_train": x[:80], "fashion_test": x[80:], "room_gallery": x, "room_queries": x[[0, 3]],
        "cutouts_train": seen[:4], "cutouts_val": seen[4:],
        "rooms_train": far[:3], "rooms_val": far[3:5], "rooms_second": far[5:],
    }  # fmt: skip
    truths = {
        "emoji": {"emoji": {"split": split.tolist(), "label": label.tolist(), "queries": queries}},
        "fashion": {"fashion_train": label[:80], "fashion_test": label[80:]},
        "room_retrieval": {"room_retrieval": {"queries": queries}},
        "cutouts": {"cutouts_train": masks[:4], "cutouts_val": masks[4:], "cutouts_classes": ["a", "b", "c"]},
        "rooms": {"rooms_train": depth[:3], "rooms_val": depth[3:5], "rooms_second": depth[5:]},
    }
    half = {k: v.astype(np.float16 if v.ndim == 4 else np.float32) for k, v in vectors.items()}
    return half, truths


@pytest.mark.parametrize("task", ["emoji", "fashion", "room_retrieval", "cutouts", "rooms"])
def test_the_table_and_the_check_agree(scripts, task):
    for seed in range(3):
        vectors, truths = made_up(seed)
        told = scripts["table"].SCORES[task](vectors, truths[task])
        for figure, (value, _) in scripts["check"].CHECKS[task](vectors, truths[task]).items():
            assert told[figure] == pytest.approx(value, abs=1e-6), figure


def test_a_wrong_figure_is_found(scripts, tmp_path, capsys):
    vectors, truths = made_up()
    scripts["truths"].write_truths("rooms", truths["rooms"], tmp_path / "truth")
    row = tmp_path / "raw-1"
    (row / "cells").mkdir(parents=True)
    for name in ("rooms_train", "rooms_val", "rooms_second"):
        np.save(row / f"{name}.npy", vectors[name])
    figures = scripts["table"].score_rooms(vectors, truths["rooms"])
    cell = row / "cells" / "rooms.json"
    cell.write_text(json.dumps({"figures": figures}))
    assert scripts["check"].check_cell(row, tmp_path / "truth", "rooms") == []
    cell.write_text(json.dumps({"figures": figures | {"rmse": figures["rmse"] + 2e-6}}))
    (line,) = scripts["check"].check_cell(row, tmp_path / "truth", "rooms")
    assert "rmse" in line


# --- cells, list, table --------------------------------------------------------------------------------------------


class Counted:
    """A row that counts how often it is asked."""

    name, key = "raw", "one"

    def __init__(self):
        self.asked = 0

    def images(self, paths, boxes, size):
        self.asked += 1
        for i, _ in enumerate(paths):
            yield np.float32([[i % 3, 1, i, 2]])


def make_emoji(root):
    gallery = [f"{split}/{c}/{i}_google.png" for i in range(12) for split in ("train", "test") for c in "ab"]
    for path in gallery:
        (root / "emoji" / path).parent.mkdir(parents=True, exist_ok=True)
        random_image(0, 8).save(root / "emoji" / path)
    query = {"query": gallery[0], "easy": [gallery[1]], "hard": [gallery[2]], "junk": []}
    (root / "emoji/retrieval.json").write_text(json.dumps({"gallery": gallery, "queries": [query]}))


def test_a_cell_is_made_once(scripts, tmp_path):
    make_emoji(tmp_path / "sets")
    row = Counted()
    with Progress(console=Console(quiet=True)) as progress:
        first = scripts["table"].make_cell("emoji", row, tmp_path / "sets", tmp_path / "work", progress)
        again = scripts["table"].make_cell("emoji", row, tmp_path / "sets", tmp_path / "work", progress)
        assert row.asked == 1
        row.key = "another checkpoint"
        scripts["table"].make_cell("emoji", row, tmp_path / "sets", tmp_path / "work", progress)
    assert first == again
    assert row.asked == 2
    assert 0 <= first["knn"] <= 100


def test_half_written_vectors_do_not_count(scripts, tmp_path):
    def breaks():
        yield np.zeros((2, 3))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scripts["table"].save_blocks(tmp_path / "x.npy", breaks(), 4)
    assert not (tmp_path / "x.npy").exists()
    scripts["table"].save_blocks(tmp_path / "x.npy", iter([np.ones((2, 3)), np.zeros((2, 3))]), 4)
    assert np.load(tmp_path / "x.npy").sum() == 6


def test_the_best_of_each_column_is_bold(scripts):
    table = {
        "raw": {"rooms": {"rmse": 0.9, "second_rmse": 1.2}, "emoji": {"knn": 40.0}},
        "trained": {"rooms": {"rmse": 0.8, "second_rmse": 1.3}, "emoji": {"knn": 39.0}},
    }
    head, _, raw, trained = scripts["table"].markdown(table).splitlines()
    assert head.count("|") == raw.count("|") == len(scripts["table"].COLUMNS) + 2
    assert "**40.0**" in raw
    assert "**1.200**" in raw
    assert "0.900" in raw.replace("**0.900**", "")
    assert "**0.800**" in trained
    assert "–" in trained


def test_the_training_list_repeats_small_sets(scripts, tmp_path):
    for folder, count in (("big", 4), ("small", 2)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            random_image(i, 8).save(tmp_path / folder / f"{i}.png")
    part = scripts["train"].Part
    listed = scripts["train"].training_list(tmp_path, tmp_path, (part("big", 1), part("small", 3)))
    lines = listed.read_text().splitlines()
    assert len(lines) == 4 + 3 * 2
    assert lines.count(str((tmp_path / "small/1.png").resolve())) == 3
    assert all(p.folder.split("/")[-1] != "test" and "val" not in p.folder for p in scripts["train"].MIXTURE)


def test_tiles_leave_out_what_is_scored(scripts, tmp_path, monkeypatch):
    build, seen = scripts["build"], {}
    made = [build.photos.Photograph(f"w/{i}", random_image(i, 160)) for i in range(20)]
    made += [build.photos.Photograph(f"fish_{i}", random_image(i, 160), "fish") for i in range(20, 40)]
    backgrounds = [p for p in made if p.label is None]
    monkeypatch.setattr(build.photos, "load_photographs", lambda raw, progress: made)
    monkeypatch.setattr(build.cutout_masks, "load_backgrounds", lambda raw, progress: backgrounds)
    monkeypatch.setattr(build.cutouts, "load_cutouts", lambda package, progress: {})
    monkeypatch.setattr(build.photos, "write_tiles", lambda kept, *rest: seen.update(names={p.name for p in kept}))
    build.build_tiles({"tuxpaint": tmp_path}, tmp_path, None)
    val = {p.name for p in build.cutout_masks.split_backgrounds(backgrounds, "val")}
    test = {p.name for p in made if build.photos.labelled_split(p) == "test"}
    assert seen["names"]
    assert val
    assert test
    assert not seen["names"] & (val | test)


def test_the_schedule_of_a_run_that_is_there_is_kept(scripts, tmp_path):
    config = scripts["train"].load_recipe(scripts["train"].RECIPE).model_copy(update={"out": str(tmp_path)})
    assert scripts["train"].length(config, None, None) == config.steps
    assert scripts["train"].length(config, 7, None) == 7
    (tmp_path / "config.yaml").write_text("steps: 11\n")
    assert scripts["train"].length(config, None, 5.0) == 11


def test_a_session_is_counted(scripts, tmp_path):
    with scripts["train"].Session(tmp_path / "sessions"):
        np.linalg.svd(np.random.default_rng(0).normal(size=(200, 200)))
    (path,) = (tmp_path / "sessions").glob("*.json")
    noted = json.loads(path.read_text())
    assert noted["cpu_s"] > 0
    assert 0 < noted["wall_s"] < 60
