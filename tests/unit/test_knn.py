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
from opendino.evaluate import first_pass, neighbours
from opendino.evaluate.first_pass import FirstPass, select
from opendino.evaluate.knn import few_shot_accuracy, knn_accuracy, knn_predict, mean_per_class, subset
from opendino.evaluate.neighbours import Neighbours, bf16_is_fast, nearest, rows_of


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


def unit64(x):
    x = torch.as_tensor(np.asarray(x)).double()
    return x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)


def assert_exact(train, queries, k, found):
    """The indices found are k different ones, and their float64 cosines are the k largest, in falling order."""
    reference = unit64(queries) @ unit64(train).T
    cosines, index = found
    assert all(len(set(row)) == k for row in index.tolist())
    best = reference.topk(k, dim=1).values
    torch.testing.assert_close(reference.gather(1, index), best, rtol=0, atol=1e-12)
    torch.testing.assert_close(cosines.double(), best, rtol=0, atol=1e-6)


def cases():
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(1003, 24)).astype(np.float32)
    asked = rng.normal(size=(40, 24)).astype(np.float32)
    near = asked[rng.integers(0, 40, 1003)] + 1e-3 * rng.normal(size=(1003, 24)).astype(np.float32)
    midway = 0.5 + 1e-3 * rng.normal(size=plain.shape)
    midpoints = np.sign(plain) * (1 + (rng.integers(0, 128, plain.shape) + midway) / 128)
    scaled = plain * np.exp(rng.uniform(-60, 60, (1003, 1))).astype(np.float32)
    with_zeros = plain.copy()
    with_zeros[::50] = 0
    return {
        "spread": (plain, asked),
        "cosines within a few bf16 roundings of each other": (near.astype(np.float32), asked),
        "components half way between two bf16 numbers": (midpoints.astype(np.float32), asked),
        "all one way": (plain + 3, asked + 3),
        "opposite the queries": (-np.abs(plain), np.abs(asked)),
        "lengths from 1e-26 to 1e26": (np.where(np.abs(scaled) < 1e-9, plain, scaled), asked),
        "zeros among them": (with_zeros, asked),
        "pairs of equal ones": (np.concatenate([plain[:500], plain[:500]]), asked),
    }


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("case", cases())
def test_two_passes_rank_as_float64_does(case, precision, monkeypatch):
    monkeypatch.setattr(first_pass, "BLOCK", 100)
    train, queries = (torch.from_numpy(x) for x in cases()[case])
    assert_exact(train, queries, 20, Neighbours(train, len(queries), 20, precision).search(queries))


def test_more_neighbours_than_a_block_has_items(monkeypatch):
    monkeypatch.setattr(first_pass, "BLOCK", 16)
    train, queries = (torch.from_numpy(x) for x in cases()["spread"])
    for precision in ("bf16", "fp32"):
        assert_exact(train[:100], queries, 40, Neighbours(train[:100], 40, 40, precision).search(queries))


def test_the_first_pass_does_the_work_and_equal_items_come_by_index(monkeypatch):
    monkeypatch.setattr(first_pass, "BLOCK", 100)
    train, queries = (torch.from_numpy(x) for x in cases()["pairs of equal ones"])
    lengths = train.double().norm(dim=1)
    for dtype in (torch.bfloat16, torch.float32):
        _, index, certain = FirstPass(train, lengths, dtype).search(queries, 20)
        assert certain.all()
        assert torch.equal(index[:, 1::2], index[:, ::2] + 500)


@pytest.mark.skipif(not bf16_is_fast(), reason="the bound is about processors that multiply bf16")
@pytest.mark.parametrize("case", cases())
def test_no_product_is_further_off_than_the_bound(case, monkeypatch):
    monkeypatch.setattr(first_pass, "BLOCK", 100)
    train, queries = (torch.from_numpy(x) for x in cases()[case])
    for dtype in (torch.bfloat16, torch.float32):
        first = FirstPass(train, train.double().norm(dim=1).clamp_min(1e-12), dtype)
        asked, largest = first._asked(queries), 0.0
        exact = unit64(queries) @ (unit64(train) - first.centre).T
        for number in range(first.num_blocks):
            products = (asked.rounded @ first.block(number).T).double()
            off = (products - exact[:, number :: first.num_blocks]).abs() - first.output_rounding * products.abs()
            largest = max(largest, float((off / asked.error[:, None]).max()))
        assert 0 < largest <= 1 if dtype == torch.bfloat16 else largest <= 1


def test_the_copy_holds_every_item_once(monkeypatch):
    for total, block in ((1003, 100), (97, 100), (256, 64), (65, 64)):
        monkeypatch.setattr(first_pass, "BLOCK", block)
        train = torch.from_numpy(cases()["spread"][0][:total])
        first = FirstPass(train, train.double().norm(dim=1), torch.bfloat16)
        for number in range(first.num_blocks):
            expected = (unit64(train) - first.centre)[number :: first.num_blocks]
            torch.testing.assert_close(first.block(number).double(), expected, rtol=2**-8, atol=1e-6)


def test_rows_with_too_many_near_items_are_searched_more_precisely(monkeypatch):
    monkeypatch.setattr(first_pass, "BLOCK", 100)
    monkeypatch.setattr(first_pass, "LIMIT", 160)
    train, queries = (torch.from_numpy(x) for x in cases()["cosines within a few bf16 roundings of each other"])
    tight = queries[:1] + 1e-4 * torch.randn(400, 24, generator=torch.Generator().manual_seed(0))
    train = torch.cat([train, tight])
    items = Neighbours(train, len(queries), 20, "bf16")
    certain = items.passes[0].search(queries, 20)[2]
    assert not certain[0]
    assert_exact(train, queries, 20, items.search(queries))


def test_hundreds_of_equal_items_are_answered(monkeypatch):
    monkeypatch.setattr(first_pass, "BLOCK", 100)
    monkeypatch.setattr(first_pass, "LIMIT", 160)
    train, queries = torch.ones(1000, 8), torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    items = Neighbours(train, 10, 5, "bf16")
    assert_exact(train, queries, 5, items.search(queries))


def test_products_beyond_their_bound_are_noticed_and_made_again(monkeypatch, caplog):
    monkeypatch.setattr(first_pass, "BLOCK", 100)
    train, queries = (torch.from_numpy(x) for x in cases()["spread"])
    items = Neighbours(train, len(queries), 20, "bf16")
    items.passes[0]._copy *= 1.2
    assert_exact(train, queries, 20, items.search(queries))
    assert "more than their bound" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shift", [0.0, 0.5, -0.5])
def test_select_finds_all_at_or_above_the_threshold(dtype, shift):
    generator = torch.Generator().manual_seed(0)
    products = (torch.randn(30, 107, generator=generator) * 0.2 + shift).to(dtype)
    threshold = 0.1 * torch.rand(30, generator=generator) + 0.05 + shift
    threshold[3], threshold[4] = torch.inf, products[4].float().max()
    rows, columns, values = select(products, threshold)
    assert torch.equal(values, products[rows, columns])
    found = torch.zeros(30, 107, dtype=torch.bool)
    found[rows, columns] = True
    needed = products.float() >= threshold[:, None]
    assert not (needed & ~found).any()
    assert not found[3].any()
    assert found.sum() == len(rows)
    loose = products.float() >= (threshold - 2**-6 * threshold.abs())[:, None]
    assert not (found & ~loose).any()
    assert dtype == torch.bfloat16 or torch.equal(found, needed)


def test_half_precision_and_memory_maps_need_no_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(first_pass, "BLOCK", 100)
    monkeypatch.setattr(neighbours, "MIN_ITEMS", 100)
    monkeypatch.setattr(neighbours, "MIN_QUERIES", 10)
    train, queries = cases()["spread"]
    np.save(tmp_path / "train.npy", train.astype(np.float16))
    mapped = np.load(tmp_path / "train.npy", mmap_mode="r")
    rows = rows_of(mapped)
    assert rows.data_ptr() == mapped.ctypes.data
    items = Neighbours(rows, 40, 20)
    assert len(items.passes) == 1 + bf16_is_fast()
    assert_exact(train.astype(np.float16), queries, 20, items.search(rows_of(queries)))
    labels = np.arange(1003) % 7
    got = knn_accuracy(mapped, labels, queries, labels[:40], k=(5,), chunk=11)
    whole = knn_accuracy(train.astype(np.float16).astype(np.float32), labels, queries, labels[:40], k=(5,))
    assert got == whole


def test_threads_change_nothing(monkeypatch):
    monkeypatch.setattr(first_pass, "BLOCK", 100)
    monkeypatch.setattr(neighbours, "MIN_QUERIES", 7)
    train, queries = (torch.from_numpy(x) for x in cases()["spread"])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(Neighbours(train, 40, 20, "bf16").search(queries))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][0], results[1][0])


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
