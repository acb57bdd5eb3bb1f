# SPDX-License-Identifier: Apache-2.0
"""Accuracy by group: the figures by hand and by loops, the tables, Dollar Street as it lies on disk, the command."""

import csv
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from opendino.cli.evaluate import main
from opendino.cli.evaluate.grouped_table import split_cell
from opendino.errors import ConfigError, DataError
from opendino.evaluate import fairness
from opendino.evaluate.fairness import bucket, cross, group_accuracy, resample
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone

# --- figures ---------------------------------------------------------------------------------------------------------


def example(seed=0, sizes=(("north", 40, 0.9), ("south", 60, 0.5), ("east", 25, 0.7), ("tiny", 3, 0.3))):
    rng = np.random.default_rng(seed)
    rows = [(g, bool(rng.random() < p)) for g, n, p in sizes for _ in range(n)] + [("", True)] * 5
    rows = [rows[i] for i in rng.permutation(len(rows))]
    return [right for _, right in rows], [group for group, _ in rows]


def test_accuracy_and_gaps_by_hand():
    right = [1, 1, 1, 0, 1, 0, 0, 0, 0, 1]
    got = group_accuracy(right, ["a"] * 4 + ["b"] * 5 + [""], min_images=4)
    assert {g: (r["accuracy"], r["n"], r["small"]) for g, r in got["groups"].items()} == {
        "a": (75.0, 4, False), "b": (20.0, 5, False),
    }  # fmt: skip
    assert got["overall"]["accuracy"] == pytest.approx(400 / 9, abs=1e-9)  # the image without a group counts nowhere
    assert got["without_group"] == 1
    assert got["groups"]["b"]["against_overall"] == pytest.approx(20 - 400 / 9, abs=1e-9)
    assert (got["gap"]["points"], got["gap"]["best"], got["gap"]["worst"]) == (55, "a", "b")
    one_group = group_accuracy(right, ["a"] * 4 + ["b"] * 5 + [""], min_images=5)
    assert one_group["groups"]["a"]["small"]
    assert one_group["gap"] is None


def percentile(values, q):
    """Linear interpolation between the sorted values, written out."""
    ranked = sorted(values)
    place = q / 100 * (len(ranked) - 1)
    low = int(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (place - low) * (ranked[high] - ranked[low])


def literal(right, groups, column, draws, seed, confidence, min_images):
    """Every figure by loops over the same draws."""
    members = {g: [r for r, h in zip(right, groups) if h == g] for g in sorted(set(groups) - {""})}
    picks = {g: resample(len(rows), draws, seed, column, g).tolist() for g, rows in members.items()}
    tails = (100 - confidence) / 2, 100 - (100 - confidence) / 2
    by_group, overall, gaps = {g: [] for g in members}, [], []
    large = [g for g in members if len(members[g]) >= min_images]
    for d in range(draws):
        hits = {g: sum(members[g][i] for i in picks[g][d]) for g in members}
        for g in members:
            by_group[g].append(100 * hits[g] / len(members[g]))
        overall.append(100 * sum(hits.values()) / sum(map(len, members.values())))
        gaps.append(max(by_group[g][-1] for g in large) - min(by_group[g][-1] for g in large))

    def ends(values):
        return [percentile(values, t) for t in tails]

    return {
        "groups": {g: (ends(v), ends([a - b for a, b in zip(v, overall)])) for g, v in by_group.items()},
        "overall": ends(overall),
        "gap": ends(gaps),
    }


@pytest.mark.parametrize(("seed", "confidence"), [(0, 95.0), (3, 80.0)])
def test_intervals_agree_with_a_literal_loop(seed, confidence):
    right, groups = example()
    settings = {"draws": 201, "seed": seed, "confidence": confidence, "min_images": 20}
    got = group_accuracy(right, groups, column="region", **settings)
    slow = literal(right, groups, "region", **settings)
    for g, (own, against) in slow["groups"].items():
        assert got["groups"][g]["interval"] == pytest.approx(own, abs=1e-6)
        assert got["groups"][g]["against_overall_interval"] == pytest.approx(against, abs=1e-6)
    assert got["overall"]["interval"] == pytest.approx(slow["overall"], abs=1e-6)
    assert got["gap"]["interval"] == pytest.approx(slow["gap"], abs=1e-6)
    assert got == group_accuracy(right, groups, column="region", **settings)
    assert got != group_accuracy(right, groups, column="region", **settings | {"seed": seed + 1})


def test_intervals_are_those_of_the_binomial_distribution():
    right = [True] * 70 + [False] * 30
    got = group_accuracy(right, ["a"] * 100, draws=40000)["groups"]["a"]["interval"]
    assert got == pytest.approx(stats.binom.ppf([0.025, 0.975], 100, 0.7), abs=0.6)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng, inside = np.random.default_rng(0), 0
    for trial in range(200):
        right = rng.random(200) < 0.6
        low, high = group_accuracy(right, ["a"] * 200, draws=300, seed=trial, confidence=90)["groups"]["a"]["interval"]
        inside += low <= 60 <= high
    assert stats.binomtest(inside, 200, 0.9).pvalue > 1e-3


def test_draws_of_a_group_do_not_depend_on_the_others():
    right, groups = example()
    kept = [i for i, g in enumerate(groups) if g in ("north", "east")]
    alone = group_accuracy([right[i] for i in kept], [groups[i] for i in kept])
    whole = group_accuracy(right, groups)
    assert alone["groups"]["north"]["interval"] == whole["groups"]["north"]["interval"]


def test_draws_in_parts_fit_in_memory_and_are_draws(monkeypatch):
    right, groups = example()
    whole = group_accuracy(right, groups, draws=4000)
    monkeypatch.setattr(fairness, "DRAW_CHUNK", 1000)
    parts = group_accuracy(right, groups, draws=4000)
    assert parts["groups"]["south"]["interval"] == pytest.approx(whole["groups"]["south"]["interval"], abs=2)


def test_gap_by_chance_agrees_with_all_ways_to_deal_out_the_answers():
    right = [1, 1, 1, 0, 0, 0, 0]
    groups = ["a"] * 3 + ["b"] * 4
    gaps = []
    for hits in itertools.combinations(range(7), 3):
        a = sum(i < 3 for i in hits)
        gaps.append(abs(100 * a / 3 - 100 * (3 - a) / 4))
    got = group_accuracy(right, groups, draws=40000, min_images=1)["gap"]
    assert got["points"] == 100
    assert got["by_chance"] == pytest.approx(np.mean(gaps), abs=1)
    assert got["p"] == pytest.approx(np.mean([g >= 100 - 1e-9 for g in gaps]), abs=0.005)


def test_equal_groups_have_no_surprising_gap_and_unequal_ones_do():
    equal = group_accuracy([True, False] * 60, ["a"] * 60 + ["b"] * 60)["gap"]
    assert (equal["points"], equal["p"]) == (0, 1)
    assert group_accuracy([True] * 60 + [False] * 60, ["a"] * 60 + ["b"] * 60)["gap"]["p"] < 0.01


@pytest.mark.parametrize(
    ("change", "error"),
    [({"draws": 0}, ConfigError), ({"confidence": 100}, ConfigError), ({"groups": [""] * 2}, DataError),
     ({"groups": ["a"]}, DataError)],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused(change, error):
    with pytest.raises(error):
        group_accuracy(**{"correct": [True, False], "groups": ["a", "b"], **change})


def test_buckets_by_edges_and_by_equal_numbers():
    values = ["10", "200", "", "1999.5", "2000", "9000"]
    got, names = bucket(values, [200, 2000])
    assert names == ["below 200", "200 to 2000", "from 2000"]
    assert got == ["below 200", "200 to 2000", "", "200 to 2000", "from 2000", "from 2000"]
    got, names = bucket([str(v) for v in range(9)], 3)
    assert [n.split(" ")[0] for n in names] == ["low", "medium", "high"]
    assert [got.count(n) for n in names] == [3, 3, 3]
    assert len(set(bucket(["1"] * 5 + ["2"] * 5, 2)[0][:5])) == 1  # equal values stay together
    with pytest.raises(ConfigError, match="must rise"):
        bucket(["5"] * 8 + ["6", "7"], 3)
    with pytest.raises(DataError, match="text"):
        bucket(["a"], [1])


def test_cross_joins_groups():
    assert cross({"a": ["x", "", "y"], "b": ["1", "2", "1"]}) == ["x × 1", "", "y × 1"]


# --- tables ----------------------------------------------------------------------------------------------------------


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def run(*words, capsys):
    assert main(["fairness", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def predicted(tmp_path):
    rows = [("1.jpg", "cat", "cat|dog", "north", 10), ("2.jpg", "cat|kitten", "kitten|dog", "north", 20),
            ("3.jpg", "dog", "cat|dog", "south", 30), ("4.jpg", "dog", "cat|cow", "south", 40),
            ("5.jpg", "", "cat|cow", "south", 50), ("6.jpg", "dog", "", "south", 60)]  # fmt: skip
    return write_csv(tmp_path / "predicted.csv", ["image", "label", "prediction", "region", "income"], rows)


def test_cells():
    assert split_cell(" a | b|") == ["a", "b"]
    assert split_cell("[892, 721]") == ["892", "721"]
    assert split_cell('["home", "toilet paper"]') == ["home", "toilet paper"]
    assert split_cell(None) == split_cell("[]") == []
    with pytest.raises(DataError, match="no list"):
        split_cell("[1, 2")


def test_predictions_in_the_table_need_no_model(predicted, tmp_path, capsys):
    got = run("--csv", predicted, "--groups", "region", "--min-images", 1, "--out", tmp_path / "out", capsys=capsys)
    rows = got["columns"]["region"]["groups"]
    assert (rows["north"]["accuracy"], rows["south"]["accuracy"]) == (100, 0)
    assert (got["num_images"], got["accuracy"]) == (4, 50)
    assert got["left_out"] == {"no label": 1, "no prediction": 1}
    top2 = run("--csv", predicted, "--groups", "region", "--k", 2, capsys=capsys)
    assert top2["columns"]["region"]["groups"]["south"]["accuracy"] == 50
    assert all(r["small"] for r in top2["columns"]["region"]["groups"].values())
    assert json.loads((tmp_path / "out" / "fairness.json").read_text()) == got
    again = run("--csv", tmp_path / "out" / "predictions.csv", "--groups", "region", "--min-images", 1, capsys=capsys)
    assert again["columns"] == got["columns"]
    page = (tmp_path / "out" / "fairness.html").read_text()
    assert "wealthy households" in page
    assert "data:image/png;base64," in page
    assert "2 have no" not in page


def test_buckets_and_crossing_on_the_command_line(predicted, capsys):
    words = ["--csv", predicted, "--groups", "region", "income", "--bins", "income=25", "--cross"]
    with pytest.raises(ConfigError, match="5 different numbers"):
        run(*words, capsys=capsys)
    words[words.index("income=25")] = "income=25,"
    assert list(run(*words, capsys=capsys)["columns"]["income"]["groups"]) == ["below 25", "from 25"]
    words[words.index("income=25,")] = "income=15,35"
    got = run(*words, capsys=capsys)
    assert list(got["columns"]) == ["region", "income", "region × income"]
    assert list(got["columns"]["income"]["groups"]) == ["below 15", "15 to 35", "from 35"]
    assert list(got["columns"]["region × income"]["groups"]) == [
        "north × 15 to 35", "north × below 15", "south × 15 to 35", "south × from 35",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ([], ConfigError, "no column"),
        (["--groups", "planet"], ConfigError, "planet"),
        (["--groups", "region", "--label", "klass"], DataError, "needs 'klass'"),
        (["--groups", "region", "--bins", "income=3"], ConfigError, "--groups does not"),
        (["--groups", "region", "--bins", "region=3"], DataError, "holds a text"),
        (["--groups", "region", "--bins", "region=a,b"], ConfigError, "COLUMN=3"),
        (["--groups", "region", "--cross"], ConfigError, "two or more"),
    ],
)
def test_wrong_words_are_refused(predicted, capsys, words, error, message):
    with pytest.raises(error, match=message):
        run("--csv", predicted, *words, capsys=capsys)


def test_wrong_tables_are_refused(tmp_path, capsys):
    with pytest.raises(DataError, match="does not exist"):
        run("--csv", tmp_path / "no.csv", capsys=capsys)
    with pytest.raises(DataError, match="images_v2_imagenet_test.csv"):
        run("--csv", tmp_path, capsys=capsys)
    numbers = write_csv(tmp_path / "n.csv", ["image", "label", "prediction", "income"],
                        [("x", "a", "a", i) for i in range(40)])  # fmt: skip
    with pytest.raises(ConfigError, match="40 different numbers"):
        run("--csv", numbers, "--groups", "income", capsys=capsys)
    with pytest.raises(ConfigError, match="one class per image"):
        run("--csv", numbers, "--groups", "income", "--bins", "income=3", "--k", 5, capsys=capsys)
    nothing = write_csv(tmp_path / "e.csv", ["image", "label", "g"], [("x", "", "a")])
    with pytest.raises(DataError, match="No row"):
        run("--csv", nothing, "--groups", "g", capsys=capsys)
    bare = write_csv(tmp_path / "b.csv", ["image", "label", "g"], [("x", "a", "a")])
    with pytest.raises(ConfigError, match="no column prediction"):
        run("--csv", bare, "--groups", "g", capsys=capsys)


# --- a model on Dollar Street ----------------------------------------------------------------------------------------

COLOURS = {"n00000001": (220, 30, 30), "n00000002": (30, 220, 30), "n00000003": (30, 30, 220), "n00000004": (9, 9, 9),
           "n00000005": (230, 230, 30), "n00000006": (230, 230, 230)}  # fmt: skip


def paint(path, colour, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 20, (20, 20, 3))
    Image.fromarray((np.array(colour) + noise).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    """The true layout: a table with these columns beside assets/, labels as places among the sorted classes."""
    root = tmp_path_factory.mktemp("street")
    for wnid, colour in COLOURS.items():
        for i in range(3):
            paint(root / "train" / wnid / f"{i}.png", colour, i)
    header = ["id", "country.name", "country.id", "region.id", "type", "imageRelPath", "topics", "place", "income",
              "imagenet_synonyms", "imagenet_sysnet_id"]  # fmt: skip
    names, rows = list(COLOURS), []
    for i in range(12):
        rich = i % 2
        truth = i % 6
        shown = truth if rich else (truth + 1) % 6  # in poor homes things look like something else
        path = f"assets/5d4b{i:04}/5d4b{i:04}.png"
        paint(root / "street" / path, COLOURS[names[shown]], 50 + i)
        labels = [truth] if i != 2 else [truth, (truth + 1) % 6]
        rows.append([f"5d4b{i:04}", "Kenya", "ke", "af" if i < 6 else "eu", "image", path, '["home"]', "nairobi",
                     100.5 + i if not rich else 5000 + i, '["x"]', str(labels)])  # fmt: skip
    rows.append(["5d4bffff", "Kenya", "ke", "af", "image", "assets/none.png", '["roof"]', "nairobi", 10.0, "[]", "[]"])
    write_csv(root / "street" / "images_v2_imagenet_test.csv", header, rows)
    torch.manual_seed(0)
    config = ViTConfig(img_size=28, patch_size=7, embed_dim=16, depth=1, num_heads=2)
    save_backbone(VisionTransformer(config, PreprocessSpec(resize=28, crop=28)), root / "model.safetensors")
    return root


def test_dollar_street_is_read_as_it_is(street, tmp_path, capsys):
    words = ["--model", street / "model.safetensors", "--cache", "none", "--train", street / "train",
             "--penalty", 100, "--csv", street / "street"]  # fmt: skip
    got = run(*words, "--k", 1, "--bins", "income=200,2000", "--out", tmp_path / "out", capsys=capsys)
    assert list(got["columns"]) == ["region.id", "income"]
    by_income = {g: (r["accuracy"], r["n"]) for g, r in got["columns"]["income"]["groups"].items()}
    # Every rich home is right, and of the poor ones the image with a second label.
    assert by_income == {"below 200": (pytest.approx(100 / 6), 6), "from 2000": (100, 6)}
    by_region = {g: (r["accuracy"], r["n"]) for g, r in got["columns"]["region.id"]["groups"].items()}
    assert by_region == {"Africa": (pytest.approx(400 / 6), 6), "Europe": (50, 6)}
    assert got["left_out"]["no label"] == 1
    with (tmp_path / "out" / "predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12
    default = run(*words, capsys=capsys)
    assert default["k"] == 5
    groups = list(default["columns"]["income"]["groups"])
    assert [g.split(" ")[0] for g in groups] == ["low", "medium", "high"]


def test_a_classifier_of_too_few_classes_is_refused(street, tmp_path, capsys):
    for name in ("a", "b"):
        paint(tmp_path / "train" / name / "x.png", (9, 99, 199))
    words = ["--model", street / "model.safetensors", "--cache", "none", "--train", tmp_path / "train"]
    with pytest.raises(DataError, match="up to 5 here, and the classifier has 2"):
        run(*words, "--csv", street / "street", capsys=capsys)
    table = write_csv(tmp_path / "t.csv", ["path", "label", "g"],
                      [("train/a/x.png", "a", "1"), ("train/b/x.png", "z", "1"), ("gone.png", "a", "2")])  # fmt: skip
    with pytest.raises(DataError, match=r"1 of 3 images.*z"):
        run(*words, "--csv", table, "--groups", "g", capsys=capsys)
    got = run(*words, "--csv", table, "--groups", "g", "--known-only", capsys=capsys)
    assert got["left_out"] == {"no label": 0, "no class that the classifier knows": 1, "unreadable": 1}
    assert got["num_images"] == 1


def test_table_for_people(predicted, capsys):
    assert main(["fairness", "--csv", str(predicted), "--groups", "region", "--min-images", "1"]) == 0
    out = capsys.readouterr().out
    assert "north is 100.0 points ahead of south" in out
    assert "wealthy households" in out
