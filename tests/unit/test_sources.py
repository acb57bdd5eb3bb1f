# SPDX-License-Identifier: Apache-2.0
"""Tar shards, Parquet and URLs hold the same images as a folder, and say what is wrong with them."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opendino.errors import DataError
from opendino.images import index_cache, locations
from opendino.images.fingerprint import explain_change, fingerprint
from opendino.images.sources import open_source
from opendino.images.tar_index import TarIndex
from opendino.images.tar_walk import walk_tar


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_tar(path, files, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def images():
    return {f"{i:04}": png(i) for i in range(10)}


@pytest.fixture
def shards(tmp_path, images):
    folder = tmp_path / "shards"
    folder.mkdir()
    keys = list(images)
    for k in range(3):
        files = []
        for key in keys[4 * k : 4 * k + 4]:
            files += [(f"{key}.png", images[key]), (f"{key}.cls", str(int(key) % 2).encode()), (f"{key}.txt", b"a")]
        write_tar(folder / f"s-{k:03}.tar", files)
    return folder


def members(path):
    with tarfile.open(path) as tar:
        return tar.getmembers()


def contents(source):
    return [source.read(i) for i in range(len(source))]


# --- tar -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["", "s-{000..002}.tar", "s-*.tar", "{s-000,s-001,s-002}.tar", "list.txt"])
def test_shards_hold_the_images_in_order(how, shards, images):
    (shards / "list.txt").write_text("s-000.tar\ns-001.tar\ns-002.tar\n")
    source = open_source(f"{shards}/{how}".rstrip("/"))
    assert contents(source) == list(images.values())
    assert source.classes == ["0", "1"]
    assert source.labels == [i % 2 for i in range(10)]
    assert source.name(5) == f"{shards}/s-001.tar/0005.png"
    assert source.items[-1].label == "1"
    assert source.groups.tolist() == [4, 4, 2]


def test_one_shard_and_a_source_that_went_to_another_process(shards, images):
    source = open_source(shards / "s-001.tar")
    assert contents(source) == list(images.values())[4:8]
    there = pickle.loads(pickle.dumps(source))
    assert contents(there) == contents(source)
    assert len(pickle.dumps(source)) < 2000


names = st.text(st.characters(blacklist_characters="/.\0", blacklist_categories=["Cs"]), min_size=1, max_size=150)


@given(st.lists(st.tuples(names, names, st.binary(max_size=1100)), min_size=1, max_size=5),
       st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_walk_finds_what_tarfile_finds(files, tar_format):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as tar:
        folder = tarfile.TarInfo("folder/")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for a, b, data in files:
            info = tarfile.TarInfo(f"{a}/{b}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data, found = out.getvalue(), []
    assert walk_tar(io.BytesIO(data), len(data), "x", found.append) is None
    assert [(m.name, data[m.offset : m.offset + m.size]) for m in found] == [(f"{a}/{b}.png", d) for a, b, d in files]


def test_ustar_prefixes_and_long_names_are_read(tmp_path):
    long = "folder/" * 20 + "0001.png"
    for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_tar(tmp_path / f"{tar_format}.tar", [(long, png(0))], format=tar_format)
        assert open_source(path).name(0) == f"{path}/{long}"


def test_keys_other_members_and_labels(tmp_path, caplog):
    files = [
        ("./a/0001.json", json.dumps({"label": "cat"}).encode()), ("./a/0001.jpg", b"1"), ("./a/0001.seg.png", b"no"),
        ("./a/._0002.jpg", b"no"), ("./a/0002.JPG", b"2"), ("./a/0002.png", b"second"), ("./b/0002.npy", b"3"),
        ("./b/0002.json", b"{no json"), ("./b/0003.txt", b"no"), ("./b/0004.webp", b"4"), ("./b/0004.cls", b"dog\n"),
    ]  # fmt: skip
    source = open_source(write_tar(tmp_path / "a.tar", files))
    assert contents(source) == [b"1", b"2", b"3", b"4"]
    assert [i.label for i in source.items] == ["cat", None, None, "dog"]
    assert "1 images under the key of another one" in caplog.text
    assert "a dot in their names" in caplog.text


def test_a_cut_tar_gives_its_whole_members_and_says_so(shards, images, caplog):
    path = shards / "s-001.tar"
    whole = path.read_bytes()
    member = members(path)[6]  # the third image
    for cut, count, words in ((member.offset_data + 10, 2, "ends in the middle of 0006.png"),
                              (member.offset + 100, 2, f"ends in the middle of a header at byte {member.offset}"),
                              (member.offset, 2, "ends without the closing blocks")):  # fmt: skip
        path.write_bytes(whole[:cut])
        for _ in range(2):  # the second time the index is there
            caplog.clear()
            source = open_source(path)
            assert contents(source) == list(images.values())[4 : 4 + count]
            assert f"{path} {words}; the 2 images before are used." in caplog.text


def test_a_damaged_header_ends_a_shard_and_is_told(shards, images, caplog):
    path = shards / "s-000.tar"
    data = bytearray(path.read_bytes())
    data[members(path)[3].offset + 20] ^= 1
    path.write_bytes(data)
    assert contents(open_source(path)) == list(images.values())[:1]
    assert "has no valid header at byte" in caplog.text


def test_random_damage_to_a_tar_is_told_or_harmless(shards, images):
    data = np.frombuffer((shards / "s-000.tar").read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = data.copy()
        damaged[rng.integers(0, len(data), 40)] = rng.integers(0, 256, 40)
        found = []
        try:
            walk_tar(io.BytesIO(damaged.tobytes()), len(data), "x", found.append)
        except DataError:
            continue
        assert all(m.offset + m.size <= len(data) for m in found)


def test_what_is_no_usable_shard(tmp_path, shards):
    (tmp_path / "page.tar").write_bytes(b"<html>not found</html>".ljust(2000))
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(shards)
    os.rename(tmp_path / "a.tar.gz", tmp_path / "b.tar")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(shards)
    write_tar(tmp_path / "texts.tar", [("a.txt", b"a")])
    for name, words in (("page.tar", "no tar file"), ("a.tar.gz", "compressed with gzip.*gunzip"), ("b.tar", "gunzip"),
                        ("texts.tar", "holds no images"), ("x-{00..02}.tar", "x-00.tar cannot be opened"),
                        ("y-*.tar", "matches no file")):  # fmt: skip
        with pytest.raises(DataError, match=words):
            open_source(tmp_path / name)


# --- the index -----------------------------------------------------------------------------------------------------


@pytest.fixture
def walked(monkeypatch):
    """Paths of the shards that are walked rather than taken from an index."""
    seen = []
    real = locations.open_binary

    def spy(place, *rest):
        seen.append(os.path.basename(place))
        return real(place, *rest)

    monkeypatch.setattr(locations, "open_binary", spy)
    return seen


def test_the_index_is_kept_and_only_what_changed_is_walked_again(shards, images, walked):
    open_source(shards)
    assert sorted(walked) == ["s-000.tar", "s-001.tar", "s-002.tar"]
    walked.clear()
    assert contents(open_source(shards)) == list(images.values())
    assert walked == []
    write_tar(shards / "s-001.tar", [("new.png", png(99))])
    source = open_source(shards)
    assert walked == ["s-001.tar"]
    assert contents(source) == [*list(images.values())[:4], png(99), *list(images.values())[8:]]
    assert source.labels == [0, 1, 0, 1, -1, 0, 1]
    walked.clear()
    write_tar(shards / "s-003.tar", [("more.png", png(98))])
    assert len(open_source(shards)) == 8
    assert walked == ["s-003.tar"]
    walked.clear()
    assert contents(open_source(shards / "s-000.tar")) == list(images.values())[:4]
    assert walked == []


def test_a_moved_set_keeps_its_index_and_a_damaged_index_is_made_anew(shards, images, walked, tmp_path):
    open_source(shards)
    moved = tmp_path / "moved"
    os.rename(shards, moved)
    walked.clear()
    assert contents(open_source(moved)) == list(images.values())
    assert walked == []
    for path in moved.glob(".opendino-index/*/offsets.npy"):
        path.write_bytes(b"")
    assert contents(open_source(moved)) == list(images.values())
    assert len(walked) == 3


def test_a_listing_that_was_broken_off_goes_on(shards, images, walked):
    whole = (shards / "s-002.tar").read_bytes()
    (shards / "s-002.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    with pytest.raises(DataError, match="s-002.tar is compressed"):
        open_source(shards)
    (shards / "s-002.tar").write_bytes(whole)
    walked.clear()
    assert contents(open_source(shards)) == list(images.values())
    assert walked == ["s-002.tar"]
    assert len(list(shards.glob(".opendino-index/*/about.json"))) == 1


def test_a_long_listing_is_kept_on_the_way(shards, images, monkeypatch):
    saved = []
    real = TarIndex.save
    monkeypatch.setattr(TarIndex, "save", lambda self, *args: saved.append(len(self)) or real(self, *args))
    monkeypatch.setattr(index_cache, "KEEP_EVERY_S", 0.0)
    assert contents(open_source(shards)) == list(images.values())
    assert saved == [4, 8, 10]
    assert len(list(shards.glob(".opendino-index/*/about.json"))) == 1


def test_processes_that_open_shards_at_once_list_them_once(shards, images):
    code = (
        "import sys\nfrom opendino.images import shards\nreal = shards.index_shard\n"
        "shards.index_shard = lambda *a: print('walked', flush=True) or real(*a)\n"
        "from opendino.images.sources import open_source\nprint(len(open_source(sys.argv[1])))"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(shards)], stdout=subprocess.PIPE, text=True) for _ in "ab"
    ]
    out = "".join(run.communicate(timeout=60)[0] for run in runs)
    assert out.count("walked") == 3
    assert out.count("10") == 2


def test_an_index_that_cannot_be_read_is_done_without(shards, images, walked, monkeypatch, caplog):
    open_source(shards)

    def refuse(*_):
        raise PermissionError("another user's")

    monkeypatch.setattr(TarIndex, "load", refuse)
    monkeypatch.setattr("shutil.rmtree", lambda *a, **k: None)
    assert contents(open_source(shards)) == list(images.values())
    assert len(walked) == 6
    assert "cannot be read (another user's)" in caplog.text
    monkeypatch.undo()
    folder = next(shards.glob(".opendino-index/*/about.json")).parent
    umask = os.umask(0)
    os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


def test_an_index_that_cannot_lie_beside_the_shards_goes_to_the_cache(shards, images, walked, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (shards / index_cache.FOLDER).write_text("in the way")
    for _ in range(2):
        assert contents(open_source(shards)) == list(images.values())
    assert len(walked) == 3
    assert list((tmp_path / "cache").rglob("offsets.npy"))


def test_a_shard_that_shrinks_or_goes_is_an_error_of_its_images(shards):
    source = open_source(shards)
    os.truncate(shards / "s-002.tar", 600)
    (shards / "s-001.tar").unlink()
    assert source.read(0) == png(0)
    with pytest.raises(OSError):
        source.read(4)
    with pytest.raises(DataError, match=r"s-002.tar/0008.png is cut off"):
        source.read(8)


# --- Parquet -------------------------------------------------------------------------------------------------------


def write_parquet(path, images, kind="struct", rows=3, **columns):
    data = list(images.values())
    if kind == "struct":
        column = [{"bytes": d, "path": f"{k}.png"} for k, d in images.items()]
        name = "image"
    else:
        column, name = data, kind
    pq.write_table(pa.table({name: column, **columns}), path, row_group_size=rows)
    return path


@pytest.mark.parametrize("kind", ["struct", "image", "bytes", "jpg"])
def test_parquet_holds_the_images_in_order(kind, tmp_path, images):
    halves = [dict(list(images.items())[:6]), dict(list(images.items())[6:])]
    for i, half in enumerate(halves):
        write_parquet(tmp_path / f"{i}.parquet", half, kind, label=[int(k) % 2 for k in half])
    for place in (tmp_path, tmp_path / "*.parquet", tmp_path / "{0,1}.parquet"):
        source = open_source(place)
        assert contents(source) == list(images.values())
        assert source.groups.tolist() == [3, 3, 3, 1]
        assert (source.classes, source.labels) == (["0", "1"], [i % 2 for i in range(10)])
    assert source.name(7) == f"{tmp_path}/1.parquet#1"
    assert contents(pickle.loads(pickle.dumps(source))) == list(images.values())


def test_class_names_of_hugging_face_are_used(tmp_path, images):
    path = write_parquet(tmp_path / "a.parquet", images, label=[int(k) % 2 for k in images])
    table = pq.read_table(path)
    about = {"info": {"features": {"label": {"names": ["dog", "cat"], "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), path)
    source = open_source(path)
    assert [i.label for i in source.items[:3]] == ["dog", "cat", "dog"]
    odd = [[1, 2]] * 5 + [None] * 5
    assert open_source(write_parquet(tmp_path / "b.parquet", images, label=odd)).classes == []
    text = ["x", None] * 5
    source = open_source(write_parquet(tmp_path / "c.parquet", images, label=text))
    assert (source.classes, source.labels) == (["x"], [0, -1] * 5)


def test_decoded_row_groups_are_kept_up_to_a_size(tmp_path, images, monkeypatch):
    from opendino.images import parquet

    path = write_parquet(tmp_path / "a.parquet", images, "image", rows=2)
    group_bytes = 2 * len(png(0))
    monkeypatch.setattr(parquet, "KEPT_BYTES", 3 * group_bytes)
    source = open_source(path)
    assert 2 <= source.max_window <= 6
    reads = []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, g, **k: reads.append(g) or real(self, g, **k))
    for i in [0, 3, 1, 2, 0, 8, 9, 5, 0]:
        assert source.read(i) == png(i)
    assert reads[:4] == [0, 1, 4, 2]
    assert len(reads) <= 5


def test_what_is_no_usable_parquet(tmp_path, images):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "columns.parquet")
    pq.write_table(pa.table({"image": ["a.jpg"]}), tmp_path / "paths.parquet")
    write_parquet(tmp_path / "empty.parquet", {}, "image")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "empty.parquet")
    (tmp_path / "cut.parquet").write_bytes(write_parquet(tmp_path / "a.parquet", images).read_bytes()[:300])
    for name, words in (("columns.parquet", r"columns \['x'\]; it needs one called `image`"),
                        ("paths.parquet", "bytes of"),
                        ("empty.parquet", "no rows"), ("cut.parquet", "cut off"),
                        ("{a,missing}.parquet", "missing.parquet cannot be opened")):  # fmt: skip
        with pytest.raises(DataError, match=words):
            open_source(tmp_path / name)


def test_rows_without_bytes_and_damaged_row_groups_are_errors_of_their_images(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"bytes": rng.bytes(2000), "path": "a"},
        {"bytes": None, "path": "b.png"},
        {"bytes": rng.bytes(2000), "path": "c"},
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": rows}), path, row_group_size=2)
    source = open_source(path)
    assert source.read(0) == rows[0]["bytes"]
    with pytest.raises(DataError, match="a.parquet#1 holds no image bytes"):
        source.read(1)
    size = path.stat().st_size
    os.truncate(path, 100)
    source = pickle.loads(pickle.dumps(source))
    from opendino.images import parquet

    parquet._readers.clear()
    assert size > 100
    with pytest.raises(DataError, match="cut off|cannot be read"):
        source.read(2)


# --- URLs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(shards, images, tmp_path, monkeypatch):
    """The shards, a Parquet file and a folder in fsspec's memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        fs.pipe(f"/set/tar/{path.name}", path.read_bytes())
    fs.pipe("/set/a.parquet", write_parquet(tmp_path / "a.parquet", images).read_bytes())
    for key, data in images.items():
        fs.pipe(f"/set/photos/{int(key) % 2}/{key}.png", data)
    fs.pipe("/set/photos/.hidden/x.png", b"no")
    fs.pipe("/set/list.txt", "\n".join(f"photos/{int(k) % 2}/{k}.png" for k in images).encode())
    yield fs
    fs.rm("/set", recursive=True)


@pytest.mark.parametrize("place", ["tar", "tar/s-{000..002}.tar", "tar/s-*.tar", "a.parquet", "list.txt"])
def test_urls_hold_the_same_images(place, memory, images):
    source = open_source(f"memory://set/{place}")
    assert source.remote
    assert contents(source) == list(images.values())
    assert source.name(0).startswith("memory://")
    assert contents(open_source(f"memory://set/{place}")) == list(images.values())


def test_a_local_list_may_name_urls(memory, images, tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"memory://set/photos/{int(k) % 2}/{k}.png\n" for k in images))
    source = open_source(tmp_path / "list.txt")
    assert source.remote
    assert contents(source) == list(images.values())


def test_a_folder_behind_a_url_has_its_classes(memory, images):
    source = open_source("memory://set/photos")
    assert source.classes == ["0", "1"]
    assert sorted(contents(source)) == sorted(images.values())


def test_a_remote_shard_that_changes_is_walked_again(memory, walked):
    open_source("memory://set/tar/s-000.tar")
    walked.clear()
    open_source("memory://set/tar/s-000.tar")
    assert walked == []
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("z.png")
        info.size = len(png(7))
        tar.addfile(info, io.BytesIO(png(7)))
    memory.pipe("/set/tar/s-000.tar", out.getvalue())
    assert contents(open_source("memory://set/tar/s-000.tar")) == [png(7)]


def test_file_urls_are_paths(shards, images):
    assert contents(open_source(f"file://{shards}/s-*.tar")) == list(images.values())


def test_what_is_no_url():
    for url, words in (("nosuch://a/b", "nosuch"), ("memory://nowhere/a.tar", "does not exist"),
                       ("memory://nowhere/{a,b}.tar", "cannot be opened")):  # fmt: skip
        with pytest.raises(DataError, match=words):
            open_source(url)


class FlakyFileSystem(MemoryFileSystem):
    """Storage that fails some times before it answers."""

    protocol = "flaky"
    failures = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def cat_file(self, path, start=None, end=None, **options):
        if FlakyFileSystem.failures:
            FlakyFileSystem.failures -= 1
            raise RuntimeError("throttled")
        return super().cat_file(path, start, end, **options)

    def isdir(self, path):
        if "broken" in path:
            raise RuntimeError("no credentials")
        return super().isdir(path)


def test_storage_that_fails_now_and_then_is_asked_again(memory, monkeypatch, images):
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    monkeypatch.setattr(locations, "PAUSES_S", (0.0, 0.0))
    FlakyFileSystem.failures = 0
    source = open_source("flaky://set/tar/s-*.tar")
    FlakyFileSystem.failures = 2
    assert source.read(3) == images["0003"]
    FlakyFileSystem.failures = 3
    with pytest.raises(DataError, match=r"flaky:///set/tar/s-000.tar cannot be read: RuntimeError: throttled"):
        source.read(3)
    with pytest.raises(DataError, match=r"flaky://broken cannot be opened: RuntimeError: no credentials. Check"):
        open_source("flaky://broken")


# --- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_of_several_kinds_says_what_it_leaves_out(shards, caplog):
    (shards / "preview.png").write_bytes(png(0))
    np.save(shards / "a.npy", np.zeros((4, 4), np.uint8))
    assert len(open_source(shards)) == 1
    assert "3 .tar files are left out" in caplog.text
    assert "1 .npy files are left out" in caplog.text


def test_arrays_alone_are_images(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.zeros((4, 4), np.uint8))
    assert len(open_source(tmp_path)) == 3


# --- what a run remembers ------------------------------------------------------------------------------------------


def all_kinds(shards, tmp_path, images):
    photos = tmp_path / "photos"
    photos.mkdir()
    for key, data in images.items():
        (photos / f"{key}.png").write_bytes(data)
    write_parquet(tmp_path / "a.parquet", images)
    return {"folder": photos, "tar": shards, "parquet": tmp_path / "a.parquet"}


def test_the_same_data_elsewhere_have_the_same_fingerprint(shards, tmp_path, images):
    for name, place in all_kinds(shards, tmp_path, images).items():
        old = json.loads(json.dumps(fingerprint(open_source(place))))
        moved = tmp_path / "other" / name / place.name
        moved.parent.mkdir(parents=True)
        os.rename(place, moved)
        assert explain_change(old, fingerprint(open_source(moved))) is None
        assert old["images"] == 10


def test_a_changed_list_is_explained(tmp_path, images):
    for key, data in images.items():
        (tmp_path / f"{key}.png").write_bytes(data)
    old = fingerprint(open_source(tmp_path))
    (tmp_path / "0005.png").rename(tmp_path / "0005.jpg")
    assert "10 images as before, but of other names" in explain_change(old, fingerprint(open_source(tmp_path)))
    (tmp_path / "0005.jpg").unlink()
    (tmp_path / "0002.png").unlink()
    text = explain_change(old, fingerprint(open_source(tmp_path)))
    assert "it had 10 images and has 8, 2 fewer (number 3 was 0003.png and is 0004.png)" in text
    for i in range(5):
        (tmp_path / f"9{i}.png").write_bytes(png(i))
    assert "has 13, 3 more" in explain_change(old, fingerprint(open_source(tmp_path)))


def test_a_file_of_a_list_that_is_gone_changes_no_fingerprint(tmp_path, images):
    for key, data in images.items():
        (tmp_path / f"{key}.png").write_bytes(data)
    (tmp_path / "list.txt").write_text("\n".join(f"{k}.png" for k in images))
    old = fingerprint(open_source(tmp_path / "list.txt"))
    (tmp_path / "0003.png").unlink()
    assert explain_change(old, fingerprint(open_source(tmp_path / "list.txt"))) is None


def test_other_shards_of_the_same_images_are_another_list(shards):
    old = fingerprint(open_source(shards))
    files = [(f"{i:04}.png", png(i)) for i in range(10)]
    for path in shards.glob("*.tar"):
        path.unlink()
    write_tar(shards / "all.tar", files)
    assert explain_change(old, fingerprint(open_source(shards))) is not None
