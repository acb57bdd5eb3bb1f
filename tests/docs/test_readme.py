# SPDX-License-Identifier: Apache-2.0
"""The README's and the docs' commands and Python, run as they stand on small images and a small model."""

import json
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from opendino.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = "--steps 2 --batch-size 2 --num-workers 0 --model.depth 1 --heads.num-prototypes 16".split()  # noqa: SIM905


def commands():
    """Every line of a page that begins with `opendino`."""
    for page in PAGES:
        for line in re.findall(r"^(?: {4})?(opendino [^#\n]+)", page.read_text(), re.MULTILINE):
            yield pytest.param(shlex.split(line), id=f"{page.name}: {line.strip()}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the pages speak of: photos/ (also as tar and Parquet), fields/ of 5 channels, train/ and val/, labelled/,
    places/, tables, rooms/ and scenes/ with masks, flat/ and hall/ with depth, a run, a published file, two
    pictures."""
    root = tmp_path_factory.mktemp("user")
    rng = np.random.default_rng(0)
    names = [f"{part}/{c}/{i}.jpg" for part in ("train", "val", "labelled/train", "labelled/test") for c in "ab"
             for i in range(2)]  # fmt: skip
    for name in [f"photos/{i}.jpg" for i in range(4)] + names + ["a.jpg", "b.jpg"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        field = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(field).resize((64, 48), Image.Resampling.BICUBIC).save(root / name)
    save_other_sources(root)
    save_tables(root)
    save_places(root)
    save_scenes(root / "rooms")
    save_scenes(root / "scenes")
    save_depths(root / "flat", root / "hall")
    data = ["--data", str(root / "photos"), "--out", str(root / "run")]
    assert main(["pretrain", "--recipe", "vitt14_demo", *data, *SMALL]) == 0
    embedded = ["--model", str(root / "run"), "--out", str(root / "vectors")]
    assert main(["embed", str(root / "photos"), *embedded]) == 0
    shutil.copytree(root / "run", root / "demo" / "run-seed0")
    shutil.copytree(root / "labelled", root / "demo" / "data" / "labelled")
    import torch

    import opendino

    model = opendino.load("vits14", weights="random")
    torch.save(model.state_dict(), root / "dinov2_vits14_pretrain.pth")
    return root


def save_scenes(root):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(2):
            mask = rng.integers(0, 3, (4, 6), dtype=np.uint8).repeat(12, 0).repeat(12, 1)
            for name, pixels in (("images", np.stack([90 * mask] * 3, -1)), ("masks", mask)):
                (root / name / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / name / split / f"{i}.png")
    (root / "classes.txt").write_text("wall\nfloor\nlamp\n")


def save_other_sources(root):
    photos = sorted((root / "photos").iterdir())
    (root / "shards").mkdir()
    for k in range(2):
        with tarfile.open(root / "shards" / f"train-{k:06}.tar", "w") as tar:
            for path in photos[2 * k : 2 * k + 2]:
                tar.add(path, path.name)
    pq.write_table(pa.table({"image": [p.read_bytes() for p in photos]}), root / "photos.parquet")
    (root / "fields").mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        np.save(root / "fields" / f"{i}.npy", rng.integers(0, 65536, (32, 32, 5), dtype=np.uint16))


def save_tables(root):
    """Tables of images with groups, for the page about fairness, and one of images of several classes."""
    rows = [f"val/{c}/{i}.jpg,{c},{'ab'[i]},{'north' if i else 'south'},{i}" for c in "ab" for i in range(2)]
    for name, header in (
        ("homes", "image,label,guess,region,income"),
        ("predicted", "image,label,prediction,region,x"),
    ):
        (root / f"{name}.csv").write_text("\n".join([header, *rows]) + "\n")
    several = [f"val/{c}/{i}.jpg,{'red|' * i}{c}" for c in "ab" for i in range(2)]
    (root / "several.csv").write_text("\n".join(["path,labels", *several]) + "\n")


def save_places(root):
    photos = [str(p) for p in sorted((root / "photos").iterdir())]
    queries = [{"query": photos[0], "box": [2, 2, 60, 40], "easy": photos[1:2], "hard": photos[2:3]}]
    (root / "places").mkdir()
    (root / "places" / "retrieval.json").write_text(json.dumps({"gallery": photos, "queries": queries}))


def save_depths(*roots):
    """Images with depth, for the page about depth."""
    for root in roots:
        for split in ("train", "val"):
            for part in ("images", "depth"):
                (root / part / split).mkdir(parents=True)
            for i in range(2):
                ramp = np.tile(np.linspace(1000, 4000 + 500 * i, 64), (48, 1))
                Image.fromarray(ramp.astype(np.uint16)).save(root / "depth" / split / f"{i}.png")
                Image.fromarray((ramp / 25).astype(np.uint8)).save(root / "images" / split / f"{i}.png")


def make_export(args, folder):
    """Give `export verify` a file."""
    pytest.importorskip("onnx")
    pytest.importorskip("openvino")
    if args[1] == "verify" and not (folder / args[2]).exists():
        assert main(["export", "onnx", "--model", str(folder / "run"), "--out", str(folder / args[2])]) == 0


@pytest.mark.parametrize("words", commands())
def test_commands_of_the_pages_run(words, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    args = words[1:]
    if args[0] == "distill":  # the student of a run has as many prototypes as it
        args = [*args, *(SMALL if "--warm-heads" in args else SMALL[:-2])]
        args = ["2" if word == "5000" else word for word in args]
    if args[0] == "pretrain":
        small = [w for w in SMALL if "--init" not in args or w not in ("--model.depth", "1")]  # weights say their depth
        small = SMALL[:6] if "vitt14_demo_open" in args else small  # and heads that are taken their size
        args = [*args, *small]
    if args[:2] == ["eval", "depth"] and "--head" not in args:
        args = [*args, "--steps", "2"]
    if args[0] == "pretrain" and "--out" in args:
        args[args.index("--out") + 1] = str(tmp_path / "run")
    elif "--out" in args:
        place = args.index("--out") + 1
        args[place] = str(tmp_path / f"out{Path(args[place]).suffix}")
    assert args[0] in COMMANDS
    if args[0] == "export":
        make_export(args, folder)
    if args[0] == "benchmark":
        args = [*args, "--seconds", "0.1", "--rounds", "1", "--runtime", "torch"]
    if "ray" in args:
        pytest.importorskip("ray")
    if args[0] == "demo":
        pytest.skip("it takes minutes and fetches packages: run make demo")
    assert main(args) == 0


def test_the_python_of_the_readme_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert 'opendino.load("vitt14_open")' in code  # which needs no network
    names = {}
    exec(code, names)
    assert names["vectors"].shape == (2, 192)


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^make (\S+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_files_named_in_the_pages_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
    for name in re.findall(r"`((?:docs|benchmarks|tests|src)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
