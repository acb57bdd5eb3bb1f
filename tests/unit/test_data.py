# SPDX-License-Identifier: Apache-2.0
"""Batches are a pure function of (seed, step): whatever the workers, the resume and the broken files."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from opendino.errors import ConfigError, DataError
from opendino.images.sources import open_source
from opendino.pretrain.crops import CropsConfig
from opendino.pretrain.data import MAX_TRIES, PretrainDataset, StepSampler, make_loader
from opendino.pretrain.photometric import apply_photometric

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
    assert torch.equal(a.local_crops, b.local_crops)
    assert torch.equal(a.indices, b.indices)
    for one, two in ((a.global_params, b.global_params), (a.local_params, b.local_params)):
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
