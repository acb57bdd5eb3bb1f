# SPDX-License-Identifier: Apache-2.0
"""Classification sets on small copies of their true layouts, and what is said when a file is missing or amiss."""

import csv
import json
import pickle
import struct
import sys
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR10

from opendino.errors import DataError
from opendino.evaluate.datasets.detect import detect, open_classification
from opendino.evaluate.datasets.imagenet import wnids
from opendino.evaluate.datasets.pickles import read_pickle
from opendino.images.arrays import read_image

FISH, DOG, CAT = wnids()[0], wnids()[151], wnids()[281]


def save_image(path, value=90, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 20, 200)).save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def labels(source):
    return {source.short_name(i): item.label for i, item in enumerate(source.items)}


def name_and_splits(path):
    return [(f.name, dict(f.splits)) for f in detect(path)]


def make_imagenet(root, folders=True):
    for wnid, numbers in ((FISH, (1, 2)), (DOG, (3,))):
        for i in numbers:
            save_image(root / "train" / wnid / f"{wnid}_{i}.JPEG")
            val = root / "val" / wnid if folders else root / "val"
            save_image(val / f"ILSVRC2012_val_{i:08d}.JPEG")


def test_imagenet_class_folders(tmp_path):
    make_imagenet(tmp_path)
    assert name_and_splits(tmp_path) == [("ImageNet-1k", {"train": 3, "val": 3})]
    found = open_classification(tmp_path, "validation")
    assert found.classes == [FISH, DOG]
    assert found.labels == [0, 0, 1]
    assert "2 classes; ImageNet-1k has 1000" in detect(tmp_path)[0].notes[0]


def test_a_stray_folder_and_a_stray_image_among_wordnet_folders_are_named(tmp_path):
    make_imagenet(tmp_path)
    save_image(tmp_path / "train" / "unsorted" / "x.jpg")
    with pytest.raises(DataError, match=r"'unsorted'.*WordNet ids"):
        open_classification(tmp_path, "train")
    save_image(tmp_path / "val" / "x.jpg")
    with pytest.raises(DataError, match=r"1 of 4 images lie in .*val itself, such as x\.jpg"):
        open_classification(tmp_path, "val")
    assert len(detect(tmp_path)[0].problems) == 2


def test_imagenet_as_kaggle_has_it(tmp_path):
    make_imagenet(tmp_path / "ILSVRC/Data/CLS-LOC", folders=False)
    two_boxes = f"{CAT} 1 2 3 4 {CAT} 5 6 7 8 "
    rows = [("ILSVRC2012_val_00000002", f"{DOG} 1 2 3 4 "), ("ILSVRC2012_val_00000001", two_boxes),
            ("ILSVRC2012_val_00000003", f"{FISH} 9 9 9 9 ")]  # fmt: skip
    with open(tmp_path / "LOC_val_solution.csv", "w", newline="") as file:
        csv.writer(file).writerows([("ImageId", "PredictionString"), *rows])
    assert name_and_splits(tmp_path) == [("ImageNet-1k", {"train": 3, "val": 3})]
    val = open_classification(tmp_path, "val")
    assert [val.classes[i] for i in val.labels] == [CAT, DOG, FISH]
    save_image(tmp_path / "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000004.JPEG")
    with pytest.raises(
        DataError, match=r"does not say the class of 1 of 4 val images, such as ILSVRC2012_val_00000004"
    ):
        open_classification(tmp_path, "val")


def test_imagenet_flat_val_with_the_devkit_or_synset_labels_or_nothing(tmp_path):
    make_imagenet(tmp_path, folders=False)
    with pytest.raises(DataError, match=r"is flat .*LOC_val_solution\.csv"):
        open_classification(tmp_path, "val")
    data = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    write(data / "ILSVRC2012_validation_ground_truth.txt", "490\n361\n2\n")
    dtype = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)]
    synsets = np.array([(490, CAT, "a cat"), (361, DOG, "a dog"), (2, FISH, "a fish")], dtype)
    savemat(data / "meta.mat", {"synsets": synsets.reshape(-1, 1)})
    assert [i.label for i in open_classification(tmp_path, "val").items] == [CAT, DOG, FISH]
    write(tmp_path / "imagenet_2012_validation_synset_labels.txt", f"{DOG}\n{DOG}\n{CAT}\n")
    assert [i.label for i in open_classification(tmp_path, "val").items] == [DOG, DOG, CAT]


def test_imagenet_real_keeps_all_right_answers_and_leaves_out_images_without(tmp_path):
    make_imagenet(tmp_path)
    write(tmp_path / "real.json", json.dumps([[281, 0], [], [151]]))
    real = open_classification(tmp_path, "real")
    assert labels(real) == {f"{FISH}/ILSVRC2012_val_00000001.JPEG": CAT, f"{DOG}/ILSVRC2012_val_00000003.JPEG": DOG}
    assert real.label_sets == [(CAT, FISH), (DOG,)]
    (found,) = detect(tmp_path)
    assert found.splits["real"] == 2
    assert "1 of 3 val images have no ReaL label" in found.notes[-1]


def test_imagenet_v2_numbers_are_places_among_sorted_wordnet_ids(tmp_path):
    root = tmp_path / "imagenetv2-matched-frequency-format-val"
    for index in (0, 10, 2, 151):
        save_image(root / str(index) / f"{index}.jpeg")
    (root / "281").mkdir()
    for path in (tmp_path, root):
        assert name_and_splits(path) == [("ImageNet-V2", {"test": 4})]
    found = open_classification(root, "test")
    assert labels(found) == {f"{i}/{i}.jpeg": wnids()[i] for i in (0, 10, 2, 151)}
    assert detect(root)[0].notes == ("4 of 1000 class folders hold images.",)


@pytest.mark.parametrize(("sets", "message"), [
    ([[1000]], "the class 1000; class indices are 0 to 999"), ([["x"]], "the class 'x'"), ({}, "no list of lists"),
    ([[1]], "has 1 lists, none for .*00000002.JPEG and 1 more"), ([[], [], []], "no image that .* gives a class"),
])  # fmt: skip
def test_real_that_does_not_fit(tmp_path, sets, message):
    make_imagenet(tmp_path)
    write(tmp_path / "real.json", json.dumps(sets))
    with pytest.raises(DataError, match=message):
        open_classification(tmp_path, "real")


def test_detection_reads_names_only(tmp_path):
    make_imagenet(tmp_path)
    for path in tmp_path.rglob("*.JPEG"):
        path.write_bytes(b"")
    assert name_and_splits(tmp_path) == [("ImageNet-1k", {"train": 3, "val": 3})]


def test_wordnet_ids_are_the_thousand_in_order():
    assert len(set(wnids())) == 1000
    assert list(wnids()) == sorted(wnids())
    assert (FISH, DOG, CAT) == ("n01440764", "n02085620", "n02123045")  # tench, Chihuahua, tabby


@pytest.mark.parametrize(
    ("folder", "name"),
    [("imagenet-a", "ImageNet-A"), ("imagenet-r", "ImageNet-R"), ("sketch", "ImageNet-Sketch"),
     ("ten", "WordNet class folders")],
)  # fmt: skip
def test_sets_of_wordnet_folders(tmp_path, folder, name):
    for wnid in (DOG, CAT):
        save_image(tmp_path / folder / wnid / "1.jpg")
    write(tmp_path / folder / "README.txt", "classes")
    assert name_and_splits(tmp_path / folder) == [(name, {"test": 2})]
    assert open_classification(tmp_path / folder, "test").classes == [DOG, CAT]


@pytest.mark.parametrize("group", ["", "noise/"])
def test_imagenet_c(tmp_path, group):
    for corruption in ("gaussian_noise", "shot_noise"):
        for severity in (1, 5):
            save_image(tmp_path / f"{group}{corruption}" / str(severity) / CAT / "ILSVRC2012_val_00000001.JPEG")
    (found,) = detect(tmp_path)
    assert found.name == "ImageNet-C"
    assert dict(found.splits) == {f"{group}{c}/{s}": 1 for c in ("gaussian_noise", "shot_noise") for s in (1, 5)}
    assert (
        open_classification(tmp_path, f"{group}shot_noise/5")
        .name(0)
        .endswith(f"shot_noise/5/{CAT}/ILSVRC2012_val_00000001.JPEG")
    )
    with pytest.raises(DataError, match=r"has no split 'fog/3'; it has .*gaussian_noise/1"):
        open_classification(tmp_path, "fog/3")


def make_inat(root, year, names):
    folder = "train_val2018/Plantae/{}" if year == 2018 else "{split}/{:05d}_Animalia_x"
    for split in ("train", "val"):
        images, annotations = [], []
        for i, category in enumerate((3, 11)):
            file = folder.format(category, split=split) + f"/{split}{i}.jpg"
            save_image(root / file)
            images.append({"id": 100 + i, "file_name": file, "width": 8, "height": 6})
            annotations.insert(0, {"id": i, "image_id": 100 + i, "category_id": category})
        categories = [{"id": c, "name": names.get(c, str(c)), "supercategory": "x"} for c in (3, 11)]
        name = f"{split}2018.json" if year == 2018 else f"{split}.json"
        write(root / name, json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def test_inaturalist_2018_and_2021(tmp_path):
    make_inat(tmp_path / "18", 2018, {})
    make_inat(tmp_path / "21", 2021, {3: "Lumbricus terrestris", 11: "Ursus"})
    assert name_and_splits(tmp_path / "18") == [("iNaturalist 2018", {"train": 2, "val": 2})]
    assert name_and_splits(tmp_path / "21") == [("iNaturalist 2021", {"train": 2, "val": 2})]
    train = open_classification(tmp_path / "18", "train")
    assert labels(train) == {"train_val2018/Plantae/3/train0.jpg": "03", "train_val2018/Plantae/11/train1.jpg": "11"}
    assert open_classification(tmp_path / "21", "val").classes == ["03 Lumbricus terrestris", "11 Ursus"]
    for split in ("train", "val"):
        (tmp_path / "21" / f"{split}.json").unlink()
    assert name_and_splits(tmp_path / "21") == [("iNaturalist 2021", {"train": 2, "val": 2})]
    assert open_classification(tmp_path / "21", "val").classes == ["00003_Animalia_x", "00011_Animalia_x"]
    (tmp_path / "18/train_val2018/Plantae/3/train0.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 2 files that .*train2018\.json names .*Plantae/3/train0\.jpg"):
        open_classification(tmp_path / "18", "train")


@pytest.mark.parametrize("change", ["category", "twice", "none", "cut"])
def test_inaturalist_json_that_does_not_fit(tmp_path, change):
    make_inat(tmp_path, 2018, {})
    found = json.loads((tmp_path / "train2018.json").read_text())
    first = found["annotations"][0]
    if change == "category":
        first["category_id"] = 12
    elif change == "twice":
        found["annotations"].append(first | {"category_id": 3})
    elif change == "none":
        found["annotations"].pop()
    text = json.dumps(found)
    write(tmp_path / "train2018.json", text[:-5] if change == "cut" else text)
    message = {"category": "category 12, which it does not list", "twice": "several classes", "cut": "no whole JSON",
               "none": r"no class to 1 of 2 images, such as train_val2018/Plantae/3/train0\.jpg"}[change]  # fmt: skip
    with pytest.raises(DataError, match=message):
        open_classification(tmp_path, "train")


def test_places205(tmp_path):
    base = tmp_path / "data/vision/torralba/deeplearning/images256"
    rows = {
        "train": ["a/abbey/1.jpg 0", "y/yard/2.jpg 204", "a/apartment_building/outdoor/3.jpg 6"],
        "val": ["a/abbey/9.jpg 0"],
    }
    for split, lines in rows.items():
        write(tmp_path / "trainvalsplit_places205" / f"{split}_places205.csv", "\n".join(lines) + "\n")
        for line in lines:
            save_image(base / line.split()[0])
    assert name_and_splits(tmp_path) == [("Places205", {"train": 3, "val": 1})]
    train = open_classification(tmp_path, "train")
    assert [i.label for i in train.items] == ["000 abbey", "204 yard", "006 apartment_building/outdoor"]
    write(tmp_path / "trainvalsplit_places205/val_places205.csv", "a/abbey/9.jpg\n")
    with pytest.raises(DataError, match=r"the line 'a/abbey/9\.jpg'"):
        open_classification(tmp_path, "val")


class Python2Pickler(pickle._Pickler):
    """Writes text as Python 2 wrote str, as the published CIFAR and revisited files have it."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_text(self, text):
        data = text if isinstance(text, bytes) else text.encode("latin1")
        self.write(b"T" + struct.pack("<i", len(data)) + data)

    dispatch[str] = dispatch[bytes] = save_text


def save_pickle(path, value, python=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    if python == 3:
        path.write_bytes(pickle.dumps(value, protocol=2))
        return
    with open(path, "wb") as file:
        Python2Pickler(file, protocol=2).dump(value)
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))


@pytest.mark.parametrize("python", [2, 3])
def test_cifar(tmp_path, python, monkeypatch):
    rng = np.random.default_rng(0)
    ten, hundred = tmp_path / "cifar-10-batches-py", tmp_path / "cifar-100-python"
    data = {f"data_batch_{i}": rng.integers(0, 256, (2, 3072), dtype=np.uint8) for i in range(1, 6)}
    data["test_batch"] = rng.integers(0, 256, (3, 3072), dtype=np.uint8)
    for name, pixels in data.items():
        n = len(pixels)
        save_pickle(ten / name, {"data": pixels, "labels": [i % 2 for i in range(n)], "batch_label": "x",
                                 "filenames": [f"{name}_{i}.png" for i in range(n)]}, python)  # fmt: skip
    save_pickle(ten / "batches.meta", {"label_names": ["airplane", "frog"], "num_vis": 3072}, python)
    for name in ("train", "test"):
        save_pickle(hundred / name, {"data": data["test_batch"], "fine_labels": [0, 1, 1], "coarse_labels": [0, 0, 0],
                                     "filenames": ["a.png", "b.png", "c.png"]}, python)  # fmt: skip
    save_pickle(hundred / "meta", {"fine_label_names": ["apple", "bee"], "coarse_label_names": ["x"]}, python)
    assert name_and_splits(tmp_path) == [
        ("CIFAR-10", {"train": 10, "test": 3}), ("CIFAR-100", {"train": 3, "test": 3}),
    ]  # fmt: skip
    train = open_classification(ten, "train")
    assert [i.label for i in train.items] == ["airplane", "frog"] * 5
    pixels = read_image(train.read(3))
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels, data["data_batch_2"][1].reshape(3, 32, 32))
    assert train.name(3) == f"{ten}/data_batch_2/data_batch_2_1.png"
    assert open_classification(hundred, "test").labels == [0, 1, 1]
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)  # of the true files only
    monkeypatch.setattr(sys.modules[CIFAR10.__module__], "check_integrity", lambda path, md5: True)
    for split in ("train", "test"):
        peer, ours = CIFAR10(tmp_path, split == "train"), open_classification(ten, split)
        assert peer.targets == ours.labels
        assert peer.classes == ours.classes
        assert all(np.array_equal(np.array(peer[i][0]).transpose(2, 0, 1), read_image(ours.read(i))) for i in range(3))
    assert train.names_hash() != open_classification(ten, "test").names_hash()
    save_pickle(ten / "test_batch", {"data": data["test_batch"], "labels": [0, 1]}, python)
    with pytest.raises(DataError, match=r"\(3, 3072\) and 2 labels"):
        open_classification(ten, "test")


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("inside", [Evil(), np.array([Evil()], dtype=object), np.ones, {1, 2}])
def test_pickles_run_nothing(tmp_path, capsys, inside):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"data": inside}, protocol=2))
    with pytest.raises(DataError, match="is refused: it asks for"):
        read_pickle(path)
    assert capsys.readouterr().out == ""


def test_pickles_of_arrays_and_plain_values_are_read(tmp_path):
    value = {"a": np.arange(6, dtype=np.int64).reshape(2, 3), "b": [1.5, "x", None], "c": np.float32(2.5),
             "d": np.array([[1, 2], "y"], dtype=object)}  # fmt: skip
    for protocol in range(2, 6):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(value, protocol=protocol))
        found = read_pickle(tmp_path / "x.pkl")
        assert np.array_equal(found["a"], value["a"])
        assert (found["b"], found["c"], found["d"].tolist()) == (value["b"], 2.5, [[1, 2], "y"])
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(DataError, match="holds a list, no dictionary"):
        read_pickle(tmp_path / "x.pkl")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value)[:40])
    with pytest.raises(DataError, match="is refused"):
        read_pickle(tmp_path / "x.pkl")
