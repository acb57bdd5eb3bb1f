# SPDX-License-Identifier: Apache-2.0
"""Classifiers as objects: scikit-learn's manners, images and arrays, files, and the backbone they belong to."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import opendino
from opendino.errors import ConfigError, DataError, WeightsError
from opendino.evaluate.knn import knn_predict
from opendino.heads import KNN, Linear, Logistic
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone

FAST = {"steps": 60, "rates": (0.1, 1.0)}
HEADS = {"KNN": lambda b=None: KNN(b, k=3), "Logistic": lambda b=None: Logistic(b, C=1.0),
         "Linear": lambda b=None: Linear(b, **FAST)}  # fmt: skip


def clouds(n=60, seed=0, dim=8):
    y = np.random.default_rng(seed).integers(0, 3, n)
    x = 2 * np.random.default_rng(7).normal(size=(3, dim))[y] + np.random.default_rng(seed).normal(size=(n, dim))
    return x.astype(np.float32), np.array(["ant", "bee", "cat"])[y]


def backbone(seed=0):
    torch.manual_seed(seed)
    config = ViTConfig(img_size=28, patch_size=7, embed_dim=16, depth=2, num_heads=2)
    return VisionTransformer(config, PreprocessSpec(resize=28, crop=28)).eval()


@pytest.fixture
def model_file(tmp_path):
    save_backbone(backbone(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for c, name in enumerate(["blue", "green"]):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 80, (24, 30, 3))
            pixels[..., 2 - c] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("name", HEADS)
def test_arrays_with_names_for_classes(name):
    (x, y), (tx, ty) = clouds(), clouds(seed=1)
    head = HEADS[name]().fit(x, y)
    assert head.classes_.tolist() == ["ant", "bee", "cat"]
    shares = head.predict_proba(tx)
    assert (shares.shape, shares.dtype) == ((60, 3), np.float64)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-6)
    assert np.array_equal(head.predict(tx), head.classes_[shares.argmax(1)])
    assert head.score(tx, ty) == np.mean(head.predict(tx) == ty) > 0.9
    assert head.n_features_in_ == 8
    assert HEADS[name]().fit(torch.from_numpy(x), [4 if c == "ant" else 9 for c in y]).classes_.tolist() == [4, 9]


def test_each_is_the_protocol_it_is_named_after():
    (x, y), (tx, _) = clouds(), clouds(seed=1)
    numbers = np.unique(y, return_inverse=True)[1]
    votes = knn_predict(x, numbers, tx, k=5, temperature=0.1).numpy()
    assert np.array_equal(KNN(k=5, temperature=0.1).fit(x, numbers).predict(tx), votes)
    theirs = LogisticRegression(C=0.1, solver="newton-cg", tol=1e-12).fit(x.astype(float), y)
    ours = Logistic(C=0.1).fit(x, y)
    np.testing.assert_allclose(ours.predict_proba(tx), theirs.predict_proba(tx.astype(float)), atol=1e-6)
    np.testing.assert_allclose(ours.decision_function(tx), theirs.decision_function(tx.astype(float)), atol=1e-5)


def test_logistic_chooses_c_and_linear_its_rate():
    x, y = clouds(100)
    logistic = Logistic().fit(x, y)
    assert len(logistic.curve_) == 45
    assert max(logistic.curve_, key=lambda point: (point[1], -point[0]))[0] == logistic.C_
    linear = Linear(steps=20, rates=(1e-5, 1.0)).fit(x, np.random.default_rng(0).permutation(y)[: len(y)])
    assert len(linear.curve_) == 2
    assert linear.kind_ is None
    assert Linear(steps=60, rates=(1e-5, 1.0)).fit(x, y).rate_ == 1.0


@pytest.mark.parametrize("name", HEADS)
def test_a_folder_of_class_folders(name, photos, model_file, tmp_path):
    head = HEADS[name](model_file).fit(photos)
    assert head.classes_.tolist() == ["blue", "green"]
    assert head.score(photos) == 1
    paths = [photos / "green" / "0.png", str(photos / "blue" / "1.png")]
    assert head.predict(paths).tolist() == ["green", "blue"]
    assert head.predict([Image.open(p) for p in paths]).tolist() == ["green", "blue"]
    arrays = [np.asarray(Image.open(p)) for p in paths]
    np.testing.assert_allclose(head.predict_proba(arrays), head.predict_proba(paths), atol=1e-6)
    head.cache = tmp_path / "cache"
    np.testing.assert_allclose(head.predict_proba(photos), head.predict_proba(photos), atol=0)
    assert list((tmp_path / "cache").rglob("*.npy"))


@pytest.mark.parametrize("name", HEADS)
def test_a_saved_head_predicts_the_same_and_finds_its_backbone(name, photos, model_file, tmp_path):
    head, path = HEADS[name](model_file).fit(photos), tmp_path / "head.safetensors"
    head.save(path)
    again = type(head).load(path)
    np.testing.assert_allclose(again.predict_proba(photos), head.predict_proba(photos), atol=1e-6)
    assert again.classes_.tolist() == ["blue", "green"]
    assert again.get_params() == head.get_params() | {"backbone": None}
    given = type(head).load(path, backbone=backbone())
    np.testing.assert_allclose(given.predict_proba(photos), head.predict_proba(photos), atol=1e-6)
    with pytest.raises(WeightsError, match="fitted on features of"):
        type(head).load(path, backbone=backbone(seed=1))
    model_file.rename(tmp_path / "elsewhere.safetensors")
    moved = type(head).load(path)
    with pytest.raises(WeightsError, match=r"model.safetensors.*backbone="):
        moved.predict(photos)
    save_backbone(backbone(seed=1), model_file)
    with pytest.raises(WeightsError, match="same backbone"):
        type(head).load(path).predict(photos)


def test_a_file_is_of_one_kind_of_head(tmp_path):
    x, y = clouds()
    Logistic(C=1.0).fit(x, y).save(tmp_path / "head")
    with pytest.raises(WeightsError, match=r"Load it with Logistic\.load"):
        KNN.load(tmp_path / "head")
    numbers = np.unique(y, return_inverse=True)[1]
    KNN(k=2).fit(x, numbers).save(tmp_path / "numbers")
    assert KNN.load(tmp_path / "numbers").classes_.dtype.kind == "i"
    assert KNN.load(tmp_path / "numbers").k == 2


def test_an_embedder_keeps_its_image_settings(photos, model_file, tmp_path):
    embedder = opendino.Embedder(model_file, size=(21, 28), fit="resize")
    head = Logistic(embedder, C=1.0).fit(photos)
    assert embedder.what == ("cls", "mean", "patches"), "the user's own object is left alone"
    head.save(tmp_path / "head")
    again = Logistic.load(tmp_path / "head")
    np.testing.assert_allclose(again.predict_proba(photos), head.predict_proba(photos), atol=1e-6)
    with pytest.raises(ConfigError, match="fit resize"):
        Logistic.load(tmp_path / "head", backbone=opendino.Embedder(model_file))


def test_images_that_cannot_be_read_are_counted_or_refused(photos, model_file, caplog):
    (photos / "green" / "broken.png").write_bytes(b"no image")
    head = Logistic(model_file, C=1.0).fit(photos)
    assert [name.rsplit("/", 1)[1] for name, _ in head.unreadable_] == ["broken.png"]
    assert "broken.png" in caplog.text
    assert head.score(photos) == 1
    with pytest.raises(DataError, match=r"1 of 13 images cannot be read.*broken\.png"):
        head.predict(photos)


def test_scikit_learn_can_drive_them():
    x, y = clouds()
    for make in HEADS.values():
        head = make()
        copy = clone(head)
        assert copy is not head
        assert copy.get_params() == head.get_params()
        assert cross_val_score(head, x, y, cv=3).mean() > 0.8
    model = backbone()
    assert clone(KNN(model)).backbone is model, "a frozen backbone is shared, not copied"
    search = GridSearchCV(KNN(), {"k": [1, 5]}, cv=2).fit(x, y)
    assert search.best_params_["k"] in (1, 5)
    assert make_pipeline(StandardScaler(), Logistic(C=1.0)).fit(x, y).score(x, y) > 0.9
    assert "k=3" in repr(KNN(k=3))


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda p: KNN().fit(p), ConfigError, "no backbone"),
        (lambda p: KNN(backbone()).fit(p / "blue"), DataError, "no classes"),
        (lambda p: KNN().fit(np.eye(3), ["a", "a", "a"]), DataError, "at least two"),
        (lambda p: KNN().fit(np.eye(3), ["a", "b"]), DataError, "3 items need"),
        (lambda p: KNN().fit(np.eye(3), [0.5, 1.0, 2.0]), DataError, "whole numbers"),
        (lambda p: KNN().fit(np.full((2, 2), np.nan), [0, 1]), DataError, "NaN"),
        (lambda p: KNN(k=0).fit(np.eye(2), [0, 1]), ConfigError, "positive"),
        (lambda p: KNN().predict(np.eye(2)), ConfigError, "not fitted"),
        (lambda p: KNN().fit(np.eye(2), [0, 1]).predict(np.eye(3)), DataError, "fitted on 2 features"),
        (lambda p: KNN(3).fit(p), ConfigError, "backbone is a int"),
        (lambda p: KNN(backbone()).fit(7), DataError, "given int"),
        (lambda p: KNN(backbone()).fit([]), DataError, "given list"),
    ],
)
def test_mistakes_are_explained(act, error, words, photos):
    with pytest.raises(error, match=words):
        act(photos)


def test_names_are_imported_on_first_use():
    code = "import sys, opendino; opendino.heads; assert not {'sklearn', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert opendino.heads.KNN is KNN
    with pytest.raises(AttributeError, match="Nothing"):
        opendino.heads.Nothing  # noqa: B018


def test_commands_keep_their_classifier(photos, model_file, tmp_path, capsys):
    from opendino.cli.evaluate import main

    words = ["--model", str(model_file), "--train", str(photos), "--val", str(photos)]
    assert main(["linear", *words, "--steps", "50", "--save-head", str(tmp_path / "linear")]) == 0
    assert main(["logreg", *words, "--save-head", str(tmp_path / "logistic")]) == 0
    assert Linear.load(tmp_path / "linear").score(photos) == Logistic.load(tmp_path / "logistic").score(photos) == 1
