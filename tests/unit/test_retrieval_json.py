# SPDX-License-Identifier: Apache-2.0
"""The JSON form of retrieval sets: both kinds, and what is refused with which words."""

import json

import numpy as np
import pytest
from PIL import Image

from opendino.errors import DataError
from opendino.evaluate.datasets.retrieval_json import open_retrieval

GALLERY = ["g/a.png", "g/b.png", "g/c.png"]


@pytest.fixture
def write(tmp_path):
    for name in [*GALLERY, "q/x.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / name)

    def put(queries, gallery=GALLERY, **more):
        (tmp_path / "retrieval.json").write_text(json.dumps({"gallery": gallery, "queries": queries, **more}))
        return tmp_path / "retrieval.json"

    return put


def test_lists_and_boxes_are_read(write, tmp_path):
    query = {
        "query": "q/x.png",
        "box": [1, 0, 3.5, 2],
        "easy": ["g/c.png"],
        "hard": ["g/a.png"],
        "instance": "no matter",
    }
    file = write([query, {"query": "./g/b.png", "easy": ["g/../g/a.png"], "junk": []}], views=[{"anything": 1}])
    got = open_retrieval(file)
    assert got.gallery == [str(tmp_path / p) for p in GALLERY]
    assert got.queries == [str(tmp_path / "q/x.png"), str(tmp_path / "g/b.png")]
    assert got.boxes == [(1.0, 0.0, 3.5, 2.0), None]
    assert got.relevant[0] == {"easy": [2], "hard": [0], "junk": []}
    assert not got.gap
    assert got.query_ids == ()
    assert open_retrieval(tmp_path) == got, "a folder stands for its retrieval.json"


def test_a_query_of_the_gallery_is_its_own_junk(write):
    got = open_retrieval(write([{"query": "g/b.png", "easy": ["g/a.png"]}, {"query": "g/a.png", "junk": ["g/a.png"]}]))
    assert [q["junk"] for q in got.relevant] == [[1], [0]]


def test_instances_are_read(write):
    gallery = [{"image": p, "instance": name} for p, name in zip(GALLERY, ["hall", "hall", 7])]
    queries = [{"query": "q/x.png", "instance": 7}, {"query": "q/x.png", "instance": "unseen"}, {"query": "q/x.png"}]
    got = open_retrieval(write([*queries, {"query": "g/a.png", "instance": "hall"}], gallery))
    assert got.gap
    assert got.gallery_ids == ["hall", "hall", "7"]
    assert got.query_ids == ["7", None, None, "hall"]
    assert [q["easy"] for q in got.relevant] == [[2], [], [], [1]]
    assert got.relevant[3]["junk"] == [0]


@pytest.mark.parametrize(
    ("queries", "gallery", "words"),
    [
        ([{"query": "q/x.png", "easy": ["g/z.png"]}], GALLERY, "lists g/z.png as easy, which is not in the gallery"),
        ([{"query": "g/a.png", "hard": ["g/a.png"]}], GALLERY, "lists itself as hard"),
        ([{"query": "q/none.png"}], GALLERY, "1 of the images .* do not exist"),
        ([{"query": "q/x.png"}], [*GALLERY, "g/gone.png", "g/gone2.png"], "2 of the images"),
        ([{"query": "q/x.png"}], [*GALLERY, "g/./a.png"], "twice in the gallery"),
        ([{"query": "q/x.png", "box": [1, 2, 1, 4]}], GALLERY, "empty"),
        ([{"query": "q/x.png", "box": [1, 2, 3]}], GALLERY, "left, upper, right, lower"),
        ([{"query": "q/x.png", "easy": "g/a.png"}], GALLERY, "a list of gallery paths"),
        (["q/x.png"], GALLERY, "at least"),
        ([], GALLERY, "at least one entry"),
        ([{"query": "q/x.png"}], [], "at least one entry"),
        ([{"query": "q/x.png"}], [{"instance": "a"}], "gallery entry"),
        ([{"query": "q/x.png"}], [{"image": "g/a.png", "instance": "a"}, "g/b.png"], "for 1 of 2 gallery images"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(write, queries, gallery, words):
    with pytest.raises(DataError, match=words):
        open_retrieval(write(queries, gallery))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="no retrieval set"):
        open_retrieval(tmp_path / "nothing.json")
    with pytest.raises(DataError, match="no retrieval set"):
        open_retrieval(tmp_path)
    for text in ("{", "[1]"):
        (tmp_path / "retrieval.json").write_text(text)
        with pytest.raises(DataError, match=r"cannot be read as JSON|no .gallery. and"):
            open_retrieval(tmp_path)
