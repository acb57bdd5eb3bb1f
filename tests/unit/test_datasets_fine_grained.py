# SPDX-License-Identifier: Apache-2.0
"""The fine-grained sets on small copies of their true layouts, class folders, and what the nearest miss is."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from opendino.cli import main
from opendino.errors import DataError
from opendino.evaluate.datasets.detect import detect, open_classification, open_depth, open_labelled


def save_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (90, 20, 200)).save(path)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def labels(path, split):
    source = open_classification(path, split)
    return {source.short_name(i): item.label for i, item in enumerate(source.items)}


def make_food(root):
    for name in ("apple_pie/1005649", "apple_pie/7", "waffles/9"):
        save_image(root / "images" / f"{name}.jpg")
    write(root / "meta/train.txt", "apple_pie/1005649", "waffles/9")
    write(root / "meta/test.txt", "apple_pie/7")
    write(root / "meta/classes.txt", "apple_pie", "waffles")
    return "train", {"apple_pie/1005649.jpg": "apple_pie", "waffles/9.jpg": "waffles"}


def make_sun(root):
    names = ("a/abbey/sun_1.jpg", "a/apartment_building/outdoor/sun_2.jpg", "z/zoo/sun_3.jpg")
    for name in names:
        save_image(root / name)
    write(root / "ClassName.txt", "/a/abbey", "/a/apartment_building/outdoor", "/z/zoo")
    for number in ("01", "02"):
        write(
            root / f"Partitions/Training_{number}.txt", "/a/abbey/sun_1.jpg", "/a/apartment_building/outdoor/sun_2.jpg"
        )
        write(root / f"Partitions/Testing_{number}.txt", "/z/zoo/sun_3.jpg")
    return "train", {names[0]: "abbey", names[1]: "apartment_building/outdoor"}


def cars_rows(rows, with_class=True):
    names = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", *(["class"] if with_class else []), "fname"]
    array = np.zeros((1, len(rows)), dtype=[(n, object) for n in names])
    for i, (fname, label) in enumerate(rows):
        array[0, i] = (1, 1, 5, 5, *([label] if with_class else []), fname)
    return array


def make_cars(root, test_labels=True):
    for name in ("cars_train/00001.jpg", "cars_train/00002.jpg", "cars_test/00001.jpg"):
        save_image(root / name)
    (root / "devkit").mkdir()
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object).reshape(1, -1)
    savemat(root / "devkit/cars_meta.mat", {"class_names": names})
    savemat(root / "devkit/cars_train_annos.mat", {"annotations": cars_rows([("00001.jpg", 2), ("00002.jpg", 1)])})
    savemat(root / "devkit/cars_test_annos.mat", {"annotations": cars_rows([("00001.jpg", 1)], False)})
    if test_labels:
        savemat(root / "cars_test_annos_withlabels.mat", {"annotations": cars_rows([("00001.jpg", 2)])})
    return "train", {"00001.jpg": "Acura RL Sedan 2012", "00002.jpg": "AM General Hummer SUV 2000"}


def make_aircraft(root):
    lines = {"train": ["0034309 727-200"], "val": ["0034958 Cessna 172"], "test": ["1000001 727-200"]}
    for split, rows in (lines | {"trainval": lines["train"] + lines["val"]}).items():
        write(root / f"data/images_variant_{split}.txt", *rows)
        write(root / f"data/images_family_{split}.txt", *rows)
        for row in rows:
            save_image(root / "data/images" / f"{row.split()[0]}.jpg")
    write(root / "data/variants.txt", "727-200", "Cessna 172")
    return "trainval", {"0034309.jpg": "727-200", "0034958.jpg": "Cessna 172"}


def make_dtd(root):
    for name in ("banded/banded_1.jpg", "zigzagged/zigzagged_2.jpg"):
        save_image(root / "images" / name)
        for number in (1, 2, 10):
            for split in ("train", "val", "test"):
                swapped = number == 2
                write(root / f"labels/{split}{number}.txt", name if swapped else "banded/banded_1.jpg")
    return "train2", {"zigzagged/zigzagged_2.jpg": "zigzagged"}


def make_pets(root):
    for name in ("Abyssinian_100", "american_bulldog_1", "Abyssinian_2"):
        save_image(root / "images" / f"{name}.jpg")
    write(root / "annotations/list.txt", "#Image CLASS-ID SPECIES BREED ID", "Abyssinian_100 1 1 1")
    write(root / "annotations/trainval.txt", "Abyssinian_100 1 1 1", "american_bulldog_1 2 2 1")
    write(root / "annotations/test.txt", "Abyssinian_2 1 1 1")
    return "trainval", {"Abyssinian_100.jpg": "Abyssinian", "american_bulldog_1.jpg": "american_bulldog"}


def make_flowers(root):
    for i in range(1, 5):
        save_image(root / "jpg" / f"image_{i:05d}.jpg")
    savemat(root / "imagelabels.mat", {"labels": np.array([[77, 77, 1, 102]], np.uint8)})
    savemat(root / "setid.mat", {"trnid": [[4, 1]], "valid": [[2]], "tstid": [[3]]})
    return "train", {"image_00004.jpg": "102", "image_00001.jpg": "077"}


def make_cub(root):
    names = ["001.Black_footed_Albatross/a_1.jpg", "002.Laysan_Albatross/b_1.jpg", "002.Laysan_Albatross/b_2.jpg"]
    for name in names:
        save_image(root / "images" / name)
    write(root / "images.txt", *(f"{i} {n}" for i, n in enumerate(names, 1)))
    write(root / "image_class_labels.txt", "1 1", "2 2", "3 2")
    write(root / "train_test_split.txt", "1 0", "2 1", "3 0")
    write(root / "classes.txt", "1 001.Black_footed_Albatross", "2 002.Laysan_Albatross")
    return "test", {names[0]: "001.Black_footed_Albatross", names[2]: "002.Laysan_Albatross"}


SETS = {
    "Food-101": (make_food, "food-101", {"train": 2, "test": 1}, "images/waffles/9.jpg"),
    "SUN397": (make_sun, "SUN397", {"train": 2, "test": 1, "train_02": 2, "test_02": 1, "all": 3}, "a/abbey/sun_1.jpg"),
    "Stanford Cars": (make_cars, "stanford_cars", {"train": 2, "test": 1}, "cars_train/00002.jpg"),
    "FGVC-Aircraft": (make_aircraft, "fgvc-aircraft-2013b", {"train": 1, "val": 1, "trainval": 2, "test": 1},
                      "data/images/0034958.jpg"),
    "DTD": (make_dtd, "dtd", {f"{s}{n}": 1 for n in ("", 2, 10) for s in ("train", "val", "test")},
            "images/zigzagged/zigzagged_2.jpg"),
    "Oxford-IIIT Pets": (make_pets, "oxford-iiit-pet", {"trainval": 2, "test": 1}, "images/Abyssinian_100.jpg"),
    "Flowers-102": (make_flowers, "flowers-102", {"train": 2, "val": 1, "test": 1}, "jpg/image_00004.jpg"),
    "CUB-200-2011": (make_cub, "CUB_200_2011", {"train": 1, "test": 2}, "images/002.Laysan_Albatross/b_2.jpg"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_fine_grained_set(tmp_path, name):
    make, folder, splits, needed = SETS[name]
    (tmp_path / folder).mkdir()
    split, expected = make(tmp_path / folder)
    for path in (tmp_path, tmp_path / folder):  # the folder that the archive was unpacked in, and its own
        (found,) = detect(path)
        assert (found.name, dict(found.splits), found.problems) == (name, splits, ())
        assert labels(path, split) == expected
    save_image(tmp_path / folder / "extra" / "1.jpg")  # what the lists do not name does not count
    assert labels(tmp_path, split) == expected
    (tmp_path / folder / needed).unlink()
    with pytest.raises(DataError, match=rf"1 of \d files that .* names? are not below .*{needed.split('/')[-1]}"):
        open_classification(tmp_path, split)
    assert any(needed.split("/")[-1] in p for p in detect(tmp_path)[0].problems)


PEERS = {
    "Food-101": lambda root: datasets.Food101(root, "train"),
    "SUN397": lambda root: datasets.SUN397(root),
    "Stanford Cars": lambda root: datasets.StanfordCars(root, "train"),
    "FGVC-Aircraft": lambda root: datasets.FGVCAircraft(root, "trainval"),
    "DTD": lambda root: datasets.DTD(root, "val", 2),
    "Oxford-IIIT Pets": lambda root: datasets.OxfordIIITPet(root, "trainval"),
    "Flowers-102": lambda root: datasets.Flowers102(root, "train"),
}


@pytest.mark.parametrize("name", PEERS)
def test_torchvision_reads_the_same_images_and_classes(tmp_path, name, monkeypatch):
    monkeypatch.setattr(datasets.flowers102, "check_integrity", lambda path, md5: True)  # of the true files only
    make, folder, *_ = SETS[name]
    root = tmp_path / "dtd/dtd" if name == "DTD" else tmp_path / folder
    root.mkdir(parents=True)
    split, _ = make(root)
    if name == "Food-101":
        lists = {"apple_pie": ["apple_pie/1005649"], "waffles": ["waffles/9"]}
        (root / "meta/train.json").write_text(json.dumps(lists))
    peer = PEERS[name](tmp_path)
    source = open_classification(tmp_path, "all" if name == "SUN397" else "val2" if name == "DTD" else split)
    if name == "Stanford Cars":
        pairs = peer._samples
    else:
        files = peer._images if name == "Oxford-IIIT Pets" else peer._image_files
        pairs = list(zip(files, peer._labels))
    assert sorted(str(p) for p, _ in pairs) == sorted(source.name(i) for i in range(len(source)))
    ours = {source.name(i): label for i, label in enumerate(source.labels)}
    assert (
        len({(label, ours[str(p)]) for p, label in pairs}) == len({label for _, label in pairs}) == len(source.classes)
    )


def test_sets_side_by_side_are_all_found(tmp_path):
    for name in ("Food-101", "DTD"):
        make, folder, *_ = SETS[name]
        make(tmp_path / folder)
    assert [f.name for f in detect(tmp_path)] == ["Food-101", "DTD"]


def test_cars_without_labels_of_the_test_images(tmp_path):
    make_cars(tmp_path, test_labels=False)
    (found,) = detect(tmp_path)
    assert dict(found.splits) == {"train": 2}
    assert "test images have no classes" in found.notes[0]
    savemat(tmp_path / "devkit/cars_meta.mat", {"class_names": np.array([["one"]], dtype=object)})
    with pytest.raises(DataError, match=r"has the number 2, but .*cars_meta\.mat ends at 1"):
        open_classification(tmp_path, "train")


def test_sun_without_partitions_and_with_an_unknown_class(tmp_path):
    make_sun(tmp_path)
    for path in (tmp_path / "Partitions").iterdir():
        path.rename(tmp_path / path.name)
    (tmp_path / "Partitions").rmdir()
    assert dict(detect(tmp_path)[0].splits)["train"] == 2
    write(tmp_path / "Training_01.txt", "/b/barn/sun_1.jpg")
    with pytest.raises(DataError, match=r"classes b/barn \(1 of them\) that .*ClassName\.txt does not name"):
        open_classification(tmp_path, "train")
    for path in tmp_path.glob("*_0?.txt"):
        path.unlink()
    (found,) = detect(tmp_path)
    assert dict(found.splits) == {"all": 3}
    assert "Partitions.zip" in found.notes[0]


def test_caltech_draws_thirty_a_class_by_name(tmp_path):
    for name, count in (("accordion", 33), ("BACKGROUND_Google", 31)):
        for i in range(count):
            save_image(tmp_path / "101_ObjectCategories" / name / f"image_{i:04d}.jpg")
    (found,) = detect(tmp_path)
    assert (found.name, dict(found.splits)) == ("Caltech-101", {"train": 60, "test": 4, "all": 64})
    train, test, every = (labels(tmp_path, s) for s in ("train", "test", "all"))
    assert train | test == every
    assert sorted(test.values()) == ["BACKGROUND_Google"] + ["accordion"] * 3
    assert list(train)[:30] != list(every)[:30]  # drawn, not the first


def test_cub_tables_of_two_downloads(tmp_path):
    make_cub(tmp_path)
    write(tmp_path / "train_test_split.txt", "1 0", "2 1")
    with pytest.raises(DataError, match=r"do not speak of the same images, such as number 3 \(1 of them\)"):
        open_classification(tmp_path, "train")
    write(tmp_path / "train_test_split.txt", "1 0", "2")
    with pytest.raises(DataError, match=r"train_test_split\.txt line 2 is '2'; 2 parts are needed"):
        open_classification(tmp_path, "train")


def test_class_folders_and_tables_of_ones_own(tmp_path):
    for name in ("train/cat/1.jpg", "train/dog/2.jpg", "validation/dog/3.jpg"):
        save_image(tmp_path / "folders" / name)
    (found,) = detect(tmp_path / "folders")
    assert (found.name, found.kind, dict(found.splits)) == (
        "class folders",
        "classification",
        {"train": 2, "validation": 1},
    )
    assert found.classes == 2
    assert labels(tmp_path / "folders", "val") == {"dog/3.jpg": "dog"}
    assert dict(detect(tmp_path / "folders/train")[0].splits) == {"all": 2}
    write(tmp_path / "tables/train.csv", "path,label", "../folders/train/cat/1.jpg,cat")
    (found,) = detect(tmp_path / "tables")
    assert (found.name, dict(found.splits)) == ("tables", {"train": 1})
    assert labels(tmp_path / "tables/train.csv", "train") == labels(tmp_path / "tables", "train")


def test_places_as_a_command_line_names_them(tmp_path):
    make_food(tmp_path / "food-101")
    for name in ("own/train/cat/1.jpg", "own/val/cat/3.jpg", "n/n02085620/1.jpg", "flat/2.jpg", "odd:train/cat/1.jpg"):
        save_image(tmp_path / name)
    assert open_labelled(f"{tmp_path}/food-101:test").classes == ["apple_pie"]
    assert open_labelled(tmp_path / "own:validation").name(0) == str(tmp_path / "own/val/cat/3.jpg")
    assert open_labelled(tmp_path / "own/train").classes == ["cat"]  # a folder as before
    assert open_labelled(tmp_path / "odd:train").classes == ["cat"]
    assert open_labelled(tmp_path / "n").classes == ["n02085620"]  # a set of one split needs no name
    assert open_labelled(tmp_path / "flat").classes == []
    write(tmp_path / "own/train/test.csv", "path,label", "cat/1.jpg,x")  # a table in a folder of classes
    assert open_labelled(tmp_path / "own/train").classes == ["cat"]
    for name, splits in (("food-101", "train, test"), ("own", "train, val")):  # its folders are no classes
        with pytest.raises(DataError, match=rf"with the splits {splits}\. Name one of them, such as .*{name}:train\."):
            open_labelled(tmp_path / name)
    with pytest.raises(DataError, match="has no split 'dev'; it has train, test"):
        open_labelled(tmp_path / "food-101:dev")
    with pytest.raises(DataError, match="does not exist"):
        open_labelled(tmp_path / "missing:train")


def test_knn_takes_a_split_of_a_named_set(tmp_path, capsys):
    make_sun(tmp_path)
    write(tmp_path / "Partitions/Testing_01.txt", "/a/abbey/sun_1.jpg")
    args = ["--model", "vits14", "--weights", "random", "--size", "28", "--k", "1", "--json"]
    assert main(["eval", "knn", "--train", f"{tmp_path}:train", "--val", f"{tmp_path}:test", *args]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["num_train"], figures["num_val"], figures["num_classes"]) == (2, 1, 2)


def test_nothing_known_names_the_closest_miss(tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        detect(tmp_path / "missing")
    save_image(tmp_path / "images/training/1.jpg")
    with pytest.raises(
        DataError, match=r"For ADE20k there is images/training but no annotations/training or annotations/validation"
    ):
        detect(tmp_path)
    with pytest.raises(DataError, match=r"is no depth data set.*For images with depth there is images/\* but no depth"):
        open_depth(tmp_path, "train")


def test_images_without_class_folders_are_called_so(tmp_path):
    save_image(tmp_path / "1.JPEG".lower())
    with pytest.raises(DataError, match=r"is no known data set\. It holds images, but not in one folder a class\."):
        detect(tmp_path)


def test_a_folder_too_deep_is_told_the_one_above(tmp_path):
    make_cub(tmp_path)
    with pytest.raises(DataError, match=r"Its folder .* is CUB-200-2011: give that one"):
        detect(tmp_path / "images" / "001.Black_footed_Albatross")
