# SPDX-License-Identifier: Apache-2.0
"""Average precision by hand, by a slow loop and by scikit-learn; one-vs-rest; VOC2007 and tables; the command."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from opendino.cli.data import main as data
from opendino.cli.evaluate import main
from opendino.cli.evaluate.suite_cells import find_places
from opendino.errors import ConfigError, DataError
from opendino.evaluate.datasets.detect import (
    detect,
    matches,
    open_classification,
    open_labelled,
    open_multilabel,
    open_split,
)
from opendino.evaluate.datasets.voc import CLASSES
from opendino.evaluate.multilabel import (
    average_precision,
    choose_c,
    eleven_point_precision,
    fit_one_vs_rest,
    multilabel_scores,
)
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone

NAMES = CLASSES[1:]


def slow_eleven_point(scores, targets):
    """At each recall the best precision of all thresholds that reach it, in exact fractions."""
    kept = [(s, t) for s, t in zip(scores, targets, strict=True) if t != 0]
    positives = sum(t > 0 for _, t in kept)
    total = Fraction(0)
    for tenth in range(11):
        best = Fraction(0)
        for threshold in {s for s, _ in kept}:
            taken = [t for s, t in kept if s >= threshold]
            found = sum(t > 0 for t in taken)
            if Fraction(found, positives) >= Fraction(tenth, 10):
                best = max(best, Fraction(found, len(taken)))
        total += best / 11
    return float(total)


def clouds(n=80, num_classes=4, dim=6, seed=0):
    """Features, and targets that depend on them, with some difficult ones."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, dim)).astype(np.float32)
    w = np.random.default_rng(99).normal(size=(dim, num_classes))
    targets = np.where(x @ w + rng.normal(size=(n, num_classes)) > 0.8, 1, -1).astype(np.int8)
    targets[rng.random(targets.shape) < 0.1] = 0
    return x, targets


def test_by_hand():
    # In order of score: there, not, there, not, there. Precision at each found: 1, 2/3, 3/5, at recalls 1/3, 2/3, 1.
    scores, targets = [5, 4, 3, 2, 1], [1, -1, 1, -1, 1]
    assert average_precision(scores, targets) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3, abs=1e-12)
    # Recalls 0 … 0.3 reach 1, 0.4 … 0.6 reach 2/3, 0.7 … 1 reach 3/5.
    assert eleven_point_precision(scores, targets) == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 3 / 5) / 11, abs=1e-12)
    # A difficult one at the top counts neither way; all equal scores are one threshold.
    assert average_precision([9, *scores], [0, *targets]) == average_precision(scores, targets)
    assert eleven_point_precision([9, *scores], [0, *targets]) == eleven_point_precision(scores, targets)
    for measure in (average_precision, eleven_point_precision):
        assert measure([1] * 5, targets) == pytest.approx(0.6, abs=1e-12)
        assert math.isnan(measure(scores, [-1] * 5))
        assert math.isnan(measure(scores, [0] * 5))


def test_a_recall_of_three_tenths_reaches_three_tenths():
    """3 · 0.1 is above 3/10 in floating point; whole numbers decide."""
    targets = np.array([1] * 3 + [-1] * 7 + [1] * 7)  # precision 1 up to the recall of 3/10, 10/17 after it
    got = eleven_point_precision(-np.arange(17.0), targets)
    assert got == pytest.approx((4 * 1 + 7 * 10 / 17) / 11, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_equals_scikit_learn_and_a_slow_loop(seed):
    rng = np.random.default_rng(seed)
    targets = rng.choice([-1, 0, 1], 60, p=[0.6, 0.1, 0.3])
    scores = rng.normal(size=60) + 0.5 * targets
    if seed % 2:
        scores = scores.round(1)  # with ties
        assert len(set(scores)) < 60
    kept = targets != 0
    expected = average_precision_score(targets[kept] > 0, scores[kept])
    assert average_precision(scores, targets) == pytest.approx(expected, abs=1e-9)
    assert eleven_point_precision(scores, targets) == pytest.approx(slow_eleven_point(scores, targets), abs=1e-12)


def test_a_class_without_positives_is_left_out_and_named():
    _, targets = clouds()
    targets[:, 2] = -1
    scores = np.random.default_rng(1).normal(size=targets.shape)
    got = multilabel_scores(scores, targets, list("abcd"))
    assert got.left_out == ["c"]
    assert got.area["c"] is got.eleven_point["c"] is None
    expected = [100 * average_precision(scores[:, i], targets[:, i]) for i in (0, 1, 3)]
    assert got.map_area == pytest.approx(np.mean(expected))
    assert got.map_eleven_point == pytest.approx(np.mean([got.eleven_point[c] for c in "abd"]))
    assert got.positives == {c: int((targets[:, i] == 1).sum()) for i, c in enumerate("abcd")}
    assert got.ignored == (targets == 0).sum() > 0
    with pytest.raises(DataError, match="No image that is scored has any"):
        multilabel_scores(scores, np.full_like(targets, -1), list("abcd"))
    with pytest.raises(DataError, match="NaN"):
        multilabel_scores(np.full(targets.shape, np.nan), targets, list("abcd"))
    with pytest.raises(DataError, match="it needs"):
        multilabel_scores(scores, targets, list("abc"))


@pytest.mark.parametrize("c", [0.01, 10.0])
def test_each_class_is_the_classifier_of_scikit_learn(c):
    x, targets = clouds()
    targets[:, 3] = 1
    told = []
    model = fit_one_vs_rest(x, targets, c, on_fit=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert model.fitted.tolist() == [True, True, True, False]
    assert model.converged
    new, _ = clouds(30, seed=5)
    logits = model.logits(new)
    for i in range(3):
        own = targets[:, i] != 0
        peer = LogisticRegression(C=c, tol=1e-10, max_iter=10000).fit(x[own].astype(np.float64), targets[own, i] > 0)
        np.testing.assert_allclose(logits[:, i], peer.decision_function(new.astype(np.float64)), rtol=1e-5, atol=1e-5)
    assert not logits[:, 3].any()
    with pytest.raises(ConfigError, match="must be positive"):
        fit_one_vs_rest(x, targets, 0.0)
    with pytest.raises(DataError, match="it needs"):
        fit_one_vs_rest(x, targets[:5])


def test_one_c_is_chosen_by_mean_average_precision():
    x, targets = clouds(200)
    x = np.concatenate([x, np.random.default_rng(3).normal(size=(200, 60)).astype(np.float32)], 1)
    values = (10.0, 1e-6, 0.01, 100.0)
    choice = choose_c(x, targets, values, share=0.2, seed=1, tolerance=1e-9)
    assert choice.num_held_out == 40
    held = np.sort(np.random.default_rng([1, 200]).permutation(200)[:40])
    rest = np.setdiff1d(np.arange(200), held)
    expected = []
    for c in sorted(values):
        aps = []
        for i in range(4):
            own, seen = rest[targets[rest, i] != 0], held[targets[held, i] != 0]
            peer = LogisticRegression(C=c, tol=1e-10, max_iter=10000).fit(x[own], targets[own, i] > 0)
            aps.append(average_precision_score(targets[seen, i] > 0, peer.decision_function(x[seen])))
        expected.append(100 * np.mean(aps))
    assert [c for c, _ in choice.curve] == sorted(values)
    np.testing.assert_allclose([v for _, v in choice.curve], expected, atol=1e-6)
    assert len({round(v, 3) for v in expected}) > 2, "the case decides nothing"
    assert choice.c == max(choice.curve, key=lambda p: p[1])[0]
    rough = choose_c(x, targets, values, share=0.2, seed=1)
    assert rough.c == choice.c
    assert choose_c(x, targets, values, share=0.2, seed=1).curve == rough.curve
    assert choose_c(x, targets, (1.0,)).edge == ""
    for wrong in ({"c_values": ()}, {"share": 1.0}):
        with pytest.raises(ConfigError):
            choose_c(x, targets, **wrong)
    with pytest.raises(DataError, match="C cannot be chosen"):
        choose_c(x, np.full_like(targets, -1))


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def picture(path, colour, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 60, (24, 32, 3))
    Image.fromarray((np.array(colour) + noise).astype(np.uint8)).save(path)


def targets_of(number):
    """Signs of an image of the fabricated VOC: each class in about one of five, some difficult, a person in most."""
    signs = np.random.default_rng(number).choice([-1, 0, 1], 20, p=[0.75, 0.05, 0.2])
    signs[NAMES.index("person")] = 1 if number % 4 else -1
    return signs


@pytest.fixture
def voc(tmp_path):
    """VOCdevkit/VOC2007 with 24 images for training and 12 for testing."""
    root = tmp_path / "VOCdevkit" / "VOC2007"
    parts = {"train": range(1, 13), "val": range(13, 25), "trainval": range(1, 25), "test": range(25, 37)}
    for number in range(1, 37):
        picture(root / "JPEGImages" / f"{number:06}.jpg", (180 * (number % 4 > 0), 90, 20), number)
    for split, numbers in parts.items():
        for i, name in enumerate(NAMES):
            lines = [f"{n:06} {targets_of(n)[i]:2d}" for n in numbers]
            write(root / "ImageSets" / "Main" / f"{name}_{split}.txt", *lines)
        write(root / "ImageSets" / "Main" / f"{split}.txt", *[f"{n:06}" for n in numbers])
    return root


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(img_size=28, embed_dim=16, depth=2, num_heads=2)
    save_backbone(VisionTransformer(config, PreprocessSpec(resize=32, crop=28)), tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


def test_voc2007_is_read(voc):
    for path in (voc, voc.parent, voc.parent.parent):
        (found,) = detect(path)
        assert (found.name, found.kind, found.classes) == ("VOC2007 classification", "classification", 20)
        assert dict(found.splits) == {"train": 12, "val": 12, "trainval": 24, "test": 12}
        assert found.problems == ()
    source = open_multilabel(voc.parent.parent, "test")
    assert source.classes == list(NAMES)
    assert source.targets.dtype == np.int8
    assert source.targets.tolist() == [targets_of(n).tolist() for n in range(25, 37)]
    assert source.short_name(3) == "000028.jpg"
    assert source.name(3) == str(voc / "JPEGImages" / "000028.jpg")
    assert source.targets_for(["person", "unicorn", "cat"]).tolist() == [
        [targets_of(n)[NAMES.index("person")], -1, targets_of(n)[NAMES.index("cat")]] for n in range(25, 37)
    ]
    peer = open_split(*matches(voc, "classification")[0], "trainval").data
    assert (peer.targets[12:] == open_multilabel(voc, "val").targets).all()


def test_segmentation_and_classification_are_both_found(voc):
    (voc / "SegmentationClass").mkdir()
    Image.fromarray(np.zeros((24, 32), np.uint8)).save(voc / "SegmentationClass" / "000001.png")
    write(voc / "ImageSets" / "Segmentation" / "train.txt", "000001")
    assert {(f.name, f.kind) for f in detect(voc)} == {
        ("Pascal VOC", "segmentation"),
        ("VOC2007 classification", "classification"),
    }


def test_other_years_are_not_taken_for_2007(voc):
    for split in ("train", "val", "trainval", "test"):
        write(voc / "ImageSets" / "Main" / f"aeroplane_{split}.txt", "2008_000002 -1")
    with pytest.raises(DataError, match="no known data set"):
        detect(voc)


def test_protocols_of_one_class_refuse_it(voc, model):
    for opened in (lambda: open_classification(voc, "test"), lambda: open_labelled(f"{voc}:test")):
        with pytest.raises(DataError, match="opendino eval multilabel"):
            opened()
    for protocol in ("knn", "logreg", "linear"):
        with pytest.raises(DataError, match="opendino eval multilabel"):
            main([protocol, "--model", model, "--data", str(voc), "--train-split", "trainval", "--val-split", "test"])


def test_damaged_lists_are_explained(voc):
    listed = voc / "ImageSets" / "Main" / "cat_test.txt"
    good = listed.read_text()
    for text, words in (
        (good.replace("000030 ", "000099 "), "do not speak of the same images, such as 000030"),
        (good.split("\n", 1)[0].rsplit(" ", 1)[0] + " 2\n", "says '2' of 000025; it must be"),
        ("000025\n", "line 1 is '000025'; 2 parts"),
    ):
        listed.write_text(text)
        with pytest.raises(DataError, match=words):
            open_multilabel(voc, "test")
    listed.unlink()
    with pytest.raises(DataError, match=r"cat_test\.txt is missing"):
        open_multilabel(voc, "test")
    (voc / "JPEGImages" / "000002.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 24 files .* such as 000002\.jpg"):
        open_multilabel(voc, "trainval")


def test_data_check_lists_it(voc, capsys):
    assert data(["check", str(voc), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["found"]
    facts = found["splits"]["test"]
    assert (found["name"], found["problems"]) == ("VOC2007 classification", [])
    assert (facts["images"], facts["classes"], facts["unusable"]) == (12, 20, 0)
    signs = np.array([targets_of(n) for n in range(25, 37)])
    assert facts["largest"] == ["person", 9]
    assert any(f"test: {((signs > 0).sum(1) > 1).sum()} of 12 images have several" in n for n in found["notes"])
    assert any(f"{(signs == 0).sum()} times an image does not count" in n for n in found["notes"])


def test_the_command_on_voc2007(voc, model, capsys):
    given = ["multilabel", "--model", model, "--data", str(voc)]
    assert main([*given, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert (got["num_train"], got["num_val"], got["num_classes"], got["num_held_out"]) == (24, 12, 20, 2)
    signs = np.array([targets_of(n) for n in range(25, 37)])
    there = [c for i, c in enumerate(NAMES) if (signs[:, i] > 0).any()]
    assert set(got["left_out"]) == set(NAMES) - set(there)
    for figure, mean in (("ap", "map"), ("ap_11_point", "map_11_point")):
        assert got[mean] == pytest.approx(np.mean([got["per_class"][c][figure] for c in there]))
    assert got["per_class"]["person"] == {"ap_11_point": 100.0, "ap": 100.0, "positives": 9}  # told by its colour
    assert got["map"] < 100
    assert got["difficult"]["val"] == (signs == 0).sum()
    assert [c for c, _ in got["c_curve"]] == pytest.approx([10.0**e for e in range(-6, 6)])
    assert main([*given, "--c-values", "1"]) == 0
    text = capsys.readouterr().out
    assert "24 training and 12 validation images, 20 classes" in text
    assert all(f"{name}" in text for name in (*there, "mean", "C = 1\n", "difficult, not counted"))


@pytest.fixture
def tables(tmp_path):
    """train.csv and val.csv of images that are red, dark, both in one column, or neither."""
    kinds = {"red": (180, 20, 20), "red|blue": (180, 20, 180), " blue ": (20, 20, 180), "": (20, 20, 20)}
    for split, count in (("train", 8), ("val", 3)):
        lines = ["path,labels"]
        for number in range(4 * count):
            labels, colour = list(kinds.items())[number % 4]
            picture(tmp_path / split / f"{number}.png", colour, number)
            lines.append(f"{split}/{number}.png,{labels}")
        write(tmp_path / f"{split}.csv", *lines)
    return ["--train", str(tmp_path / "train.csv"), "--val", str(tmp_path / "val.csv")]


def test_own_tables(tables, model, tmp_path, capsys):
    source = open_multilabel(tmp_path / "train.csv", "any")
    assert source.classes == ["blue", "red"]
    assert source.targets[:4].tolist() == [[-1, 1], [1, 1], [1, -1], [-1, -1]]
    given = ["multilabel", "--model", model, *tables, "--json"]
    assert main(given) == 0
    got = json.loads(capsys.readouterr().out)
    assert (got["num_train"], got["num_val"], got["left_out"]) == (32, 12, {})
    assert got["map"] == got["map_11_point"] == 100.0
    (tmp_path / "train" / "0.png").write_text("no image")
    assert main(given) == 0
    got = json.loads(capsys.readouterr().out)
    assert (got["num_train"], got["errors"]) == (31, 1)
    with pytest.raises(DataError, match="more than --max-errors 0"):
        main([*given, "--max-errors", "0"])


def test_mistakes_are_explained(tables, model, tmp_path):
    given = ["multilabel", "--model", model]
    with pytest.raises(DataError, match="images without a class; .* use `opendino eval multilabel`"):
        main(["knn", "--model", model, *tables])
    with pytest.raises(ConfigError, match="--data with Pascal VOC 2007"):
        main(given)
    write(tmp_path / "other.csv", "path,labels", "val/0.png,red|green")
    with pytest.raises(DataError, match="1 classes of --val are not in --train: green"):
        main([*given, *tables[:2], "--val", str(tmp_path / "other.csv")])
    write(tmp_path / "alike.csv", "path,labels", "val/0.png,red", "val/1.png,red")
    with pytest.raises(DataError, match="nothing to learn"):
        main([*given, "--train", str(tmp_path / "alike.csv"), "--val", str(tmp_path / "alike.csv")])
    for text, words in (
        (["path,label", "a.png,red"], r"columns \['path', 'label'\]; it needs .* `labels`"),
        (["path,labels", ",red"], "no path in line 2"),
        (["path,labels", "a.png,"], "gives no image a class"),
    ):
        write(tmp_path / "wrong.csv", *text)
        with pytest.raises(DataError, match=words):
            open_multilabel(tmp_path / "wrong.csv", "any")
    with pytest.raises(DataError, match="is no folder"):
        open_multilabel(tmp_path / "nowhere.csv", "any")
    for c in "ab":
        picture(tmp_path / "folders" / "train" / c / "0.png", (0, 0, 0), 0)
        picture(tmp_path / "folders" / "val" / c / "0.png", (0, 0, 0), 0)
    with pytest.raises(DataError, match="one class each; use `opendino eval logreg`"):
        open_multilabel(tmp_path / "folders", "train")


def test_the_suite_scores_it(voc, model, tmp_path, capsys):
    (place,), _ = find_places((voc.parent.parent,))
    assert (place.name, place.kind) == ("VOC2007 classification", "classification")
    out = tmp_path / "suite"
    assert main(["suite", "--model", model, "--data", str(voc), "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["failed"] == {}
    ((one),) = report["results"]
    assert (one["task"], one["result"]["num_train"], one["result"]["num_val"]) == ("multilabel", 24, 12)
    column = next(c for c in report["columns"] if c["data"] == "VOC2007 classification")
    assert list(column["scores"].values()) == [one["result"]["map_11_point"]]
