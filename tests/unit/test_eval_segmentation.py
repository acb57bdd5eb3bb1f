# SPDX-License-Identifier: Apache-2.0
"""`opendino eval segmentation` on small folders: figures, heads in files, the page, and users' mistakes."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from opendino.cli import main
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone
from opendino.report.segmentation import coloured, palette

CLASSES = ["grey", "red", "green", "blue"]
COLOURS = np.array([[120, 120, 120], [220, 30, 30], [30, 220, 30], [30, 30, 220]], np.uint8)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    torch.manual_seed(0)
    config = ViTConfig(img_size=28, patch_size=7, embed_dim=16, depth=4, num_heads=2, init_values=1.0)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_backbone(VisionTransformer(config, PreprocessSpec(resize=28, crop=28)), path)
    return path


def write_split(root, split, classes, n=4, seed=0):
    """Grey images with one rectangle, whose colour is the class."""
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (root / name / split).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        mask = np.zeros((28, 42), np.uint8)
        top, left = rng.integers(0, 14), rng.integers(0, 21)
        mask[top : top + 14, left : left + 21] = classes[i % len(classes)]
        Image.fromarray(COLOURS[mask]).save(root / "images" / split / f"{i}.png")
        Image.fromarray(mask).save(root / "masks" / split / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES))


@pytest.fixture
def data(tmp_path):
    write_split(tmp_path / "set", "train", [1, 2, 3], 6)
    write_split(tmp_path / "set", "val", [1, 2, 3], 3, seed=1)
    return tmp_path / "set"


def run(data, model_file, *more, code=0):
    """Run the command; its exit code must be `code`."""
    size = () if "--size" in more else ("--size", "28")
    args = ["eval", "segmentation", "--model", str(model_file), "--data", str(data), *size, "--steps", "25"]
    assert main([*args, "--train-batch", "4", "--learning-rate", "2e-2", "--workers", "0", *map(str, more)]) == code


def scored(capsys, *args, **kwargs):
    run(*args, "--json", **kwargs)
    return json.loads(capsys.readouterr().out)


def test_prints_one_json_object(data, model_file, capsys):
    got = scored(capsys, data, model_file)
    assert got["miou"] > 40
    assert got["miou"] == pytest.approx(np.mean([v for v in got["iou"].values() if v is not None]))
    assert list(got["iou"]) == CLASSES
    assert {k: got[k] for k in ("num_train", "num_val", "num_classes", "errors")} == {
        "num_train": 6, "num_val": 3, "num_classes": 4, "errors": 0,
    }  # fmt: skip
    assert got["absent_classes"] == got["only_predicted_classes"] == got["untrained_classes"] == []
    assert (got["protocol"]["crop"], got["protocol"]["stride"]) == (28, 18)


def test_prints_a_table(data, model_file, capsys):
    run(data, model_file)
    out = capsys.readouterr().out
    assert re.search(r"mIoU %\s+\d+\.\d\d", out)
    assert all(name in out for name in CLASSES)


def test_the_same_seed_gives_the_same_figures_and_another_cache_too(data, model_file, capsys, tmp_path):
    first = scored(capsys, data, model_file)
    assert scored(capsys, data, model_file) == first
    assert scored(capsys, data, model_file, "--cache", tmp_path / "other") == first
    assert scored(capsys, data, model_file, "--seed", "1")["iou"] != first["iou"]


def test_a_saved_head_scores_the_same(data, model_file, capsys, tmp_path):
    head = tmp_path / "heads" / "head.safetensors"
    first = scored(capsys, data, model_file, "--save-head", head)
    again = scored(capsys, data, model_file, "--head", head, "--cache", "none")
    assert again["miou"] == pytest.approx(first["miou"], abs=0.5)
    assert again["num_train"] is None
    assert again["protocol"] == first["protocol"]


def test_multi_scale_protocol(data, model_file, capsys):
    got = scored(capsys, data, model_file, "--protocol", "ms", "--scales", "1", "1.5")
    assert got["protocol"] == {
        "blocks": 4, "size": 28, "crop": 28, "stride": 14, "scales": [1.0, 1.5], "flip": True, "ratios": [1.0, 3.0],
    }  # fmt: skip
    assert got["miou"] > 40


def test_augmented_features(data, model_file, capsys):
    got = scored(capsys, data, model_file, "--features", "augmented")
    assert got["training"]["features"] == "augmented"


def test_one_of_metas_files_is_a_head(data, model_file, capsys, tmp_path):
    state = {
        "decode_head.conv_seg.weight": torch.randn(4, 16, 1, 1), "decode_head.conv_seg.bias": torch.zeros(4),
        "decode_head.bn.weight": torch.ones(16), "decode_head.bn.bias": torch.zeros(16),
        "decode_head.bn.running_mean": torch.zeros(16), "decode_head.bn.running_var": torch.ones(16),
        "decode_head.bn.num_batches_tracked": torch.tensor(1),
    }  # fmt: skip
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "head.pth")
    run(data, model_file, "--head", tmp_path / "head.pth", "--json")
    out, told = capsys.readouterr()
    assert json.loads(out)["num_classes"] == 4
    assert "name their 4 classes differently, first number 0: '0' and 'grey'" in told.replace("\n", " ")


def test_the_page_shows_image_truth_and_prediction(data, model_file, tmp_path):
    run(data, model_file, "--page", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    pictures = [base64.b64decode(p) for p in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert len(pictures) == 1 + 3
    for png, name in zip(pictures[1:], re.findall(r"figcaption>(\d).png", page), strict=True):
        sheet = np.array(Image.open(io.BytesIO(png)))
        assert sheet.shape == (28, 3 * 42 + 12, 3)
        np.testing.assert_array_equal(sheet[:, :42], Image.open(data / f"images/val/{name}.png"))
        mask = np.array(Image.open(data / f"masks/val/{name}.png"))
        np.testing.assert_array_equal(sheet[:, 48:90], coloured(mask, palette(4)))
        assert set(map(tuple, sheet[:, 96:].reshape(-1, 3).tolist())) <= set(map(tuple, palette(4).tolist()))
    assert "mIoU" in page
    assert all(name in page for name in CLASSES)


def test_colours_tell_classes_apart():
    for n in (2, 21, 150):
        assert len(np.unique(palette(n), axis=0)) == n
        assert not (palette(n) == 255).all(1).any()
    assert coloured(np.array([[0, 255]]), palette(2)).tolist() == [[[60, 60, 60], [255, 255, 255]]]


# --- users' mistakes -------------------------------------------------------------------------------------------------


def test_a_class_only_in_val_counts_zero_and_is_named(tmp_path, model_file, capsys):
    write_split(tmp_path / "set", "train", [1, 2], 4)
    write_split(tmp_path / "set", "val", [1, 3], 2)
    run(tmp_path / "set", model_file, "--json")
    out, told = capsys.readouterr()
    got = json.loads(out)
    assert got["untrained_classes"] == ["blue"]
    assert got["iou"]["blue"] == 0
    assert "Without a training pixel, so never predicted and counted as 0: blue." in told.replace("\n", " ")


def test_an_empty_class_is_left_out_and_named(tmp_path, model_file, capsys):
    for split in ("train", "val"):
        write_split(tmp_path / "set", split, [1, 2], 4)
    run(tmp_path / "set", model_file, "--json")
    out, told = capsys.readouterr()
    got = json.loads(out)
    assert got["absent_classes"] == ["blue"]
    assert got["iou"]["blue"] is None
    assert got["miou"] == pytest.approx(np.mean([got["iou"][c] for c in CLASSES[:3]]))
    assert "left out of the mean: blue." in told.replace("\n", " ")


def spoil(path, value):
    mask = np.array(Image.open(path))
    mask[0, 0] = value
    Image.fromarray(mask).save(path)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_mask_with_unknown_values_is_an_error(data, model_file, capsys, split):
    spoil(data / "masks" / split / "1.png", 9)
    run(data, model_file, code=1)
    told = " ".join(capsys.readouterr().err.split())
    assert "1.png holds the values [9], but there are 4 classes" in told
    assert "Traceback" not in told


def test_unreadable_images_are_named_and_counted(data, model_file, capsys):
    (data / "images/train/0.png").write_bytes(b"no image")
    (data / "images/val/1.png").write_bytes(b"no image")
    run(data, model_file, "--json")
    out, told = capsys.readouterr()
    got = json.loads(out)
    assert (got["errors"], got["num_train"], got["num_val"]) == (2, 5, 2)
    assert "left out" in told
    assert str(data / "images/val/1.png") in told
    run(data, model_file, "--max-errors", "1", code=1)
    assert "2 images cannot be read, more than --max-errors 1" in " ".join(capsys.readouterr().err.split())


def test_mistakes_are_one_paragraph(data, model_file, capsys, tmp_path):
    def told(*more, code):
        capsys.readouterr()
        run(data, model_file, *more, code=code)
        return " ".join(capsys.readouterr().err.split())

    assert "has no split 'test'" in told("--val-split", "test", code=1)
    assert "--size is 28x42; give one number" in told("--size", "28x42", code=2)
    assert "Leave --fit out" in told("--fit", "pad", code=2)
    assert "linear or ms" in told("--protocol", "fast", code=2)
    assert "cached or augmented" in told("--features", "slow", code=2)
    assert "--size is '0'" in told("--size", "0", code=2)
    assert "cannot be read as a head" in told("--head", tmp_path / "no.safetensors", code=1)
    (data / "classes.txt").unlink()
    assert "classes.txt is missing" in told(code=1)


def test_a_head_for_other_classes_is_refused(data, model_file, capsys, tmp_path):
    run(data, model_file, "--save-head", tmp_path / "head.safetensors")
    (data / "classes.txt").write_text("\n".join(reversed(CLASSES)))
    run(data, model_file, "--head", tmp_path / "head.safetensors", code=1)
    assert "the same classes in another order" in " ".join(capsys.readouterr().err.split())
    (data / "classes.txt").write_text("\n".join([*CLASSES, "more"]))
    run(data, model_file, "--head", tmp_path / "head.safetensors", code=1)
    assert "has 5 classes and the head 4" in " ".join(capsys.readouterr().err.split())
