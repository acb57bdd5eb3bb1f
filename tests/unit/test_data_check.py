# SPDX-License-Identifier: Apache-2.0
"""`opendino data check`: what it says of sound sets and of sets that should be mended first."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from opendino.cli import main


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def save_image(path, height=6, width=8):
    save(path, np.full((height, width, 3), 90, np.uint8))


def run(capsys, path, *flags):
    """Give the exit code and the one set that was found."""
    code = main(["data", "check", str(path), "--json", *flags])
    found = json.loads(capsys.readouterr().out)["found"]
    assert len(found) == 1
    return code, found[0]


@pytest.fixture
def folders(tmp_path):
    for name, count in (("train/cat", 3), ("train/dog", 2), ("val/cat", 1)):
        for i in range(count):
            save_image(tmp_path / name / f"{i}.jpg", height=6 + i, width=8 + i)
    return tmp_path


def test_sound_class_folders(folders, capsys):
    code, found = run(capsys, folders)
    assert (code, found["name"], found["problems"]) == (0, "class folders", [])
    assert found["splits"]["train"] == {
        "images": 5, "classes": 2, "smallest": ["dog", 2], "largest": ["cat", 3], "read": 5, "height": [6, 8],
        "width": [8, 10], "unusable": 0,
    }  # fmt: skip
    assert found["notes"] == ["val: 1 classes of train have no images: dog."]


def test_text_for_people(folders, capsys):
    assert main(["data", "check", str(folders)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"class folders (classification) in {folders}\n")
    assert "train       5 images; 2 classes; 2 (dog) to 3 (cat) in a class; 5 read: 8–10 × 6–8 pixels" in out
    assert out.endswith("Nothing stands against using it.\n")


def test_a_class_of_val_only_an_empty_class_and_a_broken_file(folders, capsys):
    save_image(folders / "val/bird/0.jpg")
    (folders / "train/fish").mkdir()
    (folders / "train/cat/2.jpg").write_bytes((folders / "train/cat/2.jpg").read_bytes()[:40])
    code, found = run(capsys, folders)
    assert code == 1
    text = "\n".join(found["problems"])
    assert "val: 1 classes are not in train and cannot be predicted: bird." in text
    assert "train: 1 class folders hold no image: fish. Fill or remove them." in text
    assert "train: 1 of 5 images that were read cannot be used:" in text
    assert str(folders / "train/cat/2.jpg") in text
    assert (found["splits"]["train"]["unusable"], found["splits"]["train"]["empty_classes"]) == (1, 1)
    assert main(["data", "check", str(folders)]) == 1
    assert "mend: val: 1 classes" in capsys.readouterr().out


def test_tables_and_lists_of_images(folders, capsys):
    (folders / "some.csv").write_text("path,label\ntrain/cat/0.jpg,cat\ntrain/dog/0.jpg,dog\ntrain/dog/1.jpg,\n")
    code, found = run(capsys, folders / "some.csv")
    assert (code, found["splits"]["all"]["read"]) == (1, 3)
    assert found["problems"] == ["1 of 3 images have no class."]
    (folders / "some.txt").write_text("train/cat/0.jpg\n")
    code, found = run(capsys, folders / "some.txt")
    assert (code, found["notes"], found["problems"]) == (0, ["no image has a class."], [])


def test_uneven_classes_are_noted(folders, capsys):
    for i in range(30):
        save_image(folders / "train/cat" / f"more{i}.jpg")
    code, found = run(capsys, folders)
    assert code == 0
    assert "train: classes are uneven, 2 to 33 images" in found["notes"][0]


def test_only_deep_reads_everything(folders, capsys):
    for i in range(200):
        save_image(folders / "train/cat" / f"more{i:03}.jpg")
    (folders / "train/cat/more001.jpg").write_bytes(b"no image")  # not one of the 64
    code, found = run(capsys, folders)
    assert (code, found["splits"]["train"]["read"]) == (0, 64)
    code, found = run(capsys, folders, "--deep")
    assert (code, found["splits"]["train"]["read"], found["splits"]["train"]["unusable"]) == (1, 205, 1)


def make_masks(root, *masks):
    for i, mask in enumerate(masks):
        save_image(root / "images/train" / f"{i}.jpg")
        save(root / "masks/train" / f"{i}.png", np.asarray(mask, np.uint8))
    (root / "classes.txt").write_text("floor\nwall\nroof\n")


def test_masks_with_unknown_ids_of_another_size_or_empty(tmp_path, capsys):
    half = np.zeros((6, 8)) + np.array([[0] * 4 + [255] * 4])
    make_masks(tmp_path, half, np.full((6, 8), 7), np.full((6, 8), 255), np.zeros((8, 6)))
    code, found = run(capsys, tmp_path, "--deep")
    assert code == 1
    facts = found["splits"]["train"]
    assert (facts["unusable"], facts["classes_seen"], facts["ignored_percent"]) == (2, 1, 75.0)
    text = "\n".join(found["problems"])
    assert "holds the values [7], but there are 3 classes" in text
    assert "3.jpg has 8 × 6 pixels, what belongs to it 6 × 8." in text
    assert found["notes"] == [
        "train: no pixel belongs to wall, roof.", "train: 1 of 2 masks have no pixel that counts.",
    ]  # fmt: skip


def test_depth_of_zeros_and_of_another_scale(tmp_path, capsys):
    for i, value in enumerate((2000, 0, 60000)):
        save_image(tmp_path / "images/train" / f"{i}.jpg")
        depth = np.full((6, 8), value, np.uint16)
        depth[0] = 0
        save(tmp_path / "depth/train" / f"{i}.png", depth)
    code, found = run(capsys, tmp_path)
    assert code == 1
    assert (found["splits"]["train"]["unusable"], found["splits"]["train"]["depth_m"]) == (2, [2.0, 2.0])
    text = "\n".join(found["problems"])
    assert "1.jpg has a depth map of zeros only." in text
    assert "2.jpg has depths from 0 to 60 m, none between 0.001 and 10 m. The scale may be wrong." in text


def test_retrieval_with_an_empty_query_and_a_box_outside(tmp_path, capsys):
    names = ["a", "b", "c"]
    for name in names:
        save_image(tmp_path / "jpg" / f"{name}.jpg")
    truth = [{"bbx": [0, 0, 8, 6], "easy": [1], "hard": [], "junk": []},
             {"bbx": [9, 0, 20, 6], "easy": [], "hard": [], "junk": [2]}]  # fmt: skip
    found = {"imlist": names, "qimlist": names[:2], "gnd": truth}
    (tmp_path / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(found, protocol=2))
    code, found = run(capsys, tmp_path)
    facts = found["splits"]["roxford5k"]
    assert (code, facts["images"], facts["gallery"], facts["unusable"]) == (1, 2, 3, 1)
    assert "b.jpg: its box (9.0, 0.0, 20.0, 6.0) lies outside of its 8 × 6 pixels" in "\n".join(found["problems"])
    assert "1 queries have nothing to be found and do not count" in found["notes"][0]


def test_instances_of_met(tmp_path, capsys):
    entries = {
        "MET_database": [{"path": "MET/1/0.jpg", "id": 1}],
        "testset": [{"path": "q/0.jpg", "MET_id": 1}, {"path": "q/1.jpg"}, {"path": "q/2.jpg", "MET_id": 5}],
    }
    for name, rows in entries.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        for row in rows:
            save_image(tmp_path / "images" / row["path"])
    code, found = run(capsys, tmp_path)
    facts = found["splits"]["test"]
    assert (code, facts["images"], facts["instances"], facts["distractors"]) == (0, 3, 1, 1)
    assert found["notes"] == ["test: 1 instances of queries are not in the gallery, so they cannot be found."]


def test_a_split_that_is_incomplete_is_said_once_and_the_others_are_checked(tmp_path, capsys):
    make_masks(tmp_path, np.zeros((6, 8)))
    save_image(tmp_path / "images/val/0.jpg")
    (tmp_path / "masks/val").mkdir()
    code, found = run(capsys, tmp_path)
    assert (code, list(found["splits"])) == (1, ["train"])
    assert "have no file of the same name" in found["problems"][0]
    (tmp_path / "classes.txt").unlink()
    save(tmp_path / "masks/val/0.png", np.zeros((6, 8), np.uint8))
    code, found = run(capsys, tmp_path)
    assert (len(found["problems"]), found["splits"]) == (1, {})


def test_lists_of_another_make_are_no_traceback(tmp_path, capsys):
    images = {"images": [{"id": 1}], "annotations": [{"image_id": 1, "category_id": 1}], "categories": [{"id": 1}]}
    (tmp_path / "train_val2018").mkdir()
    (tmp_path / "train2018.json").write_text(json.dumps(images))
    code, found = run(capsys, tmp_path)
    assert code == 1
    assert "looks like iNaturalist 2018, but the files that describe its split train" in found["problems"][0]
    assert "KeyError: 'file_name'" in found["problems"][0]


def test_wrong_usage(tmp_path, capsys):
    assert main(["data", "check", str(tmp_path / "missing")]) == 1
    assert "is no folder" in capsys.readouterr().err
    assert main(["data", "mend", str(tmp_path)]) == 2
    assert main(["data"]) == 2
    assert main(["data", "--help"]) == 0
    assert "opendino data check PATH" in capsys.readouterr().out
