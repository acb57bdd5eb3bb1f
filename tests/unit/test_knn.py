# SPDX-License-Identifier: Apache-2.0
"""The k-NN vote against a slow one, and the command that runs it."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image

from opendino.errors import ConfigError, DataError
from opendino.evaluate.knn import few_shot_accuracy, knn_accuracy, knn_predict, mean_per_class, subset
from opendino.evaluate.neighbours import nearest


def slow_scores(train, labels, query, k, temperature):
    """Votes of one query by plain loops, dict class -> weight."""
    unit = [[v / math.sqrt(sum(a * a for a in row)) for v in row] for row in [*train, query]]
    sims = [sum(a * b for a, b in zip(row, unit[-1])) for row in unit[:-1]]
    near = sorted(range(len(sims)), key=lambda i: -sims[i])[:k]
    total = sum(math.exp(sims[i] / temperature) for i in near)
    votes = {}
    for i in near:
        votes[labels[i]] = votes.get(labels[i], 0.0) + math.exp(sims[i] / temperature) / total
    return votes


def slow_accuracy(train, labels, test, truth, k, temperature):
    top1, top5 = [], []
    for query, right in zip(test, truth):
        votes = slow_scores(train, labels, query, k, temperature)
        ranked = sorted(votes, key=lambda c: -votes[c])
        top1.append(ranked[0] == right)
        top5.append(right in ranked[:5])
    by_class = [[h for h, t in zip(top1, truth) if t == c] for c in set(truth)]
    mean = sum(sum(h) / len(h) for h in by_class) / len(by_class)
    return 100 * sum(top1) / len(top1), 100 * sum(top5) / len(top5), 100 * mean


def clouds(n, seed, num_classes=12, dim=6):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(num_classes, dim))
    labels = rng.integers(0, num_classes, n)
    labels[:num_classes] = np.arange(num_classes)
    return (centres[labels] + rng.normal(size=(n, dim))).astype(np.float32), labels


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_a_slow_vote(temperature):
    (x, y), (tx, ty) = clouds(90, 0), clouds(40, 1)
    got = knn_accuracy(x, y, tx, ty, k=(1, 7, 30), temperature=temperature, chunk=16)
    for k in (1, 7, 30):
        expected = slow_accuracy(x.tolist(), y.tolist(), tx.tolist(), ty.tolist(), k, temperature)
        assert [got[m][str(k)] for m in ("top1", "top5", "mean_per_class")] == pytest.approx(expected)
    assert 20 < got["top1"]["7"] < got["top5"]["7"] < 100, "the case decides nothing"


def test_training_blocks_change_nothing():
    x = torch.nn.functional.normalize(torch.from_numpy(clouds(70, 0)[0]), dim=1)
    sims, index = nearest(x[:9], x, 20, train_block=13)
    expected = (x[:9] @ x.T).topk(20, dim=1)
    assert torch.equal(index, expected.indices)
    torch.testing.assert_close(sims, expected.values)


def test_the_nearest_vote_weighs_more_than_many_far_ones():
    x, y = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]]), torch.tensor([0, 1, 1])
    assert knn_predict(x, y, torch.tensor([[2.0, 0.0]]), k=3, temperature=0.07).tolist() == [0]
    assert knn_predict(x, y, torch.tensor([[2.0, 0.0]]), k=3, temperature=10).tolist() == [1]


def test_a_k_above_the_training_set_is_clipped_and_said(caplog):
    (x, y), (tx, ty) = clouds(30, 0), clouds(15, 1)
    with caplog.at_level(logging.WARNING):
        got = knn_accuracy(x, y, tx, ty, k=(30, 200))
    assert got["top1"]["200"] == got["top1"]["30"]
    assert "200" in caplog.text
    assert "30 training items" in caplog.text


def test_a_class_without_votes_is_no_top5_hit():
    x, y = np.eye(3, dtype=np.float32), np.arange(3)
    got = knn_accuracy(x, y, x[:1], [1], k=(1,))
    assert got["top5"]["1"] == 0


def test_mean_per_class_weighs_classes_equally():
    truth, hits = torch.tensor([0, 0, 0, 2]), torch.tensor([True, True, True, False])
    assert mean_per_class(hits, truth) == 50


def test_few_shot_draws_are_seeded_and_balanced():
    labels = np.repeat([0, 1, 4], [10, 5, 2])
    first = subset(labels, 3, seed=0, draw=1)
    assert np.bincount(labels[first]).tolist() == [3, 3, 0, 0, 2]
    assert np.array_equal(first, subset(labels, 3, seed=0, draw=1))
    assert not np.array_equal(first, subset(labels, 3, seed=0, draw=2))


def test_few_shot_mean_over_draws():
    (x, y), (tx, ty) = clouds(80, 0), clouds(40, 1)
    got = few_shot_accuracy(x, y, tx, ty, 2, draws=3, seed=5, k=(1,))
    runs = [knn_accuracy(x[i], y[i], tx, ty, k=(1,))["top1"]["1"] for i in (subset(y, 2, 5, d) for d in range(3))]
    assert got["top1"]["1"] == pytest.approx(np.mean(runs))
    assert got["std"]["top1"]["1"] == pytest.approx(np.std(runs))
    assert got["std"]["top1"]["1"] > 0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": (0,)}, ConfigError, "positive"),
        ({"temperature": 0}, ConfigError, "positive"),
        ({"test_y": [7, 0]}, DataError, "no training items"),
        ({"test_x": [[0.0, float("nan")], [1, 1]]}, DataError, "NaN"),
        ({"test_x": np.zeros((2, 3), np.float32)}, DataError, "same D"),
        ({"test_y": [0]}, DataError, "as many classes"),
        ({"train_y": [0]}, DataError, "as many classes"),
    ],
)
def test_what_cannot_be_scored_is_refused(change, error, words):
    good = {"train_x": np.eye(2), "train_y": [0, 1], "test_x": np.eye(2), "test_y": [0, 1], "k": (1,)}
    with pytest.raises(error, match=words):
        knn_accuracy(**{**good, **change})


def class_folders(root, classes, n):
    rng = np.random.default_rng(0)
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(n):
            pixels = np.full((20, 20, 3), 60 + 70 * c) + rng.integers(0, 20, (20, 20, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")


@pytest.fixture
def model_file(tmp_path):
    from opendino.models.config import PreprocessSpec, ViTConfig
    from opendino.models.vit import VisionTransformer
    from opendino.models.weights import save_backbone

    torch.manual_seed(0)
    config = ViTConfig(img_size=28, patch_size=7, embed_dim=16, depth=1, num_heads=2)
    save_backbone(VisionTransformer(config, PreprocessSpec(resize=28, crop=28)), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_command_prints_one_json_object(tmp_path, model_file, capsys):
    from opendino.cli.evaluate import main

    class_folders(tmp_path / "train", ["dark", "light", "mid"], 4)
    class_folders(tmp_path / "val", ["dark", "light"], 2)
    (tmp_path / "val" / "dark" / "broken.png").write_bytes(b"no image")
    folders = ["--train", str(tmp_path / "train"), "--val", str(tmp_path / "val")]
    assert main(["knn", "--model", str(model_file), *folders, "--k", "1", "20", "--n-per-class", "2", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["top1"]["1"] == 100
    assert {k: got[k] for k in ("num_train", "num_val", "num_classes", "errors")} == {
        "num_train": 12, "num_val": 4, "num_classes": 3, "errors": 1,
    }  # fmt: skip
    assert got["k_used"] == {"1": 1, "20": 12}
    assert got["n_per_class"]["2"]["draws"] == 5


def test_command_refuses_a_validation_class_without_training_images(tmp_path, capsys):
    from opendino.cli.evaluate import main

    class_folders(tmp_path / "train", ["a", "b"], 1)
    class_folders(tmp_path / "val", ["a", "z"], 1)
    with pytest.raises(DataError, match="not in --train: z"):
        main(["knn", "--model", "vits14", "--train", str(tmp_path / "train"), "--val", str(tmp_path / "val")])


def test_command_refuses_an_unknown_protocol():
    from opendino.cli.evaluate import main

    with pytest.raises(ConfigError, match="no protocol"):
        main(["kmm"])
