# SPDX-License-Identifier: Apache-2.0
"""What the suite finds in folders, keeps, measures again, and writes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from opendino.cli import main
from opendino.cli.evaluate.suite import plain_table
from opendino.cli.evaluate.suite_cells import find_places
from opendino.evaluate.published import COLUMNS
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone
from opendino.report.suite import TableColumn, markdown_table


def picture(path, level, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 20, (30, 34, 3))
    Image.fromarray((np.array([200 * level, 100, 200 - 200 * level]) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def data(tmp_path):
    """things/ with classes and a retrieval list, inside/rooms with masks and depth, heap/ without labels."""
    root, seed = tmp_path / "data", 0
    for split, n in (("train", 12), ("val", 3)):
        for level in (0, 1):
            for i in range(n):
                picture(root / "things" / split / f"c{level}" / f"{i}.png", level, seed := seed + 1)
    names = [p.relative_to(root / "things").as_posix() for p in sorted((root / "things" / "val").rglob("*.png"))]
    queries = [{"query": names[0], "easy": names[1:3], "hard": names[3:4]}]
    (root / "things" / "retrieval.json").write_text(json.dumps({"gallery": names, "queries": queries}))
    rooms = root / "inside" / "rooms"
    for split in ("train", "val"):
        for i in range(3):
            picture(rooms / "images" / split / f"{i}.png", i % 2, seed := seed + 1)
            for part, plane in (("masks", np.uint8(i % 2)), ("depth", np.uint16(1500 + 500 * i))):
                (rooms / part / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((30, 34), plane)).save(rooms / part / split / f"{i}.png")
    (rooms / "classes.txt").write_text("floor\nwall\n")
    second = root / "second"
    picture(second / "images" / "val" / "0.png", 1, 99)
    (second / "depth" / "val").mkdir(parents=True)
    Image.fromarray(np.full((30, 34), np.uint16(2000))).save(second / "depth" / "val" / "0.png")
    picture(root / "heap" / "0.png", 0, 0)
    return root


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(img_size=28, embed_dim=16, depth=4, num_heads=2)
    path = tmp_path / "model.safetensors"
    save_backbone(VisionTransformer(config, PreprocessSpec(resize=32, crop=28)), path)
    return str(path)


def test_places_are_found_at_any_level(data):
    places, passed_over = find_places((data,))
    found = {(p.name, p.kind, p.learn, p.score) for p in places}
    assert found == {
        ("things", "classification", "train", "val"),
        ("things", "retrieval", None, "test"),
        ("inside/rooms", "segmentation", "train", "val"),
        ("inside/rooms", "depth", "train", "val"),
        ("second", "depth", None, "val"),
    }
    assert passed_over == []
    assert find_places((data / "heap",))[1] != []
    assert {p.name for p in find_places((data / "things",))[0]} == {"things"}


def test_everything_in_one_table_and_kept(data, model, tmp_path, capsys):
    out = tmp_path / "suite"
    args = ["eval", "suite", "--model", model, "--data", str(data), "--out", str(out), "--steps", "3", "--json"]
    assert main(args) == 0
    report = json.loads(capsys.readouterr().out)
    own = [(c["title"].split(",")[0], c["data"]) for c in report["columns"] if "model.safetensors" in c["scores"]]
    assert own == [
        ("classification", "things"), ("classification", "things"), ("classification", "things"),
        ("depth", "inside/rooms"), ("depth", "second"), ("segmentation", "inside/rooms"),
        ("retrieval", "things"), ("retrieval", "things"),
    ]  # fmt: skip
    published = [(c["title"], c["data"]) for c in report["columns"] if "ViT-g/14" in c["scores"]]
    assert published == [(c.title, c.data) for c in COLUMNS], "all of the card's columns, in its order"
    scores = {(c["title"], c["data"]): c["scores"].get("model.safetensors") for c in report["columns"]}
    assert scores["classification, k-NN", "things"] == 100.0, "the colours tell the classes apart"
    assert json.loads((out / "table.json").read_text()) == report
    assert (out / "table.md").read_text().count("\n") == 9
    assert (out / "index.html").stat().st_size > 10_000
    before = {p: p.stat().st_mtime_ns for p in (out / "results").iterdir()}
    assert main(args) == 0
    assert "measured before" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in (out / "results").iterdir()} == before
    picture(data / "things" / "val" / "c0" / "0.png", 1, 7)  # a file that changed
    assert main(args) == 0
    capsys.readouterr()
    changed = {p.name for p in before if p.stat().st_mtime_ns != before[p]}
    assert changed == {f"{t}--things.json" for t in ("knn", "linear", "logreg", "retrieval")}
    heads = set((out / "heads").iterdir())
    before = {p: p.stat().st_mtime_ns for p in before}
    picture(data / "inside" / "rooms" / "images" / "train" / "0.png", 1, 8)  # what the transferred head learned from
    assert main([*args, "--tasks", "transfer"]) == 0
    capsys.readouterr()
    assert {p.name for p in before if p.stat().st_mtime_ns != before[p]} == {"transfer--second.json"}
    assert len(set((out / "heads").iterdir()) - heads) == 1, "the head of the old images is not taken"


def test_a_failing_set_does_not_stop_the_others(data, model, tmp_path, capsys):
    Image.fromarray(np.full((30, 34), np.uint8(9))).save(data / "inside" / "rooms" / "masks" / "train" / "0.png")
    out = tmp_path / "suite"
    tasks = ["--tasks", "knn", "segmentation", "--steps", "2"]
    args = ["eval", "suite", "--model", model, "--data", str(data), "--out", str(out), *tasks]
    assert main(args) == 1
    printed = capsys.readouterr()
    assert "things" in printed.out
    assert "values [9]" in " ".join(printed.err.split())
    failed = json.loads((out / "table.json").read_text())["failed"]
    assert list(failed) == ["segmentation on inside/rooms"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "nowhere"], "no folder"),
        (["--tasks", "knn", "painting"], "painting"),
        (["--data", "{data}/heap"], "fits a protocol"),
    ],
)
def test_mistakes(data, model, tmp_path, capsys, change, message):
    args = ["eval", "suite", "--model", model, "--data", str(data), "--out", str(tmp_path / "out")]
    given = [word.format(data=data) for word in change]
    if given[0] == "--data":
        args[5] = given[1]
    else:
        args += given
    assert main(args) in (1, 2)
    assert message in " ".join(capsys.readouterr().err.split())


def test_table_by_hand():
    columns = [
        TableColumn("k-NN", "own", "%", False, {"ours": 81.25}),
        TableColumn("depth", "NYU", "RMSE, m", True, {"ours": 0.4171, "ViT-S/14": 0.417}),
    ]
    assert markdown_table(["ours", "ViT-S/14"], columns) == (
        "| task | k-NN | depth |\n| :-- | --: | --: |\n| data | own | NYU |\n| unit | % | RMSE, m ↓ |\n"
        "| ours | 81.2 | 0.417 |\n| ViT-S/14 | – | 0.417 |\n"
    )


def test_the_turned_table_by_hand():
    columns = [
        {"title": "k-NN", "data": "own", "unit": "%", "lower_is_better": False, "scores": {"m": 81.25}},
        {"title": "depth", "data": "NYU", "unit": "m", "lower_is_better": True, "scores": {"m": 0.5, "S": 0.417}},
    ]
    assert plain_table({"model": "runs/m", "columns": columns}) == (
        "                     m      S\nk-NN   own  %     81.2      –\ndepth  NYU  m ↓  0.500  0.417\n"
    )
