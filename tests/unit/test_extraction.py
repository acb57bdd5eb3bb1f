# SPDX-License-Identifier: Apache-2.0
"""Order, ranges, folders, several processes and checks of an extraction."""

import importlib.util
import json
import os
import shutil
import signal
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opendino.cli import main
from opendino.embed.embedder import Embedder
from opendino.embed.folder import open_folder
from opendino.embed.job import Job
from opendino.embed.order import unmatched
from opendino.embed.pool import embed_with_processes
from opendino.embed.resume import describe, write_manifest
from opendino.embed.shards import Shard, cut, list_shards, missing_ranges, step_for
from opendino.embed.writer import embed_to_folder, to_table
from opendino.errors import ConfigError, DataError, MissingExtraError
from opendino.images import locations
from opendino.images.sources import open_source
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone


def tiny(seed=0) -> VisionTransformer:
    torch.manual_seed(seed)
    config = ViTConfig(img_size=14, patch_size=7, embed_dim=8, depth=1, num_heads=2)
    return VisionTransformer(config, PreprocessSpec(resize=14, crop=14)).eval()


def picture(path, seed):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(10):
        picture(folder / f"{i:04d}.png", i)
    return folder


@pytest.fixture
def model(tmp_path):
    save_backbone(tiny(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def write(source, out, *, seed=0, what=("cls",), batch=2, **more):
    embedder = Embedder(tiny(seed), batch_size=batch, workers=0, what=what)
    return embed_to_folder(embedder, open_source(source), out, **{"shard_rows": 4, **more})


def rows(folder):
    return pa.concat_tables([pq.read_table(p) for p in sorted(Path(folder).glob("part-*.parquet"))])


def names(folder):
    return [os.path.basename(p) for p in rows(folder)["path"].to_pylist()]


def ranges(folder):
    return [(s.first, s.end) for s in list_shards(open_folder(folder))[0]]


# --- ranges --------------------------------------------------------------------------------------------------------

spans = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=8)


@given(spans, st.integers(0, 20), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_missing_ranges_are_the_places_that_no_shard_has(found, first, length):
    shards = sorted(Shard(a, a + n, 0, "0" * 16) for a, n in found)
    covered = {p for s in shards for p in range(s.first, s.end)}
    missing = missing_ranges(shards, first, first + length)
    assert [p for a, b in missing for p in range(a, b)] == [p for p in range(first, first + length) if p not in covered]
    assert all(a < b for a, b in missing)


def test_pieces_end_at_whole_batches_whoever_takes_them():
    assert list(cut([(0, 9), (20, 23)], 4)) == [(0, 4), (4, 8), (8, 9), (20, 23)]
    assert list(cut([(3, 9)], 4)) == [(3, 4), (4, 8), (8, 9)]
    assert step_for([(0, 1000)], 4096, 32, 2) == 128  # four pieces each
    assert step_for([(0, 10**6)], 4096, 30, 2) == 4110  # full shards of whole batches
    assert step_for([], 4096, 32, 2) == 32


@given(st.lists(st.integers(0, 5), max_size=12), st.lists(st.integers(0, 5), max_size=12))
@settings(max_examples=100, deadline=None)
def test_what_has_no_row_is_found_as_a_slow_loop_finds_it(have, want):
    def packed(values):
        return np.array([[v // 2, v] for v in values], np.uint64).reshape(-1, 2)

    left, slow = list(have), []
    for place, value in enumerate(want):
        if value in left:
            left.remove(value)
        else:
            slow.append(place)
    assert unmatched(packed(have), packed(want)).tolist() == slow


def test_a_shard_says_in_its_name_what_it_holds(photos, tmp_path):
    (photos / "0005.png").write_bytes(b"no image")
    write(photos, tmp_path / "out")
    assert ranges(tmp_path / "out") == [(0, 4), (4, 8), (8, 10)]
    for shard in list_shards(open_folder(tmp_path / "out"))[0]:
        assert Shard.of(shard.name) == shard
        assert shard.digest == open_folder(tmp_path / "out").digest(shard.name)
        assert shard.errors == (shard.first == 4)
    assert names(tmp_path / "out") == [f"{i:04d}.png" for i in range(10)]


def test_shards_that_repeat_rows_are_removed_and_gaps_filled(photos, tmp_path):
    out = tmp_path / "out"
    write(photos, out)
    before = rows(out)
    shards = list_shards(open_folder(out))[0]
    # As a worker leaves them that was thought dead: the same range twice, and one across two others.
    shutil.copy(out / shards[0].name, out / Shard(0, 4, 0, "f" * 16).name)
    pq.write_table(before.slice(2, 4), out / Shard(2, 6, 0, "e" * 16).name)
    (out / shards[1].name).unlink()
    write(photos, out)
    assert rows(out).equals(before)
    assert ranges(out) == [(0, 4), (4, 8), (8, 10)]


# --- input that changes --------------------------------------------------------------------------------------------


def test_new_images_come_last_however_often_the_input_changes(photos, tmp_path, caplog):
    out = tmp_path / "out"
    write(photos, out)
    picture(photos / "0000b.png", 20)
    picture(photos / "zz.png", 21)
    with pytest.raises(KeyboardInterrupt):
        write(photos, out, batch=1, shard_rows=1, on_batch=interrupt_at(11))
    assert "has changed since" in caplog.text
    picture(photos / "0001b.png", 22)
    assert write(photos, out).count == 13
    assert names(out) == [f"{i:04d}.png" for i in range(10)] + ["0000b.png", "0001b.png", "zz.png"]
    shutil.rmtree(photos / "none", ignore_errors=True)
    (photos / "0003.png").unlink()  # its row stays
    assert write(photos, out).count == 13
    assert write(photos, out).count == 13
    assert len(json.loads((out / "manifest.json").read_text())["inputs"]) == 4


def test_a_shard_that_is_gone_is_redone_also_after_the_input_changed(photos, tmp_path):
    out = tmp_path / "out"
    write(photos, out)
    picture(photos / "zz.png", 21)
    write(photos, out)
    before = sorted(rows(out).to_pylist(), key=lambda row: row["path"])
    (out / list_shards(open_folder(out))[0][1].name).unlink()
    write(photos, out)
    assert sorted(rows(out).to_pylist(), key=lambda row: row["path"]) == before


def interrupt_at(count):
    def on_batch(rows, errors, total):
        if rows >= count:
            raise KeyboardInterrupt

    return on_batch


def write_first_layout(photos, out, count):
    """As versions before this layout wrote a folder: numbered shards, rows in the order of the input."""
    out.mkdir()
    embedder = Embedder(tiny(), batch_size=2, workers=0, what=("cls",))
    files = sorted(photos.iterdir())[:count]
    for number in range(0, count, 4):
        table = to_table(embedder([str(p) for p in files[number : number + 4]]))
        pq.write_table(table, out / f"part-{number // 4:05d}.parquet", use_dictionary=False)
    manifest = describe(embedder, "tiny", str(photos)) | {"count": count, "errors": 0, "done": False}
    (out / "manifest.json").write_text(json.dumps(manifest))


def test_a_folder_of_the_first_layout_is_continued_and_checked(photos, tmp_path, model, capsys):
    out = tmp_path / "out"
    write_first_layout(photos, out, 6)
    for _ in range(2):
        assert write(photos, out, model_name=str(model)).count == 10
        assert sorted(names(out)) == [f"{i:04d}.png" for i in range(10)]
    assert ranges(out) == [(6, 10)]
    code, verdict = verify(out, capsys)
    assert (code, verdict["troubles"], verdict["rows"], verdict["sampled"]) == (0, [], 10, 10)


def test_a_newer_layout_is_refused(photos, tmp_path):
    write(photos, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | {"layout": 9}))
    with pytest.raises(ConfigError, match="layout 9"):
        write(photos, tmp_path / "out")


# --- columns -------------------------------------------------------------------------------------------------------


def test_half_precision_is_stored_and_too_large_values_are_refused(photos, tmp_path):
    write(photos, tmp_path / "whole", what=("cls", "patches"))
    write(photos, tmp_path / "half", what=("cls", "patches"), dtype="float16")
    table = rows(tmp_path / "half")
    assert table.schema.field("cls").type == pa.list_(pa.float16(), 8)
    want = np.array(rows(tmp_path / "whole")["patches"].to_pylist(), np.float32).astype(np.float16)
    assert np.array_equal(np.array(table["patches"].to_pylist(), np.float16), want)
    with pytest.raises(ConfigError, match="dtype"):
        write(photos, tmp_path / "half")
    large = Embedder(tiny(), what=("cls",))([str(photos / "0000.png")])
    large.cls[0, 0] = 1e5
    with pytest.raises(DataError, match=r"1e\+05, too large for float16"):
        to_table(large, "float16")


def test_vectors_that_are_no_numbers_are_errors(photos, tmp_path):
    embedder = Embedder(tiny(), batch_size=4, workers=0, what=("cls",))
    with torch.no_grad():
        embedder.model.norm.weight[0] = float("nan")
    assert embed_to_folder(embedder, open_source(photos), tmp_path / "out").errors == 10
    assert set(rows(tmp_path / "out")["error"].to_pylist()) == {"the model's vectors for it are not finite numbers"}
    assert rows(tmp_path / "out")["cls"].null_count == 10


def test_names_that_are_no_utf8_have_rows(photos, tmp_path):
    try:
        picture(os.fsdecode(os.fsencode(photos) + b"/caf\xe9.png"), 3)
    except OSError:
        pytest.skip("this file system wants UTF-8")
    for _ in range(2):
        assert write(photos, tmp_path / "out").errors == 0
    assert "caf\\xe9.png" in names(tmp_path / "out")


def test_unreadable_images_are_listed_in_a_table(photos, tmp_path):
    (photos / "0002.png").write_bytes(b"no image")
    (photos / '0003,"x.png').write_bytes(b"")
    progress = write(photos, tmp_path / "out")
    table = pa.csv.read_csv(tmp_path / "out" / "errors.csv").to_pylist() if hasattr(pa, "csv") else read_csv(tmp_path)
    assert [os.path.basename(r["path"]) for r in table] == ["0002.png", '0003,"x.png']
    assert all(r["error"] for r in table)
    assert [p for p, _ in progress.examples] == [r["path"] for r in table]


def read_csv(tmp_path):
    import csv

    with open(tmp_path / "out" / "errors.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- where it goes -------------------------------------------------------------------------------------------------


def test_a_url_takes_features_and_goes_on(photos, tmp_path):
    write(photos, tmp_path / "out")
    place = "memory://extraction/out"
    with pytest.raises(KeyboardInterrupt):
        write(photos, place, on_batch=interrupt_at(4))
    write(photos, place)
    there = fsspec.filesystem("memory")
    found = sorted(p.rsplit("/", 1)[1] for p in there.find("/extraction/out"))
    assert found == sorted(p.name for p in (tmp_path / "out").iterdir() if p.name != ".lock")
    for name in found:
        if name.startswith("part-"):
            assert there.cat_file(f"/extraction/out/{name}") == (tmp_path / "out" / name).read_bytes()
    assert main(["embed", "--verify", place, "--sample", "0"]) == 0


def test_a_folder_that_cannot_be_made_is_told(photos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        write(photos, tmp_path / "file" / "out")


def test_a_full_disk_is_told_and_loses_nothing_that_was_written(photos, tmp_path):
    resource = pytest.importorskip("resource")
    write(photos, tmp_path / "wanted", what=("cls", "patches"))
    largest = max(p.stat().st_size for p in (tmp_path / "wanted").glob("part-*"))
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, limits[1]))
        with pytest.raises(DataError, match=r"cannot be written: .*File too large"):
            write(photos, tmp_path / "out", what=("cls", "patches"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not list((tmp_path / "out").glob("*.tmp"))
    write(photos, tmp_path / "out", what=("cls", "patches"))
    assert rows(tmp_path / "out").equals(rows(tmp_path / "wanted"))


# --- several processes ---------------------------------------------------------------------------------------------


def job(photos, model, out, **more):
    embedder = {"batch_size": 2, "what": ["cls"], "device": "cpu", "workers": 1}
    return Job(str(photos), str(model), str(out), embedder=embedder, shard_rows=4, **more)


def test_two_processes_write_what_one_writes_and_go_on(photos, tmp_path, model):
    write(photos, tmp_path / "one", model_name=str(model))
    (photos / "zz.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="more than --max-errors 0"):
        embed_with_processes(job(photos, model, tmp_path / "two", max_errors=0), 2)
    assert (tmp_path / "two" / "errors.csv").read_text().count("zz.png") >= 1
    seen = []
    progress = embed_with_processes(job(photos, model, tmp_path / "two"), 2, lambda *figures: seen.append(figures))
    assert (progress.count, progress.errors, seen[-1]) == (11, 1, (11, 1, 11))
    assert rows(tmp_path / "two")["cls"].to_pylist()[:10] == rows(tmp_path / "one")["cls"].to_pylist()


def test_what_a_process_finds_wrong_is_told_as_by_one(photos, tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.pth"):
        embed_with_processes(job(photos, tmp_path / "nothing.pth", tmp_path / "out"), 2)


def test_ray_is_an_extra(photos, tmp_path, model):
    from opendino.embed.ray_backend import embed_with_ray

    if importlib.util.find_spec("ray"):
        pytest.skip("it is installed")
    with pytest.raises(MissingExtraError, match=r"opendino\[ray\]"):
        embed_with_ray(job(photos, model, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_actors_answer_for_ranges_and_refuse_after_the_end(photos, tmp_path, model):
    """The actor without Ray: it is a plain class."""
    from opendino.embed.ray_backend import TOKEN, RangeWriter

    write(photos, tmp_path / "one", model_name=str(model))
    wanted = rows(tmp_path / "one")
    out = tmp_path / "out"
    write(photos, out, model_name=str(model))
    for shard in list_shards(open_folder(out))[0][1:]:
        (out / shard.name).unlink()
    (out / TOKEN).write_text("this run")
    about = RangeWriter(job(photos, model, out).json(), "this run").describe()
    state = json.loads((out / "manifest.json").read_text())["inputs"][-1]
    plan = {"settings": about["settings"], "state": state, "step": 4}
    actor = RangeWriter(job(photos, model, out).json(), "this run", plan)
    answer = actor({"first": np.array([0, 4]), "end": np.array([4, 8])})  # the first range is on the disk
    assert (answer["rows"][0], answer["errors"][0], answer["problem"][0]) == (8, 0, "")
    assert ranges(out) == [(0, 4), (4, 8)]
    (out / TOKEN).unlink()
    answer = actor({"first": np.array([8]), "end": np.array([10])})
    assert "not the folder of this run" in answer["problem"][0]
    assert ranges(out) == [(0, 4), (4, 8)]
    assert not list(out.glob("*.tmp"))
    assert rows(out).equals(wanted.slice(0, 8))


# --- verify --------------------------------------------------------------------------------------------------------


def verify(out, capsys, *extra):
    capsys.readouterr()
    code = main(["embed", "--verify", str(out), "--json", "--device", "cpu", *extra])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def finished(photos, tmp_path, model):
    (photos / "0007.png").write_bytes(b"no image")
    write(photos, tmp_path / "out", what=("cls", "patches"), model_name=str(model))
    return tmp_path / "out"


def test_a_whole_folder_is_found_well(finished, capsys):
    code, verdict = verify(finished, capsys)
    assert (code, verdict["ok"], verdict["troubles"], verdict["notes"]) == (0, True, [], [])
    assert {k: verdict[k] for k in ("rows", "errors", "shards", "sampled")} == {
        "rows": 10, "errors": 1, "shards": 3, "sampled": 10,
    }  # fmt: skip
    assert verdict["largest_difference"] < 1e-5


def replace_shard(out, number, change):
    """Write a shard anew with other rows, and a name that fits its bytes."""
    shard = list_shards(open_folder(out))[0][number]
    table = change(pq.read_table(out / shard.name))
    (out / shard.name).unlink()
    open_folder(out).put(
        lambda file: pq.write_table(table, file, use_dictionary=False),
        lambda digest: Shard(shard.first, shard.end, shard.errors, digest).name,
    )


def set_cell(table, column, row, value):
    values = table[column].to_pylist()
    values[row] = value
    return table.set_column(
        table.column_names.index(column), table.schema.field(column), pa.array(values, table.schema.field(column).type)
    )


def flip(out):
    path = out / list_shards(open_folder(out))[0][1].name
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


TROUBLES = {
    "a deleted shard": (lambda out: (out / list_shards(open_folder(out))[0][1].name).unlink(), "is gone"),
    "a flipped byte": (flip, "is damaged"),
    "a missing row": (lambda out: replace_shard(out, 0, lambda t: t.slice(1)), "has 3 rows, 0 without vectors; its"),
    "a row twice": (
        lambda out: replace_shard(out, 0, lambda t: pa.concat_tables([t.slice(0, 3), t.slice(0, 1)])),
        "1 rows are not of the image at their place",
    ),
    "an empty vector": (lambda out: replace_shard(out, 0, lambda t: set_cell(t, "cls", 2, None)), "without an error"),
    "no number": (
        lambda out: replace_shard(out, 0, lambda t: set_cell(t, "patches", 2, [float("nan")] * 32)),
        "1 rows whose patches is empty or not finite",
    ),
    "another vector": (lambda out: replace_shard(out, 0, lambda t: set_cell(t, "cls", 2, [1.0] * 8)), "not what the"),
    "another width": (lambda out: replace_shard(out, 0, lambda t: t.drop_columns(["cls"])), "has cls as None"),
    "a changed image": (lambda out: picture(out.parent / "photos" / "0004.png", 77), "has changed since"),
    "a new image": (lambda out: picture(out.parent / "photos" / "0004b.png", 77), "has 11 images, and had 10"),
    "an image that is gone": (lambda out: (out.parent / "photos" / "0004.png").unlink(), "that the input has not"),
    "an input that is gone": (lambda out: shutil.rmtree(out.parent / "photos"), "input cannot be opened"),
    "another model": (lambda out: save_backbone(tiny(1), out.parent / "model.safetensors"), "are not those that made"),
    "a model that is gone": (lambda out: (out.parent / "model.safetensors").unlink(), "No row was computed again"),
    "a shard too many": (
        lambda out: shutil.copy(out / list_shards(open_folder(out))[0][0].name, out / Shard(0, 4, 0, "f" * 16).name),
        "repeats rows of others",
    ),
}


@pytest.mark.parametrize("what", TROUBLES)
def test_trouble_is_found(what, finished, capsys):
    harm, words = TROUBLES[what]
    harm(finished)
    code, verdict = verify(finished, capsys)
    assert (code, verdict["ok"]) == (1, False)
    assert words in " ".join(verdict["troubles"])


@pytest.mark.parametrize("what", ["a deleted shard", "a new image"])
def test_the_same_command_mends_what_it_can(what, finished, photos, model, capsys):
    TROUBLES[what][0](finished)
    write(photos, finished, what=("cls", "patches"), model_name=str(model))
    assert verify(finished, capsys)[1]["troubles"] == []


def test_an_unfinished_folder_is_told(photos, tmp_path, model, capsys):
    with pytest.raises(KeyboardInterrupt):
        write(photos, tmp_path / "out", model_name=str(model), on_batch=interrupt_at(6))
    code, verdict = verify(tmp_path / "out", capsys, "--sample", "0")
    assert code == 1
    assert "It is not finished" in verdict["troubles"][0]


def test_duplicates_and_missing_files_are_rows_and_well(photos, tmp_path, model, capsys):
    listing = tmp_path / "list.txt"
    listing.write_text("".join(f"photos/{n}.png\n" for n in ("0001", "0002", "0001", "none", "0001")))
    write(listing, tmp_path / "out", model_name=str(model))
    assert names(tmp_path / "out") == ["0001.png", "0002.png", "0001.png", "none.png", "0001.png"]
    code, verdict = verify(tmp_path / "out", capsys)
    assert (code, verdict["rows"], verdict["errors"]) == (0, 5, 1)


def test_the_command_line_says_what_is_wrong(finished, tmp_path, capsys):
    flip(finished)
    assert main(["embed", "--verify", str(finished), "--sample", "0"]) == 1
    text = capsys.readouterr().out
    assert "is damaged" in text
    assert "Delete it and run the same command to redo its 4 rows" in text
    assert main(["embed", "--verify", str(tmp_path)]) == 1
    assert "has no manifest.json" in capsys.readouterr().err
    words = ["embed", "x", "--model", "m", "--out", "o"]
    assert main([*words, "--nproc", "0"]) == 2
    assert main([*words, "--address", "auto"]) == 2


def test_the_manifest_lists_the_shards_when_all_is_done(finished):
    manifest = json.loads((finished / "manifest.json").read_text())
    assert [(e["file"], e["rows"], e["sha256"]) for e in manifest["shards"]] == [
        (s.name, s.end - s.first, s.digest) for s in list_shards(open_folder(finished))[0]
    ]
    assert (manifest["layout"], manifest["dtype"], manifest["done"]) == (2, "float32", True)
    write_manifest(open_folder(finished), {})
    assert not list(finished.glob("*.tmp"))


def test_files_are_listed_in_the_order_of_their_parts(tmp_path):
    for name in ("b/2.png", "b.png", "a/z/1.png", "a/0.png", "a-b/1.png", "a.png", ".hidden/1.png", "b/.x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "c.png").symlink_to(tmp_path / "a.png")
    found = list(locations.walk(str(tmp_path)))
    assert found == sorted(found, key=lambda n: n.split("/"))
    assert found == ["a/0.png", "a/z/1.png", "a-b/1.png", "a.png", "b/2.png", "b.png", "c.png"]
