# SPDX-License-Identifier: Apache-2.0
"""Retrieval sets on small copies of their true layouts, and files that are amiss."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from opendino.errors import DataError
from opendino.evaluate.datasets.detect import detect, open_retrieval


def save_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (90, 20, 200)).save(path)


def make_revisited(root, name, **change):
    gallery, queries = (
        ["all_souls_000013", "oxford_002904", "worcester_000194"],
        ["all_souls_000013", "magdalen_000078"],
    )
    truth = [
        {"bbx": [1.5, 0.0, 6.0, 5.5], "easy": np.array([1, 2]), "hard": [], "junk": np.array([0])},
        {"bbx": np.array([0.0, 0.0, 8.0, 6.0]), "easy": [], "hard": [2], "junk": []},
    ]
    for image in {*gallery, *queries}:
        save_image(root / "jpg" / f"{image}.jpg")
    found = {"gnd": truth, "imlist": gallery, "qimlist": queries} | change
    (root / f"gnd_{name}.pkl").write_bytes(pickle.dumps(found, protocol=2))


@pytest.mark.parametrize(("name", "title"), [("roxford5k", "Revisited Oxford"), ("rparis6k", "Revisited Paris")])
def test_revisited(tmp_path, name, title):
    make_revisited(tmp_path / name, name)
    for path in (tmp_path, tmp_path / name):
        (found,) = detect(path)
        assert (found.name, found.kind, dict(found.splits)) == (title, "retrieval", {name: 2})
        data = open_retrieval(path)
        assert data.gallery[2] == str(tmp_path / name / "jpg" / "worcester_000194.jpg")
        assert data.queries[1] == str(tmp_path / name / "jpg" / "magdalen_000078.jpg")
        assert data.boxes == [(1.5, 0.0, 6.0, 5.5), (0.0, 0.0, 8.0, 6.0)]
        assert data.relevant == [{"easy": [1, 2], "hard": [], "junk": [0]}, {"easy": [], "hard": [2], "junk": []}]
        assert not data.gap


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qimlist": ["all_souls_000013"]}, "has 1 queries and ground truth for 2"),
        ({"imlist": ["all_souls_000013"]}, "speaks of image 1, but has 1 images"),
        ({"imlist": ["all_souls_000013", "gone_1", "gone_2"]}, r"2 of 5 files that .*gone_1\.jpg, gone_2\.jpg"),
        ({"gnd": [{"bbx": [1, 2, 3]}, {}]}, "a box of 3 numbers"),
    ],
)
def test_revisited_that_does_not_fit(tmp_path, change, message):
    make_revisited(tmp_path, "roxford5k", **change)
    with pytest.raises(DataError, match=message):
        open_retrieval(tmp_path)
    assert detect(tmp_path)[0].problems


def test_revisited_of_another_file_or_without_ground_truth(tmp_path):
    make_revisited(tmp_path, "roxford5k")
    (tmp_path / "gnd_roxford5k.pkl").write_bytes(pickle.dumps({"imlist": [], "gnd": []}))
    with pytest.raises(DataError, match="has no 'qimlist', only gnd, imlist"):
        open_retrieval(tmp_path)
    (tmp_path / "gnd_roxford5k.pkl").unlink()
    with pytest.raises(DataError, match="no retrieval data set.*Looked for Revisited Oxford"):
        open_retrieval(tmp_path)


def make_met(root):
    database = [
        {"path": "MET/10/0.jpg", "id": 10},
        {"path": "MET/10/1.jpg", "id": 10},
        {"path": "MET/7/0.jpg", "id": 7},
    ]
    test = [{"path": "test_met/a.jpg", "MET_id": 10}, {"path": "test_other/b.jpg"}, {"path": "test_noart/c.jpg"}]
    val = [{"path": "test_met/v.jpg", "MET_id": 7}]
    truth = root / "ground_truth"
    truth.mkdir(parents=True)
    for name, entries in (("MET_database", database), ("mini_MET_database", database[:1]), ("testset", test),
                          ("valset", val)):  # fmt: skip
        (truth / f"{name}.json").write_text(json.dumps(entries))
        for entry in entries:
            save_image(root / "images" / entry["path"])


def test_met(tmp_path):
    make_met(tmp_path)
    (found,) = detect(tmp_path)
    assert (found.name, dict(found.splits)) == ("Met", {"test": 3, "val": 1, "mini_test": 3, "mini_val": 1})
    data = open_retrieval(tmp_path)
    assert data.gap
    assert data.gallery_ids == ["10", "10", "7"]
    assert data.query_ids == ["10", None, None]
    assert data.gallery[1] == str(tmp_path / "images/MET/10/1.jpg")
    assert data.boxes == [None] * 3
    assert open_retrieval(tmp_path, "mini_val").gallery_ids == ["10"]
    (tmp_path / "images/test_other/b.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 3 files that .*testset\.json names .*test_other/b\.jpg"):
        open_retrieval(tmp_path)
    (tmp_path / "ground_truth/MET_database.json").write_text(json.dumps([{"path": "MET/10/0.jpg"}]))
    with pytest.raises(DataError, match=r"MET_database\.json has no 'id' in entry 0"):
        open_retrieval(tmp_path, "val")
    with pytest.raises(DataError, match="has no split 'train'; it has test, val"):
        open_retrieval(tmp_path, "train")


def test_amstertime(tmp_path):
    for i in range(3):
        save_image(tmp_path / "old" / f"{i:05d}.jpg")
        save_image(tmp_path / "new" / f"{i:05d}.png")
    (found,) = detect(tmp_path)
    assert (found.name, dict(found.splits)) == ("AmsterTime", {"test": 3})
    data = open_retrieval(tmp_path)
    assert data.queries[1] == str(tmp_path / "old/00001.jpg")
    assert data.gallery[1] == str(tmp_path / "new/00001.png")
    assert data.relevant[1] == {"easy": [1], "hard": [], "junk": []}
    (tmp_path / "new/00002.png").unlink()
    with pytest.raises(DataError, match="1 images without a partner, such as 00002"):
        open_retrieval(tmp_path)
