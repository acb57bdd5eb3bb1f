# SPDX-License-Identifier: Apache-2.0
"""Retrieval scores against values worked out by hand and literal loops; descriptors; the command."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score

from opendino.errors import ConfigError, DataError
from opendino.evaluate.gap import global_average_precision, recognise
from opendino.evaluate.retrieval import (
    average_precision,
    mean_average_precision,
    precision_at,
    same_source_recall,
    score_queries,
    summary,
)


@pytest.mark.parametrize(
    ("ranks", "num", "expected"),
    [
        ([0, 1, 2], 3, 1.0),
        # rank 0: (1 + 1)/2; rank 2: (1/2 + 2/3)/2 -> (1 + 7/12)/2
        ([0, 2], 2, 19 / 24),
        # rank 1: (0/1 + 1/2)/2, one of two found
        ([1], 2, 1 / 8),
        ([2, 0], 2, 19 / 24),
        ([], 4, 0.0),
    ],
)
def test_average_precision_is_the_trapezoid_area(ranks, num, expected):
    assert average_precision(ranks, num) == pytest.approx(expected)


def test_levels_pass_over_junk():
    # Order of the gallery for the query: junk 0, hard 1, negative 2, easy 3.
    similarity = [[0.9, 0.8, 0.7, 0.6]]
    got = mean_average_precision(similarity, [{"easy": [3], "hard": [1], "junk": [0]}])
    # easy: list is [negative, easy], rank 1 -> (0 + 1/2)/2
    # medium: list is [hard, negative, easy], ranks 0 and 2 -> (1 + (1/2 + 2/3)/2)/2
    # hard: list is [hard, negative], rank 0 -> 1
    assert got == pytest.approx({"easy": 25.0, "medium": 100 * 19 / 24, "hard": 100.0})


def test_queries_without_positives_do_not_count():
    similarity = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    got = mean_average_precision(similarity, [{"easy": [0]}, {"junk": [1]}])
    assert got["easy"] == got["medium"] == 100
    assert math.isnan(got["hard"])


def test_mean_is_over_queries():
    got = mean_average_precision(np.array([[2.0, 1.0], [2.0, 1.0]]), [{"easy": [0]}, {"easy": [1]}])
    assert got["easy"] == pytest.approx((100 + 25) / 2)


@pytest.mark.parametrize("query", [{"easy": [4]}, {"easy": [-1]}, {"easy": [1], "junk": [1]}])
def test_wrong_lists_are_refused(query):
    with pytest.raises(DataError, match="Query 0"):
        mean_average_precision(np.zeros((1, 3)), [query])


@pytest.mark.parametrize("similarity", [np.zeros((2, 3)), np.zeros(3), np.full((1, 3), np.nan)])
def test_wrong_similarities_are_refused(similarity):
    with pytest.raises(DataError):
        mean_average_precision(similarity, [{"easy": [0]}])


def test_same_source_recall_by_hand():
    angles = np.deg2rad([0, 10, 90, 95, 14])
    x = np.stack([np.cos(angles), np.sin(angles)], 1) * [[1], [5], [1], [2], [1]]
    groups = ["a", "a", "b", "b", "c"]
    # Nearest other: 0→1 yes, 1→4 no, 2→3 yes, 3→2 yes, 4→1 no. With two: 1→4,0 yes.
    assert same_source_recall(x, groups) == 60
    assert same_source_recall(x, groups, k=2, chunk=2) == 80


def test_recall_needs_two_rows_and_their_groups():
    for x, groups in ((np.ones((1, 2)), [0]), (np.ones((3, 2)), [0, 1])):
        with pytest.raises(DataError, match="at least two rows"):
            same_source_recall(x, groups)


def walk(ranked, good, junk, ks):
    """Average precision and precisions of one ranked list, item by item."""
    rank, found, area, at = 0, 0, 0.0, []
    for item in ranked:
        if item in junk:
            continue
        if item in good:
            before = found / rank if rank else 1.0
            area += (before + (found + 1) / (rank + 1)) / 2 / len(good)
            found += 1
            at.append(rank + 1)
        rank += 1
    return area, [sum(p <= min(k, at[-1]) for p in at) / min(k, at[-1]) for k in ks]


def test_scores_equal_a_literal_loop():
    rng = np.random.default_rng(0)
    similarity, queries = rng.normal(size=(12, 40)), []
    for _ in range(12):
        order = rng.permutation(40)
        queries.append({"easy": order[:3], "hard": order[3 : 3 + rng.integers(0, 3)], "junk": order[10:14]})
    got = summary(score_queries(similarity, queries))
    for level, good, junk in (("easy", "e", "hj"), ("medium", "eh", "j"), ("hard", "h", "ej")):
        names = {"e": "easy", "h": "hard", "j": "junk"}
        rows = []
        for sims, query in zip(similarity, queries):
            wanted, passed = ({int(i) for n in part for i in query[names[n]]} for part in (good, junk))
            if wanted:
                rows.append(walk(sorted(range(40), key=lambda i: -sims[i]), wanted, passed, (1, 5, 10)))
        assert got["map"][level] == pytest.approx(100 * np.mean([r[0] for r in rows]), abs=1e-6)
        expected = 100 * np.mean([r[1] for r in rows], axis=0)
        assert list(got["precision"][level].values()) == pytest.approx(expected, abs=1e-6)
        assert got["queries"][level] == len(rows)
    assert got["queries"]["hard"] < 12, "no query without hard positives: the case decides nothing"


def test_precision_at_k_by_hand():
    assert precision_at([0, 2, 9], 5) == 2 / 5
    assert precision_at([0, 2], 10) == 2 / 3, "ranks after the last positive do not count"
    assert precision_at([3], 1) == 0


def test_global_average_precision_by_hand():
    # By confidence: right, distractor, right, wrong -> (1/1 + 2/3) / 3; without the distractor (1/1 + 2/2) / 3
    got = global_average_precision(["a", "b", "a", "c"], [0.9, 0.7, 0.8, 0.1], ["a", "b", None, "a"])
    assert got["gap"] == pytest.approx(100 * (1 + 2 / 3) / 3, abs=1e-6)
    assert got["gap_no_distractors"] == pytest.approx(200 / 3, abs=1e-6)
    assert got["accuracy"] == pytest.approx(200 / 3, abs=1e-6)
    nothing = global_average_precision(["a"], [1.0], [None])
    assert nothing == {"gap": None, "gap_no_distractors": None, "accuracy": None}


def test_global_average_precision_equals_sklearn():
    rng = np.random.default_rng(1)
    predicted, confidence = rng.integers(0, 4, 60), rng.random(60)
    truth = [None if rng.random() < 0.3 else int(c) for c in rng.integers(0, 4, 60)]
    right = np.array([p == t for p, t in zip(predicted, truth)])
    known = sum(t is not None for t in truth)
    got = global_average_precision(predicted, confidence, truth)
    expected = 100 * average_precision_score(right, confidence) * right.sum() / known
    assert got["gap"] == pytest.approx(expected, abs=1e-6)
    assert 5 < got["gap"] < got["gap_no_distractors"] < 95


def test_recognition_equals_the_published_rule_written_as_loops():
    rng = np.random.default_rng(2)
    sims, ids = rng.uniform(-1, 1, size=(30, 50)), [f"i{n}" for n in rng.integers(0, 9, 50)]
    for k, temperature in ((1, 1.0), (5, 10.0), (80, 100.0)):
        predicted, confidence = recognise(sims, ids, k, temperature)
        for row, (got, score) in enumerate(zip(predicted, confidence)):
            near = sorted(range(50), key=lambda i: -sims[row, i])[:k]
            best = dict.fromkeys(set(ids), 0.0)
            best.update({c: max(sims[row, i] for i in near if ids[i] == c) for c in {ids[i] for i in near}})
            weights = {c: math.exp(temperature * v) for c, v in best.items()}
            among = {ids[i]: weights[ids[i]] for i in near}
            assert got == max(among, key=among.get)
            assert score == pytest.approx(among[got] / sum(weights.values()), abs=1e-6)


def test_recognition_refuses_what_it_cannot_use():
    with pytest.raises(DataError, match="2 gallery instances"):
        recognise(np.zeros((1, 3)), ["a", "b"])
    with pytest.raises(ConfigError, match="positive"):
        recognise(np.zeros((1, 2)), ["a", "b"], k=0)
    with pytest.raises(DataError, match="1 predictions"):
        global_average_precision(["a"], [0.5, 0.1], ["a"])


def small_model():
    from opendino.models.config import PreprocessSpec, ViTConfig
    from opendino.models.vit import VisionTransformer

    torch.manual_seed(0)
    config = ViTConfig(img_size=28, patch_size=7, embed_dim=16, depth=2, num_heads=2)
    return VisionTransformer(config, PreprocessSpec(resize=28, crop=28))


def draw(path, seed):
    colours = np.random.default_rng(seed).integers(0, 255, (3, 3, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colours).resize((45, 36), Image.Resampling.NEAREST).save(path)


def items_of(paths, boxes=None):
    from opendino.images.sources import FileSource, SourceImage

    source = FileSource("", "", map(str, paths), [None] * len(paths))
    return [SourceImage(source, i, str(p), (boxes or {}).get(i)) for i, p in enumerate(paths)]


def test_descriptors_are_means_of_unit_vectors_over_scales(tmp_path):
    from opendino.embed.descriptors import descriptors
    from opendino.embed.embedder import Embedder

    model, paths = small_model(), [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        draw(path, i)
    for pooling in ("cls", "mean", "gem"):
        got, errors = descriptors(model, items_of(paths), None, pooling=pooling, scales=(1, 0.707, 1.3))
        expected = np.zeros((3, 16))
        for side in (28, 21, 35):  # 19.8 and 36.4 at the nearest multiples of 7
            features = Embedder(model, size=side)(paths)
            vectors = {"cls": features.cls, "mean": features.mean}
            vectors["gem"] = np.mean(np.maximum(features.patches, 1e-6).astype(np.float64) ** 3, axis=1) ** (1 / 3)
            expected += vectors[pooling] / np.linalg.norm(vectors[pooling], axis=1, keepdims=True)
        np.testing.assert_allclose(got, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)
        assert errors == [None] * 3


def test_descriptors_of_boxes_are_those_of_the_cut_image_and_are_kept_apart(tmp_path):
    from opendino.embed.descriptors import descriptors

    draw(tmp_path / "whole.png", 5)
    Image.open(tmp_path / "whole.png").crop((4, 2, 30, 31)).save(tmp_path / "cut.png")
    paths, store = [tmp_path / "whole.png", tmp_path / "whole.png", tmp_path / "cut.png"], tmp_path / "store"
    items, seen = items_of(paths, {1: (4, 2, 30, 31)}), []
    for root in (None, store, store):
        got, _ = descriptors(small_model(), items, root, on_images=lambda done, errors, total: seen.append(done))
        np.testing.assert_allclose(got[1], got[2], atol=1e-6)
        assert got[0] @ got[1] < 0.9999
    assert seen[-1] == 3
    assert seen.count(0) == 2, "the third call found all in the store"


def test_descriptors_refuse_unknown_settings():
    from opendino.embed.descriptors import descriptors

    with pytest.raises(ConfigError, match="pooling"):
        descriptors(small_model(), [], None, pooling="max")
    for scales in ((), (0.0,), (1.0, 1.0)):
        with pytest.raises(ConfigError, match="scales"):
            descriptors(small_model(), [], None, scales=scales)


@pytest.fixture
def places(tmp_path):
    """Three pictures in the gallery twice, once as they are and once darker; each is asked for by a part of it."""
    from opendino.models.weights import save_backbone

    save_backbone(small_model(), tmp_path / "model.safetensors")
    for i in range(3):
        draw(tmp_path / "g" / f"{i}.png", i)
        Image.open(tmp_path / "g" / f"{i}.png").point(lambda v: v * 0.7).save(tmp_path / "g" / f"{i}-dark.png")
    gallery = [f"g/{i}{end}.png" for i in range(3) for end in ("", "-dark")]
    queries = [{"query": f"g/{i}.png", "box": [1, 1, 44, 35], "easy": [f"g/{i}-dark.png"]} for i in range(3)]
    (tmp_path / "retrieval.json").write_text(json.dumps({"gallery": gallery, "queries": queries}))
    return tmp_path


def run(places, capsys, *more):
    from opendino.cli.evaluate import main

    words = ["retrieval", "--model", str(places / "model.safetensors"), "--cache", str(places / "store"), *more]
    assert main([*words, "--data", str(places / "retrieval.json"), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_command_scores_lists_and_writes_a_page(places, capsys):
    got = run(places, capsys, "--page", str(places / "pages" / "found.html"), "--scales", "1,0.75", "--pooling", "gem")
    assert got["num_queries"] == {"easy": 3, "medium": 3, "hard": 0}
    assert got["without_positives"] == {"easy": 0, "medium": 0, "hard": 3}
    assert got["map"]["hard"] is None
    assert got["precision"]["hard"]["1"] is None
    assert 0 < got["map"]["easy"] == got["map"]["medium"] <= 100
    page = (places / "pages" / "found.html").read_text()
    assert page.count("data:image/png") == 3
    assert "of 1 to be found are shown" in page


def test_command_equals_a_ranking_by_hand(places, capsys):
    from opendino.embed.embedder import Embedder

    got = run(places, capsys, "--levels", "medium", "--fit", "pad")
    assert list(got["map"]) == ["medium"]
    embed = Embedder(small_model(), fit="pad")
    gallery = embed([places / "g" / f"{i}{end}.png" for i in range(3) for end in ("", "-dark")]).cls
    expected = []
    for i in range(3):
        query = embed([Image.open(places / "g" / f"{i}.png").convert("RGB").crop((1, 1, 44, 35))]).cls[0]
        cosines = gallery @ query / np.linalg.norm(gallery, axis=1)
        expected.append(walk(sorted(range(6), key=lambda j: -cosines[j]), {2 * i + 1}, {2 * i}, (1,))[0])
    assert got["map"]["medium"] == pytest.approx(100 * np.mean(expected), abs=1e-6)


def test_command_scores_instances(places, capsys):
    gallery = [{"image": f"g/{i}-dark.png", "instance": str(i)} for i in range(3)]
    queries = [{"query": f"g/{i}.png", "instance": str(i)} for i in range(2)] + [{"query": "g/2.png"}]
    (places / "retrieval.json").write_text(json.dumps({"gallery": gallery, "queries": queries}))
    got = run(places, capsys)
    assert got["distractors"] == 1
    assert 0 <= got["gap"] <= got["gap_no_distractors"] <= got["accuracy"] <= 100
    assert got["num_queries"]["easy"] == 2


def test_bunches_of_queries_change_nothing(places, capsys, monkeypatch):
    from opendino.cli.evaluate import retrieval

    gallery = [{"image": f"g/{i}{end}.png", "instance": str(i)} for i in range(3) for end in ("", "-dark")]
    queries = [{"query": f"g/{i}.png", "instance": str(i)} for i in range(3)]
    (places / "retrieval.json").write_text(json.dumps({"gallery": gallery, "queries": queries}))
    whole = run(places, capsys)
    monkeypatch.setattr(retrieval, "MOST_SIMILARITIES", 1)
    assert run(places, capsys) == whole
    assert whole["precision"]["easy"]["1"] == whole["accuracy"], "the query itself is left out of both"


def test_unreadable_gallery_images_are_ranked_last_and_queries_left_out(places, capsys):
    whole = run(places, capsys)
    (places / "g" / "0-dark.png").write_bytes(b"no image")
    content = json.loads((places / "retrieval.json").read_text())
    (places / "broken.png").write_bytes(b"no image")
    content["queries"].append({"query": "broken.png", "easy": ["g/1.png"]})
    (places / "retrieval.json").write_text(json.dumps(content))
    got = run(places, capsys)
    assert (got["queries"], got["errors"], got["errors_queries"]) == (3, 2, 1)
    # Query 0 finds its only positive behind the 4 other images that are not junk: (0/4 + 1/5)/2
    assert got["map"]["easy"] < whole["map"]["easy"]
    assert got["precision"]["easy"]["5"] <= whole["precision"]["easy"]["5"]
    with pytest.raises(DataError, match="more than --max-errors 1"):
        run(places, capsys, "--max-errors", "1")


@pytest.mark.parametrize("scales", ["1;0.5", "", "0", "1,-1", "inf"])
def test_command_refuses_wrong_scales(places, capsys, scales):
    with pytest.raises(ConfigError, match="scales"):
        run(places, capsys, "--scales", scales)


def test_command_refuses_a_box_outside_the_image_by_name(places, capsys):
    content = json.loads((places / "retrieval.json").read_text())
    content["queries"] = [{"query": "g/0.png", "box": [100, 100, 120, 120], "easy": ["g/1.png"]}]
    (places / "retrieval.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="None of the 1 queries"):
        run(places, capsys)
