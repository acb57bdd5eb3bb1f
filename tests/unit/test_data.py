# SPDX-License-Identifier: Apache-2.0
"""Batches are a pure function of (seed, step): whatever the workers, the resume and the broken files."""

import itertools
import os
import signal
import tarfile
import time

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from opendino.errors import ConfigError, DataError
from opendino.images.sources import open_source
from opendino.pretrain import data
from opendino.pretrain.crops import CropsConfig
from opendino.pretrain.data import MAX_TRIES, PretrainDataset, make_loader
from opendino.pretrain.order import StepSampler
from opendino.pretrain.photometric import apply_photometric
from opendino.pretrain.workers import explain_death, worker_deaths_explained

CROPS = CropsConfig(global_size=16, local_size=8, num_local=3)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


def batches(folder, count, **options):
    options = {"batch_size": 4, "seed": 3, "num_steps": count} | options
    return list(make_loader(open_source(folder), options.pop("crops", CROPS), **options))


def assert_same(a, b):
    assert torch.equal(a.global_crops, b.global_crops)
    assert torch.equal(a.indices, b.indices)
    assert_same_params(a.global_params, b.global_params)
    if a.local_crops is None:
        assert b.local_crops is b.local_params is a.local_params is None
        return
    assert torch.equal(a.local_crops, b.local_crops)
    assert_same_params(a.local_params, b.local_params)


def assert_same_params(one, two):
    for name, values in vars(one).items():
        np.testing.assert_array_equal(values, getattr(two, name))


def test_batch_has_the_documented_shapes_and_order(folder):
    (batch,) = batches(folder, 1)
    assert batch.global_crops.shape == (8, 3, 16, 16)
    assert batch.local_crops.shape == (12, 3, 8, 8)
    assert batch.global_crops.dtype == batch.local_crops.dtype == torch.uint8
    assert batch.errors == ()
    dataset = PretrainDataset(open_source(folder), CROPS, seed=3)
    for i, request in enumerate(StepSampler(6, 4, 3).at(0)):
        sample = dataset[request]
        assert batch.indices[i] == sample.index == request[0]
        assert torch.equal(batch.global_crops[i::4], sample.global_crops)
        assert torch.equal(batch.local_crops[i::4], sample.local_crops)
        np.testing.assert_array_equal(batch.local_params.factors[i::4], sample.local_params.factors)
        np.testing.assert_array_equal(batch.global_params.sigma[i::4], sample.global_params.sigma)


def test_batch_goes_through_the_colour_operations(folder):
    (batch,) = batches(folder, 1)
    assert apply_photometric(batch.global_crops, batch.global_params, CROPS).shape == (8, 3, 16, 16)
    assert apply_photometric(batch.local_crops, batch.local_params, CROPS).isfinite().all()


def test_resume_and_cache_change_nothing(folder):
    straight = batches(folder, 4)
    resumed = batches(folder, 2) + batches(folder, 2, start_step=2, cache=True)
    for a, b in zip(straight, resumed, strict=True):
        assert_same(a, b)


def test_an_image_that_a_list_names_often_is_kept_once(folder, monkeypatch):
    read, decode = [], data.read_image

    def counted(path, **more):
        read.append(path)
        return decode(path, **more)

    monkeypatch.setattr(data, "read_image", counted)
    paths = [item.path for item in open_source(folder).items]
    (folder / "often.txt").write_text("".join(f"{path}\n" for path in paths * 3))
    dataset = PretrainDataset(open_source(folder / "often.txt"), CROPS, cache=True)
    dataset.__getitems__([(i, i) for i in range(3 * len(paths))])
    assert sorted(read) == sorted(paths)


@pytest.mark.parametrize("num_local", [0, 3])
def test_images_held_at_a_time_change_nothing(folder, monkeypatch, num_local):
    (folder / "1.png").write_bytes(b"broken")
    crops = CROPS.model_copy(update={"num_local": num_local})
    together = batches(folder, 2, crops=crops)
    assert together[0].errors or together[1].errors
    for held in (0, 4000):  # one image, and two or three
        monkeypatch.setattr(data, "HELD_BYTES", held)
        for a, b in zip(together, batches(folder, 2, crops=crops)):
            assert_same(a, b)
            assert a.errors == b.errors


def test_workers_change_nothing(folder):
    (folder / "0.png").write_bytes(b"broken")
    for a, b in zip(batches(folder, 3), batches(folder, 3, num_workers=2), strict=True):
        assert_same(a, b)
        assert a.errors == b.errors


def test_other_seeds_and_steps_give_other_crops(folder):
    first, second = batches(folder, 2)
    (other,) = batches(folder, 1, seed=4)
    assert not torch.equal(first.global_crops, second.global_crops)
    assert not torch.equal(first.global_crops, other.global_crops)


def test_epochs_are_permutations_without_repeats_in_a_batch():
    sampler = StepSampler(num_images=10, batch_size=3, seed=0, num_steps=6)
    steps = list(sampler)
    assert [c for step in steps for _, c in step] == list(range(18))
    epochs = [[i for step in steps[k : k + 3] for i, _ in step] for k in (0, 3)]
    assert all(len(set(e)) == 9 for e in epochs)
    assert epochs[0] != epochs[1]
    assert StepSampler(10, 3, 0).at(4) == steps[4]
    assert list(StepSampler(10, 3, 0, start_step=4, num_steps=2)) == steps[4:]
    assert len(list(itertools.islice(StepSampler(10, 3, 0), 50))) == 50


def test_unreadable_image_is_replaced_and_reported(folder):
    (folder / "2.png").write_bytes(b"no image at all")
    seen = batches(folder, 3, batch_size=6)
    for batch in seen:
        assert len(batch.errors) >= 1
        assert all(path.endswith("2.png") and reason for path, reason in batch.errors)
        assert 2 not in batch.indices
    for a, b in zip(seen, batches(folder, 3, batch_size=6), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_without_a_readable_image_stops(folder, workers):
    for path in folder.iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match=f"^{MAX_TRIES} images drawn") as caught:
        batches(folder, 1, num_workers=workers)
    assert "Traceback" not in str(caught.value)


def test_too_few_images_and_wrong_channels_are_refused(folder):
    with pytest.raises(DataError, match=r"6 images and a batch is 7"):
        batches(folder, 1, batch_size=7)
    with pytest.raises(ConfigError, match=r"3 values and the images 1 channels"):
        batches(folder, 1, channels=1)


def test_grey_images_and_no_local_crops(folder):
    crops = CROPS.model_copy(update={"num_local": 0, "mean": (0.5,), "std": (0.2,)})
    (batch,) = batches(folder, 1, crops=crops, channels=1)
    assert batch.global_crops.shape == (8, 1, 16, 16)
    assert batch.local_crops is None
    assert batch.local_params is None


# --- shards, processes, dying workers ------------------------------------------------------------------------------


@pytest.fixture
def kinds(folder, tmp_path_factory, monkeypatch):
    """The same six images as tar shards, Parquet, and both behind URLs."""
    root = tmp_path_factory.mktemp("kinds")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    fs = fsspec.filesystem("memory")
    files = sorted(folder.iterdir())
    for k in range(2):
        with tarfile.open(root / f"{k}.tar", "w") as tar:
            for path in files[3 * k : 3 * k + 3]:
                tar.add(path, path.name)
        fs.put_file(str(root / f"{k}.tar"), f"/kinds/{k}.tar")
    table = pa.table({"image": [{"bytes": p.read_bytes(), "path": p.name} for p in files]})
    pq.write_table(table, root / "a.parquet", row_group_size=3)
    fs.put_file(str(root / "a.parquet"), "/kinds/a.parquet")
    yield [f"{root}/*.tar", root / "a.parquet", "memory://kinds/{0..1}.tar", "memory://kinds/a.parquet"]
    fs.rm("/kinds", recursive=True)


def test_every_kind_of_source_gives_the_crops_of_the_folder(folder, kinds):
    (of_folder,) = batches(folder, 1, batch_size=6)
    for kind in kinds:
        dataset = PretrainDataset(open_source(kind), CROPS, seed=3)
        for counter, index in enumerate(of_folder.indices.tolist()):
            sample = dataset[index, counter]
            assert torch.equal(sample.global_crops, of_folder.global_crops[counter::6])
            assert torch.equal(sample.local_crops, of_folder.local_crops[counter::6])


def test_shards_of_all_kinds_give_one_sequence_of_batches(kinds):
    sequences = [batches(kind, 4, shuffle_buffer=4) for kind in kinds]
    sequences.append(batches(kinds[0], 4, shuffle_buffer=4, num_workers=2))
    sequences.append(batches(kinds[2], 4, shuffle_buffer=4, num_workers=1))
    sequences.append(batches(kinds[1], 4, shuffle_buffer=4, num_workers=2))
    sequences.append(batches(kinds[0], 1, shuffle_buffer=4) + batches(kinds[0], 3, shuffle_buffer=4, start_step=1))
    for other in sequences[1:]:
        for a, b in zip(sequences[0], other, strict=True):
            assert_same(a, b)
    assert not torch.equal(sequences[0][0].indices, batches(kinds[0], 1, shuffle_buffer=4, seed=4)[0].indices)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_give_the_batch_of_one(processes, folder, kinds):
    for place in (folder, kinds[0]):
        whole = batches(place, 3)
        parts = [batches(place, 3, shard=(r, processes), num_workers=r % 2) for r in range(processes)]
        for step, batch in enumerate(whole):
            for name, crops in (("global_crops", 2), ("local_crops", 3)):
                shape = (crops, 4 // processes, *getattr(batch, name).shape[1:])
                joined = torch.cat([getattr(p[step], name).view(shape) for p in parts], dim=1)
                assert torch.equal(joined.flatten(0, 1), getattr(batch, name))
            assert torch.equal(torch.cat([p[step].indices for p in parts]), batch.indices)


def test_files_and_shards_that_vanish_are_replaced_and_reported(folder, kinds):
    source = open_source(folder)
    (folder / "1.png").unlink()
    seen = list(make_loader(source, CROPS, batch_size=6, seed=3, num_steps=2))
    assert all("1.png" in b.errors[0][0] and 1 not in b.indices for b in seen)
    shards = open_source(kinds[0])
    os.unlink(shards.paths[1])
    for batch in make_loader(shards, CROPS, batch_size=6, seed=3, num_steps=2):
        assert set(batch.indices.tolist()) <= {0, 1, 2}
        assert sum(f"1.tar/{i}.png" in path for path, _ in batch.errors for i in (3, 4, 5)) >= 3
    remote = open_source(kinds[2])
    fsspec.filesystem("memory").rm("/kinds/0.tar")
    (batch,) = make_loader(remote, CROPS, batch_size=6, seed=3, num_steps=1)
    assert set(batch.indices.tolist()) <= {3, 4, 5}
    fsspec.filesystem("memory").touch("/kinds/0.tar")


def test_a_worker_that_is_killed_ends_in_one_paragraph(folder):
    loader = make_loader(open_source(folder), CROPS, batch_size=4, num_workers=1)
    before = set(torch.multiprocessing.active_children())
    next(loader)
    (worker,) = set(torch.multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGKILL)

    @worker_deaths_explained()
    def go_on():
        for _ in range(100):
            next(loader)
            time.sleep(0.05)

    with pytest.raises(
        DataError, match=rf"\(pid {worker.pid}\) died \((Killed|exited)\).*lower --num-workers"
    ) as caught:
        go_on()
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_deaths_and_other_errors():
    text = (
        "DataLoader worker (pid 77) is killed by signal: Bus error. It is possible that dataloader's workers are out of"
    )
    assert "shared memory in /dev/shm is full" in explain_death(text)
    assert "pid 5) died (exited)" in explain_death("DataLoader worker (pid(s) 5) exited unexpectedly")
    with pytest.raises(RuntimeError, match="^another"), worker_deaths_explained():
        raise RuntimeError("another")


# --- many channels and 16 bits -------------------------------------------------------------------------------------


def many_channels(folder, dtype, channels=5):
    rng = np.random.default_rng(0)
    top = np.iinfo(dtype).max
    for i in range(4):
        small = rng.integers(0, top, (4, 5, channels)).astype(np.float32)
        smooth = torch.nn.functional.interpolate(
            torch.from_numpy(small).permute(2, 0, 1)[None], (30 + i, 40), mode="bilinear"
        )[0]
        np.save(folder / f"{i}.npy", smooth.permute(1, 2, 0).numpy().astype(dtype))
    return CROPS.model_copy(update={"mean": (0.5,) * channels, "std": (0.2,) * channels})


def test_sixteen_bits_make_the_crops_of_eight_bits_without_rounding(tmp_path):
    crops = many_channels(tmp_path, np.uint8)
    eight = batches(tmp_path, 2, crops=crops, channels=5)
    for path in tmp_path.iterdir():
        np.save(path, np.load(path).astype(np.uint16) * 257)
    sixteen = batches(tmp_path, 2, crops=crops, channels=5)
    for a, b in zip(eight, sixteen, strict=True):
        assert (a.global_crops.dtype, b.global_crops.dtype) == (torch.uint8, torch.float32)
        assert (a.global_crops - b.global_crops).abs().max() <= 1.1
        assert (a.local_crops - b.local_crops).abs().max() <= 1.1
        assert b.global_crops.min() >= 0
        assert b.global_crops.max() <= 255
        x = apply_photometric(a.global_crops, a.global_params, crops)
        y = apply_photometric(b.global_crops.clone(), b.global_params, crops)
        assert (x - y).abs().quantile(0.99) < 0.1


def test_values_that_eight_bits_do_not_hold_reach_the_batch(tmp_path):
    for i in range(2):
        np.save(tmp_path / f"{i}.npy", np.full((20, 20, 2), 1000 + i, np.uint16))
    crops = CROPS.model_copy(update={"mean": (0.5, 0.5), "std": (0.2, 0.2)})
    (batch,) = batches(tmp_path, 1, crops=crops, channels=2, batch_size=2)
    wanted = [1000 / 257] * 2 + [1001 / 257] * 2
    assert sorted(batch.global_crops.mean((1, 2, 3)).tolist()) == pytest.approx(wanted, rel=1e-5)


def test_a_batch_of_eight_and_sixteen_bits_is_floats(tmp_path):
    np.save(tmp_path / "0.npy", np.full((20, 20), 7, np.uint8))
    np.save(tmp_path / "1.npy", np.full((20, 20), 7 * 257, np.uint16))
    crops = CROPS.model_copy(update={"mean": (0.5,), "std": (0.2,)})
    (batch,) = batches(tmp_path, 1, crops=crops, channels=1, batch_size=2)
    assert batch.global_crops.dtype == batch.local_crops.dtype == torch.float32
    assert (batch.global_crops - 7).abs().max() < 1e-4


def test_an_image_of_other_channels_is_replaced_and_both_numbers_are_told(tmp_path):
    crops = many_channels(tmp_path, np.uint8)
    np.save(tmp_path / "2.npy", np.zeros((20, 20, 4), np.uint8))
    (batch,) = batches(tmp_path, 1, crops=crops, channels=5)
    ((path, reason), *_) = batch.errors
    assert path.endswith("2.npy")
    assert "4 channels; the model takes 5" in reason
