# SPDX-License-Identifier: Apache-2.0
"""A trained classifier on other test sets: the figures, the layouts as they lie on disk, the command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from opendino.cli.evaluate import main
from opendino.errors import ConfigError, DataError, WeightsError
from opendino.evaluate.datasets.robustness_sets import corruption_folders, open_indexed, open_named, open_real
from opendino.evaluate.logistic import fit_logistic
from opendino.evaluate.robustness import ALEXNET_ERROR, CORRUPTIONS, best_ranks, corruption_error, topk
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone

# --- figures ---------------------------------------------------------------------------------------------------------


def test_ranks_by_hand():
    scores = np.array([[0.1, 0.5, 0.3, 0.1], [0.4, 0.4, 0.1, 0.1], [0.0, 0.1, 0.2, 0.7]])
    assert best_ranks(scores, [(2,), (1,), (0,)]).tolist() == [1, 1, 3]  # equal scores: the lower index first
    assert best_ranks(scores, [(2, 1), (1, 0), (0, 3)]).tolist() == [0, 0, 0]
    assert best_ranks(scores, [(2,), (2,), (0,)], allowed=(0, 2)).tolist() == [0, 1, 1]


def literal_ranks(scores, labels, allowed):
    out = []
    for row, right in zip(scores.tolist(), labels):
        falling = sorted(allowed, key=lambda c: (-row[c], c))
        out.append(min(falling.index(c) for c in right))
    return out


@pytest.mark.parametrize("allowed", [None, (1, 3, 4, 9, 11)])
def test_ranks_agree_with_sorting(allowed):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (200, 12)).astype(float)  # many equal scores
    choice = list(range(12)) if allowed is None else list(allowed)
    labels = [tuple(rng.choice(choice, rng.integers(1, 4), replace=False)) for _ in range(200)]
    got = best_ranks(scores, labels, allowed)
    assert got.tolist() == literal_ranks(scores, labels, choice)
    for k in (1, 5):
        assert topk(got, k) == pytest.approx(100 * sum(r < k for r in got) / 200, abs=1e-9)


def test_ranks_agree_with_torchmetrics_and_scikit_learn():
    from sklearn.metrics import top_k_accuracy_score
    from torchmetrics.functional import accuracy

    rng = np.random.default_rng(1)
    scores, y = rng.normal(size=(300, 9)), rng.integers(0, 9, 300)
    ranks = best_ranks(scores, [(int(c),) for c in y])
    for k in (1, 5):
        other = accuracy(torch.tensor(scores), torch.tensor(y), "multiclass", num_classes=9, top_k=k, average="micro")
        assert topk(ranks, k) == pytest.approx(100 * other.item(), abs=1e-4)  # torchmetrics counts in fp32
        assert topk(ranks, k) == pytest.approx(100 * top_k_accuracy_score(y, scores, k=k), abs=1e-9)


@pytest.mark.parametrize("labels", [[()], [(4,)], [(-1,)], [(0,)]])
def test_labels_that_cannot_be_predicted_are_refused(labels):
    with pytest.raises(DataError, match="may be predicted"):
        best_ranks(np.zeros((1, 4)), labels, allowed=(1, 2))


def test_scores_of_nan_and_other_lengths_are_refused():
    with pytest.raises(DataError, match="NaN"):
        best_ranks(np.full((1, 2), np.nan), [(0,)])
    with pytest.raises(DataError, match="2 rows"):
        best_ranks(np.zeros((2, 2)), [(0,)])


def test_corruption_error_by_hand():
    errors = {name: dict.fromkeys(range(1, 6), ALEXNET_ERROR[name] / 2) for name in CORRUPTIONS}
    errors["fog"] = {1: 10.0, 2: 20.0, 3: 30.0, 4: 40.0, 5: 50.0}
    got = corruption_error(errors)
    assert got["corruptions"]["snow"]["ce"] == pytest.approx(50, abs=1e-9)
    assert got["corruptions"]["fog"]["ce"] == pytest.approx(100 * 150 / (5 * 81.9324), abs=1e-9)
    assert got["mce"] == pytest.approx((14 * 50 + 100 * 30 / 81.9324) / 15, abs=1e-9)
    halves = sum(v for k, v in ALEXNET_ERROR.items() if k != "fog") / 2
    assert got["mean_error"] == pytest.approx((halves + 30) / 15, abs=1e-9)
    assert got["missing"] == []


def test_alexnet_itself_has_mce_100():
    got = corruption_error({c: dict.fromkeys(range(1, 6), e) for c, e in ALEXNET_ERROR.items()})
    assert got["mce"] == pytest.approx(100, abs=1e-9)
    assert len(CORRUPTIONS) == 15


def test_corruption_error_of_a_part_and_of_other_corruptions():
    got = corruption_error({"fog": {1: 10.0, 3: 20.0}, "spatter": {1: 90.0}})
    assert got["mce"] is None
    assert len(got["missing"]) == 75 - 2
    assert got["corruptions"]["fog"] == {"error": 15.0, "ce": None, "severities": {"1": 10.0, "3": 20.0}}
    assert got["mean_error"] == 15.0  # spatter is none of the 15
    assert corruption_error({"rain": {1: 90.0}, "dusk": {1: 10.0, 2: 30.0}})["mean_error"] == 55.0
    with pytest.raises(DataError):
        corruption_error({})


# --- layouts ---------------------------------------------------------------------------------------------------------

WNIDS = [f"n{i:08}" for i in (1440764, 1443537, 1484850, 1491361, 1494475, 1496331, 1498041, 1514668, 1514859, 1518878,
                              1530575, 1531178)]  # fmt: skip


def colour(level):
    return np.array([level % 2 * 200, level // 2 % 2 * 200, level // 4 * 100])


def picture(path, level=0, seed=0, other=None):
    """A flat image whose colour says its class, so that a classifier has something to find."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 12, (20, 20, 3))
    flat = colour(level) if other is None else 0.4 * colour(level) + 0.6 * colour(other)
    Image.fromarray((flat + noise).astype(np.uint8)).save(path, quality=95)


def test_imagenet_v2_is_read_by_number_not_by_text(tmp_path):
    for i in range(12):
        picture(tmp_path / str(i) / f"{i}.jpeg")
    found = open_indexed(tmp_path, WNIDS)
    assert found.source.classes[:3] == ["0", "1", "10"]
    for i, labels in enumerate(found.labels):
        folder = int(found.source.name(i).split("/")[-2])
        assert labels == (folder,)
    shuffled = list(reversed(WNIDS))  # a head's own order does not matter
    for i, (c,) in enumerate(open_indexed(tmp_path, shuffled).labels):
        assert shuffled[c] == WNIDS[int(found.source.name(i).split("/")[-2])]


def test_imagenet_v2_of_more_classes_than_the_classifier_knows_is_refused(tmp_path):
    for i in (0, 12):
        picture(tmp_path / str(i) / "x.jpeg")
    with pytest.raises(DataError, match="folders up to 12, but the classifier has 12"):
        open_indexed(tmp_path, WNIDS)


@pytest.mark.parametrize("below", ["", "n01440764/"])
def test_real_has_several_labels_and_leaves_out_images_without(tmp_path, below):
    for i in (1, 2, 3, 4):
        picture(tmp_path / "val" / below / f"ILSVRC2012_val_{i:08}.JPEG")
    (tmp_path / "real.json").write_text("[[3], [], [0, 11], [5]]")
    found = open_real(tmp_path / "val", tmp_path / "real.json", WNIDS)
    assert [found.source.name(i)[-7:-5] for i in range(3)] == ["01", "03", "04"]
    assert found.labels == [(3,), (0, 11), (5,)]
    assert found.left_out == {"no label": 1}


def test_real_follows_the_number_in_the_name_not_the_folder(tmp_path):
    picture(tmp_path / "val" / "n1" / "ILSVRC2012_val_00000002.JPEG")
    picture(tmp_path / "val" / "n2" / "ILSVRC2012_val_00000001.JPEG")
    (tmp_path / "real.json").write_text("[[7], [4]]")
    assert open_real(tmp_path / "val", tmp_path / "real.json", WNIDS).labels == [(4,), (7,)]
    for old in list((tmp_path / "val").rglob("*.JPEG")):
        old.rename(old.with_name("ab"[int(old.stem[-1]) - 1] + ".JPEG"))  # b lies in the first folder
    assert open_real(tmp_path / "val", tmp_path / "real.json", WNIDS).labels == [(4,), (7,)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[1]]", "lists 1 images"),
        ("[[1], [12]]", "labels up to 12"),
        ("[[], []]", "no label for any"),
        ("{}", "no list"),
        ('[["n1"], [2]]', "no list"),
        ("[", "cannot be read"),
    ],
)
def test_a_wrong_list_of_labels_is_refused(tmp_path, text, words):
    for i in (1, 2):
        picture(tmp_path / "val" / f"ILSVRC2012_val_{i:08}.JPEG")
    (tmp_path / "real.json").write_text(text)
    with pytest.raises(DataError, match=words):
        open_real(tmp_path / "val", tmp_path / "real.json", WNIDS)


def test_folders_by_class_name_and_unknown_ones(tmp_path):
    for wnid in (WNIDS[2], WNIDS[7], "n99999999"):
        picture(tmp_path / wnid / "x.JPEG")
    with pytest.raises(DataError, match="n99999999.*--known-only"):
        open_named(tmp_path, WNIDS)
    found = open_named(tmp_path, WNIDS, restricted=True, known_only=True)
    assert (found.labels, found.allowed, found.left_out) == ([(2,), (7,)], (2, 7), {"1 unknown classes": 1})
    assert len(found.source) == 2
    assert len(list(found.source.images())) == 2
    assert found.source.names_hash() != open_named(tmp_path, [*WNIDS, "n99999999"]).source.names_hash()
    with pytest.raises(DataError, match="3 of the 3 classes"):
        open_named(tmp_path, ["a", "b"], known_only=True)


def test_corruptions_are_found_as_the_archives_unpack(tmp_path):
    picture(tmp_path / "noise" / "gaussian_noise" / "1" / WNIDS[0] / "x.JPEG")
    picture(tmp_path / "fog" / "5" / WNIDS[0] / "x.JPEG")
    assert {c: list(levels) for c, levels in corruption_folders(tmp_path).items()} == {
        "gaussian_noise": [1], "fog": [5],
    }  # fmt: skip
    with pytest.raises(DataError, match="no corrupted images"):
        corruption_folders(tmp_path / "fog" / "5")


# --- command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """All the sets, tiny: twelve classes, each a colour."""
    root = tmp_path_factory.mktemp("imagenet")
    for c, wnid in enumerate(WNIDS):
        for i in range(3):
            picture(root / "train" / wnid / f"{wnid}_{i}.JPEG", c, i)
        picture(root / "val" / wnid / f"ILSVRC2012_val_{c + 1:08}.JPEG", c, 7)
        picture(root / "v2" / str(c) / "x.jpeg", c, 8)
        picture(root / "sketch" / wnid / "sketch_0.JPEG", c, 9)
        for corruption in CORRUPTIONS:
            for level in range(1, 6):
                # From severity 3 on the images are those of another class.
                shown = c if level < 3 else (c + 6) % 12
                picture(root / "c" / corruption / str(level) / wnid / "x.JPEG", shown, level)
    for c in (1, 5, 9):
        # Looks most like class c + 2, which is not in A.
        picture(root / "a" / WNIDS[c] / "0.1_fox _ squirrel_0.9.jpg", c, 3, other=c + 2)
        picture(root / "r" / WNIDS[c] / "art_0.jpg", c, 4)
    # Image 1 is right by its second label, image 2 has none, image 3 is wrong.
    lists = [[11, 0], [], [9]] + [[c] for c in range(3, 12)]
    (root / "real.json").write_text(json.dumps(lists))
    torch.manual_seed(0)
    config = ViTConfig(img_size=28, patch_size=7, embed_dim=16, depth=1, num_heads=2)
    save_backbone(VisionTransformer(config, PreprocessSpec(resize=28, crop=28)), root / "model.safetensors")
    return root


def run(root, *words, capsys):
    assert main(["robustness", "--model", str(root / "model.safetensors"), "--cache", str(root / "cache"), *words,
                 "--json"]) == 0  # fmt: skip
    return json.loads(capsys.readouterr().out)


def restricted_by_hand(root, among):
    """Percent right on A among its own classes and among all, from scikit-learn's classifier and a loop."""
    from sklearn.linear_model import LogisticRegression

    import opendino

    embed = opendino.Embedder(root / "model.safetensors")
    files = {part: sorted((root / part).rglob("*.*")) for part in ("train", "a")}
    vectors = {part: embed([str(f) for f in found]).cls for part, found in files.items()}
    fitted = LogisticRegression(C=100, max_iter=10_000, tol=1e-8)
    fitted.fit(vectors["train"], [f.parent.name for f in files["train"]])
    right = [0, 0]
    for file, row in zip(files["a"], fitted.predict_proba(vectors["a"])):
        by_name = dict(zip(fitted.classes_, row))
        right[0] += max((WNIDS[c] for c in among), key=by_name.get) == file.parent.name
        right[1] += max(WNIDS, key=by_name.get) == file.parent.name
    return tuple(100 * r / len(files["a"]) for r in right)


def test_every_set_in_one_command(imagenet, capsys):
    sets = {"imagenet-val": "val", "v2": "v2", "a": "a", "r": "r", "sketch": "sketch", "c": "c", "real": "real.json"}
    words = [word for name, path in sets.items() for word in (f"--{name}", str(imagenet / path))]
    got = run(imagenet, "--train", str(imagenet / "train"), "--penalty", "100", *words, capsys=capsys)
    assert list(got["sets"]) == ["val", "ReaL", "V2", "A", "R", "Sketch"]
    for name in ("val", "V2", "R", "Sketch"):
        assert got["sets"][name]["top1"] == 100, name
    real = got["sets"]["ReaL"]
    assert real["top1"] == pytest.approx(100 * 10 / 11)
    assert (real["num_images"], real["left_out"]) == (11, {"no label": 1})
    adversarial = got["sets"]["A"]
    assert (adversarial["top1"], adversarial["top1_all_classes"]) == pytest.approx(
        restricted_by_hand(imagenet, {1, 5, 9})
    )
    assert adversarial["top1"] > adversarial["top1_all_classes"] + 30
    assert (adversarial["classes_to_choose"], adversarial["top5"]) == (3, None)
    corrupted = got["corruptions"]
    assert corrupted["corruptions"]["fog"]["severities"] == {"1": 0, "2": 0, "3": 100, "4": 100, "5": 100}
    assert corrupted["mean_error"] == pytest.approx(60)
    assert corrupted["mce"] == pytest.approx(np.mean([100 * 60 / e for e in ALEXNET_ERROR.values()]), abs=1e-9)
    assert (corrupted["num_images"], corrupted["missing"]) == (15 * 5 * 12, [])
    assert "compare with nothing published" in corrupted["note"]


def test_a_head_file_on_own_sets(imagenet, tmp_path, capsys):
    from opendino.cli.evaluate.common import pooled_embedder
    from opendino.cli.evaluate.robustness import RobustnessArgs
    from opendino.embed.cache import pooled_features
    from opendino.heads.storage import describe_backbone, save_head
    from opendino.images.sources import open_source

    embedder = pooled_embedder(RobustnessArgs(model=str(imagenet / "model.safetensors")))
    source = open_source(imagenet / "train")
    cls, mean, _ = pooled_features(embedder, source, None)
    both = np.concatenate([cls[:, -1], mean], axis=1)
    fitted = fit_logistic(both, source.label_ids(), 100)
    weight, bias = fitted.weight.numpy(), fitted.bias.numpy()
    order = list(reversed(range(12)))  # the head's classes are in an order of their own
    tensors = {"weight": torch.tensor(weight[order]), "bias": torch.tensor(bias[order])}
    settings = {"classes": [WNIDS[c] for c in order], "state": {"kind": [1, True]}}
    save_head(tmp_path / "head.safetensors", "Linear", tensors, settings, describe_backbone(embedder.model, "tiny"))
    (tmp_path / "unknown").symlink_to(imagenet / "r")
    picture(tmp_path / "night" / WNIDS[4] / "a.png", 4, 1)
    picture(tmp_path / "night" / "n99999999" / "a.png", 4, 1)
    (tmp_path / "night" / WNIDS[4] / "broken.png").write_bytes(b"no image")
    words = ["--head", str(tmp_path / "head.safetensors"), "--test", f"night={tmp_path / 'night'}"]
    got = run(imagenet, *words, "--known-only", "--v2", str(imagenet / "v2"), capsys=capsys)
    assert got["sets"]["night"] == {
        "top1": 100, "top5": 100, "top1_all_classes": 100, "num_images": 1, "classes_to_choose": 12,
        "left_out": {"1 unknown classes": 1}, "unreadable": 1,
    }  # fmt: skip
    assert got["sets"]["V2"]["top1"] == 100
    with pytest.raises(DataError, match="n99999999"):
        run(imagenet, *words, capsys=capsys)
    with pytest.raises(DataError, match="--max-errors"):
        run(imagenet, *words, "--known-only", "--max-errors", "0", capsys=capsys)

    other = VisionTransformer(embedder.model.config, embedder.model.preprocess)
    save_head(tmp_path / "head.safetensors", "Linear", tensors, settings, describe_backbone(other, "other"))
    with pytest.raises(WeightsError, match="fitted on features of other"):
        run(imagenet, *words, capsys=capsys)


def test_names_for_a_head_without_classes(imagenet, tmp_path, capsys):
    from opendino.heads.storage import save_head

    save_head(tmp_path / "h", "Linear", {"weight": torch.zeros(12, 16), "bias": torch.arange(12.0)}, {}, None)
    words = ["--head", str(tmp_path / "h"), "--sketch", str(imagenet / "sketch")]
    with pytest.raises(DataError, match="not among the classifier's 12"):
        run(imagenet, *words, capsys=capsys)
    (tmp_path / "names.txt").write_text("\n".join(WNIDS))
    got = run(imagenet, *words, "--classes", str(tmp_path / "names.txt"), capsys=capsys)
    assert got["sets"]["Sketch"]["top1"] == pytest.approx(100 / 12)  # it always says the last class
    (tmp_path / "names.txt").write_text("one\none")
    with pytest.raises(DataError, match="2 lines, 1 of them different"):
        run(imagenet, *words, "--classes", str(tmp_path / "names.txt"), capsys=capsys)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--v2", "v2"], ConfigError, "One of --head and --train"),
        (["--train", "train"], ConfigError, "No test set"),
        (["--train", "train", "--real", "real.json"], ConfigError, "needs the images"),
        (["--train", "train", "--test", "night"], ConfigError, "NAME=DIR"),
        (["--train", "train", "--test", "n=a", "--test", "n=r"], ConfigError, "same name"),
        (["--train", "train", "--imagenet-val", "v2/3"], DataError, "no class folders"),
        (["--train", "train", "--sketch", "nowhere"], DataError, "does not exist"),
    ],
)
def test_wrong_words_are_refused(imagenet, monkeypatch, capsys, words, error, message):
    monkeypatch.chdir(imagenet)
    with pytest.raises(error, match=message):
        run(imagenet, *words, capsys=capsys)


def test_table_for_people(imagenet, capsys):
    words = ["--train", str(imagenet / "train"), "--a", str(imagenet / "a"), "--c", str(imagenet / "c")]
    assert main(["robustness", "--model", str(imagenet / "model.safetensors"), "--cache", str(imagenet / "cache"),
                 *words]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "logistic regression on 36 images, 12 classes" in out
    assert out.count("\n") > 18
