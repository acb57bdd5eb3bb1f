# SPDX-License-Identifier: Apache-2.0
"""Logistic regression against scikit-learn's, the choice of C, and the command with its page."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from opendino.errors import ConfigError, DataError
from opendino.evaluate.logistic import DEFAULT_C, choose_c, fit_logistic, hold_out


def clouds(n=120, classes=4, dim=9, spread=0.6, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(classes, dim)) * spread
    y = rng.permutation(np.arange(n) % classes)
    x = centres[y] + rng.normal(size=(n, dim)) * np.exp(np.random.default_rng(8).normal(size=dim)) + 3
    return x.astype(np.float32), y


@pytest.mark.parametrize("c", [1e-6, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize(("classes", "dim"), [(4, 9), (2, 9), (3, 150)])
def test_equals_scikit_learn(c, classes, dim):
    x, y = clouds(classes=classes, dim=dim)
    # lbfgs is scikit-learn's default, but only newton-cg gets close enough to the solution to compare with.
    theirs = LogisticRegression(C=c, solver="newton-cg", tol=1e-12, max_iter=5000).fit(x.astype(np.float64), y)
    ours = fit_logistic(x, y, c)
    weight = ours.weight.numpy() if classes > 2 else (ours.weight[1] - ours.weight[0]).numpy()[None]
    bias = ours.bias.numpy() if classes > 2 else (ours.bias[1] - ours.bias[0]).numpy()[None]
    scale = np.abs(theirs.coef_).max()
    np.testing.assert_allclose(weight / scale, theirs.coef_ / scale, atol=1e-5)
    np.testing.assert_allclose(bias, theirs.intercept_, atol=1e-5 * max(1, np.abs(theirs.intercept_).max()))
    test = clouds(seed=1, classes=classes, dim=dim)[0]
    np.testing.assert_allclose(ours.predict_proba(test), theirs.predict_proba(test.astype(np.float64)), atol=1e-6)
    assert ours.converged


def test_the_gradient_vanishes_where_scikit_learn_gives_up():
    """At C = 1e5 on separable classes; the gradient of C·Σ cross-entropy + ½‖W‖² from its formula."""
    x, y = clouds(spread=4)
    ours = fit_logistic(x, y, 1e5)
    features = torch.from_numpy(x).double()
    residual = ours.predict_proba(x) - torch.nn.functional.one_hot(torch.from_numpy(y))
    gradient = 1e5 * residual.T @ features + ours.weight
    assert ours.converged
    assert gradient.abs().max() < 1e-4 * ours.weight.abs().max()
    assert 1e5 * residual.sum(0).abs().max() < 1e-4


def test_chunks_change_nothing(monkeypatch):
    from opendino.evaluate import logistic

    x, y = clouds()
    whole = fit_logistic(x, y, 1.0)
    monkeypatch.setattr(logistic, "CHUNK_NUMBERS", 50)
    torch.testing.assert_close(fit_logistic(x, y, 1.0).weight, whole.weight, rtol=1e-7, atol=1e-9)


def test_a_class_without_items_is_never_predicted():
    x, y = clouds()
    y = np.where(y == 1, 5, y)
    model = fit_logistic(x, y, 1.0, num_classes=8)
    assert model.weight.shape == (8, 9)
    assert torch.isneginf(model.bias[[1, 4, 6, 7]]).all()
    assert set(model.logits(x).argmax(1).tolist()) <= {0, 2, 3, 5}
    torch.testing.assert_close(model.predict_proba(x).sum(1), torch.ones(120, dtype=torch.float64))


def test_the_default_grid_is_the_published_one():
    assert len(DEFAULT_C) == 45
    assert DEFAULT_C[0] == pytest.approx(1e-6)
    assert DEFAULT_C[-1] == pytest.approx(1e5)
    np.testing.assert_allclose(np.diff(np.log10(DEFAULT_C)), 0.25)


def test_c_is_chosen_as_a_grid_of_scikit_learn_would():
    x, y = clouds(400)
    values = (1e-5, 1e-3, 1e-1, 10.0)
    got = choose_c(x, y, values, seed=3)
    train, held_out = hold_out(y, 0.1, 3)
    expected = [
        100 * LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(x[train], y[train]).score(x[held_out], y[held_out])
        for c in values
    ]
    assert [c for c, _ in got.curve] == list(values)
    np.testing.assert_allclose([top1 for _, top1 in got.curve], expected, atol=1e-9)
    assert got.c == values[int(np.argmax(expected))]
    assert len(set(expected)) > 1, "the case decides nothing"
    assert got.num_held_out == 40


@pytest.mark.parametrize(("values", "edge"), [((1e-5, 1e-1), "highest"), ((1.0, 1e-7), "lowest"), ((1.0,), "")])
def test_a_choice_at_the_edge_is_said(values, edge):
    x, y = clouds(400)
    if edge == "lowest":
        y = np.random.default_rng(0).permutation(y)  # nothing to learn: the curve is flat or falls
        x[:] = x[0]
    got = choose_c(x, y, values)
    assert got.edge == edge


def test_the_held_out_part_is_a_tenth_of_each_class_and_never_all_of_it():
    labels = np.repeat([0, 1, 2, 3], [100, 12, 2, 1])
    train, out = hold_out(labels, 0.1, seed=0)
    assert np.bincount(labels[out], minlength=4).tolist() == [10, 1, 1, 0]
    assert np.array_equal(np.sort(np.concatenate([train, out])), np.arange(115))
    assert np.array_equal(out, hold_out(labels, 0.1, seed=0)[1])
    assert not np.array_equal(out, hold_out(labels, 0.1, seed=1)[1])
    with pytest.raises(DataError, match="single training image"):
        hold_out(np.arange(5))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"c": 0.0}, ConfigError, "positive"),
        ({"y": [0, 0, 0]}, DataError, "two classes"),
        ({"y": [0, 1]}, DataError, r"\(N, D\) and \(N,\)"),
        ({"y": [0.0, 1.0, 1.0]}, DataError, "integers"),
        ({"x": np.full((3, 3), np.nan)}, DataError, "NaN"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change, error, words):
    with pytest.raises(error, match=words):
        fit_logistic(**{"x": np.eye(3), "y": [0, 1, 1], **change})


def class_folders(root, names, n):
    rng = np.random.default_rng(len(root.name))
    for c, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(n):
            pixels = np.full((20, 20, 3), 60 + 40 * c) + rng.integers(0, 60, (20, 20, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")


@pytest.fixture
def model_file(tmp_path):
    from opendino.models.config import PreprocessSpec, ViTConfig
    from opendino.models.vit import VisionTransformer
    from opendino.models.weights import save_backbone

    torch.manual_seed(0)
    config = ViTConfig(img_size=28, patch_size=7, embed_dim=16, depth=2, num_heads=2)
    save_backbone(VisionTransformer(config, PreprocessSpec(resize=28, crop=28)), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_command_prints_one_json_object_and_writes_a_page(tmp_path, model_file, capsys):
    from opendino.cli.evaluate import main

    class_folders(tmp_path / "train", ["dark", "light", "mid<b>"], 6)
    class_folders(tmp_path / "val", ["dark", "mid<b>"], 3)
    (tmp_path / "val" / "dark" / "broken.png").write_bytes(b"no image")
    (tmp_path / "val" / "dark" / "0.png").write_bytes((tmp_path / "train" / "light" / "0.png").read_bytes())
    page = tmp_path / "page.html"
    words = ["--model", str(model_file), "--train", str(tmp_path / "train"), "--val", str(tmp_path / "val")]
    assert main(["logreg", *words, "--json", "--page", str(page), "--confusion", "--n-per-class", "2"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert {k: got[k] for k in ("num_train", "num_val", "num_classes", "errors")} == {
        "num_train": 18, "num_val": 6, "num_classes": 3, "errors": 1,
    }  # fmt: skip
    assert got["per_class"]["light"] is None
    assert got["per_class"]["dark"] < 100
    assert len(got["c_curve"]) == 45
    assert got["num_held_out"] == 3
    assert np.sum(got["confusion"]) == 6
    assert got["n_per_class"]["2"]["draws"] == 5
    text = page.read_text()
    assert "dark → light · 0.png" in text
    assert "1 classes have no image here" in text
    assert "mid<b>" not in text, "names are escaped"
    assert text.count("data:image/png;base64,") >= 2
    assert main(["logreg", *words, "--c-values", "1"]) == 0
    assert "worst classes: mid<b> 0.0 %" in capsys.readouterr().out
