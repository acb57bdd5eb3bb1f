# SPDX-License-Identifier: Apache-2.0
"""Features on disk: columns, manifest, continuing after a kill, counting bad images."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from opendino.embed.embedder import Embedder
from opendino.embed.writer import embed_to_folder
from opendino.errors import ConfigError, DataError
from opendino.images.sources import open_source
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.vit import VisionTransformer


def tiny(seed=0) -> VisionTransformer:
    torch.manual_seed(seed)
    config = ViTConfig(img_size=14, patch_size=7, embed_dim=8, depth=1, num_heads=2)
    return VisionTransformer(config, PreprocessSpec(resize=14, crop=14)).eval()


def make_photos(folder, n):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:04d}.png")
    return folder


def rows(folder):
    return pa.concat_tables([pq.read_table(p) for p in sorted(folder.glob("part-*.parquet"))])


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos", 10)


def write(photos, out, *, seed=0, what=("cls", "mean", "patches"), **settings):
    embedder = Embedder(tiny(seed), batch_size=3, workers=0, what=what)
    return embed_to_folder(embedder, open_source(photos), out, **{"shard_rows": 4, **settings})


def test_columns_and_values(photos, tmp_path):
    (photos / "0003.png").write_bytes(b"no image")
    progress = write(photos, tmp_path / "out")
    table = rows(tmp_path / "out")
    assert (progress.count, progress.errors) == (10, 1)
    assert table.schema.field("cls").type == pa.list_(pa.float32(), 8)
    assert table.schema.field("patches").type == pa.list_(pa.float32(), 4 * 8)
    assert [os.path.basename(p) for p in table["path"].to_pylist()] == [f"{i:04d}.png" for i in range(10)]
    want = Embedder(tiny())(table["path"].to_pylist())
    for i, row in enumerate(table.to_pylist()):
        if i == 3:
            assert row["error"]
            assert row["cls"] is row["mean"] is row["patches"] is row["grid_h"] is None
        else:
            assert row["error"] is None
            assert (row["grid_h"], row["grid_w"]) == (2, 2)
            np.testing.assert_allclose(row["cls"], want.cls[i], atol=1e-5)
            np.testing.assert_allclose(row["patches"], want.patches[i].reshape(-1), atol=1e-5)
    assert table["sha256"].to_pylist() == want.hashes


def test_manifest_says_what_the_rows_are(photos, tmp_path):
    write(photos, tmp_path / "out", what=("cls",), model_name="tiny")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["config"]["embed_dim"] == 8
    assert {k: manifest[k] for k in ("model", "what", "count", "errors", "done", "dim")} == {
        "model": "tiny", "what": ["cls"], "count": 10, "errors": 0, "done": True, "dim": 8,
    }  # fmt: skip
    assert "mean" not in rows(tmp_path / "out").column_names


def test_a_second_run_adds_only_new_images(photos, tmp_path):
    write(photos, tmp_path / "out")
    before = sorted(p.name for p in (tmp_path / "out").glob("part-*"))
    write(photos, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("part-*")) == before
    Image.new("RGB", (20, 20)).save(photos / "new.png")
    assert write(photos, tmp_path / "out").count == 11
    paths = rows(tmp_path / "out")["path"].to_pylist()
    assert len(paths) == len(set(paths)) == 11


def test_a_path_listed_twice_has_two_rows(photos, tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_text("\n".join(str(photos / f"000{i}.png") for i in (0, 1, 0)))
    for _ in range(2):
        write(listing, tmp_path / "out")
        assert [os.path.basename(p)[3] for p in rows(tmp_path / "out")["path"].to_pylist()] == ["0", "1", "0"]


@pytest.mark.parametrize("change", [{"seed": 1}, {"what": ("cls",)}])
def test_another_model_or_setting_is_refused(photos, tmp_path, change):
    write(photos, tmp_path / "out")
    with pytest.raises(ConfigError, match="weights_sha256" if "seed" in change else "what:"):
        write(photos, tmp_path / "out", **change)
    assert len(rows(tmp_path / "out")) == 10


def test_another_input_is_refused(photos, tmp_path):
    write(photos, tmp_path / "out")
    with pytest.raises(ConfigError, match="input"):
        write(make_photos(tmp_path / "others", 2), tmp_path / "out")


def test_too_many_errors_stop_the_run_and_keep_what_was_done(photos, tmp_path):
    for i in (1, 2, 7):
        (photos / f"000{i}.png").write_bytes(b"no image")
    assert write(photos, tmp_path / "fine", max_errors=3).errors == 3
    with pytest.raises(DataError, match=r"3 images cannot be read, more than --max-errors 2.*0007\.png"):
        write(photos, tmp_path / "out", max_errors=2)
    assert not json.loads((tmp_path / "out" / "manifest.json").read_text())["done"]
    assert write(photos, tmp_path / "out").count == 10
    assert len(rows(tmp_path / "out")) == 10


def test_leftovers_of_a_killed_run_are_removed(photos, tmp_path):
    write(photos, tmp_path / "out")
    (tmp_path / "out" / "part-00009.parquet.tmp").write_bytes(b"half")
    assert write(photos, tmp_path / "out").count == 10
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_two_writers_do_not_share_a_folder(photos, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr("opendino.embed.folder.LOCK_WAIT_S", 0.1)
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            write(photos, tmp_path / "out")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_and_started_again_every_image_has_one_row(tmp_path):
    from opendino.models.weights import save_backbone

    photos, out = make_photos(tmp_path / "photos", 160), tmp_path / "out"
    (photos / "0159.png").write_bytes(b"no image")
    save_backbone(tiny(), tmp_path / "model.safetensors")
    command = [
        sys.executable,
        "-m",
        "opendino.cli",
        "embed",
        str(photos),
        "--model",
        str(tmp_path / "model.safetensors"),
    ]
    command += ["--out", str(out), "--batch", "2", "--workers", "1", "--shard-rows", "4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(list(out.glob("part-*.parquet"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = len(rows(out))
    assert 0 < before < 160
    subprocess.run(command, check=True, capture_output=True)
    paths = rows(out)["path"].to_pylist()
    assert sorted(os.path.basename(p) for p in paths) == [f"{i:04d}.png" for i in range(160)]
    assert json.loads((out / "manifest.json").read_text())["done"]


@pytest.mark.parametrize("kind", ["tar", "parquet", "url"])
def test_shards_give_the_vectors_of_their_images_and_go_on(kind, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(photos, tmp_path / "wanted")
    files = sorted(photos.iterdir())
    if kind == "parquet":
        place = tmp_path / "a.parquet"
        pq.write_table(pa.table({"image": [p.read_bytes() for p in files]}), place, row_group_size=4)
    else:
        place = tmp_path / "a.tar"
        with tarfile.open(place, "w") as tar:
            for path in files:
                tar.add(path, path.name)
    if kind == "url":
        fsspec.filesystem("memory").put_file(str(place), "/writer/a.tar")
        place = Path("memory://writer/a.tar")  # as the command line gives it
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write(place, out, shard_rows=3, on_batch=interrupt_at(6))
    write(place, out)
    found, wanted = rows(out), rows(tmp_path / "wanted")
    assert found["sha256"].to_pylist() == wanted["sha256"].to_pylist()
    np.testing.assert_allclose(found["cls"].to_pylist(), wanted["cls"].to_pylist(), atol=1e-5)
    assert len(set(found["path"].to_pylist())) == 10
    assert all(
        p.startswith("memory://writer/a.tar/" if kind == "url" else f"{place}") for p in found["path"].to_pylist()
    )


def interrupt_at(count):
    def on_batch(rows, errors, total):
        if rows >= count:
            raise KeyboardInterrupt

    return on_batch


def test_sixteen_bit_images_of_many_channels_are_embedded(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(img_size=14, patch_size=7, embed_dim=8, depth=1, num_heads=2, in_chans=5)
    spec = PreprocessSpec(resize=14, crop=14, mean=(0.5,) * 5, std=(0.2,) * 5)
    model = VisionTransformer(config, spec).eval()
    array = np.random.default_rng(0).integers(0, 65536, (14, 14, 5), dtype=np.uint16)
    np.save(tmp_path / "a.npy", array)
    features = Embedder(model)([tmp_path / "a.npy"])
    assert features.errors == [None]
    x = (torch.from_numpy(np.moveaxis(array, 2, 0).astype(np.float32))[None] / 65535 - 0.5) / 0.2
    with torch.no_grad():
        np.testing.assert_allclose(features.cls, model(x).numpy(), atol=1e-4)
