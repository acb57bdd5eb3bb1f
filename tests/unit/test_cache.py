# SPDX-License-Identifier: Apache-2.0
"""Features are computed once per content, and a kill costs what was not yet written."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from opendino.embed.cache import FeatureStore, pooled_features
from opendino.embed.embedder import Embedder
from opendino.errors import DataError
from opendino.images.sources import open_source
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.vit import VisionTransformer


def embedder(seed=0, **settings):
    torch.manual_seed(seed)
    config = ViTConfig(img_size=28, embed_dim=16, depth=3, num_heads=2)
    model = VisionTransformer(config, PreprocessSpec(resize=32, crop=28)).eval()
    return Embedder(model, batch_size=2, layers=2, what=("cls", "mean"), workers=0, **settings)


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def counting(emb):
    """Count the images that reach the model."""
    seen = []
    inner = emb._vectors
    emb._vectors = lambda images, what: seen.append(len(images)) or inner(images, what)
    return seen


def test_cached_features_equal_computed_ones_and_are_computed_once(photos, tmp_path):
    emb, source = embedder(), open_source(photos)
    cls, mean, errors = pooled_features(emb, source, None)
    whole = emb([str(p) for p in sorted(photos.iterdir())])
    np.testing.assert_array_equal(cls.reshape(5, -1), whole.cls)
    np.testing.assert_array_equal(mean, whole.mean[:, -16:])
    assert errors == [None] * 5
    for expected in (5, 5):  # the second pass finds all
        seen = counting(emb) if expected else []
        got = pooled_features(emb, source, tmp_path / "store")
        np.testing.assert_array_equal(got[0], cls)
        np.testing.assert_array_equal(got[1], mean)
    assert sum(seen) == 0


def test_the_key_is_the_content(photos, tmp_path):
    emb, store = embedder(), tmp_path / "store"
    pooled_features(emb, open_source(photos), store)
    shutil.copytree(photos, tmp_path / "renamed")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "renamed" / "2.png")
    seen = counting(emb)
    pooled_features(emb, open_source(tmp_path / "renamed"), store)
    assert sum(seen) == 1, "only the picture that changed is new"
    for other in (embedder(seed=1), embedder(size=42), embedder(fit="resize"), embedder(precision="bf16")):
        seen = counting(other)
        pooled_features(other, open_source(photos), store)
        assert sum(seen) == 5


def test_goes_on_after_an_interruption(photos, tmp_path):
    emb, store = embedder(), tmp_path / "store"

    def stop(done, errors, total):
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pooled_features(emb, open_source(photos), store, stop)
    seen = counting(emb)
    cls, _, _ = pooled_features(emb, open_source(photos), store)
    assert sum(seen) == 3
    np.testing.assert_array_equal(cls, pooled_features(emb, open_source(photos), None)[0])


def test_unreadable_images_are_rows_of_nan_with_a_reason(photos, tmp_path):
    (photos / "1.png").write_bytes(b"no image")
    for root in (None, tmp_path / "store"):
        cls, mean, errors = pooled_features(embedder(), open_source(photos), root)
        assert np.isnan(cls[1]).all()
        assert np.isnan(mean[1]).all()
        assert np.isfinite(np.delete(cls, 1, axis=0)).all()
        assert errors[1]
        assert errors[0] is None


def test_a_damaged_part_is_named(tmp_path):
    store = FeatureStore(tmp_path, {"a": 1}, 3)
    store.add(["00" * 32], np.ones((1, 3)))
    store.flush()
    part = next(p for p in store.folder.glob("part-*.npy") if not p.name.endswith(".sha256.npy"))
    part.write_bytes(part.read_bytes()[:20])
    with pytest.raises(DataError, match=part.name):
        FeatureStore(tmp_path, {"a": 1}, 3)


def test_parts_of_another_process_are_used(tmp_path):
    one, two = (FeatureStore(tmp_path, {"a": 1}, 2, np.float16) for _ in range(2))
    one.add(["11" * 32], np.array([[1, 2]]))
    one.flush()
    two.add(["22" * 32], np.array([[3, 4]]))
    two.flush()
    np.testing.assert_array_equal(two.rows(["22" * 32, "11" * 32]), [[3, 4], [1, 2]])
    assert two.rows(["11" * 32]).dtype == np.float16
